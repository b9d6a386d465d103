"""Streams whose readers stay away: they let go of KV memory and model, and come back with the same text."""
import os
import shutil

from lib.harness import expect, test, wait_for
from lib.wire import text_of

STORY = "stories260K-f32"
ASK = (("MODEL", STORY), ("PROMPT", "Once upon a time"), ("TEMPERATURE", 0.8), ("SEED", 3),
       ("IGNORE_EOS", 1))
QUICK = "streaming: {park_timeout: 100ms}"


def whole(daemon, n):
    """The text of a reader that keeps up."""
    with daemon.client() as c:
        return text_of(c.ask("COMPLETE", *ASK, ("MAX_TOKENS", n)))


def fall_asleep(daemon, client, n, credit=30):
    """A stream that got credit for its first bytes only, once it is asleep."""
    request = client.request("COMPLETE", *ASK, ("MAX_TOKENS", n), ("CREDIT", credit))
    wait_for(lambda: daemon.metric("streams_asleep") == 1, "the stream to fall asleep")
    expect(daemon.metric("streams") == 0, "the engine still knows a stream that is asleep")
    wait_for(lambda: daemon.metric("kv_used_bytes") == 0, "its KV memory to come free")
    return request


def grant(client, request, credit=1 << 20):
    client.request("CREDIT", ("CREDIT", credit), request_id=request)


def unload(daemon, client):
    client.ask("UNLOAD", ("MODEL", STORY))
    wait_for(lambda: daemon.metric("models_ready") == 0, "the model to go")


def daemon_of(t, config=QUICK, **more):
    return t.daemon(models=[t.golden(f"models/{STORY}.gguf")], config=config, **more)


@test
def a_reader_that_comes_back_gets_the_rest(t):
    """First with its model there, then with one that has to be loaded again; bit by bit, too."""
    d = daemon_of(t)
    text = whole(d, 200)
    for gone in (False, True):
        with d.client() as c:
            request = fall_asleep(d, c, 200)
            if gone:
                unload(d, c)
            grant(c, request)
            replies = c.replies(request)
        expect(text_of(replies) == text, f"{text_of(replies)!r} instead of {text!r}")
        expect(replies[-1].get("COMPLETION_TOKENS") == 200, f"it ended so: {replies[-1]}")
        expect(sum(r.get("SEED") is not None for r in replies) == 2, "an origin too many or few")
    expect(d.metric("preemptions_total") == 2, "each fell asleep once")
    expect(d.metric("recomputed_tokens_total") > 0, "nothing was computed again")
    with d.client() as c:
        request, got = fall_asleep(d, c, 40, credit=5), []
        for _ in range(100):
            grant(c, request, 7)
            wait_for(lambda: d.metric("streams_asleep") + (d.metric("queue") == 0),
                     "it to sleep again, or to end")
            if d.metric("queue") == 0:
                break
        got = c.replies(request)
    expect(text_of(got) == whole(d, 40), "a text in many bits is another one")
    with d.client() as c:
        stats = c.ask("MODELS", ("MODEL", STORY))[0].get("STATS")
    expect("requests 5\n" in stats, f"one that woke is counted again: {stats}")


@test
def the_rest_of_a_finished_text_needs_no_model(t):
    """Computed to its end, and its reader away: the model may go, and is not loaded again."""
    d = daemon_of(t)
    text = whole(d, 42)
    with d.client() as c:
        for stream in (1, 0):
            request = c.request("COMPLETE", *ASK, ("MAX_TOKENS", 42), ("CREDIT", len(text) - 1),
                                ("STREAM", stream))
            wait_for(lambda: d.metric("streams_asleep") == 1, "the stream to fall asleep")
            unload(d, c)
            loads = d.metric("loads_total")
            grant(c, request)
            replies = c.replies(request)
            expect(text_of(replies) == text, f"{text_of(replies)!r} instead of {text!r}")
            expect(replies[-1].get("REASON") == "length", f"it ended so: {replies[-1]}")
            expect(d.metric("loads_total") == loads, "a model was loaded for nothing")


@test
def a_model_of_sleepers_is_evicted_for_another(t):
    """The budget has room for one of two; a request for the other does not wait for the reader."""
    paths = []
    for name in (STORY, "other"):
        paths.append(t.dir / f"{name}.gguf")
        t.run("make-model", "--out", paths[-1], "--dim", "512", "--layers", "4", "--ff", "2048")
    budget = int(paths[0].stat().st_size * 1.6 + (4 << 20)) // 1024
    d = t.daemon(models=paths, config=f"memory_budget: {budget}KiB\n"
                                      f"engine: {{kv_budget: 4MiB}}\n{QUICK}")
    text = whole(d, 100)
    with d.client() as c:
        request = fall_asleep(d, c, 100)
        replies = c.ask("COMPLETE", ("MODEL", "other"), *ASK[1:], ("MAX_TOKENS", 5))
        expect(replies[-1].type == "DONE", f"the other model did not answer: {replies}")
        expect(d.metric("unloads_total") == 1, "both models are loaded: the test shows nothing")
        grant(c, request)
        replies = c.replies(request)
        expect(text_of(replies) == text, f"{text_of(replies)!r} instead of {text!r}, ended so: {replies[-1]}")


@test
def sleepers_end_like_all_others(t):
    """By cancel, disconnect, deadline and the end of the daemon."""
    d = daemon_of(t)
    with d.client() as c:
        request = fall_asleep(d, c, 200)
        c.request("CANCEL", request_id=request)
        end = c.replies(request)[-1]
        expect(end.get("REASON") == "cancelled" and end.get("COMPLETION_TOKENS") > 0, f"{end}")
        fall_asleep(d, c, 200)
    wait_for(lambda: d.metric("queue") == 0 and d.metric("streams_asleep") == 0,
             "a sleeper without a client to go")
    with d.client() as c:
        request = c.request("COMPLETE", *ASK, ("MAX_TOKENS", 200), ("CREDIT", 5),
                            ("DEADLINE_US", 600000))
        wait_for(lambda: d.metric("streams_asleep") == 1, "the stream to fall asleep")
        expect(c.replies(request)[-1].get("CODE") == "deadline", "not ended by its deadline")
        request = fall_asleep(d, c, 200)
        unload(d, c)
        d.signal(15)
        wait_for(lambda: c.receive().type == "GOAWAY", "the daemon to drain")
        grant(c, request)
        expect(c.replies(request)[-1].get("CODE") == "shutting-down", "woken by a daemon that goes")
    expect(d.wait() == 0, "the daemon did not end well")


@test
def a_stream_is_not_continued_by_another_file(t):
    source = t.golden(f"models/{STORY}.gguf")
    model = t.dir / f"{STORY}.gguf"
    shutil.copy(source, model)
    d = t.daemon(models=[model], config=QUICK)
    with d.client() as c:
        request = fall_asleep(d, c, 200)
        unload(d, c)
        shutil.copy(source, t.dir / "new")
        os.utime(t.dir / "new", (1, 1))
        os.replace(t.dir / "new", model)
        grant(c, request)
        end = c.replies(request)[-1]
        expect(end.get("CODE") == "bad-request" and end.get("OPTION") == "fingerprint", f"{end}")
        request = fall_asleep(d, c, 200)
        unload(d, c)
        os.unlink(d.models_dir / f"{STORY}.gguf")
        d.signal(1)
        wait_for(lambda: STORY not in str(c.ask("MODELS")), "the model to leave the list")
        grant(c, request)
        end = c.replies(request)[-1]
        expect(end.get("CODE") == "no-such-model", f"{end}")
