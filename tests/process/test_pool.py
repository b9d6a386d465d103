"""The pool of libhearth over daemons that end and come back."""
import os
import re
import resource
import signal
import subprocess

from lib.harness import BUILD, ROOT, Skip, expect, test, wait_for
from lib.models import made_model
from lib.wire import Client, text_of

CONFIG = "drain_timeout: 100ms\n"


def telling(t, d, times, pause_bytes):
    """A pool-client that has come to its pause."""
    client = t.start("pool-client", d.socket, "made", times, pause_bytes, stdin=subprocess.PIPE,
                     stdout=subprocess.PIPE)
    if pause_bytes:
        expect(client.stdout.readline() == b"paused\n", "it did not come to its pause")
    return client


def go_on(client):
    client.stdin.write(b"\n")
    client.stdin.flush()


def story(client):
    """How the next request ends: (word, seed, failovers, connections created, text)."""
    line = client.stdout.readline().decode()
    match = re.fullmatch(r"end (\S+) bytes (\d+) seed (\d+) failovers (\d+) created (\d+)\n", line)
    expect(match, f"no end, but {line!r}")
    text = client.stdout.read(int(match[2]))
    client.stdout.readline()
    return match[1], int(match[3]), int(match[4]), int(match[5]), text.decode()


def start_again(t, d):
    """The same daemon once more; the pool looks for it until it is there."""
    return t.start(*d.process.args)


def ready(d):
    """Until the daemon started again answers."""
    def answers():
        try:
            with Client(d.socket) as c:
                return c.ask("NULL")
        except OSError:
            return None
    wait_for(answers, "the daemon's return")


def stop(process):
    process.send_signal(signal.SIGTERM)
    expect(process.wait(20) == 0, "no good end")


def told_at_once(socket, seed):
    """The same request over one connection."""
    with Client(socket) as c:
        return text_of(c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"),
                             ("MAX_TOKENS", 600), ("IGNORE_EOS", 1), ("TEMPERATURE", 1.0),
                             ("SEED", seed)))


def goes_on_after(t, end):
    """A daemon ends in the middle of a stream, another takes over: not a byte is lost or doubled."""
    d = t.daemon(models=[made_model(t)], config=CONFIG)
    client = telling(t, d, 1, 100)
    end(d)
    again = start_again(t, d)
    go_on(client)
    word, seed, failovers, created, text = story(client)
    expect(word == "length" and failovers == 1 and created == 2,
           f"{word}, {failovers} failovers, {created} connections")
    expect(client.wait(20) == 0, "the client failed")
    expect(text == told_at_once(d.socket, seed), "another text than over one connection")
    stop(again)


@test
def a_stream_goes_on_after_a_restart(t):
    goes_on_after(t, lambda d: d.stop())


@test
def a_stream_goes_on_after_a_kill(t):
    goes_on_after(t, lambda d: d.kill())


@test
def a_stream_waits_for_the_daemon_to_come_back(t):
    d = t.daemon(models=[made_model(t)], config=CONFIG)
    client = telling(t, d, 1, 100)
    d.stop()
    go_on(client)  # nobody is there now
    again = start_again(t, d)
    word, seed, failovers, _, text = story(client)
    expect(word == "length" and failovers == 1, f"{word}, {failovers} failovers")
    expect(text == told_at_once(d.socket, seed), "another text than over one connection")
    stop(again)


@test
def a_stream_whose_model_has_changed_ends(t):
    path = made_model(t)
    d = t.daemon(models=[path], config=CONFIG)
    client = telling(t, d, 1, 100)
    d.stop()
    os.utime(path, ns=(1, 1))  # another file, as far as anybody can tell
    again = start_again(t, d)
    go_on(client)
    word, _, failovers, _, text = story(client)
    expect(word == "shutting-down" and failovers == 1, f"{word}, {failovers} failovers")
    expect(100 <= len(text.encode()) <= 600, f"{len(text)} characters")
    stop(again)


@test
def idle_connections_of_a_daemon_that_was_restarted_are_replaced(t):
    d = t.daemon(models=[made_model(t)], config=CONFIG)
    client = telling(t, d, 3, 0)
    expect(story(client)[:4:2] == ("length", 0), "the first request")
    for created in (2, 2):
        expect(client.stdout.readline() == b"paused\n", "it did not come to its pause")
        if d.process.poll() is None:
            d.stop()
            again = start_again(t, d)
            ready(d)
        go_on(client)
        word, _, failovers, now, _ = story(client)
        expect((word, failovers, now) == ("length", 0, created), f"{word} {failovers} {now}")
    stop(again)


@test
def a_request_waits_for_a_daemon_that_went_while_its_connection_was_idle(t):
    d = t.daemon(models=[made_model(t)], config=CONFIG)
    client = telling(t, d, 3, 0)
    expect(story(client)[:4:2] == ("length", 0), "the first request")
    process = d.process
    for created, end in ((2, signal.SIGTERM), (3, signal.SIGKILL)):
        expect(client.stdout.readline() == b"paused\n", "it did not come to its pause")
        process.send_signal(end)  # its socket is gone, or stays behind
        process.wait(20)
        go_on(client)  # nobody is there now
        process = start_again(t, d)
        word, _, failovers, now, _ = story(client)
        expect((word, failovers, now) == ("length", 0, created), f"{word} {failovers} {now}")
    stop(process)


def need_plain_build():
    symbols = (BUILD / "lib" / "libhearth.a").read_bytes()
    if any(word in symbols for word in (b"__asan", b"__tsan", b"__gcov")):
        raise Skip("the build is instrumented")


@test
def the_documents_example_runs(t):
    compiler = t.need_program("cc")
    text = (ROOT / "docs" / "connection-pooling.md").read_text(encoding="utf-8")
    source = t.write("story.c", re.search(r"^```c\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1])
    named = re.search(r"pkg-config --cflags --libs (\S+)\)", text)[1]
    expect((BUILD / "meson-private" / f"{named}.pc").exists(), f"pkg-config knows no {named}")
    need_plain_build()
    t.run(compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "lib", "-o",
          t.dir / "story", source, BUILD / "lib" / "libhearth.a", "-lpthread")
    d = t.daemon()
    r = t.run(t.dir / "story", env={"HEARTH_SOCKET": str(d.socket)})
    expect(r.out.splitlines()[-1] == "acquired 3 created 1 reused 2", f"{r}")


@test
def a_thousand_idle_connections_cost_little(t):
    need_plain_build()  # sanitizers have memory of their own
    d = t.daemon()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1100:
        raise Skip(f"a process may have only {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def used_once():
        c = d.client()
        c.ask("NULL")
        return c

    def anonymous_bytes():
        with open(f"/proc/{d.pid}/status", encoding="ascii") as file:
            return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024

    clients = [used_once()]
    before = anonymous_bytes()
    clients += [used_once() for _ in range(999)]
    each = (anonymous_bytes() - before) / 999
    expect(each <= 2048, f"{each:.0f} bytes a connection")
    for c in clients:
        c.close()
    wait_for(lambda: d.metric("connections") <= 1, "all of them to be closed")
    d.alive()
