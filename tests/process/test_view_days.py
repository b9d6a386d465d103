"""hearthfs on bad days: killed programs at every stage, a thousand readers, a daemon that stops."""
import contextlib
import errno
import os
import random
import select
import shutil
import signal
import subprocess
import threading
import time

from lib.harness import BUILD, Daemon, Skip, expect, test, wait_for
from lib.models import made_model
from lib.view import (HOLD, PRELOAD, STATE, WAIT, Fake, errno_of, fails, names, until)

EMBER = "models/ember"


# ---- hearthfs is killed ----

class Stage:
    """Something under way in the mount when hearthfs dies, which must come to an end."""

    def __init__(self, action):
        self.box = []
        self.thread = threading.Thread(target=lambda: self.box.append(errno_of(action)), daemon=True)
        self.thread.start()

    def end(self):
        self.thread.join(20)
        expect(self.box, "it hangs after hearthfs has died")
        expect(self.box[0] in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV),
               f"it ended with errno {self.box[0]}")


def open_here(path):
    """Descriptors of this process that have the file open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == str(path):
                found.append(int(fd))
    return found


def kill_and_follow(m, stage):
    """Kills hearthfs in the middle of something; the next one takes its place."""
    m.process.kill()
    m.process.wait()
    stage.end()
    m.start()


@test
def hearthfs_killed_at_any_stage_is_followed_by_the_next(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state loading")
    until(m, STATE, "loading\n")
    for name in (WAIT, "events"):
        def read():
            fd = os.open(m.path / name, os.O_RDONLY)
            try:
                os.read(fd, 100)
            finally:
                os.close(fd)
        stage = Stage(read)
        wait_for(lambda: open_here(m.path / name), f"{name} to be open")
        kill_and_follow(m, stage)
        expect(m.read(STATE) == "loading\n", m.read(STATE))
    for begin in (lambda: os.open(m.path / HOLD, os.O_WRONLY), lambda: m.write(PRELOAD, "1")):
        fake.process.send_signal(signal.SIGSTOP)  # the order stays without an answer
        stage = Stage(begin)
        time.sleep(0.1)
        kill_and_follow(m, stage)
        fake.process.send_signal(signal.SIGCONT)
        wait_for(lambda: fake.do("holds") == "0", "the dead one's hold to end")
        until(m, "status", "running\n")


@test
def hearthfs_killed_under_who_polls_holds_or_looks_up_is_followed_by_the_next(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state ready")
    until(m, STATE, "ready\n")

    def poll(name, wanted):
        fd = os.open(m.path / name, os.O_RDONLY)
        poller = select.poll()
        poller.register(fd, wanted)
        _, told = poller.poll()[0]
        os.close(fd)
        if told & select.POLLERR:
            raise OSError(errno.ENODEV, "poll says so")
    for name, wanted in ((STATE, select.POLLPRI), ("events", select.POLLIN)):
        stage = Stage(lambda: poll(name, wanted))
        wait_for(lambda: open_here(m.path / name), f"{name} to be open")
        time.sleep(0.1)
        kill_and_follow(m, stage)
    held = m.in_time(lambda: os.open(m.path / HOLD, os.O_WRONLY))
    folder = os.open(m.path / "models", os.O_RDONLY)
    wait_for(lambda: fake.do("holds") == "1", "the hold")
    m.process.kill()
    m.process.wait()
    m.start()
    wait_for(lambda: fake.do("holds") == "0", "the dead one's hold to end")
    until(m, HOLD, "0\n")
    fails(errno.ENOTCONN, lambda: os.write(held, b"1"))
    fails(errno.ENOTCONN, lambda: os.listdir(folder))
    for fd in (held, folder):
        with contextlib.suppress(OSError):
            os.close(fd)
    fake.process.send_signal(signal.SIGSTOP)  # looks into a folder wait for it
    time.sleep(0.2)
    stage = Stage(lambda: os.listdir(m.path / "models"))
    time.sleep(0.1)
    kill_and_follow(m, stage)
    fake.process.send_signal(signal.SIGCONT)
    until(m, "status", "running\n")
    expect(names(m, "models") == ["alpha"], names(m, "models"))


@test
def hearthfs_killed_while_it_has_a_daemon_started_is_followed_by_the_next(t):
    t.need_root()
    t.write("s.models", "alpha\n")
    fake = Fake(t, "--activated")
    m = t.mount(fake)
    for begin in (lambda: m.write(PRELOAD, "1"), lambda: os.open(m.path / HOLD, os.O_WRONLY)):
        fake.process.send_signal(signal.SIGSTOP)  # as slow to start as the test wants
        stage = Stage(begin)
        until(m, "status", "starting\n")
        kill_and_follow(m, stage)
        expect(m.read("status") == "inactive\n" and names(m, "models") == ["alpha"], m.read("status"))
        fake.process.send_signal(signal.SIGCONT)
        m.write(PRELOAD, "1")
        until(m, "status", "running\n")
        expect(fake.do("holds") == "0", "the dead one's hold was taken")
        fake.stop()
        until(m, "status", "inactive\n")
        fake = Fake(t, "--activated")


@test
def hearthfs_killed_while_mounting_leaves_nothing_in_the_way(t):
    t.need_root()
    fake = Fake(t)
    m = t.mount(fake)
    for turn in range(12):
        m.process.kill()
        m.process.wait()
        starting = t.start("hearthfs", "--socket", fake.socket, m.path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            starting.wait(0.002 * turn)
        starting.kill()
        starting.wait()
        m.start()
        expect(m.read(STATE) == "cold\n", m.read(STATE))


@test
def killed_user_s_hearthfs_is_followed_by_the_next(t):
    t.need_root()
    t.need_fuse()
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        raise Skip("/dev/fuse is not open to users")
    setpriv = t.need_program("setpriv")
    fake = Fake(t, uid=65534)
    program, point = shutil.copy(BUILD / "fs" / "hearthfs", t.dir), t.dir / "m"
    point.mkdir()
    os.chown(point, 65534, 65534)
    as_nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    for _ in range(3):
        fs = t.start(*as_nobody, program, "--socket", fake.socket, point)
        wait_for(lambda: t.run(*as_nobody, "cat", point / STATE, code=None).out == "cold\n",
                 "the mount to work")
        fs.kill()
        fs.wait()
    t.run("fusermount3", "-u", point)


# ---- the daemon is killed ----

@test
def daemon_killed_at_any_stage_is_followed_by_the_next(t):
    d = t.daemon()
    m = t.mount(d)
    events = os.open(m.path / "events", os.O_RDONLY | os.O_NONBLOCK)
    held = None

    def hold():
        nonlocal held
        held = m.in_time(lambda: os.open(m.path / EMBER / "hold", os.O_WRONLY))
    stages = (lambda: None, lambda: m.read(f"{EMBER}/state"),
              lambda: m.write(f"{EMBER}/preload", "1"),
              lambda: (m.write(f"{EMBER}/preload", "1"), m.read(f"{EMBER}/wait")),
              lambda: m.write(f"{EMBER}/preload", "0"), hold)
    for number, begin in enumerate(stages):
        begin()
        d.kill()
        until(m, "status", "inactive\n")
        expect(m.read(f"{EMBER}/state") == "cold\n", m.read(f"{EMBER}/state"))
        expect("ember" in names(m, "models"), "its names have gone with it")
        expect("\nhearth_up 0\n" in m.read("metrics/hearth.prom"), "it is said to be up")
        d = again(t, d, number)
        until(m, "status", "running\n")
        m.write(f"{EMBER}/preload", "1")
        expect(m.read(f"{EMBER}/wait") == "ready\n", "the next one does not load")
    until(m, f"{EMBER}/hold", "1\n")
    os.close(held)
    until(m, f"{EMBER}/hold", "0\n")
    poller = select.poll()
    poller.register(events, select.POLLIN)
    expect(poller.poll(20000), "no event came")
    os.close(events)


@test
def daemon_killed_with_models_in_every_state_leaves_none_stuck(t):
    t.need_fuse()
    disk = t.dir / "disk"
    disk.mkdir()
    made = {name: made_model(t, name, "--seed", str(seed)) for seed, name in enumerate(("full", "late", "slow"))}
    p = t.start("slow-disk", made["slow"], disk, "slow.gguf", "200000")
    try:
        kill_in_every_state(t, disk, made)
    finally:
        p.send_signal(signal.SIGTERM)
        p.wait(20)


def kill_in_every_state(t, disk, made):
    wait_for((disk / "slow.gguf").exists, "the disk")
    d = t.daemon(models=[made["full"], made["late"], disk / "slow.gguf"],
                 config="loading: {max_concurrent: 1, prediction: off}\ndrain_timeout: 60s\n")
    m = t.mount(d)
    with d.client() as c:
        m.write("models/full/preload", "1")
        expect(m.read("models/full/wait") == "ready\n", "it does not load")
        c.request("COMPLETE", ("MODEL", "full"), ("PROMPT", "a"), ("CREDIT", 4), ("IGNORE_EOS", 1))
        wait_for(lambda: c.receive().type == "TOKENS", "the stream that keeps it in use")
        for name, state in (("slow", "loading"), ("late", "queued")):
            m.write(f"models/{name}/preload", "1")
            until(m, f"models/{name}/state", f"{state}\n")
        m.write("models/full/preload", "0")
        until(m, "models/full/state", "draining\n")
        expect(m.read("models/slow/state") == "loading\n", "the disk is too quick for this")
        d.kill()
    until(m, "status", "inactive\n")
    for name in made:
        expect(m.read(f"models/{name}/state") == "cold\n", m.read(f"models/{name}/state"))
    d = again(t, d, 0)
    until(m, "status", "running\n")
    for name in made:
        m.write(f"models/{name}/preload", "1")
        expect(m.read(f"models/{name}/wait") == "ready\n", f"the next one does not load {name}")
    d.stop()


def again(t, dead, number):
    """Another daemon at the dead one's socket, with what that has left lying about."""
    daemon = Daemon(t, name=f"again{number}", at=dead)
    t.daemons.append(daemon)
    daemon.wait_ready()
    return daemon


