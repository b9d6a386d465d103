"""KV memory: beginnings that are computed once, and little memory for many."""
import os
import random
import struct

from lib.harness import expect, program, test, wait_for
from lib.wire import text_of

STORY = "stories260K-f32"
BOS, PAGE = 1, 16
GREEDY = (("MODEL", STORY), ("TEMPERATURE", 0.0))
PREAMBLE = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the "
            "park with her dog. One day, she saw a big tree and wanted to climb it. Her mom said, ")


def daemon_with_story(t, config=None, **more):
    return t.daemon(models=[t.golden(f"models/{STORY}.gguf")], config=config, **more)


def ask(client, prompt, n, *more):
    return client.ask("COMPLETE", *GREEDY, ("PROMPT", prompt), ("MAX_TOKENS", n), *more)


def tokens_of(client, text):
    """The ids of a prompt, with the BOS that it begins with."""
    ids = client.ask("TOKENIZE", ("MODEL", STORY), ("PROMPT", text))[0].get("IDS")
    return [BOS, *(number for (number,) in struct.iter_unpack("<i", ids))]


def common(one, other):
    """How many ids they begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@test
def a_long_preamble_is_computed_once(t):
    """A thousand requests that begin alike, all at once: what they have in common, once."""
    d = daemon_with_story(t)
    names = ["Tom", "Sue", "Ben", "Mia", "Sam"]
    with d.client() as c:
        preamble, *prompts = (tokens_of(c, PREAMBLE + name) for name in ("", *names))
        before = d.metric("prompt_tokens_total")
        ids = [c.request("COMPLETE", *GREEDY, ("PROMPT", PREAMBLE + names[i % 5]),
                         ("MAX_TOKENS", 8)) for i in range(1000)]
        texts = [text_of(c.replies(i)) for i in ids]
    computed = d.metric("prompt_tokens_total") - before
    expect(len(preamble) > 60, f"the preamble has {len(preamble)} tokens only")
    # One computes the preamble; each computes its name, and what of the preamble is on the same page.
    shared = [common(preamble, p) // PAGE * PAGE for p in prompts]
    most = max(shared) + sum(200 * (len(p) - n) for p, n in zip(prompts, shared))
    expect(computed <= most, f"{computed} prompt tokens were computed, {most} at most have to be")
    expect(d.metric("prefix_hits_total") >= 999, "not all of the others began with a kept prefix")
    off = daemon_with_story(t, "engine: {prefix_cache: no}", name="off")
    with off.client() as c:
        alone = [text_of(ask(c, PREAMBLE + n, 8)) for n in names]
    expect(all(text == alone[i % 5] for i, text in enumerate(texts)),
           "a text with a kept prefix is another one")
    expect(off.metric("prefix_hits_total") == 0, "a prefix is used although that is off")


@test
def unused_prefixes_leave_with_their_model(t):
    d = daemon_with_story(t)
    with d.client() as c:
        ask(c, PREAMBLE, 32)
        wait_for(lambda: d.metric("prefix_bytes") > 0, "a prefix to be kept")
        wait_for(lambda: d.metric("kv_used_bytes") == 0, "the memory of a text that ended")
        c.ask("UNLOAD", ("MODEL", STORY))
        wait_for(lambda: d.metric("prefix_bytes") == 0, "the prefixes of a model that is gone")
        expect(len(text_of(ask(c, PREAMBLE, 32))) > 0, "no text after the model came back")


# ---- under pressure ----

def long_requests(model, n, tokens):
    """Requests with prompts of many lengths, half of them with a beginning in common."""
    random_ = random.Random(7)
    words = "Once upon a time there was a big red dog who loved the sun and his little friend".split()
    for i in range(n):
        prompt = " ".join(random_.choice(words) for _ in range(random_.randrange(1, 60)))
        if i % 2:
            prompt = PREAMBLE[:100] + prompt
        yield (("MODEL", model), ("PROMPT", prompt), ("MAX_TOKENS", tokens), ("SEED", 1000 + i),
               ("IGNORE_EOS", 1), ("CREDIT", 1 << 20))


def texts_alone(daemon, requests):
    """What each is when nothing else runs and nothing is short."""
    with daemon.client() as c:
        return [text_of(c.ask("COMPLETE", *r)) for r in requests]


def texts_together(daemon, requests):
    with daemon.client(limit_s=40) as c:
        ids = [c.request("COMPLETE", *r) for r in requests]
        replies = [c.replies(i) for i in ids]
    for r in replies:
        expect(r[-1].type == "DONE", f"a request under pressure failed: {r[-1]}")
    return [text_of(r) for r in replies]


def same_under_pressure(t, files, models, tokens, n=24, budget="2MiB"):
    requests = [r for m in models for r in long_requests(m, n, tokens)]
    random.Random(1).shuffle(requests)
    alone = texts_alone(t.daemon(models=files, config="engine: {prefix_cache: no}"), requests)
    for prefix in ("no", "yes"):
        d = t.daemon(models=files, name=prefix,
                     config=f"engine: {{kv_budget: {budget}, prefix_cache: {prefix}}}")
        together = texts_together(d, requests)
        for i, (one, other) in enumerate(zip(alone, together)):
            expect(one == other, f"prefixes {prefix}, request {i}: {one!r} alone, {other!r}")
        expect(d.metric("preemptions_total") > 0, "nothing had to give way: the test shows nothing")
        expect(d.metric("recomputed_tokens_total") > 0, "nothing was computed again")
        wait_for(lambda: d.metric("kv_used_bytes") == 0, "all KV memory to come back")
        expect(d.metric("kv_uid_max_bytes") == 0, "somebody pays for memory that is not in use")


@test
def texts_under_pressure_are_those_of_requests_alone(t):
    """Each gives way and is computed again, several times: the same text, no byte twice."""
    same_under_pressure(t, [t.golden(f"models/{STORY}.gguf")], [STORY], 400)


@test
def models_share_one_tiny_budget(t):
    """Pages of one model come free for another only by whole slabs."""
    models = ["stories260K-f16", "syn-llama-q4_k_m"]
    same_under_pressure(t, [t.golden(f"models/{m}.gguf") for m in models], ["ember", *models],
                        120, n=24, budget="4MiB")


@test
def a_user_who_comes_gets_memory_from_who_has_all(t):
    """One uid fills the budget; another's requests begin and end beside it, and no text changes."""
    t.need_root()
    t.need_program("setpriv")
    d = daemon_with_story(t, "engine: {kv_budget: 2MiB, prefix_cache: no}")
    ask_other = ("setpriv", "--reuid", 12345, "--regid", 12345, "--clear-groups", program("hearth"),
                 "run", "--socket", d.socket, STORY, PREAMBLE, "--max-tokens", 200, "--seed", 5,
                 "--ignore-eos")
    os.chmod(d.socket, 0o666)
    for folder in (t.dir, d.dir):
        os.chmod(folder, 0o755)
    alone = t.run(*ask_other).out
    requests = list(long_requests(STORY, 300, 480))
    first = texts_alone(d, requests[:30])
    with d.client(limit_s=50) as c:
        ids = [c.request("COMPLETE", *r) for r in requests]
        wait_for(lambda: d.metric("kv_used_bytes") > 1.8 * (1 << 20), "the budget to be full")
        before = d.metric("preemptions_total")
        expect(t.run(*ask_other).out == alone, "the newcomer's text is another one")
        expect(d.metric("queue") > 0, "the other user was done first: the test shows nothing")
        expect(d.metric("preemptions_total") > before, "nobody gave way")
        texts = [text_of(c.replies(i)) for i in ids[:30]]
    expect(texts == first, "a text of who gave way is another one")


