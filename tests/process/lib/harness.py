"""Process tests: real programs on temporary sockets, and nothing of them left behind.

A test is a function in tests/process/test_AREA.py under @test; it gets a Bench (`t`) with a folder of
its own, and fails by an exception. Each test runs in a process of its own under a supervisor that
holds it to LIMIT_S, takes in every orphan (it is their subreaper), and fails the test for processes,
mounts or sanitizer reports that it leaves. Output is TAP.
"""
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from . import wire

LIMIT_S = 60          # a test, all in all
PROGRAM_LIMIT_S = 30  # one program that runs to its end
START_LIMIT_S = 20    # until READY, until mounted
STOP_LIMIT_S = 20     # from SIGTERM to the exit
WHY_CHARACTERS = 8000  # of a failure's text; as JSON it must fit a pipe's 64 KiB

ROOT = Path(__file__).resolve().parents[3]
BUILD = Path(os.environ.get("HEARTH_BUILD", ROOT / "build")).resolve()
GOLDEN = Path(os.environ.get("HEARTH_GOLDEN", ROOT.parent / "shared" / "golden"))

# What hearthd may say on stderr in any test; a test that expects more says so (Daemon.expect_log).
ROUTINE_LOG = [
    r"hearthd: listening on /\S+",
    r"hearthd: model \S+ is (cold|queued|loading|warming|ready|draining)",
    r"hearthd: draining: (SIGTERM|SIGINT|idle)",
    r"hearthd: stopped",
    r"hearthd: model \S+ is (queued|loading|warming|ready|draining|cold)",
]

_tests = []


class Skip(Exception):
    """The test cannot run here; the text says why."""


class Failure(AssertionError):
    """Something did not hold; the text says what."""


def test(function):
    _tests.append(function)
    return function


def expect(condition, sentence):
    if not condition:
        raise Failure(sentence)


def wait_for(condition, what, limit_s=START_LIMIT_S):
    """Asks until the condition holds and returns what it returned."""
    end = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failure(f"waited {limit_s} s in vain: {what}")
        time.sleep(0.01)


