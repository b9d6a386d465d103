"""hearth, the command line, against a real daemon and without one."""
import json
import os
import re
import signal
import subprocess

from lib.harness import ROOT, expect, program, test, wait_for
from lib.screen import Screen

# Model states are logged as they change.
STATES = r"hearthd: model \S+ is \w+"


def warm_daemon(t, **more):
    d = t.daemon(**more)
    d.expect_log(STATES)
    d.hearth("warm", "ember", "--wait")
    return d


def long_model(t):
    """One whose answer takes long enough to be interrupted."""
    path = t.dir / "long.gguf"
    t.run("make-model", "--out", path, "--dim", 512, "--layers", 8, "--context", 8192)
    return path


@test
def without_a_daemon_a_look_says_inactive_and_work_says_how_to_start(t):
    s = t.dir / "s"
    expect(t.run("hearth", "status", "--socket", s).out.startswith("state inactive\n"), "status")
    expect(json.loads(t.run("hearth", "status", "--json", "--socket", s).out)["state"] == "inactive",
           "status --json")
    t.write("s.models", "ember\ntiny\n")
    rows = [r.split()[:2] for r in t.run("hearth", "models", "--socket", s).out.splitlines()]
    expect(rows == [["NAME", "STATE"], ["ember", "cold"], ["tiny", "cold"]], f"{rows}")
    for command in (("run", "ember", "hi"), ("stats",), ("warm", "ember"), ("unload", "ember"),
                    ("tokenize", "ember", "hi"), ("embed", "ember", "hi"), ("pin", "ember"),
                    ("pin", "ember", "--off"), ("reload",), ("events",)):
        r = t.run("hearth", *command, "--socket", s, code=3)
        expect(r.out == "" and f"no daemon at {s}: start it with" in r.err, f"{r}")
    expect(not s.exists(), "a look started something")


@test
def usage_errors_say_what_is_wrong(t):
    cases = (((), "no command"), (("rum",), "did you mean 'run'"), (("run",), "argument is missing"),
             (("run", "m", "--top-k", "x"), "a whole number"), (("run", "m", "a", "b"), "too many"),
             (("run", "m", "p", "--deadline", "30"), "with its unit"), (("status", "x"), "too many"))
    for args, says in cases:
        r = t.run("hearth", *args, code=2)
        expect(r.out == "" and r.err.startswith("hearth: ") and says in r.err, f"{r}")
    r = t.run("hearth", "run", "./model.gguf", "hi", code=1)
    expect("cannot open ./model.gguf" in r.err, f"{r}")
    r = t.run("hearth", "tokenize", "./model.gguf", "hi", code=1)
    expect("only 'hearth run' takes one" in r.err, f"{r}")


@test
def every_command_explains_itself(t):
    for name in ("run", "embed", "tokenize", "warm", "unload", "models", "status", "stats", "top", "pin", "reload", "doctor", "events"):
        r = t.run("hearth", name, "--help")
        expect(f"usage: hearth {name}" in r.out and "--socket PATH" in r.out, f"{r}")
        expect(t.run("hearth", "help", name).out == r.out, "help NAME is another")


@test
def run_prints_the_continuation_alone_and_the_same_every_way(t):
    d = warm_daemon(t)
    options = ("--temperature", 0, "--max-tokens", 20)
    text = d.hearth("run", "ember", "Once upon a time", *options).out
    expect(text and not text.endswith("\n\n"), f"{text!r}")
    expect(d.hearth("run", "ember", *options, input="Once upon a time").out == text, "from stdin")
    answer = json.loads(d.hearth("run", "ember", "Once upon a time", *options, "--json").out)
    expect(answer["text"] == text and answer["model"] == "ember", f"{answer}")
    expect(answer["usage"]["completion_tokens"] <= 20 and answer["reason"] in ("length", "stop"),
           f"{answer}")
    expect(set(answer["timings"]) == {"queued_us", "load_us", "prefill_us", "decode_us"}, f"{answer}")


