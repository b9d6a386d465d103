"""What the daemon ends by itself: when a model's drain has lasted too long, and when the daemon goes."""
from lib.harness import expect, test, wait_for
from lib.models import ready_daemon
from lib.wire import frame, text_of

ENDLESS = (("MODEL", "made"), ("PROMPT", "a"), ("IGNORE_EOS", 1), ("SEED", 1), ("MAX_TOKENS", 8000),
           ("CREDIT", 10))
QUICK = "drain_timeout: 300ms\n"


def through_a_drain(d, c):
    """A parked stream that came while the model was draining, and so began after its next load."""
    c.request("COMPLETE", *ENDLESS)
    c.receive()
    c.ask("UNLOAD", ("MODEL", "made"))
    loads = d.metric("loads_total")
    request = c.request("COMPLETE", *ENDLESS)
    wait_for(lambda: d.metric("loads_total") == loads + 1, "the drain to end and the next load")
    while c.receive().id != request:
        pass
    return request


@test
def a_stream_that_waited_for_a_drain_sleeps_and_wakes_like_any_other(t):
    # the first stream is still the model's when its drain has lasted too long
    d = ready_daemon(t, config=QUICK + "streaming: {park_timeout: 3s}\n")
    with d.client() as c:
        request = through_a_drain(d, c)
        wait_for(lambda: d.metric("streams_asleep") == 1 or d.metric("queue") == 0,
                 "the stream to fall asleep")
        expect(d.metric("streams_asleep") == 1, "it has ended")
        c.request("CANCEL", request_id=request)
        last = c.replies(request)[-1]
        expect(last.get("REASON") == "cancelled", f"{last}")


@test
def a_stream_that_waited_for_a_drain_is_ended_by_the_next_one(t):
    d = ready_daemon(t, config=QUICK)
    with d.client() as c:
        request = through_a_drain(d, c)
        c.ask("UNLOAD", ("MODEL", "made"))
        last = c.replies(request)[-1]
        expect(last.get("CODE") == "shutting-down", f"{last}")


@test
def texts_that_are_tokenized_when_the_daemon_goes_are_told(t):
    d = ready_daemon(t, config="drain_timeout: 1ms\nlimits: {input_bytes_per_uid: 64MiB}\n")
    ids = range(1, 13)
    with d.client() as c:
        c.send(b"".join(frame("COMPLETE", i, ("MODEL", "made"), ("PROMPT", f"{i} dogs, " * 80000))
                        for i in ids))
        wait_for(lambda: d.metric("queue") > 3, "some of them to come")
        d.signal(15)
        ends = [f for f in c.frames_to_end() if f.id in ids and f.type in ("DONE", "ERROR")]
    expect(sorted(f.id for f in ends) == list(ids), f"{len(ends)} ended")
    codes = {f.get("CODE") for f in ends}
    expect(codes <= {"context-full", "shutting-down"}, f"{ends}")
    expect("shutting-down" in codes, "all were read in time: the test shows nothing")
    expect(d.wait() == 0, "it did not end well")
