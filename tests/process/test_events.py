"""hearthfs: the file `events`, with a made-up daemon and with the real one."""
import errno
import json
import os
import select
import signal
import subprocess

from lib.harness import expect, test, wait_for
from lib.view import Fake, Reader, fails, until

EVENTS = "events"


def listen(m, flags=0):
    return m.in_time(lambda: os.open(m.path / EVENTS, os.O_RDONLY | flags))


def take(m, fd, size=65536):
    return m.in_time(lambda: os.read(fd, size)).decode()


@test
def events_are_lines_that_a_read_waits_for(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = listen(m)
    fake.do('event {"event":"one"}')
    fake.do('event {"event":"two"}')
    got = take(m, fd)
    while got.count("\n") < 2:
        got += take(m, fd)
    expect(got == '{"event":"one"}\n{"event":"two"}\n', got)
    reader = t.start("head", "-n", "1", m.path / EVENTS, stdout=subprocess.PIPE)
    wait_for(lambda: fake.count("subscribe") >= 1 and reader.poll() is None, "head to read")
    os.close(fd)
    wait_for(lambda: f"{m.path / EVENTS}" in _open_files(reader.pid), "head to open it")
    fake.do('event {"event":"three"}')
    expect(reader.wait(20) == 0 and reader.stdout.read() == b'{"event":"three"}\n',
           "the event did not come")


def _open_files(pid):
    try:
        return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


@test
def each_open_has_its_own_place(t):
    fake = Fake(t)
    m = t.mount(fake)
    early = listen(m)
    fake.do("event 1")
    expect(take(m, early) == "1\n", "the first does not come")
    late = listen(m)
    fake.do("event 2")
    expect(take(m, early) == "2\n" and take(m, late) == "2\n", "they share a place")
    fake.do("lose 9")
    expect(json.loads(take(m, late)) == {"event": "lost", "count": 9}, "the loss is not told")
    os.close(late)
    expect(json.loads(take(m, early)) == {"event": "lost", "count": 9}, "the loss is not told")
    os.close(early)
    expect(fake.count("subscribe") == 2, "not one subscription for all, and one for the values")


@test
def nothing_is_missed_after_open(t):
    fake = Fake(t)
    m = t.mount(fake)
    for number in range(20):
        fd = listen(m)
        fake.do(f"event {number}")
        expect(take(m, fd) == f"{number}\n", "another event came")
        os.close(fd)


@test
def slow_reader_of_events_is_told_what_he_missed(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd, other = listen(m), listen(m)
    for number in range(1500):
        fake.do(f"event {number}")
    got = ""
    while "1499\n" not in got:
        got += take(m, fd)
    lines = got.splitlines()
    lost = sum(json.loads(line)["count"] for line in lines if "lost" in line)
    numbers = [int(line) for line in lines if "lost" not in line]
    expect(lost + len(numbers) == 1500 and len(numbers) >= 1024, f"{lost} lost, {len(numbers)} told")
    expect(numbers == sorted(numbers), "they are out of order")
    os.close(fd)
    os.close(other)


@test
def long_line_comes_in_parts_and_whole(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = listen(m)
    line = "x" * 3000
    fake.do(f"event {line}")
    fake.do("event y")
    got = ""
    while not got.endswith("y\n"):
        got += take(m, fd, 700)
    expect(got == f"{line}\ny\n", f"{len(got)} bytes")
    os.close(fd)


@test
def shell_reads_events_line_by_line(t):
    fake = Fake(t)
    m = t.mount(fake)
    loop = f"for i in 1 2 3; do read -r line; echo got $line; done <{m.path / EVENTS}"
    for program in (("sh", "-c", loop), ("bash", "-c", loop),
                    ("sh", "-c", f"(head -n 1; head -n 2) <{m.path / EVENTS} | sed 's/^/got /'")):
        shell = t.start(*program, stdout=subprocess.PIPE)
        wait_for(lambda: any(str(m.path / EVENTS) in _open_files(pid) for pid in os.listdir("/proc")
                             if pid.isdigit()), "the shell to open it")
        # All at once, so that it reads more than it wants at first.
        shell.send_signal(signal.SIGSTOP)
        for number in (1, 2, 3):
            fake.do(f"event {number}")
        shell.send_signal(signal.SIGCONT)
        expect(shell.wait(20) == 0 and shell.stdout.read() == b"got 1\ngot 2\ngot 3\n",
               f"{program} has missed something")
        wait_for(lambda: not any(str(m.path / EVENTS) in _open_files(pid)
                                 for pid in os.listdir("/proc") if pid.isdigit()), "it to close it")


@test
def events_can_be_polled_and_read_without_blocking(t):
    fake = Fake(t)
    m = t.mount(fake)
    fd = listen(m, os.O_NONBLOCK)
    fails(errno.EAGAIN, lambda: os.read(fd, 100))
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    expect(poller.poll(100) == [], "poll wakes without an event")
    fake.do("event now")
    expect(poller.poll(20000) == [(fd, select.POLLIN)], "poll does not wake")
    expect(take(m, fd) == "now\n" and poller.poll(0) == [], "one event is told twice")
    os.close(fd)


@test
def blocked_readers_of_events_are_bounded_and_interrupted(t):
    fake = Fake(t)
    m = t.mount(fake)
    readers = [Reader(m.path / EVENTS) for _ in range(80)]
    wait_for(lambda: sum(r.value == errno.EAGAIN for r in readers) == 16, "16 of 80 to be refused")
    cat = t.start("cat", m.path / "models/alpha/state", stdout=subprocess.PIPE)
    expect(cat.wait(20) == 0 and cat.stdout.read() == b"cold\n", "others cannot read")
    fake.do("event all")
    values = [r.result() for r in readers]
    expect(values.count("all\n") == 64, f"{values}")
    cat = t.start("cat", m.path / EVENTS, stdout=subprocess.PIPE)
    wait_for(lambda: f"{m.path / EVENTS}" in _open_files(cat.pid), "cat to open it")
    cat.send_signal(signal.SIGINT)
    expect(cat.wait(20) == -signal.SIGINT, "cat did not die of the signal")


@test
def events_of_the_next_daemon_follow(t):
    t.write("s.models", "alpha\n")
    m = t.mount(t.dir / "s")
    fd = listen(m)  # nobody runs, and open does not wait for somebody
    fake = Fake(t)
    until(m, "status", "running\n")
    wait_for(lambda: fake.count("subscribe") >= 2, "the subscription")
    fake.do("event first")
    expect(take(m, fd) == "first\n", "an event of the first daemon")
    fake.stop()
    fake = Fake(t)
    wait_for(lambda: fake.count("subscribe") >= 1, "the subscription")
    fake.do("event second")
    expect(take(m, fd) == "second\n", "an event of the second daemon")
    os.close(fd)


@test
def events_of_a_silent_daemon_are_opened_all_the_same(t):
    fake = Fake(t)
    m = t.mount(fake)
    expect(m.read("status") == "running\n", m.read("status"))
    fake.do("mute")
    fd = listen(m, os.O_NONBLOCK)
    fails(errno.EAGAIN, lambda: os.read(fd, 100))
    fake.do("unmute")
    until(m, "status", "running\n")
    fake.do("event spoken")
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    expect(poller.poll(20000) and take(m, fd) == "spoken\n", "the event is lost")
    os.close(fd)


@test
def real_events_tell_a_model_s_way(t):
    d = t.daemon()
    m = t.mount(d)
    fd = listen(m)
    m.write("models/ember/preload", "1")
    got = ""
    while '"state":"ready"' not in got:
        got += take(m, fd)
    events = [json.loads(line) for line in got.splitlines()]
    states = [e["state"] for e in events if e["event"] == "state" and e["model"] == "ember"]
    expect(states == ["queued", "loading", "warming", "ready"], f"{events}")
    d.signal(signal.SIGSTOP)
    until(m, "status", "unresponsive\n")
    d.signal(signal.SIGCONT)
    until(m, "status", "running\n")
    m.write("models/ember/preload", "0")
    got = ""
    while '"cold"' not in got.split('"from"')[-1]:
        got += take(m, fd)
    os.close(fd)
    expect("draining" in got, got)
