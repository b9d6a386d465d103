"""Batching as clients see it: why steps go, order, deadlines, what one user may hold."""
from lib.harness import expect, test
from lib.models import made_model, ready_daemon
from lib.wire import frame, text_of

REASONS = ("idle", "gathered", "continued", "full", "min_batch", "max_delay", "deadline")
ONE = (("IGNORE_EOS", 1), ("TEMPERATURE", 0.0))


def ask_many(c, n, *options):
    """n requests at once on one connection: their ids."""
    ids = list(range(c.next_id, c.next_id + n))
    c.next_id += n
    c.send(b"".join(frame("COMPLETE", i, ("MODEL", "made"), ("PROMPT", f"a dog {i}"), *ONE, *options)
                    for i in ids))
    return ids


@test
def every_step_has_one_reason(t):
    d = ready_daemon(t, config="batching: {max_batch: 4}\n")
    with d.client() as c:
        c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "alone"), ("MAX_TOKENS", 3), *ONE)
        for request in ask_many(c, 12, ("MAX_TOKENS", 20)):
            expect(c.replies(request)[-1].type == "DONE", "a request failed")
    counts = {r: d.metric(f"steps_{r}_total") for r in REASONS}
    expect(sum(counts.values()) == d.metric("steps_total"), f"{counts}")
    expect(counts["full"] > 0 and counts["idle"] > 0, f"{counts}")
    section = d.hearth("stats", "batcher").out
    mean = d.metric("step_rows_total") / d.metric("steps_total")
    expect(f"step_rows_mean {mean:.4f}\n" in section, section)
    expect(d.metric("step_rows_max") == 4, "more in a step than max_batch")


@test
def a_step_waits_for_company_no_longer_than_max_delay(t):
    d = ready_daemon(t, config="batching: {min_batch: 3, max_delay: 50ms}\n"
                                "engine: {prefix_cache: no}\n")
    with d.client() as c:
        expect(c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "alone"), ("MAX_TOKENS", 1),
                     *ONE)[-1].type == "DONE", "alone")
        expect(d.metric("steps_max_delay_total") == 1, "it waited for nobody to the end")
        for request in ask_many(c, 3, ("MAX_TOKENS", 1)):
            expect(c.replies(request)[-1].type == "DONE", "in company")
    steps = {r: d.metric(f"steps_{r}_total") for r in REASONS}
    expect(d.metric("steps_total") == 2 and steps["max_delay"] == 1, f"{steps}")


@test
def adaptive_narrows_steps_and_changes_no_text(t):
    d = ready_daemon(t, config="batching: {adaptive: 1us}\n")  # no step is that short
    with d.client() as c:
        alone = text_of(c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), *ONE,
                              ("MAX_TOKENS", 40)))
        ids = [c.request("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), *ONE,
                         ("MAX_TOKENS", 40)) for _ in range(40)]
        for request in ids:
            expect(text_of(c.replies(request)) == alone, "the text is another one")
    expect(d.metric("step_width") == 16 and d.metric("step_narrowed_total") > 0,
           f"{d.metric('step_width')}")


@test
def a_deadline_that_cannot_be_met_is_refused_early(t):
    d = t.daemon(models=[made_model(t, "slow", "--dim", "256", "--ff", "1024")],
                 config="engine: {prefix_cache: no}\n")
    d.hearth("warm", "--wait", "slow")
    long = (("MODEL", "slow"), ("PROMPT", "a dog ran " * 150), ("MAX_TOKENS", 1), *ONE)
    with d.client() as c:
        first = c.ask("COMPLETE", *long, ("DEADLINE_US", 600 * 1000000))[-1]
        expect(first.type == "DONE", f"nothing was measured yet: {first}")
        for _ in range(9):
            took = c.ask("COMPLETE", *long)[-1].get("PREFILL_US")
        columns = d.metric("step_columns_total")
        last = c.ask("COMPLETE", *long, ("DEADLINE_US", took // 20))[-1]
        expect(last.get("CODE") == "deadline" and "cannot be met" in last.get("SENTENCE"), f"{last}")
        expect(d.metric("step_columns_total") == columns, "it was begun all the same")
        last = c.ask("COMPLETE", *long, ("DEADLINE_US", took * 50))[-1]
        expect(last.type == "DONE", f"{last}")
    expect(d.metric("deadlines_foreseen_total") == 1, "not counted")
