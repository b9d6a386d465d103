"""hearth-bench and the scripts beside it: what they print, write and leave."""
import json
import os
import signal
import subprocess
import sys
import time

from lib.harness import ROOT, expect, program, test, wait_for

sys.path.insert(0, str(ROOT / "bench"))
from running import interval  # noqa: E402

LATENCY = {"p50", "p90", "p99", "p999", "max"}
SERVE_KEYS = {"requests", "errors", "duration_s", "requests_per_s", "tokens_per_s", "latency_us",
              "first_token_us", "rss_idle_bytes", "rss_peak_bytes", "cpu_s",
              "memory_per_request_bytes", "pool_reuse", "batch_efficiency", "engine_efficiency",
              "credit_wait_ratio", "codes"}
STAGES = ["everything off", "+ pooling", "+ batching", "+ streaming", "+ async loading"]
STAGE_KEYS = {"stage", "requests_per_s", "p50_us", "p99_us", "memory_per_request_bytes", "gain"}
LOAD_KEYS = {"cold_s", "warm_s", "raw_read_s", "peak_bytes", "final_bytes", "others_p99_ratio"}


def serve(t, daemon, *args):
    path = t.dir / "serve.json"
    t.run("hearth-bench", "serve", "--socket", daemon.socket, "--duration", "300ms", "--warmup",
          "100ms", "--json", path, *args)
    return json.loads(path.read_text())


def temporary(t):
    """An environment whose temporary files are in the test's folder."""
    (t.dir / "tmp").mkdir()
    return {"TMPDIR": str(t.dir / "tmp")}


def expect_nothing_left(t):
    left = list((t.dir / "tmp").iterdir())
    expect(not left, f"left behind: {left}")


@test
def serve_writes_every_key_of_its_contract(t):
    daemon = t.daemon()
    figures = serve(t, daemon, "--connections", "4")
    expect(set(figures) == SERVE_KEYS, f"keys are {sorted(figures)}")
    expect(set(figures["latency_us"]) == LATENCY, f"{figures['latency_us']}")
    expect(set(figures["first_token_us"]) == LATENCY, f"{figures['first_token_us']}")
    expect(figures["requests"] > 0 and figures["errors"] == 0, f"{figures}")
    expect(figures["tokens_per_s"] == figures["requests_per_s"], "one token a request is asked for")
    expect(figures["memory_per_request_bytes"] is None, "memory was not asked for")
    expect(figures["codes"] == {}, f"codes of errors: {figures['codes']}")


@test
def serve_measures_each_kind_of_load(t):
    daemon = t.daemon()
    for args, tokens in ((("--kind", "null"), 0), (("--kind", "embed"), 0),
                         (("--max-tokens", "4"), 4), (("--max-tokens", "4", "--stream"), 4),
                         (("--fresh",), 1), (("--in-flight", "3"), 1),
                         (("--distinct", "50"), 1), (("--rate", "200"), 1)):
        f = serve(t, daemon, "--connections", "4", *args)
        expect(f["requests"] > 0 and f["errors"] == 0, f"{args}: {f}")
        expect(abs(f["tokens_per_s"] - tokens * f["requests_per_s"]) < 1e-6, f"{args}: {f}")
        if "--stream" in args:
            expect(f["first_token_us"]["p50"] < f["latency_us"]["p50"], f"{f}")
        if "--fresh" in args:
            expect(f["pool_reuse"] < 0.05, f"fresh connections carry one request each: {f}")


@test
def serve_takes_its_prompts_from_a_file(t):
    daemon = t.daemon()
    prompts = t.write("prompts", "one fire\n\ntwo stones\n")
    expect(serve(t, daemon, "--connections", "2", "--prompts", prompts)["errors"] == 0, "errors")
    r = t.run("hearth-bench", "serve", "--socket", daemon.socket, "--prompts", t.dir / "missing",
              code=1)
    expect("cannot read" in r.err, f"{r}")
    r = t.run("hearth-bench", "serve", "--socket", daemon.socket, "--prompts", t.write("empty", "\n"),
              code=1)
    expect("cannot take the prompts" in r.err, f"{r}")


