"""hearth doctor and hearthd --check on this machine, whatever it is like."""
import json
import os
import re
import signal
import stat

from lib.harness import expect, program, test

LEVELS = {"ok", "warning", "problem"}


def findings(r, area=None):
    """The findings as JSON said them: those about an area, as (level, text, do)."""
    return [(f["level"], f["text"], f["do"]) for f in json.loads(r.out)
            if area in (None, f["area"])]


@test
def without_a_daemon_it_names_the_socket_and_how_to_start(t):
    s = t.dir / "s"
    r = t.run("hearth", "doctor", "--socket", s, code=1, err="")
    rows = [re.match(r"(ok|warning|problem) +(\w+) +(\S.*)$", line) for line in r.out.splitlines()]
    expect(rows and all(rows), f"{r}")
    socket = next(row[3] for row in rows if row[2] == "socket")
    expect(socket == f"{s} does not exist: nobody listens; do: hearthd --socket {s} &", f"{r}")
    expect({"daemon", "socket", "config", "cpus", "memory", "files", "fuse"} <= {x[2] for x in rows},
           f"{r}")
    expect(not s.exists() and sorted(p.name for p in t.dir.iterdir() if p.is_socket()) == [],
           "a look started something")


@test
def a_daemon_in_health_has_no_problem(t):
    d = t.daemon()
    r = d.hearth("doctor", "--json")
    expect({level for level, _, _ in findings(r)} <= LEVELS - {"problem"}, f"{r}")
    expect(findings(r, "daemon") == [("ok", f"version 0.1.0 runs, process {d.pid}", None)], f"{r}")
    expect(findings(r, "socket") == [("ok", f"{d.socket} is the daemon's", None)], f"{r}")
    expect(f"{d.models_dir}: 0 files of models" in str(findings(r, "models")), f"{r}")


@test
def models_that_cannot_be_used_are_named(t):
    d = t.daemon("--models", t.dir / "more")
    d.expect_log(r"hearthd: .*")
    for path in (d.models_dir / "twice.gguf", t.dir / "more/twice.gguf", d.models_dir / "a b.gguf"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
    d.hearth("reload")
    d.hearth("warm", "twice", "--wait", code=1)
    texts = [text for _, text, _ in findings(d.hearth("doctor", "--json"), "models")]
    for says in (r"twice failed to load: the version", r".*/twice\.gguf is no model that can be loaded",
                 r".*more/twice\.gguf is left out: the name twice is taken", r".*/a b\.gguf is left out"):
        expect(any(re.match(says, text) for text in texts), f"nothing says {says}: {texts}")


@test
def what_the_daemon_was_started_with_is_what_is_checked(t):
    d = t.daemon(config="engine: {threads: 100}\nmemory_budget: 64TiB\n")
    r = d.hearth("doctor", "--json", code=1)
    expect(findings(r, "memory")[0][0] == "problem", f"{r}")
    expect(findings(r, "cpus")[0][1].startswith("engine.threads is 100, and only"), f"{r}")
    (d.dir / "hearth.yaml").write_text("engine: {threads: none}\n")
    r = d.hearth("doctor", "--json", code=1)
    expect("engine.threads: expected" in findings(r, "config")[0][1], f"{r}")


@test
def a_stopped_daemon_is_a_problem_and_hangs_nobody(t):
    d = t.daemon()
    d.signal(signal.SIGSTOP)
    r = d.hearth("doctor", "--json", code=1, limit_s=30)
    expect(findings(r, "daemon")[0][0] == "problem", f"{r}")
    d.signal(signal.SIGCONT)
    expect(findings(d.hearth("doctor", "--json"), "daemon")[0][0] == "ok", "it is well again")


@test
def a_dead_daemon_s_socket_is_told_from_a_live_one_s(t):
    d = t.daemon()
    d.kill()
    r = d.hearth("doctor", "--json", code=1)
    expect(findings(r, "socket")[0][1].startswith(f"nobody listens on {d.socket}"), f"{r}")
    expect(findings(r, "daemon") == [("ok", "none runs now", None)], f"{r}")


@test
def a_user_outside_learns_which_group_is_missing(t):
    t.need_root()
    d = t.daemon()
    for folder in (t.dir.parent, t.dir, d.dir):
        os.chmod(folder, 0o755)
    r = t.run("setpriv", "--reuid", 12345, "--regid", 12345, "--clear-groups", program("hearth"),
              "doctor", "--json", "--socket", d.socket, code=1)
    access = findings(r, "access")[0]
    mode = stat.S_IMODE(os.stat(d.socket).st_mode)
    expect(access[0] == "problem" and f"mode {mode:04o}" in access[1], f"{r}")
    expect(findings(r, "daemon")[0][1].endswith("may not be opened by you"), f"{r}")


@test
def a_mount_is_read_and_a_dead_one_is_told(t):
    d = t.daemon()
    m = t.mount(d)
    r = d.hearth("doctor", "--json", code=None, err="")
    expect(("ok", f"{m.path} says running", None) in findings(r, "mount"), f"{r}")
    m.process.send_signal(signal.SIGKILL)
    m.process.wait(20)
    r = d.hearth("doctor", "--json")
    dead = next(f for f in findings(r, "mount") if str(m.path) in f[1])
    expect(dead[0] == "warning" and "Transport endpoint" in dead[1] and "fusermount3" in dead[2], f"{r}")
    t.run("umount", "-l", m.path)
    t.mounts.remove(m)


@test
def check_prints_what_would_be_run_with(t):
    (t.dir / "m").mkdir()
    config = t.write("c.yaml", "memory_budget: 64MiB\nengine: {threads: 3, kv_budget: 50%}\n"
                               "default_model: absent\n")
    with open(t.dir / "m/huge.gguf", "wb") as f:
        f.write(t.golden("models/stories260K-f32.gguf").read_bytes())
        f.truncate(1 << 30)
    out = t.run("hearthd", "--check", "--config", config, "--models", t.dir / "m", "--state-dir",
                t.dir / "st").out
    for line in (f"config {config}", f"models_dir {t.dir}/m", f"state_dir {t.dir}/st",
                 f"memory_budget_bytes {64 << 20}", f"kv_budget_bytes {32 << 20}", "threads 3",
                 "default_model absent", "models 2",
                 "warning default_model is absent, and there is no such model",
                 f"warning {t.dir}/m/huge.gguf has 1024 MiB and the memory_budget is 64 MiB: it cannot "
                 "be loaded until the budget is raised"):
        expect(line in out.splitlines(), f"no line '{line}': {out}")
    out = t.run("hearthd", "--check", env={"HEARTH_CPU": "nonsense"}).out
    expect("warning unknown kernel variant 'nonsense'" in out and "config none" in out, out)