@test
def a_budget_below_the_context_is_the_context(t):
    """A text ends where the whole budget is full, and a prompt beyond that is refused in words."""
    path = t.dir / "wide.gguf"
    t.run("make-model", "--out", path, "--dim", "512", "--layers", "2", "--kv-heads", "8")
    d = t.daemon(models=[path], config="engine: {kv_budget: 2MiB}")
    with d.client() as c:
        for _ in range(2):
            end = c.ask("COMPLETE", ("MODEL", "wide"), ("PROMPT", "a b c"), ("MAX_TOKENS", 5000),
                        ("IGNORE_EOS", 1))[-1]
            expect(end.get("REASON") == "context", f"it ended so: {end}")
            tokens = end.get("PROMPT_TOKENS") + end.get("COMPLETION_TOKENS")
            expect(tokens == 31 * 16, f"{tokens} tokens in a budget of 31 tiles")
        end = c.ask("COMPLETE", ("MODEL", "wide"), ("PROMPT", "a b c d " * 200), ("MAX_TOKENS", 1))[-1]
        expect(end.get("CODE") == "no-memory" and "engine.kv_budget" in end.get("SENTENCE"), f"{end}")


@test
def a_parked_reader_comes_back_after_its_memory_went(t):
    """Long before park_timeout: others wanted the memory, and its text is none the worse for it."""
    d = daemon_with_story(t, "engine: {kv_budget: 2MiB, prefix_cache: no}")
    requests = list(long_requests(STORY, 24, 400))
    alone = texts_alone(d, requests[:1])[0]
    reader = [o for o in requests[0] if o[0] != "CREDIT"]
    with d.client() as c:
        request = c.request("COMPLETE", *reader, ("CREDIT", 200))
        wait_for(lambda: d.metric("streams_parked") == 1 and d.metric("kv_parked_bytes") > 0,
                 "the stream to be parked, with its memory")
        texts_together(d, requests[1:])
        expect(d.metric("kv_parked_bytes") == 0, "its memory was not taken")
        expect(d.metric("streams_parked") == 1, "it is parked no more")
        c.request("CREDIT", ("CREDIT", 1 << 20), request_id=request)
        expect(text_of(c.replies(request)) == alone, "the text is another one")
