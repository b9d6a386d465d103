"""hearth-bench preload: the daemon's residency and prediction in virtual time. All of it is arithmetic, so
that its figures are the same on every machine."""
import collections
import json
import re

from lib.harness import expect, test

KEYS = {"trace", "seed", "policy", "requests", "hits", "accuracy", "wasted", "cost_s"}
TRACES = {"chain", "habit", "zipf", "random", "adversary"}
POLICIES = {"none", "lru", "hearth", "informed", "clairvoyant"}


def preload(t, *args):
    path = t.dir / "preload.json"
    r = t.run("hearth-bench", "preload", "--json", path, *args)
    return json.loads(path.read_text()), r.out


@test
def the_simulated_figures_hold(t):
    rows, table = preload(t)
    expect(all(set(r) == KEYS for r in rows), f"{rows[0]}")
    by = collections.defaultdict(list)
    for r in rows:
        by[r["trace"], r["policy"]].append(r)
    expect(set(by) == {(a, b) for a in TRACES for b in POLICIES}, f"{set(by)}")
    expect(all(len({r["seed"] for r in of}) == 10 for of in by.values()), "ten seeds each")

    def mean(trace, policy, value):
        return sum(value(r) for r in by[trace, policy]) / len(by[trace, policy])

    def hits(trace, policy):
        return mean(trace, policy, lambda r: r["hits"] / r["requests"])

    def cost(trace, policy):
        return mean(trace, policy, lambda r: r["cost_s"])

    for trace in ("chain", "habit"):
        expect(hits(trace, "hearth") >= 0.9, f"{trace}: {hits(trace, 'hearth')}")
        expect(hits(trace, "hearth") >= 0.97 * hits(trace, "informed"), f"{trace} of informed")
        expect(mean(trace, "hearth", lambda r: r["accuracy"]) >= 0.85, f"{trace}: accuracy")
    for trace in ("random", "adversary"):
        expect(cost(trace, "hearth") <= 1.02 * cost(trace, "lru"), f"{trace}: {cost(trace, 'hearth')}")
        expect(mean(trace, "hearth", lambda r: r["wasted"]) < 10, f"{trace}: it is not silent")
    fixed = float(re.search(r"^zipf +\(fixed set\) +([0-9.]+)$", table, re.MULTILINE)[1])
    expect(0.5 < fixed < 0.7 and hits("zipf", "hearth") >= 0.95 * fixed, f"zipf: {hits('zipf', 'hearth')}")
    for trace in TRACES - {"adversary"}:
        expect(hits(trace, "clairvoyant") >= hits(trace, "informed") >= 0.98 * hits(trace, "hearth"), trace)
        expect(cost(trace, "none") >= cost(trace, "lru") >= 0.98 * cost(trace, "hearth"), trace)


@test
def a_trace_of_one_s_own_is_simulated(t):
    lines = ["# seconds model bytes\n", "\n"]
    lines += [f"{i * 10} m{i % 6} {1000000000 + i % 6}\n" for i in range(600)]
    rows, _ = preload(t, "--trace", t.write("trace", "".join(lines)))
    by = {r["policy"]: r for r in rows}
    expect(set(by) == POLICIES and all(r["requests"] == 600 for r in rows), f"{rows}")
    expect(by["lru"]["hits"] == 0, "six in a circle and room for five")
    expect(by["hearth"]["hits"] > 540 and by["clairvoyant"]["hits"] >= 594, f"{by}")


@test
def a_malformed_trace_is_refused_with_the_line(t):
    long_name = "m" * 200
    cases = {
        "1 a\n": ":1: expected", "1 a 0\n": ":1: expected", "x a 5\n": ":1: expected",
        "-1 a 5\n": ":1: expected", "1 a 5 6\n": ":1: expected", "nan a 5\n": ":1: expected",
        "1e300 a 5\n": ":1: expected", "1 a -5\n": ":1: expected", "5 a 5\n4 a 5\n": ":2: the times must not go back",
        f"1 {long_name} 5\n": ":1: expected", "": "holds no request", "# nothing\n": "holds no request",
        "".join(f"{i} m{i} 5\n" for i in range(300)): ":257: too many models",
    }
    for text, sentence in cases.items():
        done = t.run("hearth-bench", "preload", "--trace", t.write("trace", text), code=1)
        expect(sentence in done.err, f"{text[:20]!r}: {done.err}")
    done = t.run("hearth-bench", "preload", "--trace", t.dir / "none", code=1)
    expect("cannot read" in done.err, done.err)
    for flags in (["--first-seed"], ["--first-seed", "x"], ["--first-seed", "1x"], ["more"]):
        t.run("hearth-bench", "preload", *flags, code=2)