def listening(path):
    """Whether somebody listens on the socket: between bind and listen it is there and refuses."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as sockets:
        lines = [line.split(None, 7) for line in sockets]
    return any(len(line) == 8 and line[7].strip() == str(path) and line[3] == "00010000"
               for line in lines)


class Result:
    def __init__(self, args, code, out, err):
        self.args, self.code, self.out, self.err = args, code, out, err

    def __repr__(self):
        return (f"{' '.join(map(str, self.args))}\nexit status {self.code}\n"
                f"stdout: {self.out!r}\nstderr: {self.err!r}")


def program(name):
    """A built program by its name."""
    folder = {"hearthd": "daemon", "hearth": "cli", "hearthfs": "fs", "hearth-bench": "bench",
              "make-model": "bench", "pool-client": "tests", "slow-disk": "tests"}[name]
    path = BUILD / folder / name
    if not path.exists():
        raise Failure(f"{path} is not built")
    return path


class Bench:
    """What a test has: a folder, programs, a daemon, a mount."""

    def __init__(self, folder):
        self.dir = folder
        self.daemons, self.mounts, self.programs = [], [], []
        # No configuration, state or socket of the machine's own gets into a test.
        for name in ("HEARTH_SOCKET", "STATE_DIRECTORY", "NOTIFY_SOCKET", "JOURNAL_STREAM",
                     "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC"):
            os.environ.pop(name, None)
        for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HOME"):
            path = folder / name.lower()
            path.mkdir(mode=0o700)
            os.environ[name] = str(path)

    def write(self, name, text):
        """A file in the test's folder."""
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def golden(self, name):
        """A file of the golden data; without it the test is skipped."""
        path = GOLDEN / name
        if not path.exists():
            raise Skip(f"no golden data: {name} (looked in $HEARTH_GOLDEN, else ../shared/golden)")
        return path

    def need_root(self):
        if os.geteuid() != 0:
            raise Skip("needs root")

    def need_fuse(self):
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            raise Skip("/dev/fuse is missing or may not be opened")

    def need_program(self, name, remedy=None):
        """A program's path; without it the test is skipped, and the reason names the remedy."""
        path = shutil.which(name)
        if not path:
            raise Skip(f"{name} is not installed" + (f"; '{remedy}' installs it" if remedy else ""))
        return path

    def run(self, *args, code=0, err=None, input=None, limit_s=PROGRAM_LIMIT_S, env=None):
        """Runs a program to its end: a built one by name, else a path or a command. The exit status
        must be `code` (None: any); stderr must match the regular expression `err` wholly (None:
        empty after a success, anything after a failure)."""
        with contextlib.suppress(KeyError):
            args = (program(args[0]), *args[1:])
        data = input.encode() if isinstance(input, str) else input
        where = {"input": data} if data is not None else {"stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run([str(a) for a in args], capture_output=True, timeout=limit_s,
                                  env={**os.environ, **(env or {})}, check=False, **where)
        except subprocess.TimeoutExpired as late:
            raise Failure(f"did not end within {limit_s} s: {args}\n{late.stdout}\n{late.stderr}")
        r = Result(args, done.returncode, done.stdout.decode("utf-8", "replace"),
                   done.stderr.decode("utf-8", "replace"))
        expect(code is None or r.code == code, f"expected exit status {code}\n{r}")
        if err is not None:
            expect(re.fullmatch(err, r.err, re.DOTALL), f"expected on stderr: {err}\n{r}")
        elif r.code == 0:
            expect(r.err == "", f"expected nothing on stderr\n{r}")
        return r

    def start(self, *args, **more):
        """Starts a program in the background; it is killed at the end of the test. Its stderr goes to
        a file in the test's folder unless the caller says where."""
        with contextlib.suppress(KeyError):
            args = (program(args[0]), *args[1:])
        more.setdefault("stdin", subprocess.DEVNULL)
        with open(self.dir / f"program{len(self.programs)}.stderr", "wb") as log:
            more.setdefault("stderr", log)
            process = subprocess.Popen([str(a) for a in args], **more)
        self.programs.append(process)
        return process

    def daemon(self, *flags, **more):
        """A hearthd that is READY; see Daemon."""
        daemon = Daemon(self, *flags, **more)
        self.daemons.append(daemon)
        daemon.wait_ready()
        return daemon

    def mount(self, daemon_or_socket, *flags):
        """A mounted hearthfs: its mount point."""
        self.need_fuse()
        mount = Mount(self, getattr(daemon_or_socket, "socket", daemon_or_socket), *flags)
        self.mounts.append(mount)
        mount.wait_mounted()
        return mount

    def finish(self):
        """Stops everything; a stop that goes wrong is told by the caller like any failure."""
        errors = []
        for stop in ([m.stop for m in self.mounts] + [d.finish for d in self.daemons] +
                     [lambda p=p: _kill(p) for p in self.programs]):
            try:
                stop()
            except Exception as error:  # the others have to be stopped all the same
                errors.append(str(error))
        if errors:
            raise Failure("\n".join(errors))


