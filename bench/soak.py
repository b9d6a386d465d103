#!/usr/bin/python3
"""A long run of everything at once: bench/soak.py [--build DIR] [--minutes 10] [--models DIR]

Starts a hearthd of its own and lets clients of every kind at it: those that read their answers and
compare them with what the same request gave alone, those that cancel, vanish, stop reading, send
nonsense, load and unload models, and look at the state. Every few seconds it prints the daemon's
anonymous memory, file descriptors and threads. Exit status 1 where an answer differed, the daemon
ended, or memory or descriptors at the end stand clearly above what they were after the first
quarter.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "process"))
sys.dont_write_bytecode = True

from lib.wire import Client, Closed, MAGIC, text_of  # noqa: E402

CONFIG = """\
memory_budget: 64MiB
engine: {kv_budget: 4MiB}
"""
START_S = 20
SAMPLE_S = 5
PROMPTS = ["Once upon a time", "The fox", "A small boat on the lake", "Lily had a red ball"]
# Above the first quarter's peak by more than this is growth: an allocator's arenas breathe.
GROWTH_BYTES = 8 << 20
GROWTH_DESCRIPTORS = 8


def greedy(model, prompt, tokens):
    return (("MODEL", model), ("PROMPT", prompt), ("MAX_TOKENS", tokens), ("TEMPERATURE", 0.0),
            ("IGNORE_EOS", 1))


class Soak:
    def __init__(self, path, models):
        self.path, self.models = path, models
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counts = {}
        self.wrong = []
        self.alone = {}

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def learn(self):
        """Every request once, with nobody else there."""
        with Client(self.path) as client:
            for model in self.models:
                for prompt in PROMPTS:
                    replies = client.ask("COMPLETE", *greedy(model, prompt, 48))
                    assert replies[-1].type == "DONE", replies[-1]
                    self.alone[model, prompt] = text_of(replies)

    def reads(self, rng, client):
        model, prompt = rng.choice(self.models), rng.choice(PROMPTS)
        replies = client.ask("COMPLETE", *greedy(model, prompt, 48))
        end = replies[-1]
        if end.type == "ERROR":
            self.count("error " + end.get("CODE"))
        elif text_of(replies) != self.alone[model, prompt]:
            with self.lock:
                self.wrong.append((model, prompt, text_of(replies)))
        else:
            self.count("equal answers")

    def cancels(self, rng, client):
        request = client.request("COMPLETE", *greedy(rng.choice(self.models), rng.choice(PROMPTS), 200))
        time.sleep(rng.random() * 0.02)
        client.request("CANCEL", request_id=request)
        self.count("cancelled, ended as " + str(client.replies(request)[-1].get("REASON")))

    def vanishes(self, rng, _):
        with Client(self.path) as client:
            for _ in range(4):
                client.request("COMPLETE", *greedy(rng.choice(self.models), rng.choice(PROMPTS), 200))
            time.sleep(rng.random() * 0.02)
        self.count("vanished")

    def stops_reading(self, rng, client):
        options = greedy(rng.choice(self.models), rng.choice(PROMPTS), 120)
        request = client.request("COMPLETE", *options, ("CREDIT", 16))
        time.sleep(rng.random())
        client.request("CREDIT", ("CREDIT", 1 << 20), request_id=request)
        self.count("slow, ended as " + client.replies(request)[-1].type)

    def talks_nonsense(self, rng, _):
        client = Client(self.path, hello=False)
        try:
            client.send(rng.choice([b"", MAGIC, MAGIC + b"\x00" * 5]) + rng.randbytes(rng.randrange(200)))
            client.sock.shutdown(1)
            client.rest()
        except OSError:
            pass
        client.close()
        self.count("nonsense")

    def loads(self, rng, client):
        kind = rng.choice(["WARM", "WARM", "UNLOAD"])
        client.ask(kind, ("MODEL", rng.choice(self.models)))
        self.count(kind.lower())
        time.sleep(0.05)

    def looks(self, rng, _):
        with Client(f"{self.path}.status") as client:
            client.ask(rng.choice(["STATUS", "METRICS", "MODELS"]))
        self.count("looks")
        time.sleep(0.02)

    def run(self, behave, seed):
        rng = random.Random(seed)
        client = None
        while not self.stop.is_set():
            try:
                client = client or Client(self.path)
                behave(rng, client)
            except (Closed, OSError) as error:
                self.count(f"{behave.__name__}: {type(error).__name__}")
                client = client and client.close()
        if client:
            client.close()

    def start(self):
        kinds = [self.reads] * 6 + [self.cancels] * 2 + [self.vanishes, self.stops_reading,
                 self.stops_reading, self.talks_nonsense, self.loads, self.looks]
        threads = [threading.Thread(target=self.run, args=(kind, i)) for i, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        return threads


def sample(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return (int(fields["RssAnon"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")),
            int(fields["Threads"]))


def watch(daemon, seconds):
    """Samples until the time is over or the daemon is."""
    samples, began = [], time.monotonic()
    while time.monotonic() - began < seconds and daemon.poll() is None:
        time.sleep(min(SAMPLE_S, seconds / 8))
        if daemon.poll() is None:
            samples.append(sample(daemon.pid))
            print(f"{time.monotonic() - began:6.0f} s  {samples[-1][0] / 2**20:7.2f} MiB  "
                  f"{samples[-1][1]:4d} descriptors  {samples[-1][2]:3d} threads", flush=True)
    return samples


def verdict(soak, daemon, samples):
    wrong = [f"{len(soak.wrong)} answers differed, first {soak.wrong[0]}"] if soak.wrong else []
    if daemon.poll() is not None:
        return wrong + [f"the daemon ended with {daemon.returncode}"]
    quarter, last = samples[:max(1, len(samples) // 4)], samples[-max(1, len(samples) // 4):]
    for index, name, bound in ((0, "memory", GROWTH_BYTES), (1, "descriptors", GROWTH_DESCRIPTORS)):
        before, after = max(s[index] for s in quarter), max(s[index] for s in last)
        if after > before + bound:
            wrong.append(f"{name} grew from {before} to {after}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--models", type=Path, help="a folder of GGUF files (default: ember alone)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), str(Path(name) / "s")
        (folder / "hearth.yaml").write_text(CONFIG, encoding="utf-8")
        daemon = subprocess.Popen(
            [args.build / "daemon" / "hearthd", "--socket", path, "--config", folder / "hearth.yaml",
             "--models", args.models or folder, "--state-dir", folder], stderr=subprocess.DEVNULL)
        until = time.monotonic() + START_S
        while not Path(f"{path}.status").exists() and time.monotonic() < until:
            time.sleep(0.01)
        models = ["ember"] + sorted(p.stem for p in args.models.glob("*.gguf")) if args.models else ["ember"]
        soak = Soak(path, models)
        soak.learn()
        threads = soak.start()
        samples = watch(daemon, args.minutes * 60)
        soak.stop.set()
        for thread in threads:
            thread.join()
        wrong = verdict(soak, daemon, samples)
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
            if daemon.wait() != 0:
                wrong.append(f"the daemon drained with status {daemon.returncode}")
        for what in sorted(soak.counts):
            print(f"{soak.counts[what]:9d}  {what}")
        for line in wrong:
            print(line)
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
