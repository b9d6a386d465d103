#!/usr/bin/python3
"""Every figure of docs/performance.md about serving, as tables in Markdown, each with its command:
bench/figures.py [--runs 5] [--only GROUP]...

Groups: serve (rates and latencies, round by round, so that what the machine does falls on all of
them), pairs (comparisons in interleaved pairs), stages, load. A figure is the median of the runs,
with the least and the greatest beside it. --quick looks whether everything runs: its figures are
worth nothing. stories260K comes from the golden data; without it only ember is measured.
"""
import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

from running import ROOT, WIDE_LIMITS, Daemon, default_model  # noqa: E402

CONFIGS = {
    "plain": "engine: {prefix_cache: no}\n" + WIDE_LIMITS,
    "prefix cache on": WIDE_LIMITS,
}

# The shape of a model of 1.1 billion parameters, 1.1 GB in Q8_0, and one of ember's.
LARGE = ["--dim", "2048", "--layers", "22", "--heads", "32", "--kv-heads", "4", "--ff", "5632",
         "--vocab", "32000", "--context", "2048", "--type", "q8_0"]
SMALL = ["--dim", "128", "--layers", "3", "--heads", "8", "--kv-heads", "4", "--ff", "256",
         "--vocab", "1024", "--context", "256", "--type", "q8_0", "--tied"]


def per_second(figures):
    return figures["requests_per_s"]


def at(key, percentile):
    def value(figures):
        return figures[key][percentile] / 1000
    return value


def plain(key):
    def value(figures):
        return figures[key]
    return value


RATE = ("requests/s", per_second, 0)
P50, P99 = ("p50 ms", at("latency_us", "p50"), 3), ("p99 ms", at("latency_us", "p99"), 3)
FIRST = ("first token p50 ms", at("first_token_us", "p50"), 3)
ERRORS = ("errors", plain("errors"), 0)
RATIOS = [("pool reuse", plain("pool_reuse"), 4), ("batch efficiency", plain("batch_efficiency"), 4),
          ("engine efficiency", plain("engine_efficiency"), 4)]
WAITS = ("credit waits", plain("credit_wait_ratio"), 5)
MEMORY = ("bytes a request", plain("memory_per_request_bytes"), 0)


def serve_rows(real):
    """(what, configuration, arguments, figures) for each model there is."""
    rows = []
    for model in dict.fromkeys([real, "ember"]):
        one = ["--model", model, "--distinct", "10000"]
        rows += [
            (f"{model}, one token, 64 connections", "plain", [*one, "--connections", "64"],
             [RATE, P50, P99, *RATIOS, ERRORS]),
            (f"{model}, the same, prefix cache on", "prefix cache on",
             [*one, "--connections", "64"], [RATE, P50, P99, ERRORS]),
            (f"{model}, one token, one client", "plain", [*one, "--connections", "1"],
             [RATE, P50, P99, ERRORS]),
            (f"{model}, 16 tokens streamed, 64 connections", "plain",
             [*one, "--connections", "64", "--max-tokens", "16", "--stream"],
             [RATE, FIRST, P99, WAITS, ERRORS]),
        ]
    one = ["--model", real, "--distinct", "10000"]
    return rows + [
        (f"{real}, open loop at 2,500/s", "plain",
         [*one, "--connections", "64", "--rate", "2500"], [RATE, P50, P99, ERRORS]),
        (f"{real}, a connection for each request", "plain",
         [*one, "--connections", "64", "--fresh"], [RATE, P50, P99, ERRORS]),
        (f"{real}, 1,000 connections", "plain", [*one, "--connections", "1000"],
         [RATE, P99, ERRORS]),
        (f"{real}, 10,000 connections", "plain", [*one, "--connections", "10000"],
         [RATE, P99, ERRORS]),
        (f"{real}, memory", "plain", [*one, "--connections", "1000", "--memory"],
         [MEMORY, ERRORS]),
        ("null requests, 64 connections", "plain", ["--kind", "null", "--connections", "64"],
         [RATE, P99, ERRORS]),
        ("null requests, the same, 8 deep", "plain",
         ["--kind", "null", "--connections", "64", "--in-flight", "8"], [RATE, P99, ERRORS]),
    ]


def say(text):
    if sys.stderr.isatty():
        print(f"\r{text:70}", end="", file=sys.stderr)


def number(value, digits):
    return f"{value:,.{digits}f}"


def group_serve(args):
    real, files = default_model()
    rows = serve_rows(real)
    seen = [[] for _ in rows]
    with contextlib.ExitStack() as stack:
        daemons = {name: stack.enter_context(Daemon(config, files, args.build))
                   for name, config in CONFIGS.items()}
        for run in range(args.runs):
            for i, (what, config, arguments, _) in enumerate(rows):
                say(f"run {run + 1} of {args.runs}: {what}")
                seen[i].append(daemons[config].serve(*arguments, "--duration", args.duration))
    say("")
    for name, config in CONFIGS.items():
        print(f"{name}: `{config.strip()}`".replace("\n", "`, `"))
    print("\n| what | figure | median | least to greatest | `hearth-bench serve --socket S "
          f"--duration {args.duration} ...` |\n|---|---|---|---|---|")
    for (what, config, arguments, figures), runs in zip(rows, seen):
        command = f"`{' '.join(arguments)}`"
        for name, value, digits in figures:
            values = [value(run) for run in runs]
            print(f"| {what} | {name} | {number(statistics.median(values), digits)} | "
                  f"{number(min(values), digits)} to {number(max(values), digits)} | {command} |")
            what = command = ""
    return {what: runs for (what, *_), runs in zip(rows, seen)}


