"""Serving: stories, streams, embeddings, tokens, loads, through the real daemon."""
import json
import signal
import struct
import threading

from lib.harness import expect, listening, test, wait_for
from lib.models import made_model
from lib.wire import text_of

STORY = "stories260K-f32"
GREEDY = (("MODEL", STORY), ("TEMPERATURE", 0.0))


def daemon_with_story(t, **more):
    return t.daemon(models=[t.golden(f"models/{STORY}.gguf")], **more)


def golden_case(t):
    with open(t.golden(f"models/{STORY}.json"), encoding="utf-8") as file:
        return next(c for c in json.load(file)["cases"] if len(c["prompt_ids"]) == 7)


@test
def a_story_is_the_one_that_is_known(t):
    d = daemon_with_story(t)
    case = golden_case(t)
    r = d.hearth("run", STORY, case["prompt_text"], "--temperature", "0", "--ignore-eos",
                 "--max-tokens", str(len(case["greedy_ids"])))
    expect(r.out == case["greedy_text"], f"{r.out!r} is not {case['greedy_text']!r}")


@test
def the_built_in_model_needs_no_file(t):
    d = t.daemon()
    r = d.hearth("run", "ember", "Once upon a time", "--temperature", "0", "--json")
    answer = json.loads(r.out)
    expect(answer["model"] == "ember" and len(answer["text"]) > 20, f"{answer}")
    expect(answer["reason"] in ("stop", "length", "context"), f"{answer}")


@test
def text_comes_in_frames_while_it_is_generated(t):
    d = daemon_with_story(t)
    ask = (*GREEDY, ("PROMPT", "Once upon a time"), ("MAX_TOKENS", 64))
    with d.client() as c:
        # Text that waits together goes together: only credit makes sure that there are two frames.
        request = c.request("COMPLETE", *ask, ("CREDIT", 20))
        first = c.receive()
        c.request("CREDIT", ("CREDIT", 1 << 20), request_id=request)
        replies = [first] + c.replies(request)
        whole = c.ask("COMPLETE", *ask, ("STREAM", 0))
    expect(first.type == "TOKENS" and len(first.get("TEXT").encode()) <= 20, f"{first}")
    expect(len(replies) > 2 and replies[-1].type == "DONE", f"{replies}")
    expect(first.get("VARIANT") and first.get("SEED") is not None and first.get("FINGERPRINT"),
           f"the first frame says not how: {first}")
    expect([r.type for r in whole] == ["TOKENS", "DONE"], f"{whole}")
    expect(text_of(replies) == text_of(whole), "whole and streamed text differ")


@test
def many_requests_interleave_on_one_connection(t):
    d = daemon_with_story(t)
    prompts = ["Once upon a time", "Lily and Tom", "One day, a dog", "The sun was", "Mom said"] * 8
    with d.client() as c:
        alone = {p: text_of(c.ask("COMPLETE", *GREEDY, ("PROMPT", p), ("MAX_TOKENS", 24)))
                 for p in set(prompts)}
        ids = [c.request("COMPLETE", *GREEDY, ("PROMPT", p), ("MAX_TOKENS", 24)) for p in prompts]
        for request_id, prompt in zip(ids, prompts):
            expect(text_of(c.replies(request_id)) == alone[prompt],
                   f"{prompt!r} was answered otherwise in company")


@test
def the_same_seed_gives_the_same_text(t):
    d = daemon_with_story(t)
    ask = (("MODEL", STORY), ("PROMPT", "Once"), ("MAX_TOKENS", 32), ("TEMPERATURE", 0.9))
    with d.client() as c:
        one, two = (text_of(c.ask("COMPLETE", *ask, ("SEED", 7))) for _ in range(2))
        other = text_of(c.ask("COMPLETE", *ask, ("SEED", 8)))
        first = c.ask("COMPLETE", *ask)
        again = text_of(c.ask("COMPLETE", *ask, ("SEED", first[-1].get("SEED"))))
    expect(one == two and one != other, "the seed does not decide")
    expect(text_of(first) == again, "the seed that was reported does not repeat the text")