def _kill(process):
    if process.poll() is None:
        process.kill()
    process.wait(STOP_LIMIT_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


class Daemon:
    """A hearthd on a socket in the test's folder.

    models: files that are linked into its models directory; config: YAML text; env: more environment.
    stop() sends SIGTERM and wants exit status 0; whatever is on stderr must be routine or expected.
    at: a daemon that has ended, whose socket, models and state this one takes over."""

    def __init__(self, t, *flags, models=(), config=None, env=None, name="d", at=None):
        self.t = t
        self.dir = t.dir / name
        self.dir.mkdir()
        self.socket = self.dir / "s"
        self.status_socket = Path(f"{self.socket}.status")
        self.models_dir = self.dir / "models"
        state_dir = self.dir / "state"
        if at:
            self.socket, self.status_socket = at.socket, at.status_socket
            self.models_dir, state_dir = at.models_dir, at.dir / "state"
        self.models_dir.mkdir(exist_ok=True)
        for model in models:
            (self.models_dir / Path(model).name).symlink_to(Path(model).resolve())
        self.expected_log = list(ROUTINE_LOG)
        self.expected_code = 0
        self.log_path = self.dir / "stderr"
        self.notices = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.dir / "notify"))
        # Read all the time, as systemd does: the kernel keeps a few only, and sd_notify() would wait.
        threading.Thread(target=self._read_notices, daemon=True).start()
        args = [program("hearthd"), "--socket", self.socket, "--models", self.models_dir,
                "--state-dir", state_dir]
        if config is not None:
            args += ["--config", t.write(f"{name}/hearth.yaml", config)]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [str(a) for a in (*args, *flags)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(self.dir / "notify"), **(env or {})})
        self.pid = self.process.pid

    def log(self):
        return self.log_path.read_text("utf-8", "replace")

    def expect_log(self, *patterns):
        """Lines of stderr that this test expects, as regular expressions."""
        self.expected_log += patterns

    def _read_notices(self):
        with contextlib.suppress(OSError):
            while notice := self._notify.recv(4096):
                self.notices += notice.decode().split("\n")

    def wait_notice(self, word, limit_s=START_LIMIT_S):
        """Until an sd_notify line begins with `word`; returns the line."""
        def seen():
            line = next((n for n in self.notices if n.startswith(word)), None)
            expect(line or self.process.poll() is None,
                   f"hearthd ended with {self.process.poll()}: {self.log()}")
            return line
        return wait_for(seen, f"{word} from hearthd; its stderr: {self.log()}", limit_s)

    def wait_ready(self):
        self.wait_notice("READY=1")

    def client(self, **more):
        """A raw connection to the main socket."""
        return wire.Client(self.socket, **more)

    def status_client(self, **more):
        """A raw connection to the status socket."""
        return wire.Client(self.status_socket, **more)

    def hearth(self, command, *args, **more):
        """Runs `hearth COMMAND --socket ... ARGS` to its end."""
        return self.t.run("hearth", command, "--socket", self.socket, *args, **more)

    def metric(self, name):
        """A metric's number, asked over the status socket."""
        with self.status_client() as client:
            replies = client.ask("METRICS", ("NAME", "prometheus"))
        match = re.search(rf"^hearth_{re.escape(name)} (\S+)$", wire.text_of(replies), re.MULTILINE)
        expect(match, f"no metric {name} in {replies}")
        return float(match[1])

    def alive(self):
        """Fails unless the daemon runs and answers."""
        expect(self.process.poll() is None,
               f"hearthd ended with {self.process.poll()}: {self.log()}")
        with self.client() as client:
            replies = client.ask("NULL")
        expect([r.type for r in replies] == ["DONE"], f"null is answered by {replies}")

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, limit_s=STOP_LIMIT_S):
        """Until it has ended: its exit status."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Failure(f"hearthd did not end within {limit_s} s; its stderr: {self.log()}")
        self.process.stdout.close()
        return code

    def stop(self):
        """SIGTERM, and the exit status must be 0."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.wait()
        expect(code == self.expected_code, f"hearthd ended with {code}; its stderr: {self.log()}")

    def kill(self):
        """SIGKILL, as an expected end."""
        self.expected_code = -signal.SIGKILL
        self.signal(signal.SIGKILL)
        self.wait()

    def finish(self):
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGCONT)
            self.stop()
            self._check_log()
        finally:
            _kill(self.process)
            with contextlib.suppress(OSError):
                self._notify.shutdown(socket.SHUT_RDWR)

    def _check_log(self):
        for line in self.log().splitlines():
            expect(any(re.fullmatch(p, line) for p in self.expected_log),
                   f"hearthd wrote something unexpected: {line}")


