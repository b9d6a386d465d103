"""Who may do what: root and the daemon's own user, administrators by name and by group, everybody else,
and those for whom hearthfs asks."""
import os
import time

from lib import users
from lib.harness import expect, test, wait_for
from lib.models import made_models
from lib.users import NOBODY, SOMEBODY, client_of, on_behalf_of, open_to_all
from lib.wire import Closed

MODEL = ("MODEL", "ember")

# What each kind of user may do with a model that nobody else uses.
ORDERS = (  # order, who besides administrators may
    (("SET", MODEL, ("PINNED", 1)), False),
    (("SET", MODEL, ("PINNED", 0)), False),
    (("SET", MODEL, ("KEEP_ALIVE_US", 60000000)), False),
    (("SET", MODEL, ("KEEP_ALIVE_US", 0)), False),
    (("SET", MODEL, ("PRELOAD", 1), ("PINNED", 0)), False),
    (("RELOAD",), False),
    (("SET", MODEL, ("PRELOAD", 1)), True),
    (("SET", MODEL), True),
    (("WARM", MODEL), True),
    (("UNLOAD", MODEL), True),
    (("SET", MODEL, ("PRELOAD", 0)), True),
    (("MODELS",), True),
    (("STATUS",), True),
    (("METRICS",), True),
)


def daemon_with_admins(t, more=""):
    t.need_root()
    user, uid, group, gid = users.names_for_admins()
    d = t.daemon(config=f"admin: {{users: [{user}], groups: [{group}]}}\n{more}")
    open_to_all(d)
    return d, uid, gid


def outcome(replies):
    return "done" if replies[-1].type == "DONE" else replies[-1].get("CODE")


def hold(c, *options):
    """A hold that is taken: its id."""
    request = c.request("HOLD", *options)
    first = c.receive()
    expect(first.type == "ITEM" and first.id == request, f"{first}")
    return request


def holds_of(d, name="ember"):
    with d.status_client() as c:
        return c.ask("MODELS", ("MODEL", name))[0].get("HOLDS")


def state_of(d, name="ember"):
    with d.status_client() as c:
        return c.ask("MODELS", ("MODEL", name))[0].get("STATE")


@test
def each_order_is_for_those_who_may_give_it(t):
    d, admin_uid, admin_gid = daemon_with_admins(t)
    for path in (d.socket, d.status_socket):
        for client, admin in ((client_of(path, 0), True),
                              (client_of(path, admin_uid), True),
                              (client_of(path, users.ADMIN_MEMBER, admin_gid), True),
                              (client_of(path, users.ADMIN_MEMBER, groups=[4002, admin_gid]), True),
                              (client_of(path, users.ADMIN_MEMBER, groups=[4003]), False),
                              (client_of(path, NOBODY), False)):
            with client as c:
                for order, everybody in ORDERS:
                    got = outcome(c.ask(*order))
                    want = "done" if admin or everybody else "forbidden"
                    expect(got == want, f"{order} of {path}, admin {admin}: {got}")


@test
def a_refused_set_sets_nothing(t):
    d, _, _ = daemon_with_admins(t)
    with client_of(d.socket, NOBODY) as c:
        got = c.ask("SET", MODEL, ("PRELOAD", 1), ("KEEP_ALIVE_US", 5))
        expect(outcome(got) == "forbidden", f"{got}")
        expect(state_of(d) == "cold", "it was loaded all the same")
        for bad in (("PINNED", 2), ("PRELOAD", 7), ("KEEP_ALIVE_US", 1 << 60), ("PINNED", b"")):
            got = c.ask("SET", MODEL, bad)[-1]
            expect(got.get("CODE") == "bad-request" and got.get("OPTION") == bad[0].lower(), f"{got}")
        expect(outcome(c.ask("SET", ("PINNED", 1))) == "bad-request", "a model is needed")


