#!/usr/bin/python3
"""Comparisons on one machine: each is measured in interleaved pairs, and told as the median of their
ratios with an interval that needs no distribution. Every mode starts a hearthd of its own.

  reader       others' p99 while readers have stopped reading, against the same without them
  fairness     two users' shares of the engine, 63 connections of 8 requests against one of 128; and
               the p99 of one who asks for one thing at a time, in steps (needs root: setpriv)
  credit       frames that waited for credit, with readers that keep up
  connections  requests/s and errors of 1,000 and 10,000 connections against 64
  memory       memory of a request (hearth-bench serve --memory)
"""
import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "process"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import wire  # noqa: E402
from lib.users import client_of  # noqa: E402
from running import WIDE_LIMITS, Daemon, default_model, interval, shown  # noqa: E402

PLAIN = "engine: {prefix_cache: no}\n"
USER_A, USER_B = 4001, 4002

# Readers that stop: streams that may send a little and are granted no more, and one whose replies
# nobody takes off the socket.
STOPPED_STREAMS = 16
STOPPED_CREDIT = 64
UNREAD_REQUESTS = 20000


def ratio_of(numbers, name):
    return {"name": name, "median": interval(numbers)[0], "low": interval(numbers)[1],
            "high": interval(numbers)[2], "n": len(numbers)}


def ratio(a, b):
    """0 where a window was too short for anything."""
    return a / b if b else 0.0


def tell(numbers, name, results, digits=3):
    print(f"{name:44} {shown(numbers, digits)}")
    results.append(ratio_of(numbers, name))


def alternately(args, one, other):
    """Runs both n times, the first one first in every other pair: two lists."""
    firsts, seconds = [], []
    for pair in range(args.pairs):
        for half in range(2):
            if half == pair % 2:
                firsts.append(one())
            else:
                seconds.append(other())
        if sys.stderr.isatty():
            print(f"\rpair {pair + 1} of {args.pairs} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r" + 30 * " " + "\r", end="", file=sys.stderr)
    return firsts, seconds


# ---- a reader that stops ----

def stopped_readers(daemon, model):
    """Connections that have stopped reading: keep the result to keep them."""
    streams = wire.Client(daemon.socket)
    for number in range(STOPPED_STREAMS):
        streams.send(wire.frame("COMPLETE", number + 1, ("MODEL", model),
                                ("PROMPT", f"Once upon a time {number}"), ("STREAM", True),
                                ("MAX_TOKENS", 200), ("CREDIT", STOPPED_CREDIT),
                                ("IGNORE_EOS", True)))
    unread = wire.Client(daemon.socket)
    unread.sock.setblocking(False)
    try:
        for number in range(UNREAD_REQUESTS):
            unread.sock.sendall(wire.frame("NULL", number + 1))
    except BlockingIOError:
        pass
    return streams, unread


def reader(args, results):
    model, files = args.model
    load = ["--model", model, "--distinct", "2000", "--connections", "32", "--max-tokens", "16",
            "--stream", "--duration", args.duration, "--warmup", "500ms"]
    with Daemon(PLAIN, files, args.build) as daemon:
        daemon.serve(*load)

        def without():
            return daemon.serve(*load)

        def beside():
            stopped = stopped_readers(daemon, model)
            figures = daemon.serve(*load)
            parked = daemon.counters()["streams_parked"]
            if parked < STOPPED_STREAMS:
                print(f"only {parked:.0f} of {STOPPED_STREAMS} streams were parked")
            for client in stopped:
                client.sock.close()
            return figures

        alone, with_them = alternately(args, without, beside)
    for name, key in (("p99", "p99"), ("p50", "p50")):
        tell([ratio(b["latency_us"][key], a["latency_us"][key]) for a, b in zip(alone, with_them)],
             f"others' {name}, readers stopped / none", results)
    tell([ratio(b["requests_per_s"], a["requests_per_s"]) for a, b in zip(alone, with_them)],
         "others' requests/s, readers stopped / none", results)
    tell([ratio(ratio(b["cpu_s"], b["requests"]), ratio(a["cpu_s"], a["requests"]))
          for a, b in zip(alone, with_them)],
         "the daemon's CPU a request, stopped / none", results)
    print(f"errors: {sum(f['errors'] for f in alone + with_them)}")


# ---- two users ----

def as_user(uid):
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


PROMPT = "Once upon a"


def crowd(daemon, model, duration):
    """User A's load: 63 connections of 8 requests."""
    return daemon.start_serve("--model", model, "--prompt", PROMPT, "--connections", "63",
                              "--in-flight", "8", "--duration", duration, "--warmup", "1500ms",
                              prefix=as_user(USER_A))


