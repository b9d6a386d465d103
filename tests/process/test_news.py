"""What the daemon tells by itself: events in their order and number, and values as they change."""
import json
import time

from lib.harness import expect, test, wait_for
from lib.models import made_models
from lib.wire import Closed

MODEL = ("MODEL", "ember")
CYCLE = ["queued", "loading", "warming", "ready", "draining", "cold"]


class News:
    """A subscription to events."""

    def __init__(self, d):
        self.client = d.status_client()
        self.client.request("SUBSCRIBE")
        first = self.next()
        expect(first["event"] == "daemon" and first["state"] == "running", f"{first}")

    def next(self):
        frame = self.client.receive()
        expect(frame.type == "ITEM" and "\n" not in frame.get("TEXT"), f"{frame}")
        return json.loads(frame.get("TEXT"))

    def until(self, condition, limit_s=20):
        """All events up to the one that the condition holds for."""
        got, end = [], time.monotonic() + limit_s
        while time.monotonic() < end:
            got.append(self.next())
            if condition(got[-1]):
                return got
        expect(False, f"not among the events: {got}")

    def until_state(self, model, state):
        return self.until(lambda e: e.get("model") == model and e.get("state") == state)


def states(events, model):
    return [e["state"] for e in events if e["event"] == "state" and e["model"] == model]


@test
def a_model_s_states_are_told_in_their_order_without_a_gap(t):
    d = t.daemon()
    news = News(d)
    events = []
    with d.client() as c:
        for _ in range(20):
            expect(c.ask("WARM", MODEL, ("WAIT", 1))[-1].type == "DONE", "warm")
            expect(c.ask("UNLOAD", MODEL)[-1].type == "DONE", "unload")
            events += news.until_state("ember", "cold")
    expect(states(events, "ember") == CYCLE * 20, f"{states(events, 'ember')}")
    expect([e["seq"] for e in events] == list(range(len(events))), f"{[e['seq'] for e in events]}")
    for before, after in zip(events, events[1:]):
        expect(after["from"] == before["state"] and before["time"] <= after["time"], f"{before}, {after}")


@test
def an_eviction_says_who_for_whom_why_and_at_what_cost(t):
    paths = made_models(t, "a", "b", "c")
    kib = paths[0].stat().st_size // 1024
    d = t.daemon(models=paths, config="memory_budget: 16MiB\n"
                                      f"engine: {{kv_budget: {16 * 1024 - kib * 5 // 2}KiB}}\n")
    news = News(d)
    with d.client() as c:
        for name in "abc":
            expect(c.ask("COMPLETE", ("MODEL", name), ("PROMPT", "x"), ("MAX_TOKENS", 1))[-1].type == "DONE",
                   f"{name} works")
    events = news.until_state("c", "ready")
    evicted = [e for e in events if e["event"] == "evicted"]
    expect(len(evicted) == 1, f"{evicted}")
    e = evicted[0]
    expect(e["model"] == "a" and e["for"] == "c" and e["why"] and e["bytes"] > kib * 1000 and
           e["reload_us"] > 0, f"{e}")
    order = [(e["model"], e.get("state")) for e in events if e.get("model") in ("a", "c")]
    expect(order.index(("a", None)) < order.index(("a", "draining")) < order.index(("a", "cold")) <
           order.index(("c", "loading")), f"{order}")


@test
def a_failed_load_is_told_with_its_reason(t):
    d = t.daemon(models=[t.write("broken.gguf", b"GGUF" + b"\xff" * 100)])
    d.expect_log(r"hearthd: model broken is failed: .*")
    news = News(d)
    with d.client() as c:
        last = c.ask("WARM", ("MODEL", "broken"), ("WAIT", 1))[-1]
        expect(last.get("CODE") == "load-failed", f"{last}")
    events = news.until(lambda e: e["event"] == "load-failed")
    expect(states(events, "broken")[-1] == "failed", f"{events}")
    expect(events[-1]["code"] == "load-failed" and events[-1]["sentence"] == last.get("SENTENCE"),
           f"{events[-1]}")