class Mount:
    """A hearthfs; `path` is its mount point."""

    def __init__(self, t, socket_path, *flags):
        self.path = t.dir / f"mount{len(t.mounts)}"
        self.path.mkdir()
        self.log_path = t.dir / f"mount{len(t.mounts)}.stderr"
        self.args = [program("hearthfs"), "--socket", socket_path, *flags, self.path]
        self._start()

    def _start(self):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([str(a) for a in self.args], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)

    def start(self):
        """Once more, after it was killed: until the new mount is there in the old one's place."""
        def answers():  # a dead one's attributes may still be cached, its names are not
            with contextlib.suppress(OSError):
                return "version" in os.listdir(self.path)
        self._start()
        self.wait_mounted(answers)

    def mounted(self):
        return str(self.path) in _mounts_under(self.path)

    def wait_mounted(self, mounted=None):
        def seen():
            expect(self.process.poll() is None,
                   f"hearthfs ended with {self.process.poll()}: {self.log_path.read_text()}")
            return (mounted or self.mounted)()
        wait_for(seen, "hearthfs to mount")

    def read(self, name):
        """A file's text; a read that hangs for 10 s fails."""
        return self.in_time(lambda: (self.path / name).read_text())

    def write(self, name, text):
        def put():
            fd = os.open(self.path / name, os.O_WRONLY)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        self.in_time(put)

    def in_time(self, action, limit_s=10):
        """Runs it on a thread, so that a filesystem that hangs does not hang the test."""
        box = {}

        def work():
            try:
                box["value"] = action()
            except BaseException as error:
                box["error"] = error
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(limit_s)
        if "error" in box:
            raise box["error"]
        expect("value" in box, f"hearthfs did not answer within {limit_s} s")
        return box["value"]

    def stop(self):
        """SIGTERM: it unmounts and ends with 0 and nothing on stderr."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(STOP_LIMIT_S)
            text = self.log_path.read_text()
            expect(code == 0, f"hearthfs ended with {code}: {text}")
            expect(text == "", f"hearthfs wrote something unexpected: {text}")
            expect(not self.mounted(), "hearthfs ended and left its mount")
        finally:
            _kill(self.process)


def _mounts_under(folder):
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split(" ")[4].replace("\\040", " ") for line in file]
    return [p for p in points if p == str(folder) or p.startswith(f"{folder}/")]


# ---- one test under its supervisor ----

def _sanitizer_options(folder):
    """Reports go to files: a program's stderr may be anywhere, and nobody may look at it."""
    for name, options in (("ASAN_OPTIONS", "detect_leaks=1"), ("UBSAN_OPTIONS", "print_stacktrace=1"),
                          ("TSAN_OPTIONS", ""), ("LSAN_OPTIONS", "")):
        given = os.environ.get(name, "")
        os.environ[name] = ":".join(o for o in (given, options, f"log_path={folder}/report") if o)


def _verdict(action):
    """Runs a part of a test; what it came to."""
    try:
        action()
    except Skip as skip:
        return {"ok": True, "skip": str(skip)}
    except Failure as failure:
        at = traceback.extract_tb(failure.__traceback__)
        where = next((f for f in reversed(at) if f.filename != __file__), at[-1])
        return {"ok": False, "why": f"{Path(where.filename).name}:{where.lineno}: {failure}"}
    except BaseException:
        return {"ok": False, "why": traceback.format_exc()}
    return {"ok": True}


def _send(out, verdict):
    """A verdict as JSON into a pipe that is read only later: it has to fit."""
    if "why" in verdict:
        verdict = {**verdict, "why": verdict["why"][:WHY_CHARACTERS]}
    os.write(out, json.dumps(verdict).encode())


def _child(function, folder, out):
    """The test's own process."""
    _sanitizer_options(folder)
    t = Bench(folder / "t")
    verdict, ending = _verdict(lambda: function(t)), _verdict(t.finish)
    if not ending["ok"]:
        why = [v["why"] for v in (verdict, ending) if "why" in v]
        verdict = {"ok": False, "why": "\n".join(why)}
    _send(out, verdict)


