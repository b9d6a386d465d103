"""hearthfs: `hold`, `pinned` and `keep_alive`, each with a made-up daemon and with the real one."""
import contextlib
import errno
import os
import select
import shutil
import signal
import stat
import subprocess
import threading

from lib.harness import BUILD, expect, listening, test, wait_for
from lib.view import (AS_USER, HOLD, KEEP_ALIVE, NOBODY, PINNED, STATE, Fake, as_user, errno_of,
                      fails, names, until)

EMBER = "models/ember"


def take(m, name=HOLD):
    """Opens it for writing, as `exec 9>hold` does."""
    return m.in_time(lambda: os.open(m.path / name, os.O_WRONLY | os.O_TRUNC))


def wait_holds(fake, n):
    wait_for(lambda: fake.do("holds") == str(n), f"{n} holds")


# ---- hold ----

@test
def hold_lasts_from_open_to_close(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(HOLD) == "0\n", m.read(HOLD))
    first = take(m)
    expect(fake.do("holds") == "1", "open came back before the daemon had it")
    expect(m.read(HOLD) == "1\n", m.read(HOLD))
    expect(m.read(STATE) == "queued\n", m.read(STATE))
    second = take(m)
    expect(m.read(HOLD) == "2\n", m.read(HOLD))
    os.close(first)
    wait_holds(fake, 1)
    until(m, HOLD, "1\n")
    os.close(second)
    wait_holds(fake, 0)
    until(m, HOLD, "0\n")
    expect(fake.count("hello") == 1, "a hold has a connection of its own")


@test
def hold_of_a_process_ends_with_it(t):
    fake = Fake(t)
    m = t.mount(fake)
    # One that has inherited the file goes on holding.
    child = t.start("sh", "-c", f"exec 9>{m.path / HOLD}; sleep 60 & echo $!; exec sleep 60",
                    stdout=subprocess.PIPE)
    grandchild = int(child.stdout.readline())
    wait_holds(fake, 1)
    child.kill()
    child.wait()
    expect(m.read(HOLD) == "1\n", "the heir's hold has gone")
    os.kill(grandchild, signal.SIGKILL)
    wait_holds(fake, 0)


