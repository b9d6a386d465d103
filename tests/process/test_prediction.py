"""What is asked for again and again in the same order is ready before it is asked for; what is not, is left
alone. A habit outlives the daemon, and a damaged memory of it does no harm."""
import random
import time

from lib.harness import expect, test, wait_for
from lib.models import made_models

NAMES = tuple("abcdefgh")
ROUND_S = 1.05  # requests for a model that come closer together than a second count as one


def history_of(d):
    return d.socket.with_name(d.socket.name + ".history")


def config_for(paths, models, more=""):
    """Memory for so many of them at once."""
    kib = paths[0].stat().st_size // 1024
    budget = max(16 * 1024, kib * (models + 1) + 4096)
    return (f"memory_budget: {budget}KiB\nengine: {{kv_budget: {budget - kib * (models * 4 + 2) // 4}KiB}}\n"
            + more)


def ask(c, name):
    replies = c.ask("COMPLETE", ("MODEL", name), ("PROMPT", "a b c"), ("MAX_TOKENS", 2), ("IGNORE_EOS", 1))
    expect(replies[-1].type == "DONE", f"{name}: {replies}")


def state_of(c, name):
    return next(r.get("STATE") for r in c.ask("MODELS", ("MODEL", name)) if r.type == "ITEM")


def go_round(c, rounds):
    for _ in range(rounds):
        began = time.monotonic()
        for name in NAMES:
            ask(c, name)
            time.sleep(ROUND_S / len(NAMES))
        time.sleep(max(0, ROUND_S - (time.monotonic() - began)))


def ready_before_asked(d, c, rounds):
    """In how many of a round's steps the next model becomes ready before it is asked for."""
    hits = d.metric("preload_hits_total")
    for _ in range(rounds):
        for i, name in enumerate(NAMES):
            ask(c, name)
            following = NAMES[(i + 1) % len(NAMES)]
            wait_for(lambda: state_of(c, following) == "ready", f"{following} to be ready after {name}")
            time.sleep(ROUND_S / len(NAMES))
    return d.metric("preload_hits_total") - hits


@test
def what_always_follows_is_ready_before_it_is_asked_for(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 4))
    with d.client() as c:
        go_round(c, 6)
        expect(ready_before_asked(d, c, 2) == 2 * len(NAMES), "each was ready when it was asked for")
    made, used = d.metric("predictions_total"), d.metric("predictions_used_total")
    expect(made >= 2 * len(NAMES) - 1 and used >= 0.85 * made, f"{used} of {made} were used")
    stats = d.hearth("stats", "loader").out
    for key in ("prediction_accuracy", "predictions_wasted_total", "preload_misses_total", "evictions_total"):
        expect(key in stats, f"{key} in {stats}")


@test
def a_random_order_leaves_it_silent(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 4))
    chance = random.Random(1)
    with d.client() as c:
        for _ in range(80):
            ask(c, chance.choice(NAMES))
            time.sleep(0.15)
    expect(d.metric("predictions_total") == 0, "something was predicted")
    expect(d.metric("preload_asked_total") == d.metric("preload_hits_total") +
           d.metric("preload_misses_total"), "hits and misses")


@test
def a_dry_run_counts_and_loads_nothing(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 4, "loading: {prediction: dry-run}\n"))
    with d.client() as c:
        go_round(c, 8)
    loads, asked = d.metric("loads_total"), d.metric("preload_misses_total")
    expect(d.metric("predictions_total") > 0, "it predicted nothing")
    expect(d.metric("predictions_used_total") > 0, "nothing it predicted was asked for")
    expect(loads == asked, f"{loads} loads for {asked} requests that found their model missing")


@test
def prediction_off_is_plain_lru(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 4, "loading: {prediction: off}\n"))
    with d.client() as c:
        go_round(c, 6)
    expect(d.metric("predictions_total") == 0 and d.metric("prediction_mode") == 0, "it predicted")
    expect(d.metric("preload_hits_total") == 0, "LRU finds nothing on a circle longer than memory")


@test
def a_habit_outlives_the_daemon_and_damage_is_discarded_with_a_warning(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 4))
    with d.client() as c:
        go_round(c, 6)
    d.stop()
    kept = history_of(d).read_bytes()
    again = t.daemon(config=config_for(paths, 4), at=d, name="again")
    with again.client() as c:
        ask(c, NAMES[0])
        wait_for(lambda: state_of(c, NAMES[1]) == "ready", "what the last daemon learned")
    again.stop()
    for i, damaged in enumerate((kept[:-1], b"", kept[:40] + bytes([kept[40] ^ 1]) + kept[41:])):
        history_of(d).write_bytes(damaged)
        third = t.daemon(config=config_for(paths, 4), at=d, name=f"damaged{i}")
        third.expect_log(r"hearthd: the history of requests in \S+ is discarded: .*")
        with third.client() as c:
            ask(c, NAMES[0])
        third.stop()


@test
def an_eviction_says_for_whom_and_why(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 2))
    with d.client() as c:
        for name in NAMES[:3]:
            ask(c, name)
        stats = next(r.get("STATS") for r in c.ask("MODELS", ("MODEL", "a")) if r.type == "ITEM")
    expect("evicted_for c" in stats and "evicted_why least recently used" in stats, stats)
    expect("evicted_reload_us" in stats and "evictions 1" in stats, stats)


@test
def what_is_larger_than_the_budget_is_refused_with_the_numbers(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config="memory_budget: 16MiB\nengine: {kv_budget: 15MiB}\n")
    d.expect_log(r"hearthd: model \S+ is failed: .*")
    with d.client() as c:
        replies = c.ask("COMPLETE", ("MODEL", "a"), ("PROMPT", "x"))
    expect(replies[-1].get("CODE") == "no-memory", f"{replies}")
    expect("needs" in replies[-1].get("SENTENCE") and "memory_budget" in replies[-1].get("SENTENCE"),
           f"{replies}")


@test
def an_eager_model_comes_back_when_there_is_room(t):
    paths = made_models(t, *NAMES)
    d = t.daemon(models=paths, config=config_for(paths, 2, "models: {a: {preload: eager}}\n"))
    with d.client() as c:
        wait_for(lambda: state_of(c, "a") == "ready", "the eager model at the start")
        ask(c, "b")
        ask(c, "c")
        expect(state_of(c, "a") in ("cold", "draining"), "it was the least recently used")
        time.sleep(0.5)
        expect(state_of(c, "a") == "cold", "it drove somebody out")
        c.ask("UNLOAD", ("MODEL", "b"))
        wait_for(lambda: state_of(c, "a") == "ready", "it to come back")