@test
def stopped_daemon_hangs_no_order_and_no_directory(t):
    d = t.daemon()
    m = t.mount(d)
    m.write(f"{EMBER}/preload", "1")
    expect(m.read(f"{EMBER}/wait") == "ready\n", "it is not loaded")
    events = os.open(m.path / "events", os.O_RDONLY | os.O_NONBLOCK)
    d.signal(signal.SIGSTOP)
    try:
        until(m, "status", "unresponsive\n")
        for name in ("state", "progress", "memory", "info", "stats", "hold", "error"):
            m.in_time(lambda: m.read(f"{EMBER}/{name}"), 2)
        expect(m.in_time(lambda: m.read(f"{EMBER}/wait"), 2) == "ready\n", "wait does not end")
        expect(names(m, EMBER) and names(m, "metrics"), "a directory is empty")
        for name, text in (("preload", "0"), ("pinned", "1"), ("keep_alive", "1")):
            fails(errno.ETIMEDOUT, lambda: m.write(f"{EMBER}/{name}", text))
        fails(errno.ETIMEDOUT, lambda: m.in_time(
            lambda: os.open(m.path / EMBER / "hold", os.O_WRONLY)))
        with contextlib.suppress(BlockingIOError):
            os.read(events, 65536)  # that it runs
        fails(errno.EAGAIN, lambda: os.read(events, 100))
    finally:
        d.signal(signal.SIGCONT)
    until(m, "status", "running\n")
    expect(m.read(f"{EMBER}/hold") == "0\n", "an order that was given up was carried out")
    m.write(f"{EMBER}/preload", "1")
    poller = select.poll()
    poller.register(events, select.POLLIN)
    expect(poller.poll(20000) and os.read(events, 65536), "the reader of events was lost")
    os.close(events)


