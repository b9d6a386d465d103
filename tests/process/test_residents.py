"""Models that come and go under everybody's hands: whatever the order of loads, unloads, pins, holds and
requests, every answer is right, nothing gets stuck and nothing is left."""
import random
import threading

from lib.harness import expect, test, wait_for
from lib.models import made_models
from lib.wire import text_of

N_CLIENTS, OPERATIONS = 16, 1000
NAMES = ("a", "b", "c", "d")

# How an operation may end other than with `done`: unloaded while it loaded, no room beside what is held
# and pinned, drained for too long.
ALLOWED = {"cancelled", "no-memory", "shutting-down"}


def ask_text(name):
    return ("COMPLETE", ("MODEL", name), ("PROMPT", "a b c"), ("MAX_TOKENS", 6), ("TEMPERATURE", 0.0),
            ("IGNORE_EOS", 1))


class Client:
    """One of many: does what chance says, and knows how each may end."""

    def __init__(self, d, number, right):
        self.d, self.number, self.right = d, number, right
        self.random = random.Random(number)
        self.c = d.client()
        self.holds = []
        self.wrong, self.done, self.answers = [], 0, 0

    def ended(self, what, replies):
        last = replies[-1]
        self.done += 1
        if last.type != "DONE" and last.get("CODE") not in ALLOWED:
            self.wrong.append((what, last))
        return last.type == "DONE"

    def complete(self, name):
        replies = self.c.ask(*ask_text(name))
        if not self.ended(("complete", name), replies):
            return
        self.answers += 1
        if text_of(replies) != self.right[name]:
            self.wrong.append(("text", name, text_of(replies)))

    def cancel(self, name):
        request = self.c.request(*ask_text(name))
        self.c.request("CANCEL", request_id=request)
        self.ended(("cancel", name), self.c.replies(request))

    def hold(self, name):
        self.let_go(name)
        request = self.c.request("HOLD", ("MODEL", name))
        self.holds.append(request)
        self.done += 1

    def let_go(self, _):
        if self.holds:
            request = self.holds.pop(self.random.randrange(len(self.holds)))
            self.c.request("CANCEL", request_id=request)
            self.ended(("hold",), self.c.replies(request))

    def warm(self, name):
        self.ended(("warm", name), self.c.ask("WARM", ("MODEL", name)))

    def warm_wait(self, name):
        self.ended(("warm", name), self.c.ask("WARM", ("MODEL", name), ("WAIT", 1)))

    def unload(self, name):
        self.ended(("unload", name), self.c.ask("UNLOAD", ("MODEL", name)))

    def pin(self, name):
        self.ended(("pin", name), self.c.ask("SET", ("MODEL", name), ("PINNED", 1)))

    def unpin(self, _):
        ids = [self.c.request("SET", ("MODEL", name), ("PINNED", 0)) for name in NAMES]
        for request in ids:
            self.c.replies(request)

    def preload(self, name):
        value = self.random.randrange(2)
        self.ended(("preload", name), self.c.ask("SET", ("MODEL", name), ("PRELOAD", value)))

    def leave(self, _):
        self.c.close()
        self.c, self.holds = self.d.client(), []
        self.done += 1

    def run(self, operations):
        # What keeps a model is undone soon, or there would be no room for anything to happen in.
        acts = [self.complete] * 12 + [self.let_go, self.unpin] * 4 + \
               [self.cancel, self.hold, self.warm, self.warm_wait, self.unload, self.unload, self.pin,
                self.preload, self.leave]
        try:
            while self.done < operations:
                self.random.choice(acts)(self.random.choice(NAMES))
        except Exception as error:  # told by the test's own thread
            self.wrong.append(("raised", repr(error)))


@test
def a_thousand_random_operations_leave_every_answer_right_and_nothing_behind(t):
    paths = made_models(t, *NAMES)
    kib = paths[0].stat().st_size // 1024
    d = t.daemon(models=paths, config="memory_budget: 16MiB\n"
                                      f"engine: {{kv_budget: {16 * 1024 - kib * 5 // 2}KiB}}\n")
    d.expect_log(r"hearthd: model \S+ is failed: \S+ needs .*")
    with d.client() as c:
        right = {name: text_of(c.ask(*ask_text(name))) for name in NAMES}
    expect(len(set(right.values())) == len(NAMES), f"{right}")
    clients = [Client(d, i, right) for i in range(N_CLIENTS)]
    threads = [threading.Thread(target=c.run, args=(OPERATIONS // N_CLIENTS + 1,)) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [w for c in clients for w in c.wrong]
    expect(not wrong, f"{len(wrong)} of {sum(c.done for c in clients)} went wrong: {wrong[:5]}")
    expect(sum(c.answers for c in clients) > OPERATIONS / 10, "hardly anything was answered")
    for client in clients:
        client.c.close()
    with d.client() as c:
        for name in NAMES:
            expect(c.ask("SET", ("MODEL", name), ("PINNED", 0), ("PRELOAD", 0))[-1].type == "DONE", "unpin")
        wait_for(lambda: all(r.get("STATE") in ("cold", "failed") and r.get("HOLDS") == 0
                             for r in c.ask("MODELS") if r.type == "ITEM"),
                 "all models to be cold and held by nobody")
        for name in NAMES:
            expect(text_of(c.ask(*ask_text(name))) == right[name], f"{name} is no longer itself")
            c.ask("UNLOAD", ("MODEL", name))
    wait_for(lambda: d.metric("model_bytes") == 0, "the models' memory to come back")
    expect(d.metric("queue") == 0, "requests that are left")
    expect(d.metric("kv_used_bytes") == 0, "KV memory that is left")


@test
def all_who_waited_for_a_model_are_served_before_it_gives_way(t):
    """The first of its line end at once, while another model waits for its room."""
    paths = []
    for name in ("a", "b"):
        paths.append(t.dir / f"{name}.gguf")
        t.run("make-model", "--out", paths[-1], "--dim", "512", "--layers", "4", "--ff", "2048")
    budget = int(paths[0].stat().st_size * 1.6 + (4 << 20)) // 1024
    d = t.daemon(models=paths, config=f"memory_budget: {budget}KiB\nengine: {{kv_budget: 4MiB}}\n")
    with d.client() as c:
        for _ in range(5):
            ids = [(c.request("TOKENIZE", ("MODEL", name), ("PROMPT", "hello")),
                    c.request("COMPLETE", ("MODEL", name), ("IDS", b"\xff\xff\xff\x7f")),
                    c.request("COMPLETE", ("MODEL", name), ("PROMPT", "a"), ("MAX_TOKENS", 1)))
                   for name in "aabbaabb"]
            for words, wrong, text in ids:
                expect(c.replies(words)[-1].type == "DONE", "a text was not tokenized")
                expect(c.replies(wrong)[-1].get("CODE") == "bad-request", "a wrong id was taken")
                expect(c.replies(text)[-1].type == "DONE", "a text was not continued")
    expect(d.metric("unloads_total") > 0, "both models fit: the test shows nothing")
    expect(d.metric("queue") == 0, "requests that are left")
    d.alive()
