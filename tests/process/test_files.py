"""hearthfs: real mounts, with a made-up daemon where the test must decide what it says and when."""
import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time

from lib.harness import BUILD, Failure, Skip, expect, test, wait_for
from lib.view import (HOLD, KEEP_ALIVE, NOBODY, PINNED, PRELOAD, STATE, WAIT, Fake, Reader, as_user,
                      errno_of, fails, names, until)

# ---- the tree ----

@test
def tree_holds_what_the_contract_says(t):
    m = t.mount(Fake(t))
    expect(names(m) == ["README", "batcher", "events", "loader", "metrics", "models", "pool", "status",
                        "streaming", "version"], names(m))
    expect(names(m, "models") == ["alpha"], names(m, "models"))
    expect(set(names(m, "models/alpha")) == {
        "state", "progress", "preload", "info", "error", "pinned", "keep_alive", "hold", "memory",
        "stats", "wait"}, names(m, "models/alpha"))
    expect(names(m, "metrics") == ["hearth.prom", "steps_total"], names(m, "metrics"))
    for folder in ("pool", "batcher", "streaming", "loader"):
        expect(names(m, folder) == ["stats"], names(m, folder))
        expect(m.read(f"{folder}/stats") == f"section_{folder} 1\n", m.read(f"{folder}/stats"))
    there = {*(f"models/NAME/{name}" for name in names(m, "models/alpha")), "metrics/hearth.prom",
             "metrics/NAME", "pool/stats", "batcher/stats", "streaming/stats", "loader/stats", "status",
             "version", "events"}
    told = {line.split()[0] for line in m.read("README").splitlines() if "  " in line.strip()}
    expect(there <= told, f"README does not tell of {there - told}")


