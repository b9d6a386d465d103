"""Sockets and frames on their unhappy paths: where hearthd listens, and what it cannot take."""
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from lib.harness import Failure, expect, listening, program, test, wait_for
from lib.wire import MAGIC, Client, frame, header

HELLO = MAGIC + frame("HELLO", 0, ("VERSION", "test"))


def open_files(pid):
    """The numbers of a process's descriptors."""
    return {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}


@test
def who_finds_no_descriptor_left_is_told_and_the_others_go_on(t):
    t.need_program("prlimit")
    d = t.daemon()
    with d.client() as first, d.status_client() as news:
        news.request("SUBSCRIBE")
        news.receive()
        used = max(open_files(d.pid))
        t.run("prlimit", "--pid", d.pid, f"--nofile={used + 4}:{used + 4}")
        clients, told = [], []
        for _ in range(20):
            c = Client(d.socket, hello=False)
            clients.append(c)
            with contextlib.suppress(OSError):  # who is turned away is told before he speaks
                c.send(HELLO)
            told.append(c.receive())
        refused = [f for f in told if f.type == "ERROR"]
        expect(refused and told[0].type == "HELLO", f"{told}")
        for f in refused:
            expect(f.get("CODE") == "busy" and "LimitNOFILE" in f.get("SENTENCE"), f"{f}")
        event = json.loads(news.receive().get("TEXT"))
        expect(event["event"] == "busy" and event["sentence"] == refused[0].get("SENTENCE"), f"{event}")
        expect(first.ask("NULL")[-1].type == "DONE", "the first one")
        for c in clients:
            c.close()
        wait_for(lambda: d.metric("connections") <= 3, "the connections to go")
        d.alive()
    expect(d.metric("connections_refused_total") == len(refused), "not counted")


