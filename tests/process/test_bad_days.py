"""Bad input and bad days: a clear error, nothing lost, and the others notice nothing."""
import json
import os
import signal
import socket
import time

from lib.disk import Disk
from lib.harness import expect, test, wait_for
from lib.models import made_model, ready_daemon, slow_model
from lib.wire import CRITICAL, MAGIC, Client, Closed, frame, header, option, text_of

STORY = "stories260K-f32"


ENDLESS = (("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1), ("MAX_TOKENS", 8000))


def ends_with(client, code):
    """The connection is closed after an error with that code; True."""
    frames = client.frames_to_end()
    expect(frames and frames[-1].type == "ERROR" and frames[-1].get("CODE") == code, f"{frames}")
    expect(frames[-1].get("SENTENCE"), "an error without a sentence")


def answers(d):
    """Another client notices nothing."""
    with d.client() as c:
        replies = c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), ("MAX_TOKENS", 3),
                        ("IGNORE_EOS", 1))
    expect(replies[-1].type == "DONE" and replies[-1].get("COMPLETION_TOKENS") == 3, f"{replies}")


CLOSED = r"hearthd: connection \d+ of uid \d+ is closed: .+"


@test
def an_unknown_model_is_named(t):
    d = t.daemon()
    r = d.hearth("run", "nonesuch", "hello", code=1, err=".*nonesuch.*\n")
    expect(r.out == "", f"{r}")
    with d.client() as c:
        expect(c.ask("COMPLETE", ("MODEL", "nonesuch"), ("PROMPT", "x"))[-1].get("CODE") ==
               "no-such-model", "the code")
        expect(c.ask("COMPLETE", ("MODEL", "../etc/passwd"), ("PROMPT", "x"))[-1].get("CODE") ==
               "bad-request", "a path")


@test
def malformed_model_files_fail_and_the_daemon_lives(t):
    with open(t.golden("bad/index.json"), encoding="utf-8") as file:
        index = json.load(file)
    d = t.daemon(models=[t.golden(f"bad/{entry['file']}") for entry in index])
    d.expect_log(r"hearthd: model \S+ is failed: .+", r"hearthd: .* is left out: .*")
    with d.client() as c:
        for entry in index:
            name = entry["file"].removesuffix(".gguf")
            last = c.ask("COMPLETE", ("MODEL", name), ("PROMPT", "a"), ("MAX_TOKENS", 2))[-1]
            if entry["expect"] == "reject":
                expect(last.get("CODE") == "load-failed", f"{name}: {last}")
                expect(last.get("SENTENCE"), f"{name}: no sentence")
            elif entry["expect"] == "load":
                expect(last.type == "DONE", f"{name}: {last}")
    d.alive()


@test
def a_truncated_model_is_told_and_tried_again_when_it_changes(t):
    whole = made_model(t)
    d = t.daemon()
    d.expect_log(r"hearthd: model cut is failed: .+")
    cut = d.models_dir / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-2000])
    d.signal(signal.SIGHUP)
    wait_for(lambda: "cut" in d.hearth("models").out, "the name")
    with d.client() as c:
        ask = (("MODEL", "cut"), ("PROMPT", "a"), ("MAX_TOKENS", 1))
        expect(c.ask("COMPLETE", *ask)[-1].get("CODE") == "load-failed", "a cut file loaded")
        expect(c.ask("COMPLETE", *ask)[-1].get("CODE") == "load-failed", "the second time")
        expect(d.metric("loads_total") == 1, "the same file was read again")
        cut.write_bytes(whole.read_bytes())
        expect(c.ask("COMPLETE", *ask)[-1].type == "DONE", "the whole file")


@test
def a_missing_model_file_is_a_failure_with_its_path(t):
    path = made_model(t)
    d = t.daemon(models=[path])
    d.expect_log(r"hearthd: model made is failed: .+")
    path.unlink()
    with d.client() as c:
        last = c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a"))[-1]
    expect(last.get("CODE") == "load-failed" and "made.gguf" in last.get("SENTENCE"), f"{last}")


@test
def a_wrong_magic_gets_a_sentence(t):
    d = ready_daemon(t)
    with d.client(hello=False) as c:
        c.send(b"HELLO WORLD\n")
        expect(b"Hearth" in c.rest(), "no sentence")
    answers(d)


@test
def an_http_request_gets_a_400(t):
    d = ready_daemon(t)
    with d.client(hello=False) as c:
        c.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = c.rest()
    expect(answer.startswith(b"HTTP/1.1 400 ") and b"\r\n\r\n" in answer, f"{answer}")
    answers(d)