@test
def daemon_that_speaks_and_does_not_answer_hangs_nobody(t):
    """Each event is a word of a daemon that lives; a question is not answered by it."""
    fake = Fake(t)
    m = t.mount(fake)
    fake.do("state ready")
    until(m, STATE, "ready\n")
    events = os.open(m.path / "events", os.O_RDONLY | os.O_NONBLOCK)
    over = threading.Event()

    def speak():
        while not over.wait(0.1):
            fake.do('event {"event":"x"}')
    fake.do("mute")
    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        time.sleep(0.3)
        for look in (lambda: m.read(STATE), lambda: names(m, "models"), lambda: m.read("status"),
                     lambda: os.close(os.open(m.path / "events", os.O_RDONLY))):
            m.in_time(look, 5)
            time.sleep(0.2)
        expect(m.read(STATE) == "ready\n", "the last copy is not given")
        fails(errno.EAGAIN, lambda: m.in_time(
            lambda: os.read(os.open(m.path / WAIT, os.O_RDONLY | os.O_NONBLOCK), 10)))
    finally:
        over.set()
        speaker.join(20)
    fake.do("unmute")
    fake.do("state cold")
    until(m, STATE, "cold\n")
    os.close(events)


# ---- many ----

@test
def a_thousand_readers_read_at_once(t):
    fake = Fake(t)
    m = t.mount(fake)
    good, bad, gate = [], [], threading.Event()

    def read(number):
        gate.wait(20)
        name = (STATE, "status", "metrics/hearth.prom", "models/alpha/progress")[number % 4]
        for _ in range(5):
            try:
                fd = os.open(m.path / name, os.O_RDONLY)
                (good if os.read(fd, 65536) else bad).append(name)
                os.close(fd)
            except OSError as e:
                bad.append(f"{name}: {e}")
    threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(1000)]
    threading.stack_size(256 * 1024)
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(50)
        expect(not thread.is_alive(), "a reader hangs")
    expect(bad == [] and len(good) == 5000, f"{len(good)} read; {bad[:5]}")
    expect(fake.count("hello") == 1, "more than one connection was made")
    expect(m.read(STATE) == "cold\n", m.read(STATE))


