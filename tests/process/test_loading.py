"""Loads as users see them: files of their own, disks that hang, models that need others, the end of
the daemon in the middle of it all."""
import array
import os
import signal
import socket
import time

from lib.disk import Disk
from lib.harness import expect, test, wait_for
from lib.models import made_model, slow_model
from lib.wire import Closed, frame, text_of

PACKED = ("--type", "q8_0")
CLOSED = r"hearthd: connection \d+ of uid \d+ is closed: .+"


def packed_model(t, name="made"):
    """One whose weights are packed anew by a load."""
    return made_model(t, name, *PACKED)


def send_with(client, data, *fds):
    """One message with descriptors."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = client.sock.sendmsg([data], rights)
    assert sent == len(data), "a frame was cut"


def warm_file(client, fd, request_id=100, wait=True):
    """The replies to a warm of that open file."""
    send_with(client, frame("WARM", request_id, *([("WAIT", 1)] if wait else [])), fd)
    return client.replies(request_id)


def state_of(client, model):
    replies = client.ask("MODELS", ("MODEL", model))
    return replies[0].get("STATE") if replies[0].type == "ITEM" else None


def answered(client, model):
    """Whether it is asked a little, and answers."""
    return client.ask("COMPLETE", ("MODEL", model), ("PROMPT", "a"), ("MAX_TOKENS", 2))[-1].type == "DONE"


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


# ---- a user's own file ----

@test
def a_file_of_ones_own_runs_and_goes_with_its_connection(t):
    path = packed_model(t)
    d = t.daemon(models=[path])
    options = (("PROMPT", "abc"), ("SEED", 7), ("MAX_TOKENS", 12), ("IGNORE_EOS", True))
    with d.client() as c:
        with open(path, "rb") as file:
            replies = warm_file(c, file.fileno())
        expect(replies[-1].type == "DONE", f"{replies}")
        name = replies[0].get("MODEL")
        expect(name == "file-1", f"{replies}")
        own = c.ask("COMPLETE", ("MODEL", name), *options)
        expect(text_of(own) == text_of(c.ask("COMPLETE", ("MODEL", "made"), *options)) != "",
               "the same file gives another text")
        expect(state_of(c, name) == "ready", "its state")
        expect(name not in (d.dir / "s.models").read_text(), "it is in the list of names")
    with d.status_client() as s:
        wait_for(lambda: state_of(s, name) is None, "the file's end")
        text = text_of(s.ask("METRICS", ("NAME", "prometheus")))
    expect('hearth_model_requests_total{model="file"} 1' in text and "file-1" not in text, text)
    d.alive()


@test
def hearth_runs_a_file(t):
    path = packed_model(t)
    d = t.daemon(models=[path])
    flags = ("--seed", 7, "--max-tokens", 12, "--ignore-eos")
    by_name = d.hearth("run", "made", "abc", *flags)
    by_file = d.hearth("run", path, "abc", *flags)
    expect(by_name.out == by_file.out != "", f"{by_name}\n{by_file}")
    r = d.hearth("run", t.dir / "none.gguf", "abc", code=1)
    expect("cannot open" in r.err, f"{r}")
    d.expect_log(r"hearthd: model file-\d+ is failed: .+")
    r = d.hearth("run", t.write("text.gguf", "no model"), "abc", code=1)
    expect("text.gguf" in r.err, f"{r}")


@test
def descriptors_of_other_kinds_end_the_connection(t):
    path = packed_model(t)
    d = t.daemon()
    d.expect_log(CLOSED)
    readable = os.open(path, os.O_RDONLY)
    writable = os.open(path, os.O_RDWR)
    bare = os.open(path, os.O_PATH)
    folder = os.open(t.dir, os.O_RDONLY)
    pipe = os.pipe()
    pair = socket.socketpair()
    warm = frame("WARM", 5, ("WAIT", 1))
    cases = ((warm, writable), (warm, bare), (warm, folder), (warm, pipe[0]), (warm, pair[0].fileno()),
             (warm, readable, readable), (frame("NULL", 5), readable), (frame("STATUS", 5), readable),
             (frame("CANCEL", 5), readable))
    with d.client() as c:
        c.ask("COMPLETE", ("MODEL", "ember"), ("PROMPT", "a"), ("MAX_TOKENS", 1))  # every thread has begun
        before = descriptors(d.pid)
    def answer(data, fds):
        with d.client() as c:
            send_with(c, data, *fds)
            last = c.receive()
        # busy: the one before is still being closed, and this one was not received
        return None if last.get("CODE") == "busy" else last

    for data, *fds in cases:
        last = wait_for(lambda: answer(data, fds), "an answer")
        expect(last.get("CODE") == "bad-frame", f"{fds}: {last}")
    wait_for(lambda: descriptors(d.pid) < before, "the descriptors' end")
    last = wait_for(lambda: answer(frame("WARM", 6, ("MODEL", "mine")), [readable]), "an answer")
    expect(last.get("CODE") == "bad-request", f"a name of its own it does not get: {last}")
    with d.client() as c:
        wait_for(lambda: warm_file(c, readable, wait=False)[-1].type == "DONE", "a good one")
    for fd in (readable, writable, bare, folder, *pipe):
        os.close(fd)
    d.alive()


@test
def a_file_with_a_name_is_refused_though_directories_are_due_for_a_look(t):
    d = t.daemon()
    fd = os.open(packed_model(t), os.O_RDONLY)
    with d.client() as c:
        c.ask("WARM", ("MODEL", "nobody"))  # an unknown name has the directories looked through
        time.sleep(1.1)  # and the next one may again
        send_with(c, frame("WARM", 6, ("MODEL", "mine")), fd)
        last = c.receive()
        expect(last.get("CODE") == "bad-request", f"{last}")
    os.close(fd)


@test
def a_file_of_somebody_else_is_not_there(t):
    t.need_root()
    path = packed_model(t)
    d = t.daemon()
    os.chmod(d.socket, 0o666)
    os.chmod(d.dir, 0o755)
    os.chdir(d.dir)  # the folders above are closed to others

    def as_user(uid):
        os.seteuid(uid)
        try:
            from lib.wire import Client
            return Client(d.socket.name)
        finally:
            os.seteuid(0)

    with as_user(12345) as owner, as_user(12346) as other, d.client() as root:
        with open(path, "rb") as file:
            name = warm_file(owner, file.fileno())[0].get("MODEL")
        expect(state_of(owner, name) == "ready", "its user does not see it")
        expect(state_of(root, name) == "ready", "root does not see it")
        expect(state_of(other, name) is None, "another user sees it")
        listed = [r.get("MODEL") for r in other.ask("MODELS")]
        expect(name not in listed and "ember" in listed, f"{listed}")
        for kind, more in (("COMPLETE", (("PROMPT", "a"),)), ("UNLOAD", ()), ("WARM", ()),
                           ("HOLD", ())):
            last = other.ask(kind, ("MODEL", name), *more)[-1]
            expect(last.get("CODE") == "no-such-model", f"{kind}: {last}")
        expect(answered(owner, name), "its own")


@test
def files_are_counted_to_their_user(t):
    path = slow_model(t, "made", *PACKED)
    d = t.daemon(config=f"limits: {{memory_per_uid: {path.stat().st_size * 3}B}}\n")
    codes = []
    with d.client() as c, open(path, "rb") as file:
        for _ in range(3):
            last = warm_file(c, file.fileno(), c.next_id)[-1]
            c.next_id += 1
            codes.append(last.get("CODE") or last.type)
    # the one after it may find the refused one's descriptor still being closed
    expect(codes[0] == "DONE" and codes[2] == "no-memory", f"{codes}")


@test
def a_file_that_hangs_harms_nobody_else(t):
    path = packed_model(t)
    d = t.daemon(models=[path], config="loading: {timeout: 1s, max_concurrent: 1}\n")
    d.expect_log(r"hearthd: model file-\d+ is failed: .+")
    with Disk(t, path, "mine.gguf") as disk, d.client() as c:
        file = os.open(disk.file, os.O_RDONLY)
        disk.hang()
        send_with(c, frame("WARM", 9, ("WAIT", 1)), file)
        with d.client() as other:
            expect(answered(other, "made"), "a load beside it")
            last = warm_file(other, file)[-1]
            expect(last.get("CODE") == "busy", f"a second one of the same user: {last}")
        last = c.replies(9)[-1]
        expect(last.get("CODE") == "load-failed" and "no progress" in last.get("SENTENCE"), f"{last}")
        d.alive()
        with open(path, "rb") as good:
            expect(warm_file(c, good.fileno(), 10)[-1].get("CODE") == "busy", "its thread is stuck")
            disk.go_on()
            wait_for(lambda: warm_file(c, good.fileno(), 11)[-1].type == "DONE", "the thread's end")
        os.close(file)
        c.close()
        d.stop()


@test
def a_file_whose_closing_hangs_holds_nobody_up(t):
    path = packed_model(t)
    d = t.daemon(models=[path], config="loading: {timeout: 1s, max_concurrent: 1}\n")
    d.expect_log(r"hearthd: model file-\d+ is failed: .+")
    with Disk(t, path, "mine.gguf", hang_flush=True) as disk, d.client() as c, d.client() as more:
        file = os.open(disk.file, os.O_RDONLY)
        # received on two connections before either is whole: the second is refused and closed
        whole = frame("WARM", 9, ("WAIT", 1))
        for client in (c, more):
            send_with(client, whole[:4], file)
        time.sleep(0.3)
        for client in (c, more):
            client.sock.sendall(whole[4:])
        last = more.replies(9)[-1]
        expect(last.get("CODE") == "busy", f"the second one: {last}")
        with d.client() as other:
            expect(answered(other, "made"), "a load beside it")
        last = c.replies(9)[-1]
        expect(last.get("CODE") == "load-failed" and "no progress" in last.get("SENTENCE"), f"{last}")
        d.alive()
        disk.go_on()
        with open(path, "rb") as good:
            wait_for(lambda: warm_file(c, good.fileno(), 11)[-1].type == "DONE", "the thread's end")
        os.close(file)
        c.close()
        d.stop()


@test
def the_daemon_ends_beside_a_file_that_hangs(t):
    path = packed_model(t)
    d = t.daemon()
    with Disk(t, path, "mine.gguf") as disk, d.client() as c:
        file = os.open(disk.file, os.O_RDONLY)
        disk.hang()
        send_with(c, frame("WARM", 9, ("WAIT", 1)), file)
        wait_for(lambda: state_of(c, "file-1") in ("queued", "loading"), "the load")
        d.signal(signal.SIGTERM)
        time.sleep(3)  # it gives the thread 2 s
        disk.go_on()   # a thread in a read that cannot be broken off holds the end of any process
        d.wait()
        os.close(file)


# ---- disks ----

@test
def a_disk_that_hangs_takes_one_load_down_and_no_thread_for_ever(t):
    path = packed_model(t)
    with Disk(t, path, "stuck.gguf") as disk:
        d = t.daemon("--models", disk.dir, models=[path],
                     config="loading: {timeout: 1s, max_concurrent: 1}\n")
        d.expect_log(r"hearthd: model stuck is failed: .+ has made no progress for 1 s .+")
        disk.hang()
        with d.client() as c, d.client() as other:
            request = c.request("COMPLETE", ("MODEL", "stuck"), ("PROMPT", "a"))
            last = c.replies(request)[-1]
            expect(last.get("CODE") == "load-failed", f"{last}")
            expect(answered(other, "made"), "the next load")
            expect(d.metric("loader_threads_abandoned_total") >= 1, "nothing was abandoned")
            disk.go_on()
            wait_for(lambda: answered(c, "stuck"), "the load that was given up")
        d.stop()


@test
def a_disk_that_hangs_at_the_end_of_a_load_takes_it_down(t):
    path = packed_model(t)
    with Disk(t, path, "stuck.gguf", hang_flush=True) as disk:
        d = t.daemon("--models", disk.dir, models=[path],
                     config="loading: {timeout: 1s, max_concurrent: 1}\n")
        d.expect_log(r"hearthd: model stuck is failed: .+ has made no progress for 1 s .+")
        with d.client() as c, d.client() as other:
            request = c.request("COMPLETE", ("MODEL", "stuck"), ("PROMPT", "a"))
            last = c.replies(request)[-1]
            expect(last.get("CODE") == "load-failed", f"{last}")
            expect(answered(other, "made"), "the next load")
            disk.go_on()
            wait_for(lambda: answered(c, "stuck"), "the load that was given up")
        d.stop()


@test
def a_directory_that_hangs_is_given_up(t):
    path = packed_model(t)
    with Disk(t, path, "there.gguf") as disk:
        d = t.daemon("--models", disk.dir, models=[path],
                     config="loading: {timeout: 1s, max_concurrent: 1}\n")
        d.expect_log(r"hearthd: looking through the models directories has taken longer .+")
        time.sleep(1.1)  # until a look is due again
        disk.hang()
        with d.client() as c, d.client() as other:
            request = c.request("COMPLETE", ("MODEL", "nonesuch"), ("PROMPT", "a"))
            expect(answered(other, "made"), "one beside it")
            expect(c.replies(request)[-1].get("CODE") == "no-such-model", "the look that hangs")
            disk.go_on()
        d.stop()


@test
def a_deadline_is_kept_while_its_model_loads(t):
    path = slow_model(t, "slow", *PACKED)
    with Disk(t, path, "slow.gguf", 200000) as disk:
        d = t.daemon("--models", disk.dir)
        with d.client() as c:
            began = time.monotonic()
            last = c.ask("COMPLETE", ("MODEL", "slow"), ("PROMPT", "a"), ("DEADLINE_US", 300000))[-1]
            expect(last.get("CODE") == "deadline", f"{last}")
            expect(time.monotonic() - began < 10, "the deadline came late")
            c.ask("UNLOAD", ("MODEL", "slow"))
        d.stop()


@test
def a_killed_daemon_leaves_nothing_behind_but_its_socket(t):
    path = slow_model(t, "slow", *PACKED)
    with Disk(t, path, "slow.gguf", 50000) as disk:
        d = t.daemon("--models", disk.dir)
        with d.client() as c:
            c.request("COMPLETE", ("MODEL", "slow"), ("PROMPT", "a"))
            with d.status_client() as s:
                wait_for(lambda: state_of(s, "slow") == "loading", "the load")
            d.kill()
            try:
                c.receive()
                expect(False, "the dead daemon answered")
            except (Closed, ConnectionResetError):
                pass
        again = t.daemon("--models", disk.dir, name="e")
        with again.client() as c:
            expect(answered(c, "slow"), "the next daemon")
        again.stop()


@test
def a_file_that_vanishes_or_changes_is_told_or_found_again(t):
    path = packed_model(t, "one")
    d = t.daemon()
    d.expect_log(r"hearthd: model one is failed: .+")
    target = d.models_dir / "one.gguf"
    target.write_bytes(path.read_bytes())
    ask = (("MODEL", "one"), ("PROMPT", "a"), ("MAX_TOKENS", 1))
    with d.client() as c:
        wait_for(lambda: answered(c, "one"), "the new file", 30)
        c.ask("UNLOAD", ("MODEL", "one"))
        wait_for(lambda: state_of(c, "one") == "cold", "cold")
        target.unlink()
        last = c.ask("COMPLETE", *ask)[-1]
        expect(last.get("CODE") == "load-failed" and "No such file" in last.get("SENTENCE"), f"{last}")
        target.write_bytes(path.read_bytes()[:5000])
        expect(c.ask("COMPLETE", *ask)[-1].get("CODE") == "load-failed", "a cut file")
        target.write_bytes(path.read_bytes())
        expect(answered(c, "one"), "the whole file again")


# ---- needs ----

@test
def needs_are_loaded_first_and_bad_ones_refused(t):
    base, top = packed_model(t, "base"), packed_model(t, "top")
    d = t.daemon(models=[base, top], config="models: {top: {needs: [base]}}\n")
    d.hearth("warm", "--wait", "top", err=None)
    with d.client() as c:
        expect(state_of(c, "base") == "ready", "what it needs")
    d.stop()
    for text, says in (("{top: {needs: [base]}, base: {needs: [top]}}", "base needs top needs base"),
                       ("{top: {needs: [nothere]}}", "there is no model nothere")):
        config = t.write("bad.yaml", f"models: {text}\n")
        r = t.run("hearthd", "--socket", t.dir / "x", "--state-dir", t.dir / "y", "--models",
                  d.models_dir, "--config", config, code=2)
        expect(says in r.err or "top needs base needs top" in r.err, f"{r}")


@test
def a_synchronous_load_serves_all_the_same(t):
    path = packed_model(t)
    d = t.daemon(models=[path], config="loading: {async: no}\n")
    with d.client() as c:
        expect(answered(c, "made"), "a model")
        with open(path, "rb") as file:  # of a file of somebody's own the daemon never waits
            expect(warm_file(c, file.fileno())[-1].type == "DONE", "a file")