@test
def a_seed_of_64_bits_gives_the_same_text_again(t):
    d = warm_daemon(t)
    args = ("run", "ember", "The", "--max-tokens", 16, "--seed", 2**64 - 1, "--json")
    first, second = (json.loads(d.hearth(*args).out) for _ in range(2))
    expect(first["seed"] == second["seed"] == 2**64 - 1, f"{first} {second}")
    expect(first["text"] == second["text"], f"{first} {second}")


@test
def refusals_are_sentences_and_exit_with_1(t):
    d = warm_daemon(t)
    for args, says in ((("run", "absent", "x"), "no model absent"),
                       (("warm", "absent", "--wait"), "no model absent"),
                       (("run", "ember", "x", "--max-tokens", 0), "max_tokens"),
                       (("models", "absent"), "no model"), (("stats", "absent"), "absent")):
        r = d.hearth(*args, code=1)
        expect(r.err.startswith("hearth: ") and says in r.err, f"{r}")
        expect(r.err.count("\n") == 1, f"{r}")


@test
def models_status_and_stats_agree(t):
    d = warm_daemon(t)
    ember = json.loads(d.hearth("models", "ember", "--json").out)[0]
    expect(ember["state"] == "ready" and ember["memory_bytes"] > 0, f"{ember}")
    expect("ember" in d.hearth("models").out, "the table")
    status = json.loads(d.hearth("status", "--json").out)
    expect(status["state"] == "running" and status["pid"] == d.pid, f"{status}")
    stats = json.loads(d.hearth("stats", "--json").out)
    expect({"pool", "batcher", "streaming", "loader"} <= set(stats), f"{stats}")
    expect("hearth_up 1" in d.hearth("stats", "prometheus").out, "prometheus")
    d.hearth("unload", "ember")
    wait_for(lambda: json.loads(d.hearth("models", "ember", "--json").out)[0]["state"] == "cold",
             "ember to be cold")


@test
def tokenize_prints_ids_on_one_line(t):
    d = warm_daemon(t)
    out = d.hearth("tokenize", "ember", input="Once upon a time").out
    expect(out.endswith("\n") and out.count("\n") == 1, f"{out!r}")
    ids = [int(i) for i in out.split()]
    expect(ids and json.loads(d.hearth("tokenize", "ember", "Once upon a time", "--json").out) == ids,
           f"{out!r}")


@test
def ctrl_c_cancels_in_the_daemon_too(t):
    d = warm_daemon(t, models=[long_model(t)])
    d.hearth("warm", "long", "--wait")
    p = t.start("hearth", "run", "--socket", d.socket, "long", "x", "--max-tokens", 8000,
                "--ignore-eos", stdout=subprocess.PIPE)
    expect(p.stdout.read(1), "no text came")
    p.send_signal(signal.SIGINT)
    p.stdout.read()
    expect(p.wait(20) == 130, f"exit status {p.returncode}")
    wait_for(lambda: json.loads(d.hearth("status", "--json").out)["info"]["requests_live"] == 0,
             "the daemon to have no request")
    expect(d.metric("stream_cancelled_total") == 1, "not counted as cancelled")


