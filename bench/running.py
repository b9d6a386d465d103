"""What the measuring scripts beside it share: a hearthd of their own, `hearth-bench serve` on it, and
the comparison of interleaved pairs."""
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_S = 20
CONFIDENCE = 0.95

# One uid may take all there is: for measuring with thousands of connections.
WIDE_LIMITS = ("limits: {connections: 16384, connections_per_uid: 16384, queue: 16384, "
               "queue_per_uid: 16384}\n")


def default_model():
    """stories260K where the golden data is, else ember: (name, files)."""
    golden = Path(os.environ.get("HEARTH_GOLDEN", ROOT.parent / "shared" / "golden"))
    path = golden / "models" / "stories260K-f32.gguf"
    return (path.stem, [path]) if path.exists() else ("ember", [])


def interval(values):
    """The median of the values and an interval that holds it with at least 95 % where there are six
    or more: (median, low, high, confidence). Free of any distribution: the k-th from either end."""
    values = sorted(values)
    n = len(values)

    def outside(k):
        return 2 * sum(math.comb(n, i) for i in range(k)) / 2 ** n

    k = 1
    while k < n // 2 and 1 - outside(k + 1) >= CONFIDENCE:
        k += 1
    return statistics.median(values), values[k - 1], values[n - k], 1 - outside(k) if n > 1 else 0


def shown(values, digits=3):
    median, low, high, confidence = interval(values)
    return (f"{median:.{digits}f}  [{low:.{digits}f}, {high:.{digits}f}], {len(values)} of them, "
            f"{100 * confidence:.1f} %")


class Daemon:
    """A hearthd in a folder of its own; a context."""

    def __init__(self, config, models=(), build=None):
        self.build = Path(build or ROOT / "build")
        self.folder = Path(tempfile.mkdtemp(prefix="hearth-bench-"))
        self.socket = self.folder / "s"
        self.status_socket = self.folder / "s.status"
        (self.folder / "models").mkdir()
        for model in models:
            (self.folder / "models" / Path(model).name).symlink_to(Path(model).resolve())
        (self.folder / "hearth.yaml").write_text(config, encoding="utf-8")
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [self.build / "daemon" / "hearthd", "--config", self.folder / "hearth.yaml",
                 "--socket", self.socket, "--models", self.folder / "models",
                 "--state-dir", self.folder], stdin=subprocess.DEVNULL, stderr=log)
        self.pid = self.process.pid

    def __enter__(self):
        until = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                said = (self.folder / "log").read_text("utf-8", "replace").strip()
                self.__exit__()
                sys.exit(f"hearthd did not start: {said.splitlines()[-1] if said else 'no word'}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self):
        return subprocess.run([self.build / "cli" / "hearth", "status", "--socket", self.socket],
                              capture_output=True, check=False).stdout.find(b"running") >= 0

    def open_to_all(self):
        """Other users get in: the folder and both sockets."""
        self.folder.chmod(0o755)
        self.socket.chmod(0o666)
        self.status_socket.chmod(0o666)

    def counters(self):
        """All counters, by name."""
        text = subprocess.run([self.build / "cli" / "hearth", "stats", "--socket", self.socket],
                              capture_output=True, check=True, text=True).stdout
        pairs = (line.split() for line in text.splitlines())
        return {p[0]: float(p[1]) for p in pairs if len(p) == 2}

    def start_serve(self, *args, prefix=()):
        """`hearth-bench serve` in the background; see serve_result()."""
        handle, path = tempfile.mkstemp(suffix=".json")
        os.chmod(path, 0o666)
        os.close(handle)
        command = [*prefix, self.build / "bench" / "hearth-bench", "serve", "--socket", self.socket,
                   "--json", path, *args]
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        process.json_path = path
        return process

    def serve_result(self, process):
        """Waits for it: its JSON."""
        _, said = process.communicate()
        try:
            if process.returncode != 0:
                sys.exit(f"hearth-bench serve: {said.strip()}")
            return json.loads(Path(process.json_path).read_text(encoding="utf-8"))
        finally:
            os.unlink(process.json_path)

    def serve(self, *args):
        return self.serve_result(self.start_serve(*args))