@test
def nobody_unloads_what_others_use(t):
    d, admin_uid, _ = daemon_with_admins(t)
    ask = (MODEL, ("PROMPT", "Once"), ("MAX_TOKENS", 1))
    unloads = (("UNLOAD", MODEL), ("SET", MODEL, ("PRELOAD", 0)))
    with client_of(d.socket, NOBODY) as other, client_of(d.socket, SOMEBODY) as user, \
            client_of(d.socket, admin_uid) as admin:
        expect(outcome(user.ask("COMPLETE", *ask)) == "done", "the model works")
        for unload in unloads:
            got = other.ask(*unload)[-1]
            expect(got.get("CODE") == "forbidden" and "minute" in got.get("SENTENCE"), f"{got}")
        expect(outcome(user.ask("UNLOAD", MODEL)) == "done", "its only user may")
        wait_for(lambda: state_of(d) == "cold", "it to be cold")
        # The same for what others hold, and for what is pinned.
        held = hold(user, MODEL)
        wait_for(lambda: state_of(d) == "ready", "it to be ready")
        for unload in unloads:
            expect(outcome(other.ask(*unload)) == "forbidden", "somebody else holds it")
        user.request("CANCEL", request_id=held)
        expect(user.replies(held)[-1].get("REASON") == "cancelled", "it is let go")
        admin.ask("SET", MODEL, ("PINNED", 1))
        for unload in unloads:
            expect(outcome(other.ask(*unload)) == "forbidden", "it is pinned")
        expect(outcome(admin.ask("UNLOAD", MODEL)) == "done", "an administrator may all the same")


@test
def an_unload_waits_for_the_last_hold(t):
    d, admin_uid, _ = daemon_with_admins(t)
    with client_of(d.socket, SOMEBODY) as user, client_of(d.socket, admin_uid) as admin:
        held = [hold(user, MODEL), hold(user, MODEL)]
        admin.ask("WARM", MODEL, ("WAIT", 1))
        expect(outcome(admin.ask("UNLOAD", MODEL)) == "done", "an administrator may")
        item = admin.ask("MODELS", MODEL)[0]
        expect(item.get("STATE") == "ready" and item.get("PRELOAD") == 0, f"{item}")
        user.request("CANCEL", request_id=held[0])
        user.replies(held[0])
        expect(state_of(d) == "ready", "one hold is left")
        user.request("CANCEL", request_id=held[1])
        user.replies(held[1])
        wait_for(lambda: state_of(d) == "cold", "it to go with the last hold")
        # Who wants it meanwhile, has it stay.
        again = hold(user, MODEL)
        expect(outcome(admin.ask("UNLOAD", MODEL)) == "done", "an administrator may")
        expect(outcome(user.ask("WARM", MODEL, ("WAIT", 1))) == "done", "wanted again")
        user.request("CANCEL", request_id=again)
        user.replies(again)
        time.sleep(0.2)
        expect(state_of(d) == "ready", "it was wanted again")


@test
def only_the_daemon_s_own_user_speaks_for_others_and_on_the_status_socket_alone(t):
    d, admin_uid, admin_gid = daemon_with_admins(t)
    pin = ("SET", MODEL, ("PINNED", 0))
    with client_of(d.status_socket, 0) as own, client_of(d.socket, 0) as main, \
            client_of(d.status_socket, NOBODY) as other, client_of(d.status_socket, admin_uid) as admin:
        for who, want in ((on_behalf_of(NOBODY), "forbidden"), (on_behalf_of(NOBODY, 5, 6), "forbidden"),
                          (on_behalf_of(admin_uid), "done"), (on_behalf_of(0), "done"),
                          (on_behalf_of(SOMEBODY, 5, admin_gid), "done")):
            expect(outcome(own.ask(*pin, who)) == want, f"{who}: not {want}")
        expect(outcome(own.ask("SET", MODEL, ("PRELOAD", 1), on_behalf_of(NOBODY))) == "done", "may warm")
        for c, order in ((main, pin), (main, ("NULL",)), (main, ("MODELS",)), (other, pin),
                         (other, ("STATUS",)), (admin, pin), (admin, ("HOLD", MODEL)),
                         (main, ("COMPLETE", MODEL, ("PROMPT", "x"))), (other, ("SUBSCRIBE",))):
            got = c.ask(*order, on_behalf_of(0))[-1]
            expect(got.get("CODE") == "forbidden" and got.get("OPTION") == "on-behalf-of", f"{order}: {got}")
        for bad in (b"", b"\0\0", b"\0" * 7, b"\0" * 4 * 258):
            got = own.ask(*pin, ("ON_BEHALF_OF", bad))[-1]
            expect(got.get("CODE") == "bad-request", f"{len(bad)} bytes: {got}")