@test
def a_reader_that_leaves_ends_it_quietly(t):
    d = warm_daemon(t, models=[long_model(t)])
    d.hearth("warm", "long", "--wait")
    p = t.start(program("hearth"), "run", "--socket", d.socket, "long", "x", "--max-tokens", 8000,
                "--ignore-eos", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    expect(p.stdout.read(1), "no text came")
    p.stdout.close()
    expect(p.wait(20) == -signal.SIGPIPE, f"exit status {p.returncode}")
    expect(p.stderr.read() == b"", "it said something")
    wait_for(lambda: json.loads(d.hearth("status", "--json").out)["info"]["requests_live"] == 0,
             "the daemon to have no request")


@test
def embed_prints_a_vector_of_length_1_for_each_line(t):
    d = warm_daemon(t)
    one = json.loads(d.hearth("embed", "ember", "a fox").out)
    expect(abs(sum(x * x for x in one) - 1) < 1e-5, f"length {sum(x * x for x in one)}")
    lines = [f"line {i % 7}" for i in range(300)]
    out = d.hearth("embed", "ember", input="\n".join(lines)).out  # the last one without a newline
    vectors = out.splitlines()
    expect(len(vectors) == len(lines), f"{len(vectors)} vectors of {len(lines)} lines")
    expect(len(set(vectors)) == 7 and all(vectors[i] == vectors[i % 7] for i in range(300)), "order")
    expect(d.hearth("embed", "ember", input="").out == "", "of nothing comes something")


@test
def embed_answers_a_line_before_the_next_one_is_there(t):
    d = warm_daemon(t)
    p = t.start("hearth", "embed", "--socket", d.socket, "ember", stdin=subprocess.PIPE,
                stdout=subprocess.PIPE)
    for line in (b"one\n", b"\n", b"two\n"):
        p.stdin.write(line)
        p.stdin.flush()
        expect(json.loads(p.stdout.readline()), "no vector")
    p.stdin.close()
    expect(p.wait(20) == 0 and p.stdout.read() == b"", f"exit status {p.returncode}")


@test
def a_line_that_cannot_be_embedded_keeps_its_place(t):
    d = warm_daemon(t)
    r = d.hearth("embed", "ember", input="a\n" + "x" * 2_000_000 + "\nb\n", code=1)
    rows = [json.loads(line) for line in r.out.splitlines()]
    expect([row is None for row in rows] == [False, True, False], f"{r}")
    expect("line 2: the request is larger" in r.err, f"{r}")
    r = d.hearth("embed", "ember", input="a\n" + "x" * 17_000_000 + "\nb\n", code=1)
    expect(r.out.count("\n") == 1 and "line 2 is longer than" in r.err, f"{r.err}")


@test
def ctrl_c_and_a_full_disk_end_an_endless_embed(t):
    d = warm_daemon(t)
    p = t.start("hearth", "embed", "--socket", d.socket, "ember", stdin=subprocess.PIPE,
                stdout=subprocess.PIPE)
    p.stdin.write(b"x\n" * 10)
    p.stdin.flush()
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    expect(p.wait(20) == 130, f"exit status {p.returncode}")
    yes = t.start("yes", stdout=subprocess.PIPE)
    with open("/dev/full", "wb") as full:
        p = t.start("hearth", "embed", "--socket", d.socket, "ember", stdin=yes.stdout, stdout=full)
        expect(p.wait(20) == 1, f"exit status {p.returncode}")


@test
def warm_draws_a_bar_for_each_model_and_says_what_failed(t):
    d = t.daemon(models=[long_model(t)])
    d.expect_log(STATES, r"hearthd: model bad is failed: .*")
    (d.models_dir / "bad.gguf").write_bytes(b"GGUF")
    d.hearth("reload")
    s = Screen(t, "hearth", "warm", "--socket", d.socket, "--wait", "ember", "long", "bad")
    s.end(1)
    text = s.text.decode()
    last = text.split("\x1b[3A")[-1].split("\r\n")
    expect(re.fullmatch(r"\r\x1b\[Kember  \[#{30}\] 100%  ready( .*)?", last[0]), f"{last}")
    expect(re.fullmatch(r"\r\x1b\[Klong   \[#{30}\] 100%  ready  \S+ of \S+", last[1]), f"{last}")
    expect(re.fullmatch(r"\r\x1b\[Kbad    \[\.{30}\]   0%  failed", last[2]), f"{last}")
    expect(last[3].startswith("hearth: bad: the version"), f"{last}")


@test
def warm_in_a_small_window_shortens_its_lines_or_prints_them(t):
    d = t.daemon()
    d.expect_log(STATES)
    s = Screen(t, "hearth", "warm", "--socket", d.socket, "--wait", "ember", columns=14)
    s.end(0)
    lines = [re.sub(r"\x1b\[K|\x1b\[1A|\r", "", line) for line in s.text.decode().split("\r\n")]
    expect(all(len(line) < 14 for line in lines) and lines[-2].startswith("ember  100%"), f"{lines}")
    s = Screen(t, "hearth", "warm", "--socket", d.socket, "--wait", "ember", "ember", rows=2)
    s.end(0)
    expect(b"\x1b" not in s.text and s.text.count(b"ember ready") == 2, f"{s.text}")


@test
def warm_without_wait_returns_at_once(t):
    d = t.daemon(models=[long_model(t)])
    d.expect_log(STATES)
    expect(d.hearth("warm", "long", "ember").out == "", "it printed something")
    states = {m["name"]: m["state"] for m in json.loads(d.hearth("models", "--json").out)}
    expect("cold" not in states.values(), f"{states}")


@test
def pin_is_seen_and_taken_back(t):
    d = warm_daemon(t)
    d.hearth("pin", "ember")
    expect(json.loads(d.hearth("models", "ember", "--json").out)[0]["pinned"], "not pinned")
    d.hearth("pin", "ember", "--off")
    expect(not json.loads(d.hearth("models", "ember", "--json").out)[0]["pinned"], "still pinned")
    r = d.hearth("pin", "ember", "absent", "gone", code=1)
    expect(r.err.count("\n") == 2 and "no model absent" in r.err and "no model gone" in r.err, f"{r}")
    expect(json.loads(d.hearth("models", "ember", "--json").out)[0]["pinned"], "one spoils the other")


@test
def reload_makes_new_files_known_before_it_returns(t):
    d = t.daemon()
    for i in range(3):
        (d.models_dir / f"new{i}.gguf").write_bytes(b"GGUF")
        d.hearth("reload")
        expect(f"new{i} " in d.hearth("models").out, f"new{i} is not known")


@test
def what_an_administrator_may_others_are_refused_in_words(t):
    t.need_root()
    d = warm_daemon(t)
    os.chmod(d.socket, 0o666)
    os.chmod(d.status_socket, 0o666)
    other = ("setpriv", "--reuid", 12345, "--regid", 12345, "--clear-groups", program("hearth"))
    for folder in (t.dir, d.dir):
        os.chmod(folder, 0o755)
    for command, says in ((("pin", "ember"), "only an administrator"),
                          (("reload",), "only an administrator")):
        r = t.run(*other, command[0], "--socket", d.socket, *command[1:], code=1)
        expect(says in r.err, f"{r}")
    d.hearth("run", "ember", "hi", "--max-tokens", 1)
    r = t.run(*other, "unload", "--socket", d.socket, "ember", code=1)
    expect("ember was used by somebody else within the last minute" in r.err, f"{r}")
    with d.status_client() as c:
        c.request("HOLD", ("MODEL", "ember"))
        c.receive()
        r = t.run(*other, "unload", "--socket", d.socket, "ember", code=1)
        expect("ember is held by somebody else: an administrator may unload it" in r.err, f"{r}")
    d.hearth("pin", "ember")
    r = t.run(*other, "unload", "--socket", d.socket, "ember", code=1)
    expect(r.err == "hearth: ember is pinned: an administrator may unload it\n", f"{r}")


class Watcher:
    """A `hearth events` and the lines that it has printed."""

    def __init__(self, t, d, *args):
        self.process = t.start(program("hearth"), "events", "--socket", d.socket, *args,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self, pattern):
        """The next line, which must match."""
        line = self.process.stdout.readline().rstrip("\n")
        match = re.fullmatch(pattern, line)
        expect(match, f"wanted {pattern}: {line!r}")
        return match

    def end(self, code):
        rest = self.process.stdout.read()
        expect(self.process.wait(20) == code, f"exit status {self.process.returncode}")
        return rest, self.process.stderr.read()


@test
def events_are_told_in_words_or_as_objects(t):
    d = t.daemon(config="memory_budget: 16MiB\n")
    d.expect_log(STATES, r"hearthd: model bad is failed: .*", r"hearthd: .* ember .*")
    (d.models_dir / "bad.gguf").write_bytes(b"GGUF")
    d.hearth("reload")
    words, objects = Watcher(t, d), Watcher(t, d, "--json")
    words.line(r"\d\d:\d\d:\d\d\.\d{3}  hearthd is running, version 0\.1\.0")
    first = json.loads(objects.line(r"\{.*\}")[0])
    expect(first["event"] == "daemon" and first["state"] == "running", f"{first}")
    d.hearth("warm", "ember", "--wait")
    words.line(r"\S+  ember is queued, was cold")
    words.line(r"\S+  ember is loading, was queued")
    words.line(r"\S+  ember is warming, was loading")
    words.line(r"\S+  ember is ready, was warming \(\S+iB, loaded in \S+m?s\)")
    d.hearth("warm", "bad", "--wait", code=1)
    for word in ("queued", "loading", "failed"):
        words.line(rf"\S+  bad is {word}, was \w+")
    words.line(r"\S+  bad failed to load \(load-failed\): the version .*")
    states = [json.loads(objects.line(r"\{.*\}")[0]) for _ in range(8)]
    expect([s["seq"] for s in states] == list(range(states[0]["seq"], states[0]["seq"] + 8)), f"{states}")
    d.signal(signal.SIGTERM)
    rest, error = words.end(3)
    expect("hearthd is draining" in rest and error == "hearth: the daemon has ended\n", f"{rest}{error}")
    expect(objects.end(3)[1] == error, "another end")


@test
def a_closed_pipe_and_a_full_disk_end_events(t):
    d = t.daemon()
    d.expect_log(STATES)
    w = Watcher(t, d)
    w.line(".*")
    w.process.stdout.close()
    d.hearth("warm", "ember", "--wait")
    expect(w.process.wait(20) == -signal.SIGPIPE and w.process.stderr.read() == "", "not quiet")
    with open("/dev/full", "wb") as full:
        p = t.start("hearth", "events", "--socket", d.socket, stdout=full, stderr=subprocess.PIPE)
        expect(p.wait(20) == 1 and b"No space left" in p.stderr.read(), f"{p.returncode}")


@test
def bash_completes_commands_options_and_models(t):
    t.need_program("bash")
    d = t.daemon()
    (d.models_dir / "story.gguf").write_bytes(b"GGUF")
    d.hearth("reload")
    script = t.write("try.sh", f"""
        source {ROOT}/packaging/completion/hearth
        COMP_WORDS=({program("hearth")} "$@"); COMP_CWORD=$#; _hearth; echo "${{COMPREPLY[@]}}"
    """)

    def complete(*words):
        return t.run("bash", script, *words, env={"HEARTH_SOCKET": str(d.socket)}).out.split()
    helps = re.findall(r"^  (\w+) ", t.run("hearth", "--help").out, re.M)
    expect(set(complete("")) == {*helps, "help"}, f"{complete('')}")
    expect(complete("mod") == ["models"] and complete("help", "emb") == ["embed"], "commands")
    expect(complete("warm", "") == ["ember", "story"] and complete("warm", "ember", "s") == ["story"],
           f"{complete('warm', '')}")
    expect(complete("--socket", d.socket, "run", "st") == ["story"], "behind --socket")
    expect(complete("run", "ember", "s") == [], "a prompt is no model")
    expect(complete("pin", "--o") == ["--off"] and "--seed" in complete("run", "--"), "options")
    expect(complete("stats", "bat") == ["batcher"] and complete("--v") == ["--version"], "others")
    expect(complete("run", f"{t.dir}/try") == [f"{t.dir}/try.sh"], "a file")


@test
def options_before_the_command_and_help_count_too(t):
    s = t.dir / "s"
    for args in (("--socket", s, "status"), (f"--socket={s}", "status")):
        expect(f"socket {s}\n" in t.run("hearth", *args).out, f"{args}")
    helps = t.run("hearth", "--help").out
    expect(t.run("hearth", "help").out == helps and t.run("hearth", "-h").out == helps, "another help")
    expect(t.run("hearth", "--version").out == "hearth 0.1.0\n", "the version")
    for args, says in ((("transmogrify",), "'hearth --help' lists them"), (("x" * 70,), "no command"),
                       (("--no-such",), "is no option before a command"),
                       (("--socket",), "is no option before a command"),
                       (("run", "m", "--top-k", 2**32), "--top-k is at most")):
        r = t.run("hearth", *args, code=2)
        expect(says in r.err, f"{r}")


@test
def names_lists_and_sockets_that_cannot_be_are_told(t):
    s = t.dir / "s"
    for command in ("run", "embed", "tokenize", "warm", "unload", "pin", "models"):
        r = t.run("hearth", command, "--socket", s, "no name", code=1)
        expect("is no model's name" in r.err, f"{r}")
    (t.dir / "s.models").mkdir()
    r = t.run("hearth", "models", "--socket", s, code=1)
    expect("cannot read the list of models" in r.err, f"{r}")
    for command in ("status", "doctor", "models", "stats"):
        r = t.run("hearth", command, "--socket", "/tmp/" + "x" * 200, code=1)
        expect(r.err.startswith("hearth: ") and r.out == "", f"{r}")


@test
def input_that_cannot_be_read_is_told(t):
    d = warm_daemon(t)
    for command in ("run", "tokenize", "embed"):
        with open("/proc/self/mem", "rb") as nothing:  # of which byte 0 cannot be read
            p = t.start("hearth", command, "--socket", d.socket, "ember", stdin=nothing,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            expect(p.wait(20) == 1 and b"cannot read standard input" in p.stderr.read(),
                   f"{command}: {p.returncode}")
    with open("/dev/zero", "rb") as endless:
        p = t.start("hearth", "tokenize", "--socket", d.socket, "ember", stdin=endless,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        expect(p.wait(40) == 1 and b"longer than 64 MiB" in p.stderr.read(), f"{p.returncode}")


@test
def a_full_disk_is_told_by_every_command(t):
    d = warm_daemon(t)
    for args in (("run", "ember", "hi"), ("run", "ember", "hi", "--json"), ("tokenize", "ember", "hi"),
                 ("models",), ("models", "--json"), ("status",), ("stats",), ("stats", "--json"),
                 ("doctor",), ("warm", "ember", "--wait"), ("--help",)):
        with open("/dev/full", "wb") as full:
            p = t.start("hearth", *(args if args[0] == "--help" else
                                    (args[0], "--socket", d.socket, *args[1:])),
                        stdout=full, stderr=subprocess.PIPE)
            expect(p.wait(20) == 1 and b"No space left" in p.stderr.read(), f"{args}: {p.returncode}")


@test
def on_a_terminal_text_ends_its_line_and_typed_text_is_asked_for(t):
    d = warm_daemon(t)
    options = ("--temperature", 0, "--max-tokens", 3)
    plain = d.hearth("run", "ember", "Once upon a time", *options).out
    s = Screen(t, "hearth", "run", "--socket", d.socket, "ember", "Once upon a time", *options)
    s.end(0)
    expect(s.text.decode() == plain.replace("\n", "\r\n") + "\r\n", f"{s.text} for {plain!r}")
    s = Screen(t, "hearth", "run", "--socket", d.socket, "ember", *options)
    wait_for(lambda: b"Ctrl-D ends it" in s.read(), "the question")
    s.key(b"Once upon a time\x04\x04")
    s.end(0)
    expect(s.text.decode().endswith(plain.replace("\n", "\r\n") + "\r\n"), f"{s.text}")
    s = Screen(t, "hearth", "tokenize", "--socket", d.socket, "ember")
    wait_for(lambda: b"Ctrl-D ends it" in s.read(), "the question")
    s.key(b"\x03")
    s.end(130)


@test
def status_of_a_daemon_that_is_stopped_is_unresponsive(t):
    d = t.daemon()
    d.signal(signal.SIGSTOP)
    expect(d.hearth("status").out.startswith("state unresponsive\n"), "not unresponsive")
    d.signal(signal.SIGCONT)