@test
def readers_in_great_numbers_leave_no_files_behind(t):
    """A close is a request that nobody waits for: it must not stay behind those that somebody does."""
    m = t.mount(Fake(t))
    r = t.run("hearth-bench", "reads", "--readers", "64", "--turns", "4", m.path / STATE)
    expect(r.out.count("\n") == 5, f"{r}")
    expect(m.read(STATE) == "cold\n", m.read(STATE))


# Opens a file as a user until that fails; says how often it went well and why it failed, and waits.
OPEN_ALL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
n = 0
try:
    while True:
        os.open(sys.argv[2], os.O_RDONLY)
        n += 1
except OSError as e:
    print(n, e.errno, flush=True)
sys.stdin.read()
"""


@test
def open_files_of_a_user_are_bounded_and_others_have_room(t):
    t.need_root()
    m = t.mount(Fake(t))
    for uid in (4001, 4002, 4001):
        hoarders = [t.start("/usr/bin/python3", "-c", OPEN_ALL, u, m.path / STATE, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True) for u in (str(uid), "4003")]
        for hoarder in hoarders:
            said = hoarder.stdout.readline()
            expect(said == f"16384 {errno.EMFILE}\n", f"{said!r}")
        expect(m.read(STATE) == "cold\n", "others cannot read")
        for hoarder in hoarders:
            hoarder.stdin.close()
            expect(hoarder.wait(20) == 0, "it did not end")
            hoarder.stdout.close()
        wait_for(lambda: t.run("/usr/bin/setpriv", f"--reuid={uid}", "--clear-groups", "cat",
                               m.path / STATE, code=None).code == 0, "its files to be closed")


@test
def what_is_kept_for_a_user_s_open_files_is_bounded(t):
    t.need_root()
    d = t.daemon()
    m = t.mount(d)
    for name in ("metrics/hearth.prom", "models"):
        hoarder = t.start("/usr/bin/python3", "-c", OPEN_ALL, "4001", m.path / name, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True)
        n, error = (int(word) for word in hoarder.stdout.readline().split())
        expect(error == errno.EMFILE, errno.errorcode[error])
        if name == "models":
            expect(n == 16384, f"{n} directories of few entries")
        else:
            expect(1000 < n < (64 << 20) / (len(m.read(name)) * 0.8), f"{n} files of {len(m.read(name))} bytes")
        expect(m.read(f"{EMBER}/state") == "cold\n", "others cannot read")
        hoarder.stdin.close()
        expect(hoarder.wait(20) == 0, "it did not end")
        hoarder.stdout.close()


# Polls files as a user, one more than may be; says how many fail at once, then when the others wake.
POLL_ALL = """
import os, resource, select, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
poller = select.poll()
for _ in range(2049):
    poller.register(os.open(sys.argv[1], os.O_RDONLY), select.POLLPRI)
told = poller.poll(20000)
print(len(told), told[0][1] == select.POLLERR, flush=True)
os.close(told[0][0])
poller.unregister(told[0][0])
n = set()
while len(n) < 2048:
    for fd, event in poller.poll():
        os.pread(fd, 100, 0)
        n.add(fd) if event == select.POLLPRI else sys.exit(1)