def run_json(command, path):
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def group_pairs(args):
    results = {}
    pairs = ["--pairs", str(args.pairs), "--duration", args.pair_duration]
    print("\n| what | median | interval | command |\n|---|---|---|---|")
    for mode in ("reader", "fairness", "credit", "connections", "memory"):
        say(mode)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            results[mode] = run_json(
                [sys.executable, ROOT / "bench" / "pairs.py", mode, *pairs, "--json", file.name,
                 *(["--build", args.build] if args.build else [])], file.name)
        for row in results[mode]:
            print(f"| {row['name']} | {row['median']:.4g} | {row['low']:.4g} to {row['high']:.4g} | "
                  f"`bench/pairs.py {mode} {' '.join(pairs)}` |")
    say("")
    return results


def program(args, name):
    return Path(args.build or ROOT / "build") / "bench" / name


def group_stages(args):
    command = ["stages", "--pairs", str(args.stage_pairs), "--duration", args.stage_duration]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        say("stages")
        rows = run_json([program(args, "hearth-bench"), *command, "--json", file.name], file.name)
    say("")
    print(f"\n`hearth-bench {' '.join(command)}`, medians\n\n| stage | requests/s | p50 ms | p99 ms | "
          "first token p50 ms | the 48 clients' p99 ms | bytes a request | gain | errors |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['stage']} | {number(row['requests_per_s'], 0)} | {row['p50_us'] / 1e3:.1f} | "
              f"{row['p99_us'] / 1e3:.1f} | {row['first_token_p50_us'] / 1e3:.1f} | "
              f"{row['steady_p99_us'] / 1e3:.1f} | {row['memory_per_request_bytes'] or 0:.0f} | "
              f"{row['gain']:.2f} | {row['errors']} |")
    print(f"\n| step | figure | ratio, median of {args.stage_pairs} | interval |\n|---|---|---|---|")
    steps = [(r, "to_previous", "requests_per_s") for r in rows[1:]]
    steps += [(rows[3], "to_previous", "first_token_p50_us"),
              (rows[4], "to_previous", "steady_p99_us"), (rows[4], "to_first", "requests_per_s")]
    for row, against, key in steps:
        s = row[against][key]
        print(f"| {row['stage']}{' against everything off' if against == 'to_first' else ''} | "
              f"{key} | {s['median']:.3f} | {s['low']:.3f} to {s['high']:.3f} |")
    return rows


def group_load(args):
    results = {}
    print("\n| file | cold / raw read s | ratio | warm s | CPU cold, warm s | peak, final MiB | "
          "others' p99 | others' requests/s | load beside others s |\n|---|---|---|---|---|---|---|---|"
          "---|")
    with tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=args.large_dir) as folder:
        for name, shape in (("ember's shape", SMALL), ("1.1 GB", SMALL if args.quick else LARGE)):
            path = Path(folder) / "m.gguf"
            say(f"making the model, {name}")
            subprocess.run([program(args, "make-model"), "--out", path, *shape], check=True)
            for cached in ((), ("--cached",)):
                say(f"load, {name} {' '.join(cached)}")
                out = Path(folder) / "load.json"
                f = run_json([program(args, "hearth-bench"), "load", path, "--pairs",
                              str(args.pairs), *cached, "--json", out], out)
                results[f"{name} {' '.join(cached)}"] = f
                print(f"| {name}{', cached beside others' if cached else ''} | {f['cold_s']:.3f} / "
                      f"{f['raw_read_s']:.3f} | {f['cold_to_raw_ratio']:.2f} "
                      f"{bracket(f['cold_to_raw_interval'])} | {f['warm_s']:.3f} | "
                      f"{f['cold_cpu_s']:.2f}, {f['warm_cpu_s']:.2f} | "
                      f"{f['peak_bytes'] / 2**20:.0f}, {f['final_bytes'] / 2**20:.0f} | "
                      f"{f['others_p99_ratio']:.2f} {bracket(f['others_p99_interval'])} | "
                      f"{f['others_throughput_ratio']:.2f} "
                      f"{bracket(f['others_throughput_interval'])} | {f['busy_load_s']:.3f} |")
    say("")
    print(f"\n`make-model --out m.gguf {' '.join(SMALL)}`, `... {' '.join(LARGE)}`;\n"
          f"`hearth-bench load m.gguf --pairs {args.pairs} [--cached]`")
    return results


def bracket(interval):
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def group_plots(args):
    real, files = default_model()
    with Daemon(CONFIGS["plain"], files, args.build) as daemon, \
            tempfile.TemporaryDirectory(prefix="hearth-bench-") as folder:
        say("plots")
        figures = daemon.serve("--model", real, "--distinct", "10000", "--connections", "64",
                               "--max-tokens", "16", "--stream", "--duration", args.duration,
                               "--plot", folder)
        for name in ("percentiles", "throughput"):
            shutil.copyfile(Path(folder) / f"{name}.svg", ROOT / "docs" / f"serve-{name}.svg")
    say("")
    return figures


GROUPS = {"serve": group_serve, "pairs": group_pairs, "stages": group_stages, "load": group_load,
          "plots": group_plots}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--duration", default="8s", help="of a run of serve")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--pair-duration", default="3s")
    parser.add_argument("--stage-pairs", type=int, default=20)
    parser.add_argument("--stage-duration", default="8s")
    parser.add_argument("--only", action="append", choices=GROUPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large-dir", type=Path, help="where the file of 1.1 GB is made")
    parser.add_argument("--build", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.runs, args.duration, args.pairs, args.pair_duration = 2, "300ms", 2, "300ms"
        args.stage_pairs, args.stage_duration = 1, "1s"
    results = {name: GROUPS[name](args) for name in args.only or list(GROUPS)[:-1]}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


main()