@test
def refusals_with_busy_are_told_once_a_second_with_their_number(t):
    d = t.daemon(config="limits: {queue_per_uid: 2}\n")
    news = News(d)
    with d.client() as c:
        slow = c.request("COMPLETE", MODEL, ("PROMPT", "x"), ("MAX_TOKENS", 100000), ("IGNORE_EOS", 1),
                         ("CREDIT", 4))
        for _ in range(30):
            expect(c.ask("EMBED", MODEL, ("PROMPT", "a secret"))[-1].get("CODE") == "busy", "not busy")
        first = news.until(lambda e: e["event"] == "busy")[-1]
        second = news.until(lambda e: e["event"] == "busy")[-1]
        c.request("CANCEL", request_id=slow)
        c.replies(slow)
    expect(first["refused"] == 1 and second["refused"] == 29, f"{first}, {second}")
    expect("queue_per_uid" in first["sentence"] and "secret" not in json.dumps([first, second]), f"{first}")


@test
def a_reader_that_is_too_slow_gets_one_lost_and_goes_on(t):
    d = t.daemon()
    news, other = News(d), News(d)
    rounds = 700
    told = []
    with d.client() as c:
        for _ in range(rounds):
            c.ask("WARM", MODEL, ("WAIT", 1))
            c.ask("UNLOAD", MODEL)
            told += other.until_state("ember", "cold")
        # The one that reads has all of them; the other one has not read since the beginning.
        expect(states(told, "ember") == CYCLE * rounds, "the reader that keeps up missed some")
        expect(d.metric("requests_total") >= 2 * rounds, "the daemon goes on meanwhile")
        late = []
        while not late or late[-1].get("seq") != len(told) - 1:
            late.append(news.next())
    lost = [e for e in late if e["event"] == "lost"]
    expect(len(lost) == 1, f"{len(lost)} times lost among {len(late)}")
    at = late.index(lost[0])
    seqs = [e["seq"] for e in late if e["event"] != "lost"]
    expect(seqs[:at] == list(range(at)), "the first ones are there")
    expect(seqs[at:] == list(range(at + lost[0]["count"], len(told))), f"{at} {lost} {seqs[at:at + 3]}")
    expect(len(seqs) - at >= 1024, "the last 1,024 are there")
    expect([e for e in late if e["event"] != "lost"] ==
           [told[s] for s in seqs], "what it got is what the other one got")


@test
def subscriptions_have_bounds_and_end_on_cancel(t):
    d = t.daemon()
    with d.status_client() as c:
        ids = [c.request("SUBSCRIBE") for _ in range(65)] + \
              [c.request("SUBSCRIBE", ("NAME", "values")) for _ in range(9)]
        refused = []
        while len(refused) < 2:
            refused += [f for f in [c.receive()] if f.type == "ERROR"]
        expect([f.id for f in refused] == [ids[64], ids[73]], f"{refused}")
        expect(all(f.get("CODE") == "busy" for f in refused), f"{refused}")
        c.request("CANCEL", request_id=ids[0])
        expect(c.replies(ids[0])[-1].get("REASON") == "cancelled", "cancelled")
        last = c.request("SUBSCRIBE")
        frame = c.receive()
        while frame.id != last:
            frame = c.receive()
        expect(frame.type == "ITEM", f"{frame}")


# ---- values ----

class Copy:
    """A subscription to values: what a reader makes of the pushes."""

    def __init__(self, d):
        self.client = d.status_client()
        self.models, self.sections, self.status, self.pushes = {}, {}, None, 0
        self.lost = 0
        self.client.request("SUBSCRIBE", ("NAME", "values"))
        self.push()

    def push(self):
        """Takes one push."""
        got = 0
        while True:
            f = self.client.receive()
            expect(f.type == "ITEM", f"{f}")
            got += 1
            if f.get("LOST"):
                self.models = {}
                self.lost += 1
            elif f.get("MODEL"):
                if f.get("STATE"):
                    self.models[f.get("MODEL")] = dict(f.options)
                else:
                    del self.models[f.get("MODEL")]
            elif f.get("NAME"):
                self.sections[f.get("NAME")] = f.get("TEXT")
            else:
                self.status = dict(f.options)
                self.pushes += 1
                return got

    def until(self, condition, limit_s=20):
        end = time.monotonic() + limit_s
        while not condition():
            expect(time.monotonic() < end, f"not pushed: {self.models}")
            self.push()