@test
def an_oversize_frame_ends_its_connection(t):
    d = ready_daemon(t)
    d.expect_log(CLOSED)
    with d.client() as c:
        c.send(header("COMPLETE", 1, (1 << 20) + 1))
        ends_with(c, "too-large")
    with d.client() as c:
        c.send(header("COMPLETE", 1, 0xffffffff))
        ends_with(c, "too-large")
    answers(d)


@test
def half_a_frame_and_silence_ends_in_time(t):
    d = ready_daemon(t)
    d.expect_log(CLOSED)
    with d.client() as c:
        c.send(frame("COMPLETE", 1, ("MODEL", "made"), ("PROMPT", "a dog"))[:20])
        began = time.monotonic()
        ends_with(c, "bad-frame")
        expect(time.monotonic() - began > 5, "it was not given its time")
    answers(d)


@test
def no_hello_ends_in_time(t):
    d = ready_daemon(t)
    d.expect_log(CLOSED)
    with d.client(hello=False) as c:
        c.send(MAGIC)
        ends_with(c, "bad-frame")
    with d.client(hello=False) as c:
        c.send(MAGIC + frame("NULL", 1))
        ends_with(c, "bad-frame")
    answers(d)


@test
def a_frame_may_come_byte_by_byte(t):
    d = ready_daemon(t)
    with d.client(hello=False) as c:
        for byte in MAGIC + frame("HELLO", 0) + frame("COMPLETE", 9, ("MODEL", "made"),
                                                     ("PROMPT", "a dog"), ("MAX_TOKENS", 2)):
            c.send(bytes([byte]))
        expect(c.receive().type == "HELLO", "no hello")
        expect(c.replies(9)[-1].type == "DONE", "no answer")


@test
def malformed_frames_end_their_connection(t):
    d = ready_daemon(t)
    d.expect_log(CLOSED)
    cases = {
        "flags": frame("NULL", 1, flags=1),
        "option beyond the body": header("COMPLETE", 1, 12) + b"\x10\0\0\0\xff\0\0\0abcd",
        "half an option head": header("COMPLETE", 1, 4) + b"\x10\0\0\0",
        "reserved field of an option": header("COMPLETE", 1, 8) + b"\x10\0\1\0\0\0\0\0",
        "id 0": frame("NULL", 0),
        "a live id again": frame("COMPLETE", 5, *ENDLESS) + frame("COMPLETE", 5, *ENDLESS),
    }
    for what, data in cases.items():
        with d.client() as c:
            c.send(data)
            frames = c.frames_to_end()
            expect(frames and frames[-1].get("CODE") == "bad-frame", f"{what}: {frames[-3:]}")
    wait_for(lambda: d.metric("streams") == 0, "all streams to end")
    answers(d)


@test
def an_unknown_option_is_skipped_unless_it_must_be_understood(t):
    d = ready_daemon(t)
    ask = (("MODEL", "made"), ("PROMPT", "a dog"), ("MAX_TOKENS", 1))
    with d.client() as c:
        expect(c.ask("COMPLETE", *ask, option(999, b"whatever"))[-1].type == "DONE", "skipped")
        last = c.ask("COMPLETE", *ask, option(CRITICAL | 999, b"must"))[-1]
        expect(last.get("CODE") == "bad-request" and "0x83e7" in last.get("SENTENCE"), f"{last}")
        last = c.ask("MODELS", ("STOP", "x"))[-1]
        expect(last.get("CODE") == "bad-request" and last.get("OPTION") == "stop", f"misplaced: {last}")
        last = c.ask("UNLOAD", ("MODEL", "made"), ("ON_BEHALF_OF", b"\0\0\0\0"))[-1]
        expect(last.get("CODE") == "forbidden", f"on behalf of: {last}")
        expect(c.ask("NULL")[-1].type == "DONE", "the connection goes on")


@test
def an_unknown_type_ends_its_request_alone(t):
    d = ready_daemon(t)
    with d.client() as c:
        for kind in (200, "ITEM", "HELLO"):
            last = c.ask(kind)[-1]
            expect(last.get("CODE") == "bad-request", f"{kind}: {last}")
        for kind, *options in (("CHAT",), ("SET",), ("HOLD",), ("SUBSCRIBE", ("NAME", "weather"))):
            last = c.ask(kind, *options)[-1]
            expect(last.get("CODE") == "bad-request" and last.get("SENTENCE"), f"{kind}: {last}")
        expect(c.ask("NULL")[-1].type == "DONE", "the connection goes on")


