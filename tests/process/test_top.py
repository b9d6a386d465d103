"""hearth top: on a real terminal, as lines, and without a daemon."""
import json
import re
import signal
import subprocess
import termios
import time

from lib.harness import expect, program, test, wait_for
from lib.screen import ENTER, LEAVE, Screen
from test_files import Fake

def top_screen(t, d, *args, **more):
    return Screen(t, "hearth", "top", "--socket", d.socket, "--interval", "100ms", *args, **more)


@test
def draws_in_place_and_q_gives_the_terminal_back(t):
    d = t.daemon()
    s = top_screen(t, d)
    s.wait_picture(lambda p: p[0].startswith("hearth ") and " running " in p[0], "a picture")
    d.hearth("run", "ember", "Once", "--max-tokens", 5)
    picture = s.wait_picture(lambda p: re.search(r"^ember +ready", "\n".join(p), re.M), "a ready ember")
    expect(picture[7].split()[:3] == ["MODEL", "STATE", "MEMORY"], f"{picture}")
    expect(len({len(p) for p in s.pictures()}) == 1, "the pictures differ in their lines")
    s.key(b"q")
    s.end(0)
    d.expect_log(r"hearthd: model \S+ is \w+")


@test
def fits_every_window_and_follows_its_size(t):
    d = t.daemon()
    s = top_screen(t, d, columns=40, rows=6)
    s.wait_picture(lambda p: len(p) == 6 and all(len(line) <= 40 for line in p), "40x6")
    n = len(s.pictures())
    s.key(b"x\f")  # draws again, and knows no other key
    wait_for(lambda: len(s.pictures()) > n, "another picture")
    for columns, rows in ((1, 1), (200, 50), (7, 3)):
        s.text = ENTER
        s.resize(columns, rows)
        s.wait_picture(lambda p: len(p) <= rows and max(map(len, p)) <= columns, f"{columns}x{rows}")
    s.key(b"q")
    s.end(0)


@test
def says_how_many_models_do_not_fit(t):
    d = t.daemon()
    for i in range(30):
        (d.models_dir / f"m{i}.gguf").write_bytes(b"GGUF")
    d.signal(signal.SIGHUP)
    wait_for(lambda: "m29" in d.hearth("models").out, "the models")
    s = top_screen(t, d, rows=20)
    picture = s.wait_picture(lambda p: len(p) == 20, "20 lines")
    expect(picture[-1] == "and 20 more", f"{picture}")
    s.key(b"q")
    s.end(0)


@test
def ctrl_c_and_signals_give_the_terminal_back(t):
    d = t.daemon()
    for key, number, code in ((b"\x03", None, 130), (None, signal.SIGTERM, -signal.SIGTERM),
                              (None, signal.SIGHUP, -signal.SIGHUP)):
        s = top_screen(t, d)
        s.wait_picture(lambda p: p[0].startswith("hearth "), "a picture")
        if key:
            s.key(key)
        else:
            s.process.send_signal(number)
        s.end(code)


