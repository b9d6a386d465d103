"""What models say of their memory adds up, and is what the process takes."""
from lib.harness import expect, test, wait_for
from lib.models import made_models
from lib.wire import text_of

PARTS = ("weight_bytes", "table_bytes", "scratch_bytes", "kv_bytes")
NAMES = ("a", "b")


def items_of(d):
    with d.status_client() as c:
        return {r.get("MODEL"): r for r in c.ask("MODELS") if r.type == "ITEM"}


def stats_of(item):
    return dict(line.split(" ", 1) for line in item.get("STATS").splitlines())


def parts_of(item):
    stats = stats_of(item)
    return [int(stats[part]) for part in PARTS]


def work(d, name, texts=12, tokens=8):
    """Texts of a few hundred tokens, each other ones, side by side."""
    with d.client() as c:
        ids = [c.request("COMPLETE", ("MODEL", name), ("PROMPT", f"{i} a b c d e f g " * 20),
                         ("MAX_TOKENS", tokens), ("IGNORE_EOS", 1)) for i in range(texts)]
        for i in ids:
            replies = c.replies(i)
            expect(replies[-1].type == "DONE", f"{name}: {replies[-1]}")


def rss_bytes(d):
    with open(f"/proc/{d.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024


@test
def the_memory_of_models_adds_up(t):
    d = t.daemon(models=made_models(t, *NAMES))
    for name in NAMES:
        work(d, name)
    items = items_of(d)
    for name in NAMES:
        parts = parts_of(items[name])
        expect(all(parts), f"{name} has parts that are empty: {items[name].get('STATS')}")
        expect(sum(parts) == items[name].get("MEMORY_BYTES"), f"{name}: {parts}, {items[name]}")
    expect(items["ember"].get("MEMORY_BYTES") == 0 and not any(parts_of(items["ember"])),
           f"ember is cold: {items['ember']}")
    kv = d.metric("kv_used_bytes") + d.metric("prefix_bytes")
    expect(kv == sum(parts_of(items[name])[3] for name in NAMES), f"{kv} bytes of KV memory")
    expect(d.metric("model_bytes") == sum(sum(parts_of(items[name])[:3]) for name in NAMES),
           "what counts in the budget")
    with d.status_client() as c:
        prom = text_of(c.ask("METRICS", ("NAME", "prometheus")))
    for name in NAMES:
        line = f'hearth_model_memory_bytes{{model="{name}"}} {items[name].get("MEMORY_BYTES")}'
        expect(line in prom, f"no {line}")
    with d.client() as c:
        c.ask("UNLOAD", ("MODEL", "a"))
    wait_for(lambda: items_of(d)["a"].get("MEMORY_BYTES") == 0, "a's memory to go")
    expect(d.metric("kv_used_bytes") + d.metric("prefix_bytes") == parts_of(items_of(d)["b"])[3],
           "b's KV memory is all there is")


@test
def a_file_follows_the_memory_of_its_model(t):
    d = t.daemon(models=made_models(t, "a"))
    m = t.mount(d)
    work(d, "a", texts=1)
    few = items_of(d)["a"].get("MEMORY_BYTES")
    wait_for(lambda: m.read("models/a/memory") == f"{few}\n", f"the file to say {few}")
    work(d, "a")
    item = items_of(d)["a"]
    expect(item.get("MEMORY_BYTES") > few, "wide steps took nothing")
    wait_for(lambda: m.read("models/a/memory") == f"{item.get('MEMORY_BYTES')}\n", "the file to follow")
    wait_for(lambda: m.read("models/a/stats") == item.get("STATS"), "the model's stats to follow")


@test
def the_process_takes_what_models_say(t):
    """From below nearly all of it is there; from above little beside it, free pages of KV that stay
    for the next text included."""
    path = t.dir / "wide.gguf"
    t.run("make-model", "--out", path, "--dim", "512", "--layers", "4", "--ff", "4096", "--vocab", "8000",
          "--type", "q8_0")
    d = t.daemon(models=[path], config="engine: {kv_budget: 16MiB}\n")
    before = rss_bytes(d)
    work(d, "wide", tokens=2)
    said, took = items_of(d)["wide"].get("MEMORY_BYTES"), rss_bytes(d) - before
    expect(took > said * 0.9, f"{said} bytes are said, {took} were taken")
    expect(took < said * 1.25 + (24 << 20), f"{said} bytes are said, {took} were taken")


@test
def a_model_at_rest_gives_back_what_wide_steps_took(t):
    """A second after its last use; and the file that tells follows without anybody's doing."""
    path = t.dir / "wide.gguf"
    t.run("make-model", "--out", path, "--dim", "128", "--layers", "1", "--ff", "16384", "--type", "f16")
    d = t.daemon(models=[path], config="engine: {chunk_target: 1s, prefix_cache: no}\n")
    work(d, "wide")
    scratch = parts_of(items_of(d)["wide"])[2]
    expect(scratch > 20 << 20, f"{scratch} bytes of scratch: the test shows nothing")
    wait_for(lambda: parts_of(items_of(d)["wide"])[2] < 1 << 20, "its scratch to go")
    expect(items_of(d)["wide"].get("STATE") == "ready", "it is loaded all the same")
    wait_for(lambda: d.metric("model_bytes") == sum(parts_of(items_of(d)["wide"])[:3]),
             "the budget to have it back")
    work(d, "wide")
    expect(parts_of(items_of(d)["wide"])[2] > 20 << 20, "wide steps take it again")


@test
def nobody_goes_for_what_another_at_rest_can_give_back(t):
    paths = [t.dir / f"{name}.gguf" for name in NAMES]
    for seed, path in enumerate(paths):
        t.run("make-model", "--out", path, "--dim", "128", "--layers", "1", "--ff", "16384", "--type", "f16",
              "--seed", str(seed))
    kib = paths[0].stat().st_size // 1024
    d = t.daemon(models=paths, config=f"memory_budget: {kib * 5 // 2 + 8192}KiB\n"
                                      "engine: {kv_budget: 8MiB, chunk_target: 1s, prefix_cache: no}\n")
    work(d, "a", texts=6)
    expect(d.metric("model_bytes") > kib * 1024 * 3 // 2, "a is not in the way: the test shows nothing")
    work(d, "b", texts=1, tokens=1)
    items = items_of(d)
    expect(items["a"].get("STATE") == "ready" and d.metric("evictions_total") == 0, f"{items['a']}")
    expect(parts_of(items["a"])[2] < 1 << 20, f"{items['a'].get('STATS')}")