@test
def serve_counts_refusals_by_their_codes(t):
    daemon = t.daemon(config="limits: {queue_per_uid: 1}\n")
    f = serve(t, daemon, "--connections", "8", "--in-flight", "4", "--max-tokens", "16")
    expect(f["errors"] > 0 and f["codes"].get("busy", 0) == f["errors"], f"{f['codes']}")


@test
def serve_says_wrong_usage_and_a_missing_daemon(t):
    for args in (("--connections", "0"), ("--connections", "x"), ("--duration", "5"),
                 ("--kind", "song"), ("--rate", "-1"), ("--bogus",), ("more",)):
        r = t.run("hearth-bench", "serve", *args, code=2)
        expect("usage: hearth-bench serve" in r.err, f"{r}")
    r = t.run("hearth-bench", "serve", "--socket", t.dir / "nobody", code=3)
    expect("nobody" in r.err, f"{r}")
    for command in ("serve", "stages", "load"):
        r = t.run("hearth-bench", command, "--help")
        expect(r.out.startswith(f"usage: hearth-bench {command}"), f"{r}")


@test
def serve_draws_what_it_measured(t):
    t.need_program("gnuplot")
    daemon = t.daemon()
    serve(t, daemon, "--connections", "4", "--max-tokens", "4", "--stream", "--plot", t.dir / "plots")
    drawn = {p.name for p in (t.dir / "plots").iterdir()}
    for name in ("percentiles", "distribution", "throughput"):
        expect({f"{name}.png", f"{name}.svg", f"{name}.dat"} <= drawn, f"{drawn}")
    serve(t, daemon, "--kind", "null", "--connections", "4", "--plot", t.dir / "one.svg")
    expect("<svg" in (t.dir / "one.svg").read_text(), "no SVG")


@test
def serve_without_gnuplot_says_so_after_its_figures(t):
    daemon = t.daemon()
    r = t.run("hearth-bench", "serve", "--socket", daemon.socket, "--duration", "200ms", "--warmup",
              "0s", "--plot", t.dir / "plots", code=1, env={"PATH": str(t.dir)})
    expect("requests/s" in r.out and "gnuplot-nox" in r.err, f"{r}")


@test
def load_writes_every_key_of_its_contract(t):
    model, path = t.dir / "m.gguf", t.dir / "load.json"
    t.run("make-model", "--out", model, "--layers", "2", "--vocab", "600")
    r = t.run("hearth-bench", "load", model, "--pairs", "2", "--connections", "2", "--json", path,
              env=temporary(t),
              err=r"(hearth-bench: \d+ % of \S+ stay in the page cache: .*\n)?")
    figures = json.loads(path.read_text())
    expect(LOAD_KEYS <= set(figures), f"keys are {sorted(figures)}")
    expect(all(figures[key] > 0 for key in ("cold_s", "warm_s", "raw_read_s", "others_p99_ratio")),
           f"{figures}")
    expect(figures["pairs"] == 2 and figures["errors"] == 0, f"{figures}")
    expect(figures["file_bytes"] == model.stat().st_size, f"{figures}")
    expect("others' p99" in r.out, f"{r}")
    expect_nothing_left(t)


@test
def load_refuses_what_is_no_model(t):
    r = t.run("hearth-bench", "load", t.dir / "missing.gguf", code=1)
    expect("cannot read" in r.err, f"{r}")
    r = t.run("hearth-bench", "load", t.write("bad.gguf", "GGUF\x03\0\0\0 and nothing more"),
              code=1, env=temporary(t))
    expect(r.err.startswith("hearth-bench: ") and r.out == "", f"{r}")
    expect_nothing_left(t)
    for args in ((), ("a", "b"), ("--pairs", "0", "m"), ("--pairs", "x", "m")):
        t.run("hearth-bench", "load", *args, code=2)
    for args in (("--pairs", "0"), ("--duration", "0s"), ("--duration", "soon"), ("more",)):
        t.run("hearth-bench", "stages", *args, code=2)