@test
def values_are_the_daemons(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state ready")
    until(m, STATE, "ready\n")
    expect(m.read("status") == "running\n", m.read("status"))
    expect(m.read("version") == "7.7.7\n", m.read("version"))
    expect(m.read("models/alpha/progress") == "done_bytes 1000\ntotal_bytes 1000\n",
           m.read("models/alpha/progress"))
    expect(m.read("metrics/steps_total") == "5\n", m.read("metrics/steps_total"))
    expect("hearth_up 1\n" in m.read("metrics/hearth.prom"), m.read("metrics/hearth.prom"))


@test
def tools_read_the_files_as_files(t):
    m = t.mount(Fake(t))
    for tool in (["cat"], ["head", "-c", "3"], ["tail", "-n", "1"], ["grep", "cold"], ["wc", "-c"],
                 ["dd", "bs=1", "status=none"]):
        given = [f"if={m.path / STATE}"] if tool[0] == "dd" else [m.path / STATE]
        r = t.run(*tool, *given)
        expect(r.out, f"{r}")
    expect(t.run("cat", m.path / STATE).out == "cold\n", "cat gives something else")
    r = t.run("cp", "-r", m.path / "models" / "alpha", t.dir / "copy")
    expect((t.dir / "copy" / "state").read_text() == "cold\n", f"{r}")


@test
def models_that_come_and_go_are_directories_that_do(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(STATE) == "cold\n", "alpha is not there")
    number = os.stat(m.path / STATE).st_ino
    fake.do("model beta")
    wait_for(lambda: names(m, "models") == ["beta"], "models to hold beta alone")
    fails(errno.ENOENT, lambda: m.read(STATE))
    expect(m.read("models/beta/state") == "cold\n", "beta is not there")
    fake.do("model alpha")
    wait_for(lambda: names(m, "models") == ["alpha"], "models to hold alpha alone")
    expect(os.stat(m.path / STATE).st_ino == number, "alpha came back under another number")


@test
def modes_say_who_may_what(t):
    t.need_root()
    m = t.mount(Fake(t))
    for name, mode in ((STATE, 0o444), (PRELOAD, 0o664), (PINNED, 0o664), (KEEP_ALIVE, 0o664),
                       (HOLD, 0o660), (WAIT, 0o440), ("events", 0o440), ("status", 0o444),
                       ("models", 0o555), ("metrics/hearth.prom", 0o444)):
        st = os.stat(m.path / name)
        expect(stat.S_IMODE(st.st_mode) == mode, f"{name} has mode {st.st_mode:o}")
        expect(st.st_uid == 0, f"{name} belongs to {st.st_uid}")


@test
def what_cannot_be_written_is_nobodys_to_write(t):
    m = t.mount(Fake(t))
    for name in (STATE, WAIT, "status", "metrics/hearth.prom", "models/alpha/error", "events"):
        fails(errno.EACCES, lambda: m.write(name, "1"))
        fails(errno.EACCES, lambda: os.truncate(m.path / name, 0))
    # Root may where modes forbid; the filesystem then says that it is not possible.
    denied = (errno.EPERM, errno.EACCES)
    for action in (lambda: os.mkdir(m.path / "x"), lambda: os.unlink(m.path / "status"),
                   lambda: (m.path / "models/alpha/new").write_text("1"),
                   lambda: os.rename(m.path / "status", m.path / "other"),
                   lambda: os.symlink("a", m.path / "b"), lambda: os.rmdir(m.path / "models/alpha"),
                   lambda: os.link(m.path / "status", m.path / "c"),
                   lambda: os.chmod(m.path / "status", 0o777)):
        try:
            action()
            raise Failure("something was made or removed")
        except OSError as e:
            expect(e.errno in denied, f"{e}")


# ---- orders ----

@test
def preload_loads_and_wait_tells_the_end(t):
    fake = Fake(t)
    m = t.mount(fake)
    m.write(PRELOAD, "1\n")
    expect(m.read(STATE) == "queued\n", m.read(STATE))
    reader = Reader(m.path / WAIT)
    for state in ("loading", "warming"):
        fake.do(f"state {state}")
        until(m, STATE, f"{state}\n")
        expect(reader.blocked(), f"wait ended with {reader.value!r} while {state}")
    fake.do("state ready")
    expect(reader.result() == "ready\n", f"wait gave {reader.value!r}")
    m.write(PRELOAD, "0")
    expect(m.read(STATE) == "cold\n", m.read(STATE))
    expect((fake.count("warm"), fake.count("unload")) == (1, 1), "orders were lost or doubled")


@test
def wait_on_what_is_settled_returns_at_once(t):
    fake = Fake(t)
    m = t.mount(fake)
    for state in ("cold", "ready", "failed"):
        fake.do(f"state {state}")
        expect(m.read(WAIT) == f"{state}\n", f"wait gave {m.read(WAIT)!r}")


@test
def bad_writes_are_refused_and_ask_for_nothing(t):
    fake = Fake(t)
    m = t.mount(fake)
    for text in ("banana\n", "2", "10", "1 1", " 1", "1\n\n", "\n", "yes", "x" * 70000):
        fails(errno.EINVAL, lambda: m.write(PRELOAD, text))
    expect((fake.count("warm"), fake.count("unload")) == (0, 0), "a bad write became an order")
    r = t.run("sh", "-c", f"echo banana >{m.path / PRELOAD}", code=None)
    expect(r.code != 0, f"the shell is told nothing\n{r}")


@test
def refusals_come_back_as_errno(t):
    fake = Fake(t)
    m = t.mount(fake)
    for code, error in (("forbidden", errno.EACCES), ("bad-request", errno.EINVAL),
                        ("busy", errno.EBUSY), ("no-such-model", errno.ENOENT),
                        ("load-failed", errno.EIO), ("internal", errno.EIO)):
        fake.do(f"refuse {code}")
        fails(error, lambda: m.write(PRELOAD, "1"))
        fails(error, lambda: m.write(PRELOAD, "0"))


@test
def preload_starts_an_activated_daemon_and_looks_do_not(t):
    t.write("s.models", "alpha\n")
    fake = Fake(t, "--activated")
    m = t.mount(fake)
    for name in ("status", STATE, "metrics/hearth.prom", WAIT, "pool/stats"):
        m.read(name)
    names(m, "models/alpha")
    m.write(PRELOAD, "0")
    expect(fake.count("hello") == 0, "a look has started the daemon")
    expect(m.read("status") == "inactive\n", m.read("status"))
    m.write(PRELOAD, "1")
    expect(m.read(STATE) == "queued\n", m.read(STATE))
    expect(m.read("status") == "running\n", m.read("status"))
    expect(fake.count("warm") == 1, "the order did not arrive once")


@test
def a_daemon_that_is_being_started_is_starting(t):
    t.write("s.models", "alpha\n")
    fake = Fake(t, "--activated")
    m = t.mount(fake)
    expect(m.read("status") == "inactive\n", m.read("status"))
    fake.process.send_signal(signal.SIGSTOP)  # as slow to start as the test wants
    box = []
    writer = threading.Thread(target=lambda: box.append(errno_of(lambda: m.write(PRELOAD, "1"))))
    writer.start()
    try:
        until(m, "status", "starting\n")
        expect("\nhearth_up 0\n" in m.read("metrics/hearth.prom"), "it is said to be up")
        expect(m.read(STATE) == "cold\n", m.read(STATE))
    finally:
        fake.process.send_signal(signal.SIGCONT)
    writer.join(20)
    expect(box == [0], f"the write came to {box}")
    until(m, "status", "running\n")
    fake.stop()
    until(m, "status", "inactive\n")
    fails(errno.ECONNREFUSED, lambda: m.write(PRELOAD, "1"))
    until(m, "status", "inactive\n")


@test
def preload_where_nobody_listens_is_refused(t):
    t.write("s.models", "alpha\n")
    m = t.mount(t.dir / "s")
    fails(errno.ECONNREFUSED, lambda: m.write(PRELOAD, "1"))
    m.write(PRELOAD, "0")


@test
def preload_of_a_silent_daemon_times_out_and_holds_nobody_up(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(STATE) == "cold\n", "not there")
    fake.do("mute")
    box = []
    writer = threading.Thread(target=lambda: box.append(errno_of(lambda: m.write(PRELOAD, "1"))))
    writer.start()
    expect(m.read("README"), "README cannot be read meanwhile")
    expect(m.read(STATE) == "cold\n", "the last copy is not given")
    writer.join(20)
    expect(box == [errno.ETIMEDOUT], f"the write came to {box}")


@test
def orders_go_in_the_name_of_who_opened_the_file(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    gid = os.stat(m.path / PRELOAD).st_gid
    m.write(PRELOAD, "1")
    expect(fake.do("caller") == "self", fake.do("caller"))
    for name, text in ((PRELOAD, "0"), (PINNED, "1"), (KEEP_ALIVE, "30")):
        given = as_user(t, m, 12345, gid, "4242,77", name, text)
        expect(given == str(len(text)), f"{name}: {given}")
        expect(fake.do("caller") == f"12345 {gid} 77 4242", fake.do("caller"))
    # the group of the mount may be a supplementary one
    expect(as_user(t, m, 12345, 777, str(gid), PRELOAD, "1") == "1", "the group may not")
    expect(fake.do("caller") == f"12345 777 {gid}", fake.do("caller"))
    orders = [fake.count(c) for c in ("warm", "unload", "set")]
    expect(orders == [2, 1, 2], f"{orders}")


@test
def modes_keep_others_out(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    expect(as_user(t, m, NOBODY, NOBODY, "-", STATE, "-") == "cold", "a value cannot be read")
    for name, text in ((PRELOAD, "1"), (PINNED, "1"), (KEEP_ALIVE, "1"), (HOLD, ""), (HOLD, "-"),
                       (WAIT, "-"), ("events", "-")):
        given = as_user(t, m, NOBODY, NOBODY, "-", name, text)
        expect(given == str(errno.EACCES), f"{name}: {given}")
    orders = [fake.count(c) for c in ("warm", "unload", "set", "hold")]
    expect(orders == [0, 0, 0, 0], f"somebody else's order was passed on: {orders}")


@test
def rights_are_those_of_open_and_not_of_write(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    gid = os.stat(m.path / PRELOAD).st_gid
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:  # hands an open file to root
        os.setgroups([])
        os.setgid(gid)
        os.setuid(4711)
        socket.send_fds(theirs, [b"x"], [os.open(m.path / PRELOAD, os.O_WRONLY)])
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    expect(os.waitpid(pid, 0)[1] == 0, "the user cannot open it")
    expect(os.write(fds[0], b"1") == 1, "the file cannot be written")
    expect(fake.do("caller") == f"4711 {gid}", fake.do("caller"))
    os.close(fds[0])
    # inherited, it is still his who opened it
    fd = os.open(m.path / PRELOAD, os.O_WRONLY)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os._exit(0 if os.write(fd, b"0") == 1 else 1)
    expect(os.waitpid(pid, 0)[1] == 0, "the heir cannot write")
    expect(fake.do("caller") == "self" and fake.count("unload") == 1, fake.do("caller"))
    os.close(fd)


# ---- bad days of the daemon ----

@test
def stopped_daemon_hangs_nobody(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state ready")
    until(m, STATE, "ready\n")
    before = m.read("metrics/hearth.prom")
    fake.process.send_signal(signal.SIGSTOP)
    try:
        until(m, "status", "unresponsive\n")
        for _ in range(3):
            expect(m.read(STATE) == "ready\n", "the last state is not given")
            expect(m.read("metrics/hearth.prom") == before, "the last metrics are not given")
            expect(m.read("status") == "unresponsive\n", m.read("status"))
            expect(names(m, "models") == ["alpha"], names(m, "models"))
    finally:
        fake.process.send_signal(signal.SIGCONT)
    until(m, "status", "running\n")
    fake.do("state cold")
    until(m, STATE, "cold\n")


@test
def mount_over_a_stopped_daemon_works(t):
    fake = Fake(t)
    t.write("s.models", "alpha\n")
    fake.process.send_signal(signal.SIGSTOP)
    try:
        m = t.mount(fake)
        expect(m.read("status") == "unresponsive\n", m.read("status"))
        expect(m.read("version") and names(m), "the mount is empty")
    finally:
        fake.process.send_signal(signal.SIGCONT)
    until(m, "status", "running\n")


@test
def without_a_daemon_everything_is_cold(t):
    t.write("s.models", "alpha\nbeta\n../x\n")
    m = t.mount(t.dir / "s")
    expect(m.read("status") == "inactive\n", m.read("status"))
    expect(names(m, "models") == ["alpha", "beta"], names(m, "models"))
    expect(m.read(STATE) == "cold\n", m.read(STATE))
    expect(m.read(WAIT) == "cold\n", m.read(WAIT))
    expect(m.read("models/beta/progress") == "done_bytes 0\ntotal_bytes 0\n", "progress")
    expect("\nhearth_up 0\n" in m.read("metrics/hearth.prom"), m.read("metrics/hearth.prom"))
    expect(m.read("pool/stats") == "", "there are figures of nobody")


@test
def the_names_are_there_before_a_daemon_ever_ran(t):
    model = t.write("models/mine.gguf", b"GGUF")
    listed = t.run("hearthd", "--list", "--socket", t.dir / "s", "--models", model.parent,
                   "--state-dir", t.dir / "state").out
    expect({"ember", "mine"} <= set(listed.split()), listed)
    expect((t.dir / "s.models").read_text() == listed, "the list is not kept")
    expect(stat.S_IMODE((t.dir / "s.models").stat().st_mode) == 0o644, "not for everybody to read")
    m = t.mount(t.dir / "s")
    expect(names(m, "models") == sorted(listed.split()), names(m, "models"))
    expect(m.read("models/mine/state") == "cold\n", m.read("models/mine/state"))
    model.unlink()  # asked again, it follows
    t.run("hearthd", "--list", "--socket", t.dir / "s", "--models", model.parent)
    wait_for(lambda: "mine" not in names(m, "models"), "the list to be followed")
    expect([p.name for p in t.dir.glob("s.models*")] == ["s.models"], "litter beside the list")
    t.run("hearthd", "--list", "--socket", t.dir / "hearth.sock", "--state-dir", t.dir / "state")
    expect("ember\n" in (t.dir / "state/models.list").read_text(), "not in the state directory")
    r = t.run("hearthd", "--list", "--socket", t.dir / "none" / "s")
    expect("ember\n" in r.out, f"a list that cannot be written fails: {r}")


@test
def daemon_that_goes_and_comes_back_is_followed(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state ready")
    until(m, STATE, "ready\n")
    fake.stop()
    until(m, "status", "inactive\n")
    expect(m.read(STATE) == "cold\n", "a state outlived its daemon")
    expect("\nhearth_up 0\n" in m.read("metrics/hearth.prom"), "it is said to be up")
    fake = Fake(t)
    until(m, "status", "running\n")
    m.write(PRELOAD, "1")
    expect(m.read(STATE) == "queued\n", m.read(STATE))


@test
def wait_ends_when_the_daemon_dies(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    reader = Reader(m.path / WAIT)
    expect(reader.blocked(), f"wait ended with {reader.value!r}")
    fake.process.kill()
    fake.process.wait()
    expect(reader.result() == "cold\n", f"wait gave {reader.value!r}")


@test
def daemon_on_its_way_out_is_draining(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read("status") == "running\n", m.read("status"))
    fake.do("goaway")
    until(m, "status", "running\n")  # a new connection was made
    expect(fake.count("hello") == 2, "it did not connect again")


# ---- readers ----

@test
def file_keeps_what_it_held_when_opened(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = os.open(m.path / STATE, os.O_RDONLY)
    fake.do("state ready")
    until(m, STATE, "ready\n")
    expect(os.pread(fd, 100, 0) == b"cold\n", "the snapshot moved")
    expect(os.pread(fd, 100, 2) == b"ld\n" and os.pread(fd, 100, 5) == b"", "slices are wrong")
    expect(os.pread(fd, 100, 1 << 40) == b"", "there is something beyond the end")
    os.close(fd)


@test
def poll_wakes_on_a_change(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = os.open(m.path / STATE, os.O_RDONLY)
    poller = select.poll()
    poller.register(fd, select.POLLPRI)
    expect(poller.poll(200) == [], "poll wakes without a change")
    fake.do("state ready")
    expect(poller.poll(20000) == [(fd, select.POLLPRI)], "poll does not wake")
    expect(os.pread(fd, 100, 0) == b"ready\n", "after a change offset 0 gives the new value")
    expect(poller.poll(0) == [], "the change is told twice")
    os.close(fd)


@test
def poll_of_each_value_wakes_on_its_own_change(t):
    fake = Fake(t)
    m = t.mount(fake)
    fds = {name: os.open(m.path / name, os.O_RDONLY)
           for name in ("status", "models/alpha/progress", PINNED, HOLD, "README")}

    def woken(limit_ms):
        poller = select.poll()
        for fd in fds.values():
            poller.register(fd, select.POLLPRI)
        found = {fd for fd, _ in poller.poll(limit_ms)}
        for fd in found:
            os.pread(fd, 100, 0)
        return {name for name, fd in fds.items() if fd in found}
    expect(woken(200) == set(), "poll wakes without a change")
    for change, name in ((lambda: fake.do("state ready"), "models/alpha/progress"),
                         (lambda: m.write(PINNED, "1"), PINNED),
                         (lambda: fake.do("mute"), "status"), (lambda: fake.do("unmute"), "status")):
        change()
        expect(woken(20000) == {name}, f"no wake-up of {name}")
    held = m.in_time(lambda: os.open(m.path / HOLD, os.O_WRONLY))
    expect(woken(20000) == {HOLD}, "no wake-up of hold")
    os.close(held)
    expect(woken(20000) == {HOLD}, "no wake-up of hold")
    for fd in fds.values():
        os.close(fd)


@test
def poll_of_wait_tells_when_it_would_not_block(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    fd = os.open(m.path / WAIT, os.O_RDONLY | os.O_NONBLOCK)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    expect(poller.poll(200) == [], "it is said to be over")
    fails(errno.EAGAIN, lambda: os.read(fd, 100))
    fake.do("state ready")
    expect(poller.poll(20000) == [(fd, select.POLLIN)], "poll does not wake")
    expect(os.read(fd, 100) == b"ready\n", "the state is not told")
    os.close(fd)


@test
def blocked_read_can_be_interrupted(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    cat = t.start("cat", m.path / WAIT, stdout=subprocess.PIPE)
    time.sleep(0.3)
    expect(cat.poll() is None, "wait did not block")
    cat.send_signal(signal.SIGINT)
    expect(cat.wait(20) == -signal.SIGINT, "cat did not die of the signal")
    expect(m.read(STATE) == "loading\n", "the mount suffered")


@test
def blocked_readers_are_bounded_and_others_read_on(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    readers = [Reader(m.path / WAIT) for _ in range(80)]
    wait_for(lambda: sum(r.value == errno.EAGAIN for r in readers) == 16, "16 of 80 to be refused")
    expect(m.read(STATE) == "loading\n", "others cannot read")
    fake.do("state ready")
    expect(sorted(str(r.result()) for r in readers) == [str(errno.EAGAIN)] * 16 + ["ready\n"] * 64,
           "not all 64 were told")


@test
def many_readers_read_at_once(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(STATE) == "cold\n", m.read(STATE))
    bad = []

    def read():
        for _ in range(200):
            text = (m.path / STATE).read_text()
            if text not in ("cold\n", "ready\n"):
                bad.append(text)
    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    fake.do("state ready")
    for thread in threads:
        thread.join(30)
        expect(not thread.is_alive(), "a reader hangs")
    expect(bad == [], f"readers saw {bad[:3]}")
    expect(fake.count("hello") == 1, "more than one connection was made")
    expect(fake.count("models") < 500, f"3,200 reads asked {fake.count('models')} times")


# ---- hearthfs's own days ----

@test
def killed_hearthfs_is_followed_by_the_next(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    for _ in range(3):
        fd = os.open(m.path / STATE, os.O_RDONLY)
        m.process.kill()
        m.process.wait()
        fails(errno.ENOTCONN, lambda: m.read(STATE))
        m.start()
        expect(m.read(STATE) == "cold\n", "it does not work again")
        fails(errno.ENOTCONN, lambda: os.pread(fd, 10, 0))
        with contextlib.suppress(OSError):
            os.close(fd)
    r = t.run("hearthfs", "--socket", fake.socket, m.path, code=1)
    expect("a hearthfs that works" in r.err and r.err.count("\n") == 1, f"{r}")
    m.stop()
    expect(t.run("stat", "-f", "-c", "%T", m.path).out != "fuseblk\n", "a mount is left")


@test
def dead_mounts_of_others_are_left_alone(t):
    t.need_root()
    t.need_fuse()
    slow_disk = BUILD / "tests" / "slow-disk"
    if not slow_disk.exists():
        raise Skip("slow-disk is not built")
    point, file = t.dir / "other", t.write("file", "x")
    point.mkdir()
    disk = t.start(slow_disk, file, point, "name", "0")
    wait_for(lambda: str(point) in open("/proc/self/mountinfo").read(), "the other one to mount")
    disk.kill()
    disk.wait()
    r = t.run("hearthfs", "--socket", t.dir / "s", point, code=1)
    expect(f"fusermount3 -u {point}" in r.err and r.err.count("\n") == 1, f"{r}")
    t.run("fusermount3", "-u", point)


@test
def sigterm_unmounts_with_readers_blocked_and_files_open(t):
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    fd = os.open(m.path / STATE, os.O_RDONLY)
    reader = Reader(m.path / WAIT)
    expect(reader.blocked(), "wait did not block")
    m.stop()
    expect(isinstance(reader.result(), int), f"the blocked read gave {reader.value!r}")
    os.close(fd)


@test
def sigterm_ends_it_while_it_has_a_daemon_started(t):
    t.write("s.models", "alpha\n")
    fake = Fake(t, "--activated")
    m = t.mount(fake)
    fake.process.send_signal(signal.SIGSTOP)
    box = []
    writers = [threading.Thread(target=lambda name=name: box.append(errno_of(
        lambda: os.close(os.open(m.path / name, os.O_WRONLY)) if name == HOLD else m.write(name, "1"))))
        for name in (PRELOAD, HOLD)]
    for writer in writers:
        writer.start()
    try:
        until(m, "status", "starting\n")
        m.stop()
        for writer in writers:
            writer.join(20)
        expect(box == [errno.ENODEV] * 2, f"the orders came to {box}")
    finally:
        fake.process.send_signal(signal.SIGCONT)
    expect(fake.do("holds") == "0" and fake.count("warm") == 0, "an order was carried out all the same")


@test
def sigint_ends_it_as_well(t):
    m = t.mount(Fake(t))
    m.process.send_signal(signal.SIGINT)
    expect(m.process.wait(20) == 0 and not m.mounted(), "it did not unmount")


@test
def unmounted_from_outside_it_ends_well(t):
    m = t.mount(Fake(t))
    t.run("fusermount3", "-u", m.path)
    expect(m.process.wait(20) == 0, "it did not end with 0")


@test
def unusable_mount_points_are_told_apart(t):
    file = t.write("file", "")
    for path, sentence in ((t.dir / "nowhere", "mkdir -p"), (file, "not a directory")):
        r = t.run("hearthfs", "--socket", t.dir / "s", path, code=1)
        expect(sentence in r.err and str(path) in r.err and r.err.startswith("hearthfs: "), f"{r}")


@test
def usage_of_hearthfs_is_told(t):
    for args in ((), ("a", "b"), ("--socket",), ("--nonsense", "a")):
        r = t.run("hearthfs", *args, code=2)
        expect("Usage: hearthfs" in r.err, f"{r}")
    expect("Usage: hearthfs" in t.run("hearthfs", "--help").out, "no help")
    expect(t.run("hearthfs", "--version").out.startswith("hearthfs "), "no version")


@test
def too_long_socket_path_is_told(t):
    (t.dir / "m").mkdir()
    r = t.run("hearthfs", "--socket", "/" + "x" * 120, t.dir / "m", code=1)
    expect("longer than" in r.err, f"{r}")
    r = t.run("hearthfs", "--socket", "/" + "x" * 104, t.dir / "m", code=1)
    expect("too long" in r.err, f"{r}")


# ---- ways to mount ----

@test
def mount_helper_hands_over_a_mount_without_privileges(t):
    t.need_root()
    t.need_fuse()
    helper = t.need_program("mount.fuse3")
    fake = Fake(t)
    for path in (t.dir, fake.socket, f"{fake.socket}.status"):
        os.chmod(path, 0o777)
    program = t.dir / "hearthfs"
    shutil.copy(BUILD / "fs" / "hearthfs", program)
    (t.dir / "m").mkdir()
    t.start(helper, f"{program}#", t.dir / "m", "-o",
            "setuid=nobody,drop_privileges,allow_other,default_permissions",
            env={**os.environ, "HEARTH_SOCKET": str(fake.socket)}, start_new_session=True)
    try:
        wait_for(lambda: os.path.exists(t.dir / "m" / "version"), "the helper to mount")
        expect((t.dir / "m" / STATE).read_text() == "cold\n", "the state cannot be read")
        st = os.stat(t.dir / "m" / PRELOAD)
        expect(st.st_uid == 0, f"preload belongs to {st.st_uid}")
        # The daemon is another's: it would not believe us whom we speak for.
        fails(errno.EACCES, lambda: (t.dir / "m" / PRELOAD).write_text("1"))
        fails(errno.EACCES, lambda: (t.dir / "m" / HOLD).open("w"))
        expect(fake.count("warm") + fake.count("hold") == 0, "an order was passed on")
        fake.stop()
        fake = Fake(t, uid=NOBODY)
        (t.dir / "m" / PRELOAD).write_text("1")
        expect(fake.count("warm") == 1, "root's order did not arrive")
        expect(fake.do("caller").startswith("0 0"), fake.do("caller"))
    finally:
        t.run("umount", t.dir / "m")


@test
def user_mounts_for_himself(t):
    t.need_root()
    t.need_fuse()
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        raise Skip("/dev/fuse is not open to users")
    setpriv = t.need_program("setpriv")
    fake = Fake(t)
    for path in (t.dir, fake.socket, f"{fake.socket}.status"):
        os.chmod(path, 0o777)
    program, point = t.dir / "hearthfs", t.dir / "m"
    shutil.copy(BUILD / "fs" / "hearthfs", program)
    point.mkdir()
    os.chown(point, 65534, 65534)
    as_nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    fs = t.start(*as_nobody, program, "--socket", fake.socket, point)
    wait_for(lambda: str(point) in open("/proc/self/mountinfo").read(), "it to mount")
    r = t.run(*as_nobody, "sh", "-c", f"echo 1 >{point / PRELOAD} && cat {point / STATE} && "
              f"stat -c %u {point / STATE}")
    expect(r.out == "queued\n65534\n", f"{r}")
    fs.send_signal(signal.SIGTERM)
    expect(fs.wait(20) == 0, "it did not end with 0")


@test
def user_without_access_to_fuse_is_told(t):
    t.need_root()
    if not os.path.exists("/dev/fuse") or os.stat("/dev/fuse").st_mode & 0o006:
        raise Skip("/dev/fuse is open to users")
    setpriv = t.need_program("setpriv")
    program, point = t.dir / "hearthfs", t.dir / "m"
    shutil.copy(BUILD / "fs" / "hearthfs", program)
    point.mkdir()
    r = t.run(setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", program, "--socket",
              t.dir / "s", point, code=1)
    expect("/dev/fuse may not be opened by this user" in r.err, f"{r}")


# ---- over a real daemon ----

@test
def real_models_load_and_unload_by_writing_files(t):
    d = t.daemon()
    m = t.mount(d)
    expect("ember" in names(m, "models"), names(m, "models"))
    expect(m.read("models/ember/state") == "cold\n", m.read("models/ember/state"))
    m.write("models/ember/preload", "1\n")
    expect(m.read("models/ember/wait") == "ready\n", "it did not get ready")
    done, total = (int(line.split()[1]) for line in m.read("models/ember/progress").splitlines())
    expect(done == total > 0, f"progress is {done} of {total}")
    expect(m.read("models/ember/preload") == "1\n", "preload does not say so")
    expect(int(m.read("models/ember/memory")) > 0, "it takes no memory")
    expect(m.read("metrics/models_ready") == "1\n", m.read("metrics/models_ready"))
    m.write("models/ember/preload", "0\n")
    expect(m.read("models/ember/wait") == "cold\n", "it did not get cold")
    for folder in ("pool", "batcher", "streaming", "loader"):
        expect(m.read(f"{folder}/stats"), f"{folder}/stats is empty")


@test
def real_failure_is_told_by_state_error_and_write(t):
    d = t.daemon(models=[t.write("broken.gguf", b"GGUF" + b"\xff" * 60)])
    d.expect_log(r"hearthd: .*broken.*")
    m = t.mount(d)
    with contextlib.suppress(OSError):  # the order may be taken before the load fails
        m.write("models/broken/preload", "1")
    expect(m.read("models/broken/wait") == "failed\n", m.read("models/broken/wait"))
    expect(m.read("models/broken/error").strip(), "no reason is given")


@test
def real_daemon_that_ends_leaves_its_names(t):
    d = t.daemon()
    m = t.mount(d)
    expect(m.read("status") == "running\n", m.read("status"))
    d.stop()
    until(m, "status", "inactive\n")
    expect("ember" in names(m, "models"), names(m, "models"))
    expect(m.read("models/ember/state") == "cold\n", m.read("models/ember/state"))
    expect("\nhearth_up 0\n" in m.read("metrics/hearth.prom"), "it is said to be up")
