"""Streaming as clients see it: what a reader may hold up, and what its text is worth."""
from lib.harness import expect, test, wait_for
from lib.models import ready_daemon
from lib.wire import frame, text_of


@test
def skipping_to_the_inside_of_a_character_is_refused(t):
    d = ready_daemon(t)
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 60),
           ("TEMPERATURE", 0.0))
    with d.client() as c:
        text = text_of(c.ask("COMPLETE", *ask)).encode()
        wrong = 0
        for skip in range(1, 40):
            replies = c.ask("COMPLETE", *ask, ("SKIP_BYTES", skip))
            if text[skip] & 0xc0 != 0x80:
                expect(text_of(replies).encode() == text[skip:], f"skip {skip}: {replies}")
                continue
            wrong += 1
            last = replies[-1]
            expect(len(replies) == 1 and last.get("CODE") == "bad-request" and
                   last.get("OPTION") == "skip_bytes", f"skip {skip}: {replies}")
    expect(wrong > 0, f"the text has no characters of several bytes: {text!r}")


@test
def a_slow_reader_gets_every_byte_and_holds_up_nobody(t):
    d = ready_daemon(t, config="limits: {stream_buffer: 4KiB}\n")
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("TEMPERATURE", 0.0))
    long = (*ask, ("MAX_TOKENS", 6000))
    with d.client() as c:
        whole = text_of(c.ask("COMPLETE", *long))
    expect(len(whole.encode()) > 5000, "the text is too short to be held up")
    with d.client() as slow, d.client() as quick:
        # replies that are not read fill the socket; the credit stands behind them, and the stream
        n = 500
        metrics = [frame("METRICS", i) for i in range(2, n + 2)]
        metrics.insert(n - 10, frame("CREDIT", 1, ("CREDIT", 1 << 30)))
        slow.send(frame("COMPLETE", 1, *long, ("CREDIT", 100)) + b"".join(metrics))
        wait_for(lambda: d.metric("streams_parked") == 1, "the stream to be parked")
        for _ in range(5):
            expect(quick.ask("COMPLETE", *ask, ("MAX_TOKENS", 20))[-1].type == "DONE", "another")
        expect(d.metric("streams_parked") == 1, "it went on though nobody read")
        text, ended = "", []
        while len(ended) < n + 1:
            f = slow.receive()
            text += f.get("TEXT", "") if f.type == "TOKENS" else ""
            ended += [f.id] if f.type == "DONE" else []
    expect(text == whole, "the text is another one")
    expect(sorted(ended) == list(range(1, n + 2)), "an answer is missing")
    wait_for(lambda: d.metric("kv_used_bytes") == 0, "KV memory to come back")


@test
def a_stream_is_continued_from_wherever_it_broke(t):
    d = ready_daemon(t)
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 300),
           ("SEED", 11))
    with d.client() as c:
        whole = text_of(c.ask("COMPLETE", *ask))
    for n_bytes in (1, 50, 150):
        c = d.client()
        c.request("COMPLETE", *ask, ("CREDIT", 200))
        first = [c.receive()]
        while len(text_of(first).encode()) < n_bytes:
            first.append(c.receive())
        c.close()
        got = text_of(first)
        with d.client() as c:
            rest = c.ask("COMPLETE", *ask, ("SKIP_BYTES", len(got.encode())),
                         ("FINGERPRINT", first[0].get("FINGERPRINT")))
        expect(rest[-1].type == "DONE" and got + text_of(rest) == whole, f"{n_bytes} bytes")


@test
def without_streaming_the_text_is_the_same(t):
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 3000),
           ("TEMPERATURE", 0.0))
    d = ready_daemon(t, config="limits: {stream_buffer: 4KiB}\n")
    with d.client() as c:
        streamed = c.ask("COMPLETE", *ask)
        whole = c.ask("COMPLETE", *ask, ("STREAM", 0))
    expect(text_of(streamed) == text_of(whole), "the text is another one")
    frames = [len(f.get("TEXT").encode()) for f in whole if f.type == "TOKENS"]
    expect(len(frames) > 1 and all(n >= 2048 for n in frames[:-1]), f"{frames}")


@test
def each_stream_that_its_reader_ends_counts_once(t):
    """By cancel, by disconnect or by both, wherever it is; not one that an unload ends."""
    d = ready_daemon(t, config="drain_timeout: 100ms\n")
    ask = (("MODEL", "made"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 8000), ("TEMPERATURE", 0.0))
    endless = (*ask, ("PROMPT", "a dog"))

    def ended(cancels, what):
        wait_for(lambda: d.metric("queue") == 0, f"{what} to end")
        count = d.metric("stream_cancelled_total")
        expect(count == cancels, f"{what}: {count} counted, not {cancels}")

    with d.client() as c:
        c.request("COMPLETE", *endless, ("CREDIT", 200))
        c.receive()
    ended(1, "a stream whose reader is gone")
    with d.client() as c:
        request = c.request("COMPLETE", *endless, ("CREDIT", 200))
        c.receive()
        c.send(frame("CANCEL", request))
    ended(2, "one that is cancelled by a reader who goes")
    with d.client() as c:
        request = c.request("COMPLETE", *endless, ("CREDIT", 1))
        wait_for(lambda: d.metric("streams_parked") == 1, "the stream to be parked")
        c.request("CANCEL", request_id=request)
        expect(c.replies(request)[-1].get("REASON") == "cancelled", "parked")
    ended(3, "one that waits for its reader")
    with d.client() as c:
        c.send(frame("COMPLETE", 1, *ask, ("PROMPT", "a dog " * 20000)) + frame("CANCEL", 1))
        last = c.replies(1)[-1]
        expect(last.get("REASON") == "cancelled", f"while its text is tokenized: {last}")
    ended(4, "one whose text was being tokenized")
    with d.client() as c:
        request = c.request("COMPLETE", *endless, ("CREDIT", 200))
        c.receive()
        d.hearth("unload", "made")
        last = c.replies(request)[-1]
        expect(last.get("CODE") == "shutting-down", f"unloaded: {last}")
    ended(4, "one that an unload ends")