@test
def values_are_what_one_would_be_told(t):
    d = t.daemon(models=made_models(t, "a", "b"))
    copy = Copy(d)
    expect(set(copy.models) == {"a", "b", "ember"}, f"{set(copy.models)}")
    expect(set(copy.sections) == {"pool", "batcher", "streaming", "loader", "prometheus"},
           f"{set(copy.sections)}")
    expect(copy.status["STATE"] == "running", f"{copy.status}")
    with d.client() as c:
        hold = c.request("HOLD", ("MODEL", "a"))
        c.receive()
        c.ask("SET", ("MODEL", "b"), ("PINNED", 1), ("KEEP_ALIVE_US", 3000000000))
        c.ask("COMPLETE", MODEL, ("PROMPT", "Once"), ("MAX_TOKENS", 3))
        copy.until(lambda: copy.models["a"]["STATE"] == "ready" and copy.models["a"]["HOLDS"] == 1 and
                   copy.models["b"]["PINNED"] == 1 and "tokens 3\n" in copy.models["ember"]["STATS"] and
                   "generations_done_total 1\n" in copy.sections["batcher"])
        for reply in c.ask("MODELS"):
            if reply.type == "ITEM":
                expect(dict(reply.options) == copy.models[reply.get("MODEL")], f"{reply}")
        # A model that is gone, and one that is new.
        (d.models_dir / "b.gguf").unlink()
        (d.models_dir / "c.gguf").symlink_to(t.dir / "b.gguf")
        c.ask("RELOAD")
        copy.until(lambda: "b" not in copy.models and "c" in copy.models)
        c.request("CANCEL", request_id=hold)
        c.replies(hold)
    copy.until(lambda: copy.models["a"]["HOLDS"] == 0)


@test
def values_are_pushed_when_they_change_and_at_a_pace(t):
    d = t.daemon()
    copy = Copy(d)
    with d.client() as c:
        c.ask("WARM", MODEL, ("WAIT", 1))
        copy.until(lambda: copy.models["ember"]["STATE"] == "ready")
        begin, before, n = time.monotonic(), copy.pushes, 0
        copy.client.sock.settimeout(0.001)
        while time.monotonic() < begin + 2 or n < 100:
            c.ask("TOKENIZE", MODEL, ("PROMPT", "x"))
            n += 1
            try:
                copy.client.buffer += copy.client.sock.recv(1 << 20)
            except TimeoutError:
                pass
        elapsed = time.monotonic() - begin
        copy.client.sock.settimeout(20)
        copy.until(lambda: copy.sections["pool"].count("requests_total") and
                   int(copy.sections["pool"].split("requests_total ")[1].split()[0]) >= n)
        pushes = copy.pushes - before
        expect(pushes <= (time.monotonic() - begin) / 0.1 + 2, f"{pushes} pushes in {elapsed:.1f} s")
    # Where nothing happens, nothing is pushed: the end of the other connection is the last thing.
    copy.client.sock.settimeout(1)
    quiet = False
    for _ in range(20):
        try:
            copy.push()
        except TimeoutError:
            quiet = True
            break
    expect(quiet, "it is pushed without an end")


@test
def a_reader_of_values_that_was_too_slow_gets_everything_anew(t):
    d = t.daemon(models=made_models(t, "a", "b"), config="limits: {stream_buffer: 16KiB}\n")
    copy = Copy(d)
    with d.client() as c:
        for i in range(60):
            c.ask("SET", ("MODEL", "a"), ("KEEP_ALIVE_US", (i + 1) * 1000000))
            time.sleep(0.11)
        (d.models_dir / "b.gguf").unlink()
        c.ask("RELOAD")
        c.ask("SET", ("MODEL", "a"), ("KEEP_ALIVE_US", 99000000))
        copy.until(lambda: copy.models["a"]["KEEP_ALIVE_US"] == 99000000 and "b" not in copy.models)
        expect(copy.lost > 0 and copy.pushes < 50, f"{copy.lost} times lost, {copy.pushes} pushes")
        expect(c.ask("NULL")[-1].type == "DONE", "others are served")


@test
def a_stop_is_news_until_the_connection_ends(t):
    d = t.daemon()
    news = News(d)
    d.signal(15)
    events = news.until(lambda e: e["event"] == "daemon")
    expect(events[-1]["state"] == "draining", f"{events}")
    ends = [f for f in _rest(news.client) if f.type == "ERROR"]
    expect([f.get("CODE") for f in ends] == ["shutting-down"], f"{ends}")
    expect(d.wait() == 0, "a clean end")


def _rest(client):
    got = []
    try:
        while True:
            got.append(client.receive())
    except Closed:
        return got


@test
def subscriptions_are_no_work(t):
    d = t.daemon()
    news, copy = News(d), Copy(d)
    with d.client() as c:
        expect("requests_live 0\n" in c.ask("STATUS")[0].get("INFO"), "they count as requests at work")
    wait_for(lambda: d.metric("queue") == 0, "they count in the queue")
    expect(news and copy, "both live")