@test
def stages_tell_each_stage_and_each_step(t):
    path = t.dir / "stages.json"
    r = t.run("hearth-bench", "stages", "--small", "--pairs", "2", "--duration", "300ms", "--json",
              path, env=temporary(t), limit_s=50)
    rows = json.loads(path.read_text())
    expect([row["stage"] for row in rows] == STAGES, f"{rows}")
    for row in rows:
        expect(STAGE_KEYS <= set(row), f"keys are {sorted(row)}")
        expect(row["requests_per_s"] > 0 and row["p50_us"] <= row["p99_us"], f"{row}")
        expect(row["errors"] == 0, f"{row}\n{r}")
        parts = row["steady_per_s"] + row["alternating_per_s"]
        expect(abs(parts - row["requests_per_s"]) < 1e-6 * parts + 1e-9, f"{row}")
        step = row["to_first"]["requests_per_s"]
        expect(step["low"] <= step["median"] <= step["high"], f"{row}")
    expect(rows[0]["gain"] == 1 and rows[0]["to_first"]["p99_us"]["median"] == 1, f"{rows[0]}")
    expect("everything on" in r.out and "first token p50" in r.out, f"{r}")
    expect_nothing_left(t)


@test
def an_interrupted_benchmark_leaves_nothing(t):
    model = t.dir / "m.gguf"
    t.run("make-model", "--out", model, "--layers", "2", "--vocab", "600")
    process = t.start("hearth-bench", "load", model, "--pairs", "1000", "--connections", "2",
                      stdout=subprocess.DEVNULL, env={**os.environ, **temporary(t)})
    wait_for(lambda: list((t.dir / "tmp").glob("*/s")), "its daemon")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    expect(process.wait(10) == 130, "the exit status is not 130")
    expect_nothing_left(t)


@test
def the_scripts_compare_pairs_as_the_program_does(t):
    for n, low, high in ((1, 1, 1), (5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15)):
        values = [(i * 7) % n + 1 for i in range(n)]
        if n % 7 == 0:
            continue
        got = interval(values)
        expect(got[1:3] == (low, high), f"{n}: {got}")
        expect(got[0] == (n + 1) / 2, f"{n}: {got}")
    expect(abs(interval(range(10))[3] - 0.978515625) < 1e-9, "the confidence of ten")


@test
def the_scripts_run(t):
    for mode in ("credit", "reader"):
        path = t.dir / f"{mode}.json"
        r = t.run(sys.executable, ROOT / "bench" / "pairs.py", mode, "--pairs", "2", "--duration",
                  "200ms", "--build", program("hearthd").parents[1], "--json", path)
        figures = json.loads(path.read_text())
        expect(figures and all({"name", "median", "low", "high", "n"} == set(f) for f in figures),
               f"{figures}\n{r}")


@test
def reads_counts_small_files(t):
    path, files = t.dir / "reads.json", [t.write(name, "text\n") for name in ("a", "b")]
    for args in ((), ("--readers", "3"), ("--to-end",)):
        t.run("hearth-bench", "reads", "--turns", "2", "--duration", "50ms", "--json", path, *args, *files)
        rows = json.loads(path.read_text())
        expect(len(rows) == 2, f"{rows}")
        for row in rows:
            expect(set(row) == {"readers", "reads_per_s", "p50_us", "p99_us", "max_us"}, f"{row}")
            expect(row["reads_per_s"] > 0 and row["readers"] == (3 if "--readers" in args else 1), f"{row}")
    r = t.run("hearth-bench", "reads", t.dir / "none", code=1)
    expect(f"cannot read {t.dir / 'none'}: No such file" in r.err, f"{r}")
    for args in ((), ("--readers", "0", files[0]), ("--turns", "x", files[0])):
        expect("usage: hearth-bench reads" in t.run("hearth-bench", "reads", *args, code=2).err, f"{args}")
