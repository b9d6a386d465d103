"""What tests of hearthfs share: a made-up daemon behind the mount, readers, other users."""
import errno
import os
import shutil
import subprocess
import threading

from .harness import BUILD, Failure, Skip, expect, wait_for

STATE = "models/alpha/state"
PRELOAD = "models/alpha/preload"
WAIT = "models/alpha/wait"
HOLD = "models/alpha/hold"
PINNED = "models/alpha/pinned"
KEEP_ALIVE = "models/alpha/keep_alive"
NOBODY = 65534


class Fake:
    """A status-daemon on a socket in the test's folder, obeying commands."""

    def __init__(self, t, *flags, uid=None):
        path = BUILD / "tests" / "status-daemon"
        if not path.exists():
            raise Skip("status-daemon is not built")
        self.socket = t.dir / "s"
        args = [path]
        if uid is not None:  # who may not come where the build is
            args = [t.need_program("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
                    shutil.copy(path, t.dir / "status-daemon")]
            os.chmod(t.dir, 0o777)
        self.process = t.start(*args, *flags, self.socket, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline().strip()
        expect(line and line != "what?", f"status-daemon answered {line!r}")
        return line

    def do(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def count(self, what):
        return int(self.do(f"count {what}"))

    def stop(self):
        self.process.stdin.close()
        expect(self.process.wait(20) == 0, "status-daemon failed")
        self.process.stdout.close()
        self.process.stdin = self.process.stdout = None


def fails(error, action):
    """The action must fail with this errno."""
    try:
        action()
    except OSError as e:
        expect(e.errno == error, f"expected {errno.errorcode[error]}, got {e}")
        return
    raise Failure(f"expected {errno.errorcode[error]}, and it went well")


def names(mount, folder=""):
    return sorted(mount.in_time(lambda: os.listdir(mount.path / folder)))


def until(mount, name, text):
    wait_for(lambda: mount.read(name) == text, f"{name} to say {text!r}")


class Reader:
    """A read of a file on a thread: what it gave, or how it failed."""

    def __init__(self, path):
        self.value = None
        self.thread = threading.Thread(target=self._read, args=(path,), daemon=True)
        self.thread.start()

    def _read(self, path):
        fd = os.open(path, os.O_RDONLY)
        try:
            self.value = os.read(fd, 4096).decode()
        except OSError as e:
            self.value = e.errno
        finally:
            os.close(fd)

    def result(self):
        self.thread.join(20)
        expect(not self.thread.is_alive(), "the read does not come back")
        return self.value

    def blocked(self):
        self.thread.join(0.3)
        return self.thread.is_alive()


def errno_of(action):
    try:
        action()
    except OSError as e:
        return e.errno
    return 0


# Does what its arguments say as another user: uid, gid, groups ("-": none), a file, a text to write
# ("-": open it for reading). Prints what was read, or the errno.
AS_USER = """
import os, sys
uid, gid, groups, path, text = sys.argv[1:]
os.setgroups([int(g) for g in groups.split(",") if g != "-"])
os.setgid(int(gid))
os.setuid(int(uid))
try:
    fd = os.open(path, os.O_RDONLY if text == "-" else os.O_WRONLY)
    print(os.read(fd, 4096).decode() if text == "-" else os.write(fd, text.encode()))
except OSError as e:
    print(e.errno)
"""


def as_user(t, m, uid, gid, groups, name, text):
    return t.run("/usr/bin/python3", "-c", AS_USER, uid, gid, groups, m.path / name, text).out.strip()
