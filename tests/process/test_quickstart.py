"""packaging/quickstart: a newcomer's first command."""
import os
import signal
import subprocess

from lib.harness import BUILD, ROOT, expect, test, wait_for

QUICKSTART = ROOT / "packaging" / "quickstart"


def environment(t):
    """Its temporary folder goes into the test's own, so that what it leaves is seen."""
    folder = t.dir / "tmp"
    folder.mkdir()
    return {"HEARTH_BUILD": str(BUILD), "TMPDIR": str(folder)}


def expect_nothing_left(t):
    left = [p.name for p in (t.dir / "tmp").iterdir()]
    expect(not left, f"quickstart left {left}")


@test
def the_built_in_model_answers_and_nothing_is_left(t):
    r = t.run(QUICKSTART, env=environment(t))
    expect("\nready\n" in r.out or " ready " in r.out, f"{r}")
    expect("requests_total" in r.out, f"{r}")
    expect_nothing_left(t)


@test
def a_file_tells_its_known_story(t):
    model = t.golden("models/stories260K-f32.gguf")
    r = t.run(QUICKSTART, model, "Once upon a time", env=environment(t))
    expect("there was a little girl named Lily" in r.out, f"{r}")
    expect_nothing_left(t)


@test
def a_file_that_is_no_model_fails_in_a_sentence(t):
    bad = t.write("bad.gguf", b"no model")
    r = t.run(QUICKSTART, bad, code=1, env=environment(t))
    expect("did not load" in r.err, f"{r}")
    expect_nothing_left(t)


@test
def a_missing_file_and_too_many_arguments_are_told(t):
    t.run(QUICKSTART, t.dir / "absent.gguf", code=1, err=".*is no file that can be read.*")
    t.run(QUICKSTART, "a", "b", "c", code=2)


@test
def ctrl_c_in_the_middle_cleans_up(t):
    process = t.start(QUICKSTART, env={**os.environ, **environment(t)}, stdout=subprocess.PIPE,
                      stderr=subprocess.DEVNULL, start_new_session=True)
    tmp = t.dir / "tmp"
    wait_for(lambda: list(tmp.glob("hearth.*/hearth.sock")), "the daemon's socket")
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    code = process.wait(30)
    # It may have been done already when the signal came.
    expect(code in (0, 130), f"exit status {code}")
    expect_nothing_left(t)
