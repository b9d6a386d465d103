"""A terminal for a program, and what the program writes there."""
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios

from lib.harness import expect, wait_for

ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
PICTURE = re.compile(rb"\x1b\[H(.*?)\x1b\[K\x1b\[J", re.DOTALL)


class Screen:
    """A program on a terminal of its own, and what it has written there."""

    def __init__(self, t, *args, columns=80, rows=24):
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        self.text = b""
        # A session of its own, so that the keys' signals reach it.
        self.process = t.start(*args, stdin=self.slave, stdout=self.slave, stderr=self.slave,
                               start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, limit_s=0.05):
        if select.select([self.master], [], [], limit_s)[0]:
            with contextlib.suppress(OSError):
                self.text += os.read(self.master, 65536)
        return self.text

    def pictures(self):
        return [[line.decode() for line in p.split(b"\x1b[K\r\n")] for p in PICTURE.findall(self.read())]

    def wait_picture(self, condition, what):
        """Until a whole picture is as wanted: that picture."""
        return wait_for(lambda: next((p for p in self.pictures() if condition(p)), None),
                        f"{what}; the terminal has {self.text[-2000:]!r}")

    def key(self, key):
        os.write(self.master, key)

    def end(self, code):
        """Its end with the exit status, and the terminal as it was."""
        wait_for(lambda: self.read() is not None and self.process.poll() is not None, "the end")
        while select.select([self.master], [], [], 0.1)[0]:
            self.read()
        expect(self.process.returncode == code, f"exit status {self.process.returncode}: {self.text!r}")
        expect(termios.tcgetattr(self.slave) == self.before, "the terminal is not as it was")
        entered, left = self.text.count(ENTER), self.text.count(LEAVE)
        expect(entered == left, f"entered {entered} times, left {left} times")
        os.close(self.master)
        os.close(self.slave)
