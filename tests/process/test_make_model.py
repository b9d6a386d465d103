"""make-model: what it writes, and what it leaves when it cannot."""
import json

from lib.harness import expect, program, test


@test
def writes_models_that_the_engine_takes(t):
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k", "q4_k_m"):
        path = t.dir / f"{kind}.gguf"
        t.run("make-model", "--out", path, "--type", kind, "--layers", "2", "--vocab", "600")
        r = t.run("hearth-bench", "ids", path, input="a fire in the stone")
        ids = json.loads(r.out)
        expect(ids and all(0 <= i < 600 for i in ids), f"{kind}: {r}")
        expect(not path.with_name(path.name + ".part").exists(), "the unfinished file is left")


@test
def gives_the_same_file_for_the_same_options(t):
    options = ("--arch", "qwen2", "--type", "q4_k_m", "--layers", "2", "--vocab", "600")
    files = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        t.run("make-model", "--out", t.dir / name, "--seed", seed, *options)
        files.append((t.dir / name).read_bytes())
    expect(files[0] == files[1], "the same seed gives another file")
    expect(files[0] != files[2], "another seed gives the same file")


@test
def refuses_wrong_usage(t):
    out = t.dir / "m.gguf"
    for args, sentence in (((), "--out FILE is missing"),
                           (("--out", out, "--type", "q5_k"), "--type q5_k"),
                           (("--out", out, "--dim", "12x"), "--dim 12x"),
                           (("--out", out, "--seed", "-1"), "--seed -1"),
                           (("--out", out, "--heads", "3"), "3 heads do not divide"),
                           (("--out", out, "--vocab", "10"), "vocab is 10"),
                           (("--out", out, "more"), "unexpected argument more"),
                           (("--out", out, "--bogus"), "--bogus")):
        r = t.run("make-model", *args, code=2)
        expect(sentence in r.err, f"no \"{sentence}\" in {r}")
        expect(not out.exists(), f"{args} wrote a file")
    expect("--kv-heads" in t.run("make-model", "--help").out, "help names no --kv-heads")


@test
def keeps_the_old_file_when_the_new_one_fails(t):
    out = t.write("m.gguf", "old")
    limited = f"trap '' XFSZ; ulimit -f 64; exec '{program('make-model')}' --out '{out}'"
    r = t.run("bash", "-c", limited, code=1)
    expect("File too large" in r.err and "m.gguf" in r.err, f"{r}")
    expect(out.read_text() == "old", "the old file is gone")
    expect(not (t.dir / "m.gguf.part").exists(), "the unfinished file is left")
    r = t.run("make-model", "--out", t.dir / "none" / "m.gguf", code=1)
    expect("No such file" in r.err, f"{r}")
