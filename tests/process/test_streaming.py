"""Streaming as clients see it: what a reader may hold up, and what its text is worth."""
from lib.harness import expect, test, wait_for
from lib.models import ready_daemon
from lib.wire import text_of


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
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 6000),
           ("TEMPERATURE", 0.0))
    with d.client() as c:
        whole = text_of(c.ask("COMPLETE", *ask))
    with d.client() as slow, d.client() as quick:
        request = slow.request("COMPLETE", *ask, ("CREDIT", 1 << 30))
        wait_for(lambda: d.metric("streams_parked") == 1, "the stream to be parked")
        for _ in range(5):
            expect(quick.ask("COMPLETE", *ask[:3], ("MAX_TOKENS", 20))[-1].type == "DONE", "another")
        expect(d.metric("streams_parked") == 1, "it went on although nobody read")
        text = text_of(slow.replies(request))
    expect(text == whole, "the text is another one")
    expect(d.metric("stream_parks_total") > 0 and d.metric("kv_used_bytes") == 0, "at the end")


@test
def a_stream_is_continued_from_wherever_it_broke(t):
    d = ready_daemon(t)
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 300),
           ("SEED", 11))
    with d.client() as c:
        whole = text_of(c.ask("COMPLETE", *ask))
    for n_frames in (1, 2, 5):
        c = d.client()
        c.request("COMPLETE", *ask, ("CREDIT", 200))
        first = [c.receive() for _ in range(n_frames)]
        c.close()
        got = text_of(first)
        with d.client() as c:
            rest = c.ask("COMPLETE", *ask, ("SKIP_BYTES", len(got.encode())),
                         ("FINGERPRINT", first[0].get("FINGERPRINT")))
        expect(rest[-1].type == "DONE" and got + text_of(rest) == whole, f"{n_frames} frames")


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