@test
def holds_have_a_bound_for_each_user_also_for_whom_is_spoken(t):
    d, _, _ = daemon_with_admins(t, "limits: {holds_per_uid: 3}\n")
    with client_of(d.status_socket, 0) as own, client_of(d.status_socket, NOBODY) as other:
        mine = [hold(own, MODEL, on_behalf_of(NOBODY)) for _ in range(2)]
        hold(other, MODEL)
        for c, who in ((own, (on_behalf_of(NOBODY),)), (other, ())):
            got = c.ask("HOLD", MODEL, *who)[-1]
            expect(got.get("CODE") == "busy" and got.get("RETRY_AFTER_US") and
                   "holds_per_uid" in got.get("SENTENCE"), f"{got}")
        theirs = [hold(own, MODEL, on_behalf_of(SOMEBODY)) for _ in range(3)]
        expect(holds_of(d) == 6, "each has his own")
        own.request("CANCEL", request_id=mine[0])
        own.replies(mine[0])
        hold(other, MODEL)
        for request in theirs:
            own.request("CANCEL", request_id=request)
            own.replies(request)
        expect(holds_of(d) == 3, "those let go count no more")
    wait_for(lambda: holds_of(d) == 0, "connections that end to let go")


@test
def a_user_s_holds_keep_no_more_memory_than_allowed(t):
    t.need_root()
    models = made_models(t, "m0", "m1", "m2")
    size = models[0].stat().st_size // 1024
    limit = size * 5 // 2  # of three models, two fit
    d = t.daemon(models=models, config=f"memory_budget: 64MiB\n"
                                       f"limits: {{memory_per_uid: {limit}KiB}}\n")
    open_to_all(d)
    with client_of(d.socket, NOBODY) as c, client_of(d.socket, SOMEBODY) as other, \
            client_of(d.socket, 0) as root:
        for name in ("m0", "m1", "m1"):
            hold(c, ("MODEL", name))
        got = c.ask("HOLD", ("MODEL", "m2"))[-1]
        expect(got.get("CODE") == "no-memory" and "memory_per_uid" in got.get("SENTENCE"), f"{got}")
        expect(state_of(d, "m2") == "cold", "it is not loaded for that")
        kept = hold(other, ("MODEL", "m2"))
        hold(c, ("MODEL", "m2"))  # another keeps it, too
        other.request("CANCEL", request_id=kept)
        other.replies(kept)
        for name in ("m0", "m1", "m2"):
            hold(root, ("MODEL", name))  # administrators are not held to it


@test
def a_hold_ends_with_its_request_its_connection_or_its_client(t):
    d = t.daemon()
    a, b = d.client(), d.client()
    first, second = hold(a, MODEL), hold(b, MODEL)
    expect(holds_of(d) == 2, "two holds")
    a.request("CANCEL", request_id=first)
    expect(a.replies(first)[-1].get("REASON") == "cancelled", "cancelled by its client")
    expect(holds_of(d) == 1, "one hold is left")
    b.close()
    wait_for(lambda: holds_of(d) == 0, "the end of the connection to let go")
    a.close()
    expect(second, "it had an id")
    # A client that is killed.
    pid = os.fork()
    if pid == 0:
        c = d.client()
        c.request("HOLD", MODEL)
        c.receive()
        time.sleep(60)
        os._exit(0)
    wait_for(lambda: holds_of(d) == 1, "the child's hold")
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    wait_for(lambda: holds_of(d) == 0, "the killed client's hold to go")
    # A hold is taken before the model is there, and the load goes on without it.
    wait_for(lambda: state_of(d) == "ready", "it to be ready")