@test
def a_stop_string_ends_the_text_before_it(t):
    d = daemon_with_story(t)
    with d.client() as c:
        full = text_of(c.ask("COMPLETE", *GREEDY, ("PROMPT", "Once upon a time"),
                             ("MAX_TOKENS", 60)))
        replies = c.ask("COMPLETE", *GREEDY, ("PROMPT", "Once upon a time"), ("MAX_TOKENS", 60),
                        ("STOP", "Lily"))
    expect(replies[-1].get("REASON") == "stop", f"{replies[-1]}")
    expect(text_of(replies) == full[:full.index("Lily")], f"{text_of(replies)!r}")


@test
def a_repeated_request_skips_what_its_reader_has(t):
    d = daemon_with_story(t)
    ask = (*GREEDY, ("PROMPT", "Once upon a time"), ("MAX_TOKENS", 40))
    with d.client() as c:
        replies = c.ask("COMPLETE", *ask)
        mark = replies[0].get("FINGERPRINT")
        rest = c.ask("COMPLETE", *ask, ("SKIP_BYTES", 30), ("FINGERPRINT", mark))
        expect(text_of(rest).encode() == text_of(replies).encode()[30:], f"{text_of(rest)!r}")
        wrong = c.ask("COMPLETE", *ask, ("SKIP_BYTES", 30), ("FINGERPRINT", b"\0" * 8))
    expect(wrong[-1].get("CODE") == "bad-request" and wrong[-1].get("OPTION") == "fingerprint",
           f"{wrong}")


@test
def ids_are_taken_in_place_of_text(t):
    d = daemon_with_story(t)
    case = golden_case(t)
    ids = struct.pack(f"<{len(case['prompt_ids'])}i", *case["prompt_ids"])
    with d.client() as c:
        replies = c.ask("COMPLETE", *GREEDY, ("IDS", ids), ("MAX_TOKENS", 32))
        outside = c.ask("COMPLETE", *GREEDY, ("IDS", struct.pack("<i", 512)))
    expect(case["greedy_text"].startswith(text_of(replies)), f"{text_of(replies)!r}")
    expect(outside[-1].get("CODE") == "bad-request", f"{outside}")


@test
def tokenize_gives_the_ids_of_a_text(t):
    d = daemon_with_story(t)
    case = golden_case(t)
    r = d.hearth("tokenize", STORY, case["prompt_text"])
    expect([int(i) for i in r.out.split()] == case["prompt_ids"][1:], f"{r.out} {case['prompt_ids']}")