@test
def a_bad_value_is_refused_by_its_options_name(t):
    d = ready_daemon(t)
    cases = {"temperature": ("TEMPERATURE", -1.0), "top_p": ("TOP_P", 1.5),
             "max_tokens": ("MAX_TOKENS", 0), "min_p": ("MIN_P", float("nan")),
             "stream": ("STREAM", 2), "repeat_penalty": ("REPEAT_PENALTY", 0.0),
             "priority": ("PRIORITY", 9), "stop": ("STOP", b""),
             "model": ("MODEL", "a/b"), "ids": ("IDS", b"abc")}
    with d.client() as c:
        for name, bad in cases.items():
            last = c.ask("COMPLETE", ("PROMPT", "a"), bad)[-1]
            expect(last.get("CODE") == "bad-request" and last.get("OPTION") == name, f"{name}: {last}")
        last = c.ask("COMPLETE", ("MODEL", "made"))[-1]
        expect(last.get("OPTION") == "prompt", f"neither prompt nor ids: {last}")


@test
def a_prompt_longer_than_the_context_is_refused(t):
    d = t.daemon(models=[made_model(t, "short", "--context", "32")])
    with d.client() as c:
        last = c.ask("COMPLETE", ("MODEL", "short"), ("PROMPT", "dog " * 200))[-1]
        expect(last.get("CODE") == "context-full" and "32" in last.get("SENTENCE"), f"{last}")
        last = c.ask("COMPLETE", ("MODEL", "short"), ("PROMPT", "dog"), ("MAX_TOKENS", 500),
                     ("IGNORE_EOS", 1))[-1]
        expect(last.type == "DONE" and last.get("REASON") == "context", f"{last}")


@test
def a_client_that_dies_is_not_computed_for(t):
    d = ready_daemon(t)
    c = d.client()
    c.request("COMPLETE", *ENDLESS)
    c.receive()
    c.close()
    wait_for(lambda: d.metric("streams") == 0, "the stream's end")
    steps = d.metric("steps_total")
    answers(d)
    expect(d.metric("steps_total") - steps <= 4, "steps went on for nobody")
    expect(d.metric("kv_used_bytes") == 0, "its KV memory is still held")


@test
def a_client_that_never_reads_is_parked(t):
    d = ready_daemon(t)
    c = d.client()
    c.request("COMPLETE", *ENDLESS, ("CREDIT", 100))
    wait_for(lambda: d.metric("streams_parked") == 1, "the stream to be parked")
    steps = d.metric("steps_total")
    answers(d)
    expect(d.metric("steps_total") - steps <= 4, "steps went on for a parked reader")
    c.close()
    wait_for(lambda: d.metric("streams") == 0, "the stream's end")


@test
def credit_moves_a_parked_stream_on(t):
    d = ready_daemon(t)
    with d.client() as c:
        request = c.request("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1),
                            ("MAX_TOKENS", 200), ("CREDIT", 50), ("TEMPERATURE", 0.0))
        wait_for(lambda: d.metric("streams_parked") == 1, "the stream to be parked")
        text = ""
        while True:
            reply = c.receive()
            if reply.type == "DONE":
                break
            text += reply.get("TEXT")
            c.request("CREDIT", ("CREDIT", len(reply.get("TEXT").encode())), request_id=request)
        whole = text_of(c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1),
                              ("MAX_TOKENS", 200), ("TEMPERATURE", 0.0)))
    expect(text == whole, "parking changed the text")


