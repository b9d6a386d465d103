"""What one user can hold of the daemon, whatever he sends and does not read."""
import re
import threading

from lib.harness import BUILD, Skip, expect, test, wait_for
from lib.models import made_model, ready_daemon
from lib.wire import HEADER, Closed, frame


def need_plain_build():
    symbols = (BUILD / "lib" / "libhearth.a").read_bytes()
    if any(word in symbols for word in (b"__asan", b"__tsan", b"__gcov")):
        raise Skip("the build is instrumented, and has memory of its own")


def anonymous_bytes(d):
    with open(f"/proc/{d.pid}/status", encoding="ascii") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


def send_unread(c, data):
    """As much of it as is taken within a moment, by a client that reads nothing."""
    c.sock.settimeout(0.5)
    sent = 0
    try:
        while sent < len(data):
            sent += c.sock.send(data[sent:sent + 65536])
    except (TimeoutError, ConnectionError):
        pass
    return sent


@test
def small_requests_for_large_replies_are_taken_no_faster_than_they_are_read(t):
    need_plain_build()
    d = ready_daemon(t)
    d.metric("streams")
    before = anonymous_bytes(d)
    c = d.client()
    sent = send_unread(c, b"".join(frame("METRICS", i) for i in range(1, 60000)))
    grown = anonymous_bytes(d) - before
    expect(sent < 60000 * 16, "everything was taken though nothing was read")
    expect(grown < 4 << 20, f"{grown >> 10} KiB for replies that nobody reads")
    d.alive()
    c.close()


@test
def every_reply_comes_to_a_slow_reader_in_order(t):
    d = ready_daemon(t)
    n = 20000
    with d.client() as c:
        sender = threading.Thread(
            target=c.send, args=(b"".join(frame("STATUS" if i % 2 else "NULL", i)
                                          for i in range(1, n + 1)),))
        sender.start()
        for i in range(1, n + 1):
            last = c.replies(i)[-1]
            expect(last.type == "DONE" and not c.waiting, f"{i}: {last}, then {c.waiting}")
        sender.join()
        expect(c.ask("NULL")[-1].type == "DONE", "the connection is of no use any more")


@test
def prompts_count_in_their_users_bound_until_their_end(t):
    d = ready_daemon(t, config="batching: {max_batch: 1}\n"
                               "limits: {frame: 64KiB, input_bytes: 256KiB, "
                               "input_bytes_per_uid: 128KiB}\n")
    with d.client() as c, d.client() as other:
        first = c.request("COMPLETE", ("MODEL", "made"), ("PROMPT", "a"), ("IGNORE_EOS", 1),
                          ("MAX_TOKENS", 8000))
        c.receive()
        # 28,000 bytes each: four fit; the second kind is that large only once it is ids
        for long in (("IDS", b"\5\0\0\0" * 7000), ("PROMPT", "\x01" * 7000)):
            long = (("MODEL", "made"), long, ("MAX_TOKENS", 1))
            waiting = [other.request("COMPLETE", *long) for _ in range(10)]
            codes = [None] * len(waiting)
            for _ in range(6):
                f = other.receive()
                codes[waiting.index(f.id)] = f.get("CODE")
                expect(f.get("RETRY_AFTER_US", 0) > 0, f"{f}")
            expect(sorted(codes, key=str) == [None] * 4 + ["busy"] * 6, f"{codes}")
            c.request("CANCEL", request_id=first)
            c.replies(first)
            for request, code in zip(waiting, codes):
                expect(code or other.replies(request)[-1].type == "DONE", "one that was let in")
            expect(other.ask("COMPLETE", *long)[-1].type == "DONE", "the room did not come free")
            first = c.request("COMPLETE", ("MODEL", "made"), ("PROMPT", "a"), ("IGNORE_EOS", 1),
                              ("MAX_TOKENS", 8000))
            c.receive()


