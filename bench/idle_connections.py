#!/usr/bin/python3
"""What an idle connection costs the daemon in memory: bench/idle_connections.py [--build DIR] [N...]

Starts a hearthd of its own, opens connections up to each N (default 1000 10000), lets each carry one
request of kind `null`, leaves them idle and reads the daemon's anonymous memory (RssAnon of
/proc/PID/status). One line a step: connections, bytes, bytes a connection
over the start. The kernel's own memory for a socket is not in it.
"""
import argparse
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "process"))
sys.dont_write_bytecode = True

from lib.wire import Client, frame  # noqa: E402

CONFIG = """\
limits:
  connections: 16384
  connections_per_uid: 16384
"""
START_S = 20
SETTLE_S = 1.0


def anonymous_bytes(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) * 1024


def started(build, folder):
    """A hearthd that listens."""
    config, path = folder / "hearth.yaml", folder / "s"
    config.write_text(CONFIG, encoding="utf-8")
    daemon = subprocess.Popen([build / "daemon" / "hearthd", "--socket", path, "--config", config,
                               "--models", folder, "--state-dir", folder],
                              stderr=subprocess.DEVNULL)
    until = time.monotonic() + START_S
    while not Path(f"{path}.status").exists() and daemon.poll() is None:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return daemon, str(path)


def used_once(path):
    client = Client(path)
    client.send(frame("NULL", 1))
    client.receive()
    return client


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 10000])
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    with tempfile.TemporaryDirectory() as name:
        daemon, path = started(args.build, Path(name))
        try:
            clients = [used_once(path)]
            time.sleep(SETTLE_S)
            first = anonymous_bytes(daemon.pid)
            print(f"{1:6d} connections {first:10d} bytes")
            for count in sorted(args.counts):
                clients += [used_once(path) for _ in range(count - len(clients))]
                time.sleep(SETTLE_S)
                now = anonymous_bytes(daemon.pid)
                print(f"{count:6d} connections {now:10d} bytes "
                      f"{(now - first) / (count - 1):8.1f} a connection")
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


main()