@test
def descriptors_that_come_back_are_used_to_tell_those_who_wait(t):
    """The daemon keeps one descriptor to tell with; here that one is taken from it as well."""
    t.need_program("prlimit")
    d = t.daemon()

    def limit(n):
        t.run("prlimit", "--pid", d.pid, f"--nofile={n}:")

    def cpu_s():
        fields = Path(f"/proc/{d.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with d.client() as first, contextlib.ExitStack() as stack:
        before = open_files(d.pid)
        limit(3)
        waiting = [stack.enter_context(Client(path, hello=False)) for path in (d.socket, d.status_socket)]
        wait_for(lambda: open_files(d.pid) < before, "the kept one to be given up")
        used = cpu_s()
        expect(first.ask("NULL")[-1].type == "DONE", "the first one is served all the while")
        time.sleep(1)
        used = cpu_s() - used
        expect(used < 0.25, f"{used} s of CPU in a second of waiting")
        limit(min(set(range(4096)) - open_files(d.pid)) + 1)  # room for the kept one, and no more
        waiting.append(stack.enter_context(Client(d.socket, hello=False)))
        for c in waiting:
            f = c.receive()
            expect(f.get("CODE") == "busy" and "LimitNOFILE" in f.get("SENTENCE"), f"{f}")
        limit(max(before) + 20)
        d.alive()
        expect(first.ask("NULL")[-1].type == "DONE", "the first one")
        expect(open_files(d.pid) >= before, "the kept one did not come back")


@test
def a_frame_that_there_is_no_room_for_is_refused_and_passed_over(t):
    d = t.daemon(config="limits: {frame: 64KiB, input_bytes: 256KiB, input_bytes_per_uid: 150KiB}\n")
    unknown = (0x1234, b"x" * 60000)  # an option that is skipped: the frame counts, and no prompt
    large = frame("NULL", 7, unknown)
    with d.client() as one, d.client() as two, d.client() as late, d.status_client() as news:
        news.request("SUBSCRIBE")
        news.receive()
        for holder in (one, two):  # a frame counts whole from its header on
            holder.ask("NULL")
            holder.send(large[:30000])
        d.alive()  # a later connection's frame has been read, so theirs have
        late.send(large[:20000])
        f = late.receive()
        expect(f.type == "ERROR" and f.id == 7 and f.get("CODE") == "busy" and f.get("RETRY_AFTER_US"),
               f"{f}")
        event = json.loads(news.receive().get("TEXT"))
        expect(event["event"] == "busy" and event["sentence"] == f.get("SENTENCE"), f"{event}")
        late.send(large[20000:40000])
        late.send(large[40000:] + frame("NULL", 8))
        expect(late.replies(8)[-1].type == "DONE", "what follows was lost")
        two.close()
        wait_for(lambda: d.metric("connections") <= 4, "the second one to go")
        one.send(large[30000:])
        replies = one.replies(7)
        expect(replies[-1].type == "DONE", f"the one that was there first: {replies}")
        replies = late.ask("NULL", unknown)
        expect(replies[-1].type == "DONE", f"there is no room again: {replies}")


@test
def a_hello_that_is_none_ends_its_connection(t):
    d = t.daemon()
    d.expect_log(r"hearthd: connection \d+ .*")
    cases = {
        "an option beyond the frame": header("HELLO", 0, 12) + b"\x01\0\0\0\xff\0\0\0abcd",
        "a request first": frame("NULL", 1),
        "a hello with an id": frame("HELLO", 3),
    }
    for what, data in cases.items():
        with Client(d.socket, hello=False) as c:
            c.send(MAGIC + data)
            frames = c.frames_to_end()
            expect([f.get("CODE") for f in frames if f.type == "ERROR"] == ["bad-frame"], f"{what}: {frames}")
    d.alive()


@test
def a_client_that_resets_and_one_that_half_closes_harm_nobody(t):
    d = t.daemon()
    d.expect_log(r"hearthd: model ember is \w+")
    for cut in (3, len(MAGIC), len(MAGIC) + 5, len(HELLO) + 10):
        c = Client(d.socket, hello=False)
        c.send((HELLO + frame("COMPLETE", 1, ("MODEL", "ember"), ("PROMPT", "x")))[:cut])
        c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        c.close()
    with d.client() as c:
        c.request("COMPLETE", ("MODEL", "ember"), ("PROMPT", "x"), ("MAX_TOKENS", 3))
        c.sock.shutdown(socket.SHUT_WR)
        c.frames_to_end()  # whatever it still gets, the connection ends
    wait_for(lambda: d.metric("connections") <= 1, "the connections to go")
    d.alive()


@test
def paths_that_cannot_be_listened_on_are_told(t):
    cases = ((f"/tmp/{'x' * 120}", "longer than|too long"), ("/proc/s", "cannot listen on /proc/s"),
             (f"/tmp/{'y' * 98}", "status socket's path"), (t.dir / "a/b/c/s", "cannot make|cannot listen"))
    for path, says in cases:
        r = t.run("hearthd", "--socket", path, "--state-dir", t.dir / "st", code=1,
                  err=rf"hearthd: [^\n]*({says})[^\n]*\n")
        expect(r.out == "", f"{r}")
        expect(not os.path.exists(path), f"{path} is left")


def pass_sockets(t, *sockets):
    """A hearthd that gets these descriptors as systemd would pass them."""
    def place():
        for number, fd in enumerate([os.dup(s.fileno()) for s in sockets], 3):
            os.dup2(fd, number)
    return t.start("sh", "-c", f'LISTEN_PID=$$ LISTEN_FDS={len(sockets)} exec "$@"', "sh",
                   program("hearthd"), "--state-dir", t.dir / "st", preexec_fn=place,
                   pass_fds=range(3, 3 + len(sockets)), stderr=subprocess.PIPE)


@test
def sockets_passed_that_are_none_of_ours_are_refused(t):
    def listener(family, address, kind=socket.SOCK_STREAM, listen=True):
        s = socket.socket(family, kind)
        s.bind(address)
        if listen:
            s.listen()
        return s
    unix = socket.AF_UNIX
    cases = (([listener(socket.AF_INET, ("127.0.0.1", 0))], "expected one listening Unix stream"),
             ([listener(unix, f"{t.dir}/1"), listener(unix, f"{t.dir}/2")], "2 descriptors were passed"),
             ([listener(unix, f"{t.dir}/3", listen=False)], "expected one listening Unix stream"),
             ([listener(unix, f"{t.dir}/4", socket.SOCK_DGRAM, False)], "expected one listening"),
             ([listener(unix, f"\0{t.dir}/5")], "has no path in the file system"))
    for sockets, says in cases:
        p = pass_sockets(t, *sockets)
        expect(p.wait(20) == 1, f"{says}: {p.returncode}")
        text = p.stderr.read().decode()
        expect(says in text, f"wanted '{says}': {text}")
        for s in sockets:
            s.close()


@test
def a_user_s_own_daemon_listens_in_his_runtime_directory(t):
    t.need_root()
    os.chmod(t.dir.parent, 0o755)
    os.chmod(t.dir, 0o755)
    folder = t.dir / "user"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    p = t.start("setpriv", "--reuid", 12345, "--regid", 12345, "--clear-groups", "env",
                f"XDG_RUNTIME_DIR={folder}", f"HOME={folder}", f"XDG_STATE_HOME={folder}",
                f"XDG_DATA_HOME={folder}", f"XDG_CONFIG_HOME={folder}", program("hearthd"),
                stderr=subprocess.DEVNULL)
    path = folder / "hearth/hearth.sock"
    wait_for(lambda: listening(path) and listening(folder / "hearth/daemon/status.sock"), "the sockets")
    expect(os.stat(path).st_uid == 12345, "another's socket")
    out = t.run("hearth", "status", env={"XDG_RUNTIME_DIR": str(folder)}).out
    expect("state running\n" in out and f"socket {path}\n" in out, out)
    p.send_signal(signal.SIGTERM)
    expect(p.wait(20) == 0 and not path.exists(), "no good end")
    if path.parent.exists() and list(path.parent.glob("*.sock")):
        raise Failure("a socket is left")