@test
def a_long_text_is_tokenized_beside_the_reactor(t):
    d = daemon_with_story(t)
    text = "Once upon a time there was a dog. " * 400
    with d.client() as c:
        request = c.request("TOKENIZE", ("MODEL", STORY), ("PROMPT", text))
        expect([r.type for r in c.ask("NULL")] == ["DONE"], "null had to wait")
        replies = c.replies(request)
    expect(len(replies[0].get("IDS")) // 4 > 2000, f"{replies[-1]}")


@test
def an_embedding_is_a_vector_of_length_one(t):
    d = t.daemon(models=[made_model(t)])
    with d.client() as c:
        replies = c.ask("EMBED", ("MODEL", "made"), ("PROMPT", "a dog"))
        same = c.ask("EMBED", ("MODEL", "made"), ("PROMPT", "a dog"))
        other = c.ask("EMBED", ("MODEL", "made"), ("PROMPT", "the sun is warm"))
    vector = struct.unpack("<64f", replies[0].get("VECTOR"))
    expect(abs(sum(v * v for v in vector) - 1) < 1e-4, f"{vector}")
    expect(replies[0].get("VECTOR") == same[0].get("VECTOR") != other[0].get("VECTOR"),
           "vectors do not follow their texts")


@test
def the_prompt_may_come_through_a_pipe(t):
    d = daemon_with_story(t)
    by_argument = d.hearth("run", STORY, "Once upon a time", "--temperature", "0", "--max-tokens", "20")
    by_pipe = d.hearth("run", STORY, "--temperature", "0", "--max-tokens", "20",
                       input="Once upon a time")
    expect(by_argument.out == by_pipe.out != "", f"{by_argument} {by_pipe}")


@test
def interrupting_the_command_cancels_in_the_daemon(t):
    d = t.daemon(models=[made_model(t)])
    p = t.start("hearth", "run", "--socket", d.socket, "made", "hello", "--ignore-eos",
                "--max-tokens", "1000000", "--raw", stdout=-1, stderr=-1)
    # The context ends such a run before anybody could: many of them keep one alive long enough.
    expect(p.stdout.read(1), "no text came")
    p.send_signal(signal.SIGINT)
    code = p.wait(20)
    expect(code in (130, 0), f"exit status {code}")
    wait_for(lambda: d.metric("streams") == 0, "the stream's end")


@test
def warm_unload_and_models_tell_the_states(t):
    d = daemon_with_story(t)
    expect("cold" in next(l for l in d.hearth("models").out.splitlines() if STORY in l), "not cold")
    d.hearth("warm", "--wait", STORY)
    expect("ready" in next(l for l in d.hearth("models").out.splitlines() if STORY in l), "not ready")
    with d.status_client() as c:
        item = c.ask("MODELS", ("MODEL", STORY))[0]
        expect(item.get("PRELOAD") == 1 and item.get("DONE_BYTES") == item.get("TOTAL_BYTES") > 0,
               f"{item}")
    d.hearth("unload", STORY)
    with d.status_client() as c:
        wait_for(lambda: c.ask("MODELS", ("MODEL", STORY))[0].get("STATE") == "cold", "cold")


@test
def a_request_for_a_cold_model_loads_it(t):
    d = daemon_with_story(t)
    with d.client() as c:
        replies = c.ask("COMPLETE", *GREEDY, ("PROMPT", "Once"), ("MAX_TOKENS", 4))
    expect(replies[-1].type == "DONE" and replies[-1].get("LOAD_US") > 0, f"{replies[-1]}")
    expect(d.metric("loads_total") == 1, "not one load")


@test
def two_requests_load_a_model_once(t):
    d = daemon_with_story(t)
    with d.client() as one, d.client() as two:
        ids = [(c, c.request("COMPLETE", *GREEDY, ("PROMPT", "Once"), ("MAX_TOKENS", 4)))
               for c in (one, two) for _ in range(4)]
        ids += [(c, c.request("WARM", ("MODEL", STORY), ("WAIT", 1))) for c in (one, two)]
        for c, request_id in ids:
            expect(c.replies(request_id)[-1].type == "DONE", "one was not answered")
    expect(d.metric("loads_total") == 1, f"{d.metric('loads_total')} loads")


@test
def unload_while_in_use_lets_the_stream_finish(t):
    d = daemon_with_story(t)
    with d.client() as c:
        request = c.request("COMPLETE", *GREEDY, ("PROMPT", "Once upon a time"), ("IGNORE_EOS", 1),
                            ("MAX_TOKENS", 300), ("CREDIT", 8))
        first = c.receive()
        expect(first.type == "TOKENS", f"{first}")
        d.hearth("unload", STORY)
        with d.status_client() as s:
            expect(s.ask("MODELS", ("MODEL", STORY))[0].get("STATE") == "draining", "not draining")
            c.request("CREDIT", ("CREDIT", 1 << 20), request_id=request)
            done = c.replies(request)[-1]
            expect(done.type == "DONE" and done.get("COMPLETION_TOKENS") == 300, f"{done}")
            wait_for(lambda: s.ask("MODELS", ("MODEL", STORY))[0].get("STATE") == "cold", "cold")
        again = c.ask("COMPLETE", *GREEDY, ("PROMPT", "Once"), ("MAX_TOKENS", 2))
        expect(again[-1].type == "DONE", f"{again}")


@test
def a_model_put_into_the_directory_is_found(t):
    d = t.daemon()
    path = made_model(t)
    (d.models_dir / "made.gguf").symlink_to(path)
    def found():
        with d.client() as c:
            return c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a"), ("MAX_TOKENS", 1))[-1].type == "DONE"
    wait_for(found, "the new model")
    d.signal(signal.SIGHUP)
    (d.models_dir / "second.gguf").symlink_to(path)
    d.signal(signal.SIGHUP)
    wait_for(lambda: "second" in d.hearth("models").out, "the second one in the list")


@test
def names_are_listed_while_no_daemon_runs(t):
    d = daemon_with_story(t)
    d.stop()
    r = d.hearth("models")
    expect(STORY in r.out and "ember" in r.out, f"{r}")
    expect("inactive" in d.hearth("status").out, "the status")
    d.hearth("stats", code=3)


@test
def a_model_of_one_user_evicts_the_least_recently_used(t):
    paths = [made_model(t, f"m{i}", "--seed", str(i), "--dim", "256", "--ff", "4096") for i in (1, 2, 3)]
    size = paths[0].stat().st_size
    # a quarter of the budget is KV memory; the rest holds two models and a half
    d = t.daemon(models=paths, config=f"memory_budget: {int(size * 2.6 * 4 / 3) // 1024}KiB\n")
    def ask(name):
        with d.client() as c:
            return c.ask("COMPLETE", ("MODEL", name), ("PROMPT", "a"), ("MAX_TOKENS", 1))[-1]
    for name in ("m1", "m2", "m1", "m3", "m1"):
        expect(ask(name).type == "DONE", f"{name} was not answered")
    with d.status_client() as s:
        states = {r.get("MODEL"): r.get("STATE") for r in s.ask("MODELS")[:-1]}
    expect(states["m1"] == "ready" and states["m3"] == "ready" and states["m2"] == "cold", f"{states}")
    expect(d.metric("loads_total") == 3, "m1 was loaded again")


@test
def a_model_larger_than_the_budget_is_refused_with_the_numbers(t):
    path = made_model(t, "big", "--dim", "512", "--layers", "4", "--ff", "2048")
    d = t.daemon(models=[path], config="memory_budget: 16MiB\n")
    d.expect_log("hearthd: model big is failed: .*")
    with d.client() as c:
        replies = c.ask("COMPLETE", ("MODEL", "big"), ("PROMPT", "a"))
    expect(replies[-1].get("CODE") == "no-memory" and "MiB" in replies[-1].get("SENTENCE"), f"{replies}")


@test
def metrics_count_what_was_done(t):
    d = daemon_with_story(t)
    with d.client() as c:
        for _ in range(3):
            c.ask("COMPLETE", *GREEDY, ("PROMPT", "Once upon a time"), ("MAX_TOKENS", 10),
                  ("IGNORE_EOS", 1))
    expect(d.metric("completion_tokens_total") == 30, "completion tokens")
    expect(d.metric("generations_done_total") == 3, "generations")
    expect(d.metric("prompt_tokens_total") == 15, "prompt tokens")
    # each step passes over every matrix once, and so did the one that warmed the model
    steps, passes = d.metric("steps_total") + 1, d.metric("weight_passes_total")
    expect(passes > steps and passes % steps == 0, f"{passes} weight passes in {steps} steps")
    expect(d.metric("streams") == 0 and d.metric("queue") == 0, "something is left")
    expect(d.metric("kv_used_bytes") == 0, "KV memory is left")


@test
def a_deadline_ends_a_request_with_its_code(t):
    d = t.daemon(models=[made_model(t, "slow", "--dim", "512", "--layers", "8", "--ff", "2048",
                                    "--context", "4096")])
    d.hearth("warm", "--wait", "slow")
    with d.client() as c:
        replies = c.ask("COMPLETE", ("MODEL", "slow"), ("PROMPT", "a"), ("MAX_TOKENS", 4000),
                        ("IGNORE_EOS", 1), ("DEADLINE_US", 20000))
    expect(replies[-1].get("CODE") == "deadline", f"{replies[-1]}")
    d.alive()


@test
def socket_activation_takes_the_socket_it_is_given(t):
    t.need_program("systemd-socket-activate")
    path = t.dir / "activated"
    from lib.harness import program
    p = t.start("systemd-socket-activate", "-l", path, program("hearthd"), "--models", t.dir,
                "--state-dir", t.dir / "state", stdout=-1, stderr=-1,
                env={**__import__("os").environ, "HEARTH_SOCKET": str(t.dir / "none")})
    wait_for(lambda: listening(path), "the socket")
    r = t.run("hearth", "run", "--socket", path, "ember", "Once", "--max-tokens", "4",
              "--temperature", "0")
    expect(r.out, "no answer")
    p.send_signal(signal.SIGTERM)
    expect(p.wait(20) == 0, "it did not end well")
    expect(path.exists(), "the activated socket was removed")


@test
def a_thousand_connections_are_answered(t):
    d = t.daemon(models=[made_model(t)])
    d.hearth("warm", "--wait", "made")
    t.run("hearth-bench", "serve", "--socket", d.socket, "--model", "made", "--connections", "1000",
          "--duration", "1s", "--warmup", "0s", "--json", t.dir / "j")
    with open(t.dir / "j", encoding="utf-8") as file:
        figures = json.load(file)
    expect(figures["errors"] == 0 and figures["requests"] >= 1000, f"{figures}")


@test
def clients_in_threads_get_their_own_answers(t):
    d = daemon_with_story(t)
    prompts = ["Once upon a time", "Lily and Tom", "One day, a dog", "The sun was"]
    with d.client() as c:
        alone = {p: text_of(c.ask("COMPLETE", *GREEDY, ("PROMPT", p), ("MAX_TOKENS", 16)))
                 for p in prompts}
    wrong = []
    def work(i):
        with d.client() as c:
            for k in range(10):
                p = prompts[(i + k) % len(prompts)]
                if text_of(c.ask("COMPLETE", *GREEDY, ("PROMPT", p), ("MAX_TOKENS", 16))) != alone[p]:
                    wrong.append(p)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(not wrong, f"answered otherwise in company: {wrong}")


@test
def the_watchdog_is_fed_and_the_state_is_told(t):
    d = t.daemon(env={"WATCHDOG_USEC": "200000"})
    d.wait_notice("WATCHDOG=1")
    expect(any(n.startswith("STATUS=") for n in d.notices), f"{d.notices}")
    d.notices.clear()
    d.hearth("run", "ember", "Once", "--max-tokens", "8")
    d.wait_notice("WATCHDOG=1")
    d.signal(signal.SIGTERM)
    d.wait_notice("STOPPING=1")


@test
def an_idle_daemon_on_an_activated_socket_goes_and_comes_back(t):
    t.need_program("systemd-socket-activate")
    from lib.harness import program
    path = t.dir / "activated"
    config = t.write("idle.yaml", "idle_exit: 300ms\n")
    def activate():
        path.unlink(missing_ok=True)
        p = t.start("systemd-socket-activate", "-l", path, program("hearthd"), "--config", config,
                    "--models", t.dir, "--state-dir", t.dir / "state", stdout=-1, stderr=-1)
        wait_for(lambda: listening(path), "the socket")
        return p
    for _ in range(2):  # systemd-socket-activate activates once
        p = activate()
        r = t.run("hearth", "run", "--socket", path, "ember", "Once", "--max-tokens", "4")
        expect(r.out, "no answer")
        expect(p.wait(20) == 0, "it did not go by itself")
        expect(path.exists(), "the socket went with it")