@test
def ctrl_z_gives_the_terminal_back_until_it_goes_on(t):
    d = t.daemon()
    s = top_screen(t, d)
    s.wait_picture(lambda p: p[0].startswith("hearth "), "a picture")
    s.process.send_signal(signal.SIGTSTP)
    wait_for(lambda: LEAVE in s.read(), "the terminal to be left")

    def stopped():
        with open(f"/proc/{s.process.pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "T"
    wait_for(stopped, "it to stop")
    expect(termios.tcgetattr(s.slave) == s.before, "the terminal is not as it was")
    s.text = b""
    s.process.send_signal(signal.SIGCONT)
    s.wait_picture(lambda p: p[0].startswith("hearth "), "a picture after it went on")
    s.key(b"q")
    s.text += LEAVE  # the one cut off above
    expect(s.text.count(ENTER) == 1, "entered once more")
    s.process.wait(20)
    s.text = s.text.replace(LEAVE, b"", 1)
    s.end(0)


@test
def a_silent_daemon_is_shown_as_unresponsive(t):
    d = t.daemon()
    s = top_screen(t, d)
    s.wait_picture(lambda p: " running " in p[0], "a picture")
    d.signal(signal.SIGSTOP)
    s.wait_picture(lambda p: " unresponsive " in p[0], "unresponsive")
    d.signal(signal.SIGCONT)
    s.text = s.text[:s.text.index(ENTER) + len(ENTER)]
    s.wait_picture(lambda p: " running " in p[0], "running again")
    s.key(b"q")
    s.end(0)


@test
def a_daemon_that_ends_ends_it_with_3(t):
    d = t.daemon()
    s = top_screen(t, d)
    s.wait_picture(lambda p: " running " in p[0], "a picture")
    d.kill()
    s.end(3)
    expect(f"hearth: the daemon at {d.socket} has ended".encode() in s.text.split(LEAVE)[1], f"{s.text}")


@test
def without_a_daemon_it_exits_3_and_without_a_terminal_it_prints_lines(t):
    r = t.run("hearth", "top", "--socket", t.dir / "s", code=3)
    expect("no daemon at" in r.err and r.out == "", f"{r}")
    d = t.daemon()
    p = t.start("hearth", "top", "--socket", d.socket, "--interval", "100ms", stdout=subprocess.PIPE)
    lines = [p.stdout.readline().split() for _ in range(24)]
    expect(lines[0][:2] == [b"REQ/S", b"TOK/S"] and lines[21][0] == b"REQ/S", f"{lines}")
    expect(all(len(line) == len(lines[0]) for line in lines), f"{lines}")
    p.send_signal(signal.SIGINT)
    expect(p.wait(20) == 130, f"exit status {p.returncode}")


@test
def once_prints_one_picture_and_json_one_object(t):
    d = t.daemon()
    out = d.hearth("top", "--once", "--interval", "100ms").out
    expect(out.startswith("hearth ") and out.count("\n") == 9 and "\x1b" not in out, f"{out!r}")
    figures = json.loads(d.hearth("top", "--once", "--json", "--interval", "100ms").out)
    expect(figures["state"] == "running" and figures["requests_per_s"] == 0, f"{figures}")
    expect([m["name"] for m in figures["models"]] == ["ember"], f"{figures}")
    expect(abs(figures["time_ms"] / 1000 - time.time()) < 60, f"{figures}")
    p = t.start("hearth", "top", "--socket", d.socket, "--json", "--interval", "100ms",
                stdout=subprocess.PIPE)
    for _ in range(3):
        expect(json.loads(p.stdout.readline())["connections"] == 1, "not an object a line")
    d.kill()
    p.stdout.read()
    expect(p.wait(20) == 3, f"exit status {p.returncode}")


@test
def lines_go_on_after_a_daemon_that_was_silent(t):
    fake = Fake(t)
    p = t.start("hearth", "top", "--socket", fake.socket, "--interval", "100ms",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.readline()
    fake.do("mute")
    expect(p.stderr.readline() == b"hearth: the daemon does not answer: waiting\n", "it said nothing")
    fake.do("unmute")
    for _ in range(30):
        p.stdout.readline()
    fake.do("goaway")
    expect(p.wait(20) == 3, f"exit status {p.returncode}")
    fake.stop()


@test
def full_disks_closed_pipes_and_bad_intervals(t):
    d = t.daemon()
    for args in ((), ("--json",), ("--once",)):
        with open("/dev/full", "wb") as full:
            p = t.start("hearth", "top", "--socket", d.socket, "--interval", "100ms", *args,
                        stdout=full, stderr=subprocess.PIPE)
            expect(p.wait(20) == 1 and b"No space left" in p.stderr.read(), f"{args}: {p.returncode}")
    p = t.start(program("hearth"), "top", "--socket", d.socket, "--interval", "100ms",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.readline()
    p.stdout.close()
    expect(p.wait(20) == -signal.SIGPIPE and p.stderr.read() == b"", f"{p.returncode}")
    for value, says in (("1ms", "at least 100ms"), ("0s", "more than 0"), ("1", "with its unit")):
        r = d.hearth("top", "--interval", value, code=2)
        expect(says in r.err, f"{r}")