@test
def holds_end_when_the_daemon_does(t):
    d = t.daemon()
    c = d.client()
    request = hold(c, MODEL)
    subscription = c.request("SUBSCRIBE")
    d.signal(15)
    ends = {}
    try:
        while True:
            frame = c.receive()
            if frame.type in ("ERROR", "DONE"):
                ends[frame.id] = frame.get("CODE")
    except Closed:
        pass
    expect(ends == {request: "shutting-down", subscription: "shutting-down"}, f"{ends}")
    expect(d.wait() == 0, "a clean end")


@test
def a_hold_on_what_cannot_load_ends_with_the_reason(t):
    d = t.daemon(models=[t.write("broken.gguf", b"GGUF" + b"\xff" * 200)])
    d.expect_log(r"hearthd: model broken is failed: .*")
    with d.client() as c:
        request = c.request("HOLD", ("MODEL", "broken"))
        replies = c.replies(request)
        expect(outcome(replies) == "load-failed", f"{replies}")
        expect(outcome(c.ask("HOLD", ("MODEL", "broken"))) == "load-failed", "and again at once")
        expect(outcome(c.ask("HOLD", ("MODEL", "none-such"))) == "no-such-model", "unknown")
    expect(holds_of(d, "broken") == 0, "no hold is left")


@test
def values_of_run_time_outlive_a_look_but_not_the_daemon(t):
    config = "models: {ember: {keep_alive: 90s}}\n"
    d = t.daemon(config=config)
    with d.client() as c:
        expect(outcome(c.ask("SET", MODEL, ("PINNED", 1), ("KEEP_ALIVE_US", 7000000))) == "done", "set")
        expect(outcome(c.ask("RELOAD")) == "done", "reload")
        item = c.ask("MODELS", MODEL)[0]
        expect(item.get("PINNED") == 1 and item.get("KEEP_ALIVE_US") == 7000000, f"{item}")
    d.stop()
    again = t.daemon(config=config, name="again")
    with again.client() as c:
        item = c.ask("MODELS", MODEL)[0]
        expect(item.get("PINNED") == 0 and item.get("KEEP_ALIVE_US") == 90000000, f"{item}")


@test
def a_reload_sees_what_was_there_before_it(t):
    d = t.daemon()
    with d.client() as c:
        for i in range(5):
            t.run("make-model", "--out", d.models_dir / f"new{i}.gguf", "--dim", "64", "--layers", "1",
                  "--vocab", "300")
            expect(outcome(c.ask("RELOAD")) == "done", "reload")
            names = [r.get("MODEL") for r in c.ask("MODELS") if r.type == "ITEM"]
            expect(f"new{i}" in names, f"{names}")
        # Many at once: each is answered.
        ids = [c.request("RELOAD") for _ in range(50)]
        for request in ids:
            expect(outcome(c.replies(request)) == "done", "each is answered")


@test
def a_model_that_is_new_is_found_by_who_names_it(t):
    d = t.daemon()
    orders = (("WARM", ("WAIT", 1)), ("HOLD",), ("SET", ("PRELOAD", 1)), ("COMPLETE", ("PROMPT", "x"),
              ("MAX_TOKENS", 1)))
    with d.client() as c:
        for i, (kind, *options) in enumerate(orders):
            time.sleep(1.05)  # a look a second is what unknown names get
            name = f"new{i}"
            t.run("make-model", "--out", d.models_dir / f"{name}.gguf", "--dim", "64", "--layers", "1",
                  "--vocab", "300")
            request = c.request(kind, ("MODEL", name), *options)
            first = c.receive()
            expect(first.id == request and first.type != "ERROR", f"{kind}: {first}")
            if first.type != "DONE":
                c.request("CANCEL", request_id=request)
                c.replies(request)
        time.sleep(1.05)
        # An unknown one is refused by all of them at once, and one that is cancelled ends.
        ids = [c.request(kind, ("MODEL", "none-such"), *options) for kind, *options in orders]
        for request in ids:
            expect(outcome(c.replies(request)) == "no-such-model", "it is not there")
