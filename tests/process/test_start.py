"""Starting: flags, configuration files, and what is said about wrong ones."""
import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

from lib.harness import ROOT, Daemon, expect, listening, program, test, wait_for


@test
def help_says_how_to_start_each_program(t):
    for name in ("hearthd", "hearth", "hearthfs"):
        r = t.run(name, "--help")
        expect(name in r.out and "--socket" in r.out, f"{r}")


@test
def version_is_one_line_the_same_everywhere(t):
    lines = {t.run(name, "--version").out.removeprefix(name).strip()
             for name in ("hearthd", "hearth", "hearthfs")}
    expect(len(lines) == 1, f"different versions: {lines}")


@test
def unknown_flags_are_usage_errors(t):
    for name in ("hearthd", "hearth", "hearthfs"):
        r = t.run(name, "--no-such-flag", code=2)
        expect(r.out == "" and r.err != "", f"{r}")


@test
def check_takes_good_files(t):
    example = ROOT / "packaging/systemd/hearth.yaml"
    t.run("hearthd", "--check", "--config", example)
    t.run("hearthd", "--check", "--config", t.write("empty.yaml", ""))
    t.run("hearthd", "--check", "--config", t.write("some.yaml", "limits: {queue: 10}\n"))


@test
def check_tells_file_line_key_and_what_was_expected(t):
    cases = (
        ("limits:\n  queue: many\n", 2, "limits.queue: expected a whole number"),
        ("idle_exit: 5\n", 1, "idle_exit: expected a time with its unit"),
        ("limts: {}\n", 1, "the nearest one is limits"),
        ("limits:\n\tqueue: 1\n", 2, "expected YAML"),
        ("limits: {queue: 1, queue: 2}\n", 1, "limits.queue: expected once"),
        ("memory_budget: 8GB\n", 1, "memory_budget: expected 1% to 100%"),
    )
    for text, line, says in cases:
        path = t.write("bad.yaml", text)
        r = t.run("hearthd", "--check", "--config", path, code=2)
        expect(f"{path}:{line}: " in r.err and says in r.err, f"{text!r}: {r}")


@test
def malformed_yaml_starts_nothing(t):
    path = t.write("bad.yaml", "limits: {queue: [}\n")
    r = t.run("hearthd", "--socket", t.dir / "s", "--config", path, code=2)
    expect(str(path) in r.err, f"{r}")
    expect(not (t.dir / "s").exists(), "a socket was made all the same")


@test
def a_missing_configuration_is_told_by_its_name(t):
    r = t.run("hearthd", "--check", "--config", t.dir / "absent.yaml", code=2)
    expect("absent.yaml" in r.err and "No such file" in r.err, f"{r}")


@test
def print_keys_is_the_document(t):
    r = t.run("hearthd", "--print-keys")
    expect(r.out == (ROOT / "docs/configuration.md").read_text(), "docs/configuration.md is old")


@test
def threads_have_names_and_leave_signals_to_the_first(t):
    d = t.daemon()
    d.alive()

    def of(task):
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        return fields["Name"].strip(), int(fields["SigBlk"], 16)

    tasks = Path(f"/proc/{d.pid}/task")
    names = {}
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            names.setdefault(*of(task))
    expect({"hearthd", "hearth-engine", "hearth-text", "hearth-loader"} <= set(names), f"{names}")
    for name, blocked in names.items():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
            expect(name == "hearthd" or blocked >> (number - 1) & 1, f"{name} may take {number.name}")


@test
def verbose_logs_connections_that_come_and_go(t):
    for flags, wanted in (((), 0), (("--verbose",), 1)):
        d = t.daemon(*flags, name=f"d{wanted}")
        with d.client() as c:
            c.ask("NULL")
        lines = [f"connection 1 of uid {os.getuid()} {what}" for what in ("has come", "is over")]
        d.expect_log(r"hearthd: connection \d+ of uid \d+( to the status socket)? (has come|is over)")
        d.metric("connections")  # a later one has come, so the first one's end was seen
        d.stop()
        for line in lines:
            expect(d.log().count(f"{line}\n") == wanted, f"{line}: {d.log()}")


@test
def with_few_descriptors_it_says_so_and_serves(t):
    t.need_program("prlimit")
    process = t.start("prlimit", "--nofile=64:64", program("hearthd"), "--socket", t.dir / "s",
                      "--models", t.dir, "--state-dir", t.dir, stderr=subprocess.PIPE)
    wait_for(lambda: listening(t.dir / "s.status"), "the sockets")
    out = t.run("hearth", "run", "--socket", t.dir / "s", "--max-tokens", 3, "ember", "Once").out
    expect(out != "", "no answer")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1].decode()
    expect(process.returncode == 0 and "only 64 file descriptors are allowed" in said
           and "LimitNOFILE" in said, said)


@test
def a_service_manager_may_listen_on_an_abstract_name(t):
    name = f"hearth-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind("\0" + name)
        notices.settimeout(20)
        t.daemons.append(Daemon(t, env={"NOTIFY_SOCKET": "@" + name}))
        expect(notices.recv(4096).startswith(b"READY=1"), "not ready")


@test
def a_user_s_own_configuration_is_read(t):
    for variable, folder in (("XDG_CONFIG_HOME", "xdg/hearth"), ("HOME", "home/.config/hearth")):
        (t.dir / folder).mkdir(parents=True)
        path = t.write(f"{folder}/hearth.yaml", "memory_budget: 1GiB\n")
        env = {"XDG_CONFIG_HOME": "", "HOME": str(t.dir / "none"),
               variable: str(t.dir / folder.partition("/")[0])}
        out = t.run("hearthd", "--check", env=env).out
        expect(f"config {path}\n" in out and f"memory_budget_bytes {1 << 30}\n" in out, out)
        out = t.run("hearthd", "--check", "--socket", t.dir / "s", env=env).out
        expect("config none\n" in out, f"beside --socket no file is read: {out}")
        t.write(f"{folder}/hearth.yaml", "memory: 1GiB\n")
        err = t.run("hearthd", "--check", env=env, code=2, err=None).err
        expect(f"{path}:1: " in err and "memory_budget" in err, err)
