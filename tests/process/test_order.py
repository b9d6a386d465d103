"""batching.preserve_order: a connection's answers complete in the order of its requests."""
from lib.harness import expect, test, wait_for
from lib.models import ready_daemon
from lib.wire import frame, text_of

CONFIG = "batching: {preserve_order: yes}\n"
GREEDY = (("MODEL", "made"), ("IGNORE_EOS", 1), ("TEMPERATURE", 0.0))


def ends(c, n):
    """The ids of the next n endings, as they come, and all frames until then."""
    order, frames = [], []
    while len(order) < n:
        f = c.receive()
        frames.append(f)
        if f.type in ("DONE", "ERROR"):
            order.append(f.id)
    return order, frames


def ask(c, n_tokens, *more):
    return c.request("COMPLETE", *GREEDY, ("PROMPT", "a dog"), ("MAX_TOKENS", n_tokens), *more)


@test
def a_short_answer_completes_after_a_long_one_before_it(t):
    d = ready_daemon(t, config=CONFIG)
    with d.client() as c, d.client() as other:
        long, short = ask(c, 2000), ask(c, 1)
        expect(other.ask("COMPLETE", *GREEDY, ("PROMPT", "a cat"), ("MAX_TOKENS", 1))[-1].type ==
               "DONE", "another connection waits for this one's turn")
        order, frames = ends(c, 2)
    expect(order == [long, short], f"{order}")
    first_short = next(i for i, f in enumerate(frames) if f.id == short)
    last_long = max(i for i, f in enumerate(frames) if f.id == long)
    expect(first_short < last_long, "its text waited too")


@test
def without_it_the_short_one_is_first(t):
    d = ready_daemon(t)
    with d.client() as c:
        long, short = ask(c, 5000), ask(c, 1)
        order, _ = ends(c, 2)
    expect(order == [short, long], f"{order}")


@test
def every_way_to_end_keeps_its_turn(t):
    d = ready_daemon(t, config=CONFIG)
    with d.client() as c:
        parked = ask(c, 300, ("CREDIT", 10))
        others = [ask(c, 1),
                  c.request("COMPLETE", ("MODEL", "nobody"), ("PROMPT", "a")),
                  c.request("EMBED", ("MODEL", "made"), ("PROMPT", "a dog")),
                  c.request("TOKENIZE", ("MODEL", "made"), ("PROMPT", "a dog")),
                  c.request("COMPLETE", *GREEDY, ("PROMPT", "a "  * 9000), ("MAX_TOKENS", 1)),
                  ask(c, 5000, ("DEADLINE_US", 20000)),
                  ask(c, 5000)]
        c.request("CANCEL", request_id=others[-1])
        wait_for(lambda: d.metric("answers_kept") == len(others), "all but the first to end")
        expect(d.metric("queue") == len(others) + 1, "kept answers are in no limit")
        expect(c.ask("NULL")[-1].type == "DONE", "a question waits for its turn")
        early = [f for f in c.waiting if f.type in ("DONE", "ERROR")]
        expect(not early, f"{early}")
        c.request("CREDIT", ("CREDIT", 1 << 20), request_id=parked)
        order, frames = ends(c, len(others) + 1)
    expect(order == [parked] + others, f"{order}")
    codes = [f.get("CODE") or f.get("REASON", "-") for f in frames if f.type in ("DONE", "ERROR")]
    expect(codes == ["length", "length", "no-such-model", "stop", "stop", "context-full",
                     "deadline", "cancelled"], f"{codes}")
    expect(d.metric("answers_kept") == 0 and d.metric("queue") == 0, "something is left")


@test
def cancelling_the_first_lets_the_next_go(t):
    d = ready_daemon(t, config=CONFIG)
    with d.client() as c:
        first, second, third = ask(c, 300, ("CREDIT", 10)), ask(c, 1), ask(c, 1)
        wait_for(lambda: d.metric("answers_kept") == 2, "the others to end")
        c.request("CANCEL", request_id=first)
        order, _ = ends(c, 3)
    expect(order == [first, second, third], f"{order}")


@test
def kept_answers_go_with_their_client(t):
    d = ready_daemon(t, config=CONFIG)
    c = d.client()
    ask(c, 300, ("CREDIT", 10))
    for _ in range(50):
        ask(c, 1)
    wait_for(lambda: d.metric("answers_kept") == 50, "the others to end")
    c.close()
    wait_for(lambda: d.metric("queue") == 0, "the requests to go")
    expect(d.metric("answers_kept") == 0, "something is left")
    wait_for(lambda: d.metric("kv_used_bytes") == 0, "KV memory to come back")
    d.alive()


@test
def kept_answers_end_with_the_daemon(t):
    d = ready_daemon(t, config=CONFIG + "drain_timeout: 300ms\n")
    with d.client() as c:
        first, second = ask(c, 300, ("CREDIT", 10)), ask(c, 1)
        wait_for(lambda: d.metric("answers_kept") == 1, "the second to end")
        d.signal(15)
        order, frames = ends(c, 2)
    expect(order == [first, second], f"{order}")
    expect(frames[-1].type == "DONE", f"{frames[-1]}")
    expect(d.wait() == 0, "it did not end well")


@test
def many_of_all_lengths_complete_in_order_with_their_own_text(t):
    d = ready_daemon(t, config=CONFIG)
    lengths = [1 + i * 7919 % 40 for i in range(400)]
    with d.client() as c:
        alone = text_of(c.ask("COMPLETE", *GREEDY, ("PROMPT", "a dog"), ("MAX_TOKENS", 40)))
        ids = list(range(1000, 1000 + len(lengths)))
        c.send(b"".join(frame("COMPLETE", i, *GREEDY, ("PROMPT", "a dog"), ("MAX_TOKENS", n))
                        for i, n in zip(ids, lengths)))
        order, frames = ends(c, len(ids))
    expect(order == ids, f"{order}")
    texts = {i: "" for i in ids}
    for f in frames:
        texts[f.id] += f.get("TEXT", "")
    for i, n in zip(ids, lengths):
        expect(alone.startswith(texts[i]) and (texts[i] or n == 1), f"{n} tokens: {texts[i]!r}")
    expect(texts[ids[lengths.index(40)]] == alone, "the longest is another text")