@test
def hold_is_opened_for_reading_without_holding(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = os.open(m.path / HOLD, os.O_RDONLY)
    expect(os.read(fd, 10) == b"0\n" and fake.do("holds") == "0", "a look holds")
    os.close(fd)
    fd = m.in_time(lambda: os.open(m.path / HOLD, os.O_RDWR))
    expect(m.in_time(lambda: os.pread(fd, 10, 0)) == b"1\n", "its own hold is not counted")
    os.close(fd)
    wait_holds(fake, 0)


@test
def writes_to_hold_mean_nothing(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = take(m)
    for text in (b"1", b"0\n", b"x" * 5000):
        fails(errno.EINVAL, lambda: os.write(fd, text))
    expect(fake.do("holds") == "1", "a write has let go")
    os.close(fd)


@test
def hold_starts_an_activated_daemon(t):
    t.write("s.models", "alpha\n")
    fake = Fake(t, "--activated")
    m = t.mount(fake)
    expect(m.read(HOLD) == "0\n" and fake.count("hello") == 0, "a look has started the daemon")
    fd = take(m)
    expect(fake.do("holds") == "1", "it is not held")
    os.close(fd)


@test
def hold_that_cannot_be_is_told_by_open(t):
    t.write("s.models", "alpha\n")
    m = t.mount(t.dir / "s")
    fails(errno.ECONNREFUSED, lambda: take(m))
    fake = Fake(t)
    until(m, "status", "running\n")
    for code, error in (("busy", errno.EBUSY), ("forbidden", errno.EACCES),
                        ("no-memory", errno.ENOMEM), ("load-failed", errno.EIO),
                        ("no-such-model", errno.ENOENT)):
        fake.do(f"refuse {code}")
        fails(error, lambda: take(m))
    fake.do("accept")
    fake.do("mute")
    fails(errno.ETIMEDOUT, lambda: take(m))
    fake.do("unmute")
    wait_holds(fake, 0)
    until(m, HOLD, "0\n")


@test
def waiting_holds_are_bounded_and_can_be_interrupted(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(STATE) == "cold\n", m.read(STATE))
    fake.do("mute")
    box = []
    threads = [threading.Thread(target=lambda: box.append(errno_of(lambda: take(m))), daemon=True)
               for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # How many are refused depends on how many come within the second that the others wait.
    expect(set(box) <= {errno.EAGAIN, errno.ETIMEDOUT} and len(box) == 80, f"{sorted(box)}")
    expect(box.count(errno.ETIMEDOUT) >= 64, f"{sorted(box)}")
    shell = t.start("sh", "-c", f"exec 9>{m.path / HOLD}", stdout=subprocess.DEVNULL)
    shell.send_signal(signal.SIGINT)
    shell.wait(20)
    fake.do("unmute")
    wait_for(lambda: fake.count("hold") > 0 and fake.do("holds") == "0", "all to be let go")


@test
def hold_goes_in_the_name_of_who_opened_it(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    gid = os.stat(m.path / HOLD).st_gid
    expect(as_user(t, m, 12345, gid, "4242", HOLD, "") == "0", "the group may not hold")
    expect(fake.do("caller") == f"12345 {gid} 4242", fake.do("caller"))
    wait_holds(fake, 0)


@test
def hold_outlives_its_daemon(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = take(m)
    for end in (fake.stop, lambda: (fake.process.kill(), fake.process.wait())):
        end()
        until(m, "status", "inactive\n")
        fake = Fake(t)
        wait_holds(fake, 1)
        until(m, STATE, "queued\n")
    fake.do("hangup")
    wait_holds(fake, 1)
    os.close(fd)
    wait_holds(fake, 0)


@test
def hold_whose_load_fails_is_told_by_poll(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = take(m)
    poller = select.poll()
    poller.register(fd, select.POLLPRI)
    expect(poller.poll(100) == [], "poll wakes without a reason")
    fake.do("break load-failed")
    expect(poller.poll(20000) == [(fd, select.POLLERR)], "poll does not tell")
    os.close(fd)
    expect(fake.do("holds") == "0", "it was taken again")


@test
def killed_hearthfs_lets_go(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    fd = take(m)
    m.process.kill()
    m.process.wait()
    wait_holds(fake, 0)
    with contextlib.suppress(OSError):
        os.close(fd)
    t.run("fusermount3", "-u", m.path)
    t.mounts.remove(m)


# ---- pinned, keep_alive ----

@test
def pinned_and_keep_alive_are_written_and_read(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read(PINNED) == "0\n" and m.read(KEEP_ALIVE) == "0\n", "they are set already")
    for name, text, value in ((PINNED, "1\n", "1\n"), (PINNED, "0", "0\n"), (PINNED, "1", "1\n"),
                              (KEEP_ALIVE, "30\n", "30\n"), (KEEP_ALIVE, "1.25", "1.25\n"),
                              (KEEP_ALIVE, "0", "0\n")):
        m.write(name, text)
        expect(m.read(name) == value, f"{text!r} reads {m.read(name)!r}")
    expect(fake.count("set") == 6, f"{fake.count('set')} orders")


@test
def bad_values_are_refused_and_set_nothing(t):
    fake = Fake(t)
    m = t.mount(fake)
    for name, texts in ((PINNED, ("2", "yes", "", "\n", "01", "x" * 70000)),
                        (KEEP_ALIVE, ("-1", "1s", "1e3", ".5", "1.", "31536001", "9" * 30, "\n",
                                      "0x10", "x" * 70000))):
        for text in texts:
            if text:
                fails(errno.EINVAL, lambda: m.write(name, text))
    fake.do("refuse forbidden")
    fails(errno.EACCES, lambda: m.write(PINNED, "1"))
    fails(errno.EACCES, lambda: m.write(KEEP_ALIVE, "1"))
    expect(m.read(PINNED) == "0\n" and m.read(KEEP_ALIVE) == "0\n", "something was set")
    fake.stop()
    until(m, "status", "inactive\n")
    fails(errno.ECONNREFUSED, lambda: m.write(PINNED, "1"))
    fails(errno.ECONNREFUSED, lambda: m.write(KEEP_ALIVE, "1"))
    m.write(PINNED, "0")


# ---- over a real daemon ----

@test
def real_hold_keeps_a_model_that_was_told_to_go(t):
    d = t.daemon()
    m = t.mount(d)
    fd = take(m, f"{EMBER}/hold")
    expect(m.read(f"{EMBER}/wait") == "ready\n", "holding does not load")
    m.write(f"{EMBER}/preload", "0")
    expect(m.read(f"{EMBER}/state") == "ready\n", m.read(f"{EMBER}/state"))
    expect(m.read(f"{EMBER}/preload") == "0\n", "the order to go is forgotten")
    os.close(fd)
    wait_for(lambda: m.read(f"{EMBER}/state") == "cold\n", "it to go with its last hold")
    expect(m.read(f"{EMBER}/hold") == "0\n", m.read(f"{EMBER}/hold"))


@test
def real_rights_are_those_of_the_caller(t):
    t.need_root()
    d = t.daemon()
    m = t.mount(d)
    gid = os.stat(m.path / EMBER / "preload").st_gid

    def user(uid, name, text):
        return as_user(t, m, uid, gid, "-", f"{EMBER}/{name}", text)
    expect(user(4001, "preload", "1") == "1", "a user may not load")
    expect(m.read(f"{EMBER}/wait") == "ready\n", "it is not loaded")
    for name in ("pinned", "keep_alive"):
        expect(user(4001, name, "1") == str(errno.EACCES), f"a user may set {name}")
    fd = take(m, f"{EMBER}/hold")
    expect(user(4001, "preload", "0") == str(errno.EACCES), "a user ends what root holds")
    os.close(fd)
    wait_for(lambda: m.read(f"{EMBER}/hold") == "0\n", "root to let go")
    expect(user(4001, "preload", "0") == "1", "a user may not unload what nobody uses")
    m.write(f"{EMBER}/pinned", "1")
    m.write(f"{EMBER}/keep_alive", "2.5")
    expect(m.read(f"{EMBER}/pinned") == "1\n" and m.read(f"{EMBER}/keep_alive") == "2.5\n",
           "root's values are not there")


@test
def real_holds_of_a_user_are_limited(t):
    t.need_root()
    d = t.daemon(config="limits:\n  holds_per_uid: 3\n")
    m = t.mount(d)
    fds = [take(m, f"{EMBER}/hold") for _ in range(3)]
    fails(errno.EBUSY, lambda: take(m, f"{EMBER}/hold"))
    gid = os.stat(m.path / EMBER / "hold").st_gid
    expect(stat.S_IMODE(os.stat(m.path / EMBER / "hold").st_mode) == 0o660, "its mode is another")
    given = as_user(t, m, 4001, gid, "-", f"{EMBER}/hold", "")
    expect(given == "0", f"another user pays for it: {given}")
    for fd in fds:
        os.close(fd)
    wait_for(lambda: m.read(f"{EMBER}/hold") == "0\n", "all to be let go")
    expect("ember" in names(m, "models"), names(m, "models"))


@test
def as_a_service_it_speaks_for_its_users(t):
    """As packaged: daemon and filesystem under a user of their own, without privileges, mounted by root."""
    t.need_root()
    t.need_fuse()
    helper, setpriv = t.need_program("mount.fuse3"), t.need_program("setpriv")
    os.chmod(t.dir, 0o777)
    for name in ("daemon/hearthd", "fs/hearthfs"):
        shutil.copy(BUILD / name, t.dir)
    t.start(setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", t.dir / "hearthd",
            "--socket", t.dir / "s", "--models", t.dir / "models", "--state-dir", t.dir / "state")
    wait_for(lambda: listening(t.dir / "s"), "hearthd to listen")
    os.chmod(t.dir / "s", 0o666)
    point = t.dir / "m"
    point.mkdir()
    t.start(helper, f"{t.dir / 'hearthfs'}#", point, "-o",
            "setuid=nobody,drop_privileges,allow_other,default_permissions",
            env={**os.environ, "HEARTH_SOCKET": str(t.dir / "s")}, start_new_session=True)
    try:
        wait_for(lambda: os.path.exists(point / EMBER / "hold"), "the mount")
        gid = os.stat(point / EMBER / "hold").st_gid

        def user(uid, group, name, text):
            return t.run("/usr/bin/python3", "-c", AS_USER, uid, group, "-", point / EMBER / name,
                         text).out.strip()
        denied = str(errno.EACCES)
        expect(user(4001, gid, "preload", "1") == "1", "a member may not load")
        expect(user(4001, gid, "wait", "-") == "ready", "it is not loaded")
        expect(user(4001, gid, "pinned", "1") == denied, "a member may pin")
        expect(user(4001, gid, "hold", "") == "0", "a member may not hold")
        expect(user(0, 0, "pinned", "1") == "1", "root may not pin")
        expect(user(4001, gid, "preload", "0") == denied, "a member unloads what root has pinned")
        for name, text in (("preload", "0"), ("hold", ""), ("wait", "-")):
            expect(user(4002, 4002, name, text) == denied, f"others may use {name}")
        expect(user(4002, 4002, "state", "-") == "ready", "others cannot read")
    finally:
        t.run("umount", point)