@test
def a_client_that_pipelines_and_never_reads_is_bounded(t):
    d = ready_daemon(t)
    c = d.client()
    c.sock.settimeout(2)
    sent = 0
    request = frame("MODELS", 1)
    try:
        for i in range(1, 200000):
            c.send(frame("STATUS", i))
            sent += len(request)
    except (TimeoutError, BlockingIOError):
        pass
    expect(sent < 199999 * len(request), "everything was taken though nothing was read")
    with open(f"/proc/{d.pid}/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    answers(d)
    expect(resident < 512 << 20, f"{resident >> 20} MiB resident")
    c.close()


@test
def a_full_house_answers_busy(t):
    d = t.daemon(models=[made_model(t)], config="limits: {connections: 4, connections_per_uid: 4}\n")
    clients = [d.client() for _ in range(4)]
    with d.client(hello=False) as c:
        frames = c.frames_to_end()
        expect(frames[-1].get("CODE") == "busy" and frames[-1].get("RETRY_AFTER_US"), f"{frames}")
    clients.pop().close()
    def admitted():
        try:
            with d.client() as c:
                return c.ask("NULL")[-1].type == "DONE"
        except (AssertionError, Closed, ConnectionError):  # turned away in place of a hello
            return False
    wait_for(admitted, "a place")
    for c in clients:
        c.close()


@test
def a_full_queue_answers_busy(t):
    d = ready_daemon(t, config="limits: {queue: 8, queue_per_uid: 8}\n")
    with d.client() as c:
        ids = [c.request("COMPLETE", *ENDLESS, ("CREDIT", 1)) for _ in range(12)]
        refused = [c.replies(i)[-1] for i in ids[8:]]
        expect(all(r.get("CODE") == "busy" and r.get("RETRY_AFTER_US") for r in refused), f"{refused}")
        for i in ids[:8]:
            c.request("CANCEL", request_id=i)
        for i in ids[:8]:
            expect(c.replies(i)[-1].get("REASON") == "cancelled", "not cancelled")
    answers(d)


@test
def cancel_ends_a_stream_with_its_reason(t):
    d = ready_daemon(t)
    with d.client() as c:
        request = c.request("COMPLETE", *ENDLESS)
        c.receive()
        c.request("CANCEL", request_id=request)
        done = c.replies(request)[-1]
        expect(done.type == "DONE" and done.get("REASON") == "cancelled", f"{done}")
        expect(done.get("COMPLETION_TOKENS") < 8000, "it ran to its end")
        c.request("CANCEL", request_id=request)  # of one that has ended: nothing happens
        expect(c.ask("NULL")[-1].type == "DONE", "the connection goes on")
    wait_for(lambda: d.metric("kv_used_bytes") == 0, "KV memory to come back")


@test
def a_second_daemon_on_the_same_socket_is_refused(t):
    d = ready_daemon(t)
    r = t.run("hearthd", "--socket", d.socket, code=1)
    expect(str(d.socket) in r.err and "already" in r.err, f"{r}")
    answers(d)


@test
def a_stale_socket_file_is_replaced(t):
    d = ready_daemon(t)
    d.kill()
    expect(d.socket.exists(), "nothing is stale")
    again = t.start("hearthd", "--socket", d.socket, "--models", d.models_dir, "--state-dir",
                    t.dir / "state", stderr=-1)
    def answered():
        try:
            with Client(d.socket) as c:
                return c.ask("NULL")[-1].type == "DONE"
        except OSError:
            return False
    wait_for(answered, "the new daemon")
    again.send_signal(signal.SIGTERM)
    expect(again.wait(20) == 0 and not d.socket.exists(), "it did not clean up")


@test
def a_file_in_the_way_is_left_alone(t):
    path = t.write("precious", "data")
    r = t.run("hearthd", "--socket", path, code=1)
    expect("not a socket" in r.err, f"{r}")
    expect((t.dir / "precious").read_text() == "data", "it was replaced")


@test
def unwritable_paths_are_told(t):
    r = t.run("hearthd", "--socket", "/proc/none/s", code=1)
    expect("/proc/none" in r.err, f"{r}")
    r = t.run("hearthd", "--socket", "/tmp/" + "x" * 200, code=1)
    expect("too long" in r.err or "longer" in r.err, f"{r}")


@test
def sigterm_lets_a_stream_finish(t):
    d = ready_daemon(t)
    with d.client() as c:
        request = c.request("COMPLETE", ("MODEL", "made"), ("PROMPT", "a dog"), ("IGNORE_EOS", 1),
                            ("MAX_TOKENS", 3000))
        c.receive()
        d.signal(signal.SIGTERM)
        replies = c.replies(request)
        expect(replies[-1].type == "DONE" and replies[-1].get("COMPLETION_TOKENS") == 3000,
               f"{replies[-1]}")
    expect(d.wait() == 0, "it did not end well")


@test
def sigterm_tells_a_stream_that_cannot_finish(t):
    d = ready_daemon(t, config="drain_timeout: 300ms\n")
    with d.client() as c:
        request = c.request("COMPLETE", *ENDLESS, ("CREDIT", 10))
        c.receive()
        d.signal(signal.SIGTERM)
        frames = c.frames_to_end()
    types = [f.type for f in frames]
    expect("GOAWAY" in types, f"{frames}")
    expect(frames[-1].id == request and frames[-1].get("CODE") == "shutting-down", f"{frames[-1]}")
    expect(d.wait() == 0, "it did not end well")


@test
def a_client_still_in_its_hello_is_told_of_the_drain(t):
    d = ready_daemon(t, config="drain_timeout: 2s\n")
    with d.client() as c, d.client(hello=False) as silent, d.client(hello=False) as half:
        half.send(MAGIC)
        expect(half.receive().type == "HELLO", "no hello")
        c.request("COMPLETE", *ENDLESS, ("CREDIT", 10))
        c.receive()
        d.signal(signal.SIGTERM)
        while c.receive().type != "GOAWAY":
            pass
        silent.send(MAGIC + frame("HELLO", 0))
        half.send(frame("HELLO", 0))
        expect([silent.receive().type, silent.receive().type] == ["HELLO", "GOAWAY"], "silent")
        expect(half.receive().type == "GOAWAY", "half")
        with d.status_client() as status:
            state = status.ask("STATUS")
        expect(state[0].get("STATE") == "draining", f"{state}")
    expect(d.wait() == 0, "it did not end well")


@test
def new_requests_while_draining_are_told(t):
    d = ready_daemon(t, config="drain_timeout: 2s\n")
    with d.client() as c:
        c.request("COMPLETE", *ENDLESS, ("CREDIT", 10))
        c.receive()
        d.signal(signal.SIGTERM)
        while c.receive().type != "GOAWAY":
            pass
        last = c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "a"))[-1]
        expect(last.get("CODE") == "shutting-down", f"{last}")
    expect(d.wait() == 0, "it did not end well")


