"""KV memory: beginnings that are computed once, and little memory for many."""
from lib.harness import expect, test, wait_for
from lib.wire import text_of

STORY = "stories260K-f32"
GREEDY = (("MODEL", STORY), ("TEMPERATURE", 0.0))
PREAMBLE = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the "
            "park with her dog. One day, she saw a big tree and wanted to climb it. Her mom said, ")


def daemon_with_story(t, config=None, **more):
    return t.daemon(models=[t.golden(f"models/{STORY}.gguf")], config=config, **more)


def ask(client, prompt, n, *more):
    return client.ask("COMPLETE", *GREEDY, ("PROMPT", prompt), ("MAX_TOKENS", n), *more)


@test
def a_long_preamble_is_computed_once(t):
    """A thousand requests that begin alike, all at once: what they have in common, once."""
    d = daemon_with_story(t)
    names = ["Tom", "Sue", "Ben", "Mia", "Sam"]
    with d.client() as c:
        length = ask(c, PREAMBLE, 1)[-1].get("PROMPT_TOKENS")
        before = d.metric("prompt_tokens_total")
        ids = [c.request("COMPLETE", *GREEDY, ("PROMPT", PREAMBLE + names[i % 5]),
                         ("MAX_TOKENS", 8)) for i in range(1000)]
        texts = [text_of(c.replies(i)) for i in ids]
    computed = d.metric("prompt_tokens_total") - before
    expect(length > 60, f"the preamble has {length} tokens only")
    # each computes at most its last, part page and its name
    expect(computed < 1000 * 32, f"{computed} prompt tokens were computed, {length} a request")
    expect(d.metric("prefix_hits_total") >= 1000, "not all of them began with a kept prefix")
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