print(len(n), flush=True)
"""


@test
def polled_files_of_a_user_are_bounded(t):
    fake = Fake(t)
    m = t.mount(fake)
    poller = t.start("/usr/bin/python3", "-c", POLL_ALL, m.path / STATE, stdout=subprocess.PIPE, text=True)
    said = poller.stdout.readline()
    expect(said == "1 True\n", f"{said!r}")
    fake.do("state ready")
    said = poller.stdout.readline()
    expect(said == "2048\n", f"{said!r}")
    expect(poller.wait(20) == 0, "it did not end")
    poller.stdout.close()


@test
def a_thousand_pollers_wake_at_once(t):
    fake = Fake(t)
    m = t.mount(fake)
    fds = [os.open(m.path / STATE, os.O_RDONLY) for _ in range(900)]
    poller = select.epoll()
    for fd in fds:
        poller.register(fd, select.EPOLLPRI)
    expect(poller.poll(0.1) == [], "poll wakes without a change")
    fake.do("state ready")
    woken = set()
    wait_for(lambda: woken.update(fd for fd, _ in poller.poll(1)) or len(woken) == 900,
             "all to wake")
    expect(all(os.pread(fd, 10, 0) == b"ready\n" for fd in fds), "a poller reads something else")
    for fd in fds:
        os.close(fd)


@test
def models_by_the_hundred_are_directories(t):
    names_there = [f"m{n:03d}" for n in range(500)]
    t.write("s.models", "".join(f"{name}\n" for name in names_there))
    m = t.mount(t.dir / "s")
    expect(names(m, "models") == names_there, f"{len(names(m, 'models'))} models")
    for name in names_there[::50]:
        expect(m.read(f"models/{name}/state") == "cold\n", name)
    t.write("s.models", "other\n")
    wait_for(lambda: names(m, "models") == ["other"], "the list to be followed")
    fails(errno.ENOENT, lambda: m.read("models/m001/state"))


@test
def a_thousand_random_operations_leave_nothing_behind(t):
    d = t.daemon(models=[t.golden("models/stories260K-f32.gguf")])
    m = t.mount(d)
    models = ("ember", "stories260K-f32")
    states = {"cold", "queued", "loading", "warming", "ready", "draining"}
    bad = []

    def hold(path):
        fd = os.open(f"{path}/hold", os.O_WRONLY)
        try:
            settled = read(f"{path}/wait")
            if settled not in ("ready", "cold"):
                bad.append(f"held, and {settled}")
        finally:
            os.close(fd)

    def read(path):
        with open(path, encoding="utf-8") as file:
            return file.read().strip()

    def write(path, text):
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def state(path):
        word = read(f"{path}/state")
        if word not in states:
            bad.append(f"state {word!r}")

    def complete(name):
        with d.client() as client:
            replies = client.ask("COMPLETE", ("MODEL", name), ("PROMPT", "Once"), ("MAX_TOKENS", 4))
        # Somebody may unload the model that it waits for.
        if replies[-1].type != "DONE" and "'cancelled'" not in f"{replies[-1]}":
            bad.append(f"{replies[-1]}")

    def work(seed):
        dice = random.Random(seed)
        for _ in range(63):
            name = dice.choice(models)
            path = m.path / "models" / name
            action = dice.choice((
                lambda: hold(path), lambda: write(path / "preload", "1"),
                lambda: write(path / "preload", "0"), lambda: write(path / "pinned", "1"),
                lambda: write(path / "pinned", "0"), lambda: write(path / "keep_alive", "0.05"),
                lambda: write(path / "keep_alive", "0"), lambda: state(path),
                lambda: read(path / "wait"), lambda: os.listdir(path), lambda: complete(name)))
            try:
                action()
            except Exception as error:
                bad.append(f"{error!r}")
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
        expect(not thread.is_alive(), "an operation hangs")
    expect(bad == [], f"{len(bad)} of 1,008: {bad[:5]}")
    for name in models:
        m.write(f"models/{name}/pinned", "0")
        m.write(f"models/{name}/preload", "0")
        wait_for(lambda: m.read(f"models/{name}/state") == "cold\n", f"{name} to be cold")
        until(m, f"models/{name}/hold", "0\n")
        expect(m.read(f"models/{name}/memory") == "0\n", m.read(f"models/{name}/memory"))