def share_of_b(daemon, args, model):
    """B's part of the requests of both. Engine time is charged by rows, and all requests are alike:
    it is as the requests are."""
    a = crowd(daemon, model, args.duration)
    b = daemon.start_serve("--model", model, "--prompt", PROMPT, "--connections", "1",
                           "--in-flight", "128", "--duration", args.duration, "--warmup", "1500ms",
                           prefix=as_user(USER_B))
    a, b = daemon.serve_result(a), daemon.serve_result(b)
    return b["requests"] / (a["requests"] + b["requests"]), a["errors"] + b["errors"]


def one_at_a_time(daemon, args, model):
    """B's times with one request in flight beside A's crowd, in steps: as B sees them, and from the
    request's arrival at the engine to its token, as the daemon says."""
    length = float(args.duration.rstrip("ms")) / (1000 if args.duration.endswith("ms") else 1)
    a = crowd(daemon, model, f"{length + 2}s")
    seen, inside = [], []
    time.sleep(2)
    with client_of(daemon.socket, USER_B) as client:
        before, until = daemon.counters(), time.monotonic() + length
        while time.monotonic() < until:
            began = time.monotonic()
            done = client.ask("COMPLETE", ("MODEL", model), ("PROMPT", PROMPT), ("MAX_TOKENS", 1),
                              ("IGNORE_EOS", True))[-1]
            seen.append(1e6 * (time.monotonic() - began))
            if done.type != "DONE":
                sys.exit(f"user B was refused: {done}")
            inside.append(done.get("QUEUED_US") + done.get("PREFILL_US"))
        after = daemon.counters()
    daemon.serve_result(a)
    step_us = (1e6 * (after["engine_busy_seconds_total"] - before["engine_busy_seconds_total"]) /
               max(after["steps_total"] - before["steps_total"], 1))
    return [percentile(values, p) / step_us for values in (seen, inside) for p in (50, 99)]


def percentile(values, p):
    return sorted(values)[min(len(values) - 1, int(len(values) * p / 100))]


def fairness(args, results):
    if os.geteuid() != 0:
        sys.exit("fairness needs root: it runs its clients as two users")
    model, files = args.model
    shares, waits, errors = [], [], 0
    with Daemon(PLAIN + "batching: {max_batch: 32}\n" + WIDE_LIMITS, files, args.build) as daemon:
        daemon.open_to_all()
        for _ in range(args.pairs):
            share, failed = share_of_b(daemon, args, model)
            shares.append(share)
            errors += failed
            waits.append(one_at_a_time(daemon, args, model))
    tell(shares, "B's share of the engine, 128 in flight", results)
    for i, what in enumerate(("p50", "p99", "p50 in the daemon", "p99 in the daemon")):
        tell([w[i] for w in waits], f"B's {what}, one in flight, in steps", results, 2)
    print(f"errors: {errors}")


# ---- plain repetitions ----

def credit(args, results):
    model, files = args.model
    ratios = []
    with Daemon(PLAIN, files, args.build) as daemon:
        for _ in range(args.pairs):
            ratios.append(daemon.serve("--model", model, "--distinct", "2000", "--connections", "64",
                                       "--max-tokens", "64", "--stream", "--duration",
                                       args.duration, "--warmup", "500ms")["credit_wait_ratio"])
    tell(ratios, "frames that waited for credit / frames", results, 5)


def connections(args, results):
    model, files = args.model
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Daemon(PLAIN + WIDE_LIMITS, files, args.build) as daemon:
        def load(count):
            return daemon.serve("--model", model, "--distinct", "10000", "--connections", str(count),
                                "--duration", args.duration, "--warmup", "1s")

        for count in (1000, 10000):
            if count + 200 > hard:
                print(f"{count} connections need more files than the limit of {hard}: left out")
                continue
            few, many = alternately(args, lambda: load(64), lambda: load(count))
            tell([m["requests_per_s"] / f["requests_per_s"] for f, m in zip(few, many)],
                 f"requests/s, {count} connections / 64", results)
            print(f"errors: {sum(f['errors'] for f in few + many)}, "
                  f"p99 {interval([m['latency_us']['p99'] / 1e3 for m in many])[0]:.1f} ms")


def memory(args, results):
    model, files = args.model
    sizes = []
    with Daemon(PLAIN + WIDE_LIMITS, files, args.build) as daemon:
        for _ in range(args.pairs):
            sizes.append(daemon.serve("--model", model, "--distinct", "10000", "--connections",
                                      "1000", "--duration", args.duration, "--warmup", "500ms",
                                      "--memory")["memory_per_request_bytes"])
    tell(sizes, "bytes of a request", results, 0)


MODES = {"reader": reader, "fairness": fairness, "credit": credit, "connections": connections,
         "memory": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--duration", default="3s", help="of each measurement")
    parser.add_argument("--model", type=Path, help="a GGUF file (stories260K-f32, else ember)")
    parser.add_argument("--build", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    args.model = (args.model.stem, [args.model]) if args.model else default_model()
    results = []
    MODES[args.mode](args, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


main()