@test
def a_slow_disk_shows_progress_and_holds_up_nobody(t):
    with Disk(t, slow_model(t), "slow.gguf", 100000) as disk:
        d = t.daemon("--models", disk.dir, models=[made_model(t)])
        d.hearth("warm", "--wait", "made")
        seen = set()
        with d.client() as c, d.status_client() as s:
            request = c.request("WARM", ("MODEL", "slow"), ("WAIT", 1))
            while True:
                item = s.ask("MODELS", ("MODEL", "slow"))[0]
                if item.get("STATE") == "loading":
                    seen.add(item.get("DONE_BYTES"))
                    expect(item.get("DONE_BYTES") == 0 or item.get("MEMORY_BYTES") > 0, "it takes no memory")
                    answers(d)
                if item.get("STATE") in ("ready", "failed"):
                    break
            expect(c.replies(request)[-1].type == "DONE", "the load failed")
        expect(len([v for v in seen if v > 0]) >= 3, f"progress showed {sorted(seen)}")
        d.stop()


@test
def a_disk_that_fails_is_tried_again_and_then_told(t):
    path = made_model(t, "bad")
    with Disk(t, path, "bad.gguf", fails_from=path.stat().st_size // 2) as disk:
        d = t.daemon("--models", disk.dir, config="loading: {retries: 1}\n")
        d.expect_log(r"hearthd: model bad is failed: .+")
        with d.client() as c:
            last = c.ask("COMPLETE", ("MODEL", "bad"), ("PROMPT", "a"))[-1]
        expect(last.get("CODE") == "load-failed", f"{last}")
        d.alive()
        d.stop()


@test
def a_load_can_be_ended_by_an_unload(t):
    with Disk(t, slow_model(t), "slow.gguf", 100000) as disk:
        d = t.daemon("--models", disk.dir)
        with d.client() as c, d.status_client() as s:
            request = c.request("COMPLETE", ("MODEL", "slow"), ("PROMPT", "a"))
            wait_for(lambda: s.ask("MODELS", ("MODEL", "slow"))[0].get("STATE") == "loading", "the load")
            s.ask("UNLOAD", ("MODEL", "slow"))
            last = c.replies(request)[-1]
            expect(last.get("CODE") == "cancelled", f"{last}")
            wait_for(lambda: s.ask("MODELS", ("MODEL", "slow"))[0].get("STATE") == "cold", "cold")
        d.stop()


@test
def the_status_socket_takes_no_generations(t):
    d = ready_daemon(t)
    with d.status_client() as c:
        for kind in ("COMPLETE", "EMBED", "TOKENIZE"):
            last = c.ask(kind, ("MODEL", "made"), ("PROMPT", "a"))[-1]
            expect(last.get("CODE") == "bad-request", f"{kind}: {last}")
        expect(c.ask("STATUS")[0].get("STATE") == "running", "the status")


@test
def no_prompt_or_answer_gets_into_the_log(t):
    d = ready_daemon(t)
    d.expect_log(CLOSED)
    with d.client() as c:
        c.ask("COMPLETE", ("MODEL", "made"), ("PROMPT", "xyzzysecret"), ("MAX_TOKENS", 2))
        c.send(frame("COMPLETE", 7, ("PROMPT", "xyzzysecret"), ("TEMPERATURE", -2.0)))
        c.send(header(0x1234, 8, 1 << 30))
        ends_with(c, "too-large")
    expect("xyzzysecret" not in d.log(), "the prompt is in the log")
