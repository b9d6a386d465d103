"""Streaming as clients see it: what a reader may hold up, and what its text is worth."""
from lib.harness import expect, test
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