def _children():
    path = f"/proc/self/task/{os.getpid()}/children"
    return [int(p) for p in Path(path).read_text().split()]


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def _reap(pid):
    """Whether this child had ended by itself; one that had not is killed."""
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return True
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        return True
    return False


def _sweep():
    """Kills whatever was left to this process; the names of what still ran."""
    names = []
    for _ in range(100):  # a killed one's children come to us in turn
        pids = _children()
        if not pids:
            break
        for pid in pids:
            command = _command(pid)
            if not _reap(pid):
                names.append(command or f"process {pid}")
    return names


def _unmount(folder):
    points = _mounts_under(folder)
    for point in reversed(points):
        subprocess.run(["fusermount3", "-uz", point], check=False, stderr=subprocess.DEVNULL)
        if point in _mounts_under(folder):
            subprocess.run(["umount", "-l", point], check=False, stderr=subprocess.DEVNULL)
    return points


def _await(pid, read_fd):
    """The verdict of the test's process, or what became of it."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            text = os.read(read_fd, 1 << 20)
            return json.loads(text) if text else {"ok": False, "why": f"ended with status {status}"}
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"ok": False, "why": f"not done within {LIMIT_S} s"}


def _supervise(function):
    """Runs one test; its verdict with what it left behind."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    folder = Path(tempfile.mkdtemp(prefix="hearth-test-")).resolve()
    (folder / "t").mkdir()
    os.chmod(folder, 0o755)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _child(function, folder, write_fd)
        os._exit(0)
    os.close(write_fd)
    verdict = _await(pid, read_fd)
    left = _sweep()
    mounts = _unmount(folder)
    why = [verdict["why"]] if "why" in verdict else []
    if left:
        why.append("left processes: " + ", ".join(left))
    if mounts:
        why.append("left mounts: " + ", ".join(mounts))
    for report in sorted(folder.glob("report*")):
        if report.stat().st_size:
            why.append("sanitizer report:\n" + report.read_text("utf-8", "replace")[:20000])
    shutil.rmtree(folder, ignore_errors=True)
    if why:
        return {"ok": False, "why": "\n".join(why)}
    return verdict


def _spawn(function):
    """A supervisor as a process of its own: (pid, where its verdict comes)."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(read_fd)
        _send(write_fd, _supervise(function))
        os._exit(0)
    os.close(write_fd)
    return pid, read_fd


def _name(function):
    area = function.__module__.removeprefix("test_")
    return f"{area}::{function.__name__}"


def _print(number, name, verdict, seconds):
    word = "ok" if verdict["ok"] else "not ok"
    tail = f" # SKIP {verdict['skip']}" if "skip" in verdict else f" ({seconds:.2f}s)"
    print(f"{word} {number} - {name}{tail}")
    for line in verdict.get("why", "").splitlines():
        print(f"# {line}")
    sys.stdout.flush()


def _verdict_of(read_fd):
    text = b""
    while data := os.read(read_fd, 1 << 16):
        text += data
    os.close(read_fd)
    try:
        return json.loads(text)
    except ValueError:
        return {"ok": False, "why": f"the supervisor was lost: {text!r}"}


def main(patterns, jobs):
    """Runs the tests whose names contain one of the patterns (none: all); True if all passed."""
    chosen = [f for f in _tests if not patterns or any(p in _name(f) for p in patterns)]
    print(f"1..{len(chosen)}")
    running, number, good = {}, 0, True
    waiting = list(chosen)
    while waiting or running:
        while waiting and len(running) < jobs:
            function = waiting.pop(0)
            pid, read_fd = _spawn(function)
            running[pid] = (function, read_fd, time.monotonic())
        pid, _ = os.wait()
        function, read_fd, start = running.pop(pid)
        verdict = _verdict_of(read_fd)
        number += 1
        _print(number, _name(function), verdict, time.monotonic() - start)
        good = good and verdict["ok"]
    return good
