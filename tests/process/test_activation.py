"""Socket activation: the socket is there before the daemon, and outlives it."""
import signal
import socket
import subprocess
import time

from lib.harness import expect, listening, program, test, wait_for
from lib.wire import Client, frame


def activate(t, *flags, config="idle_exit: 0s\n"):
    """systemd-socket-activate on a socket, which starts hearthd at the first connection."""
    t.need_program("systemd-socket-activate")
    path = t.dir / "hearth.sock"
    log = open(t.dir / "stderr", "wb")
    process = t.start("systemd-socket-activate", "-l", path, program("hearthd"), "--config",
                      t.write("hearth.yaml", config), "--state-dir", t.dir / "state", *flags,
                      stderr=log)
    log.close()
    wait_for(lambda: listening(path), "the socket")
    return process, path


def running(process):
    """Whether systemd-socket-activate has become hearthd."""
    with open(f"/proc/{process.pid}/comm", encoding="utf-8") as file:
        return file.read().strip() == "hearthd"


@test
def the_first_connection_starts_it_and_is_answered(t):
    process, path = activate(t)
    expect(not running(process), "it runs before anybody came")
    with Client(path) as client:
        replies = client.ask("NULL")
        expect([r.type for r in replies] == ["DONE"], f"{replies}")
    expect(running(process), "something else answered")
    process.send_signal(signal.SIGTERM)
    expect(process.wait(20) == 0, "no good end")
    expect(path.exists(), "the socket is not the daemon's to remove")


@test
def a_look_does_not_start_it(t):
    process, path = activate(t)
    r = t.run("hearth", "status", "--socket", path)
    expect("inactive" in r.out, f"{r}")
    expect(not running(process), "a look started the daemon")


@test
def it_leaves_when_nothing_is_to_be_done(t):
    process, path = activate(t, config="idle_exit: 1s\n")
    with Client(path) as client:
        client.ask("NULL")
        goodbye = client.frames_to_end()  # an idle connection does not keep it
        expect([f.type for f in goodbye] == ["GOAWAY"], f"{goodbye}")
    expect(process.wait(20) == 0, "no good end")
    expect(path.exists(), "the socket is not the daemon's to remove")


@test
def it_refuses_a_passed_descriptor_that_does_not_listen(t):
    ours, theirs = socket.socketpair()
    process = t.start("sh", "-c", f"LISTEN_PID=$$ LISTEN_FDS=1 exec '{program('hearthd')}' 3<&0",
                      stdin=theirs, stderr=subprocess.PIPE, text=True)
    text = process.stderr.read()
    expect(process.wait(20) == 1, "it took something that is no listening socket")
    expect("expected one listening Unix stream socket" in text, text)
    ours.close()
    theirs.close()


@test
def what_is_to_stay_keeps_it_and_who_only_listens_does_not(t):
    process, path = activate(t, config="idle_exit: 1s\n")
    model = ("MODEL", "ember")
    with Client(path) as first:
        first.ask("NULL")
        with Client(t.dir / "daemon" / "status.sock") as client:
            client.request("SUBSCRIBE")
            client.request("SUBSCRIBE", ("NAME", "values"))
            client.request("HOLD", model, request_id=9)

            def stays(seconds=2.5):
                time.sleep(seconds)
                return running(process)
            expect(stays(), "a hold keeps it")
            client.send(frame("CANCEL", 9) + frame("SET", 10, model, ("PINNED", 1)))
            expect(stays(), "a pin keeps it")
            client.send(frame("SET", 11, model, ("PINNED", 0), ("KEEP_ALIVE_US", 60000000)))
            expect(stays(), "a keep_alive that runs keeps it")
            client.send(frame("SET", 12, model, ("KEEP_ALIVE_US", 0)))
            client.frames_to_end()
    expect(process.wait(20) == 0, "subscriptions kept it")