@test
def streams_that_sleep_count_in_their_users_bound(t):
    """Their ids are kept for as long as their reader stays away: the prompt's, and the text's."""
    d = ready_daemon(t, config="limits: {frame: 64KiB, input_bytes: 256KiB, "
                               "input_bytes_per_uid: 128KiB}\nstreaming: {park_timeout: 100ms}\n")
    long = (("MODEL", "made"), ("IDS", b"\5\0\0\0" * 7000), ("IGNORE_EOS", 1), ("MAX_TOKENS", 500))
    with d.client() as c:
        asleep = [c.request("COMPLETE", *long, ("CREDIT", 5)) for _ in range(4)]
        wait_for(lambda: d.metric("streams_asleep") == 4, "four streams to fall asleep")
        last = c.ask("COMPLETE", *long)[-1]
        expect(last.get("CODE") == "busy" and "input_bytes" in last.get("SENTENCE"), f"{last}")
        c.request("CREDIT", ("CREDIT", 1 << 20), request_id=asleep[0])
        expect(c.replies(asleep[0])[-1].get("COMPLETION_TOKENS") == 500, "woken in full bounds")
        expect(c.ask("COMPLETE", *long)[-1].type == "DONE", "the room did not come free")
        # 20,000 bytes each: six fit, but not with what is generated
        short = (*long[:1], ("IDS", b"\5\0\0\0" * 5000), *long[2:3], ("MAX_TOKENS", 3000))
        for request in asleep[1:]:
            c.request("CANCEL", request_id=request)
            c.replies(request)
        many = [c.request("COMPLETE", *short, ("CREDIT", 2000)) for _ in range(6)]
        wait_for(lambda: d.metric("streams_asleep") == d.metric("queue") < 6, "all of them to fall asleep or end")
        n_asleep = d.metric("streams_asleep")
        expect(n_asleep >= 4, f"{n_asleep} of 6 sleep")
        ends = []
        while len(ends) < 6 - n_asleep:
            f = c.receive()
            ends += [f] if f.type == "ERROR" else []
        expect(all(f.get("CODE") == "busy" and f.id in many for f in ends), f"{ends}")


@test
def a_request_of_a_user_who_has_nothing_else_is_never_too_much(t):
    """A frame as large as may be, with bounds that are no larger: as a frame, as a text, as ids."""
    d = ready_daemon(t, config="limits: {frame: 64KiB, input_bytes: 64KiB, input_bytes_per_uid: 64KiB}\n")
    options = (("MODEL", "made"), ("PROMPT", ""))
    room = (64 << 10) - (len(frame("TOKENIZE", 1, *options)) - HEADER.size)
    for text in ("a", "\x01"):
        with d.client() as c:
            for _ in range(3):
                last = c.ask("TOKENIZE", options[0], ("PROMPT", text * room))[-1]
                expect(last.type == "DONE", f"{last}")
    with d.client() as c:  # beside another one he is told to wait
        ids = (("IDS", b"\5\0\0\0" * 8000), ("IGNORE_EOS", 1))
        first = c.request("COMPLETE", options[0], *ids, ("CREDIT", 5))
        c.receive()
        last = c.ask("TOKENIZE", options[0], ("PROMPT", "a" * room))[-1]
        expect(last.get("CODE") == "busy", f"{last}")
        c.request("CANCEL", request_id=first)
        c.replies(first)
        expect(c.ask("TOKENIZE", options[0], ("PROMPT", "a" * room))[-1].type == "DONE", "no room")


@test
def input_that_waits_behind_unread_replies_counts_in_the_users_bound(t):
    d = ready_daemon(t, config="limits: {frame: 64KiB, input_bytes: 256KiB, input_bytes_per_uid: 128KiB}\n")
    clients = [d.client() for _ in range(8)]
    data = b"".join(frame("METRICS", i) for i in range(1, 30000))
    for c in clients:
        send_unread(c, data)
    refused = 0
    for c in clients:
        c.sock.settimeout(5)
        try:
            while (f := c.receive()).type != "ERROR":
                pass
            expect(f.get("CODE") == "busy" and "input_bytes" in f.get("SENTENCE"), f"{f}")
            refused += 1
        except (Closed, TimeoutError):
            pass
        c.close()
        if refused:
            break
    expect(refused > 0, "nobody was refused")
    for c in clients:
        c.close()
    d.expect_log(".*is closed: requests keep coming.*")
    wait_for(lambda: d.metric("connections") <= 1, "the connections to go")
    d.alive()


@test
def everybody_who_is_refused_as_busy_is_an_event(t):
    """Whatever was asked for: a text, a load to be followed, a hold, a subscription."""
    d = t.daemon(models=[made_model(t, "a"), made_model(t, "b")], config="limits: {queue_per_uid: 2}\n")
    d.hearth("warm", "--wait", "a")
    with d.client() as c, d.status_client() as status:
        events = status.request("SUBSCRIBE")
        status.receive()
        c.request("COMPLETE", ("MODEL", "a"), ("PROMPT", "a"), ("IGNORE_EOS", 1),
                  ("MAX_TOKENS", 8000), ("CREDIT", 10))
        c.receive()
        for ask in (("COMPLETE", ("MODEL", "a"), ("PROMPT", "a")), ("HOLD", ("MODEL", "a")),
                    ("SUBSCRIBE",), ("WARM", ("MODEL", "b"), ("WAIT", 1))):
            last = c.ask(*ask)[-1]
            expect(last.get("CODE") == "busy" and last.get("RETRY_AFTER_US", 0) > 0, f"{ask}: {last}")
            while '"busy"' not in (told := status.receive().get("TEXT", "")):
                pass
            expect("queue_per_uid" in told, told)
