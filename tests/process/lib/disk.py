"""A disk on a bad day."""
import signal
import subprocess

from .harness import wait_for


class Disk:
    """A file system of its own that holds one file; it is slow for `delay_us` each read, fails from the
    offset `fails_from` on, and can be stopped; reads after the first `hang_after` and, with
    `hang_flush`, closes hang until go_on()."""

    def __init__(self, t, path, name, delay_us=0, fails_from=-1, hang_after=-1, hang_flush=False):
        t.need_fuse()
        self.dir = t.dir / f"disk-{name}"
        self.dir.mkdir()
        self.file = self.dir / name
        self.process = t.start("slow-disk", path, self.dir, name, delay_us, fails_from, hang_after,
                               *(["flush"] if hang_flush else []))
        wait_for(self.file.exists, "the disk")

    def hang(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGUSR1)
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go_on()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
