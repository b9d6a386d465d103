"""The tests' own tools fail where they must."""
import re
import socket
import sys
from pathlib import Path

from lib.harness import ROOT, expect, listening, test

RUN = Path(__file__).parent / "run"
SANITIZED = ROOT / "tests" / "sanitized"

BAD_TESTS = '''
import os, subprocess, time
from lib.harness import Skip, expect, test

@test
def passes(t):
    pass

@test
def fails(t):
    expect(1 == 2, "one is not two")

@test
def raises(t):
    {}["absent"]

@test
def leaves_a_process(t):
    subprocess.Popen(["sleep", "1000"], start_new_session=True)

@test
def skips(t):
    raise Skip("no reason")

@test
def dies(t):
    os.kill(os.getpid(), 9)

@test
def reports(t):
    (t.dir.parent / "report.123").write_text("ERROR: AddressSanitizer")
'''


@test
def supervisor_fails_what_must_fail(t):
    t.write("bad/test_bad.py", BAD_TESTS)
    r = t.run(sys.executable, RUN, "--dir", t.dir / "bad", code=1)
    lines = {m[2]: m[1] for m in re.finditer(r"^(ok|not ok) \d+ - bad::(\w+)", r.out, re.MULTILINE)}
    expect(lines == {"passes": "ok", "fails": "not ok", "raises": "not ok", "skips": "ok",
                     "leaves_a_process": "not ok", "dies": "not ok", "reports": "not ok"}, r.out)
    expect("one is not two" in r.out and "# SKIP no reason" in r.out, r.out)
    expect("left processes: sleep 1000" in r.out, r.out)


@test
def sanitized_fails_on_a_report_and_only_then(t):
    # A child's leak and a child's overflow: the parent's exit status says nothing of either.
    source = t.write("bad.c", r"""
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    (void)argc;
    if (fork() == 0) {
        volatile int n = INT_MAX;
        char *volatile p = malloc(8);
        if (strcmp(argv[1], "leak") != 0)
            free(p);
        p = NULL;
        if (strcmp(argv[1], "overflow") == 0)
            n++;
        exit(n == 0);
    }
    wait(NULL);
    return 0;
}
""")
    program = t.dir / "bad"
    # gcc's shared runtimes do not know of each other, and UBSan's has no log_path then.
    t.run("gcc", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
          "-static-libasan", "-static-libubsan", "-o", program, source)
    t.run(SANITIZED, program, "clean")
    for kind, says in (("leak", "detected memory leaks"), ("overflow", "signed integer overflow")):
        r = t.run(SANITIZED, program, kind, code=99)
        expect(says in r.err, f"{r}")


@test
def sanitized_passes_on_an_exit_status(t):
    t.run(SANITIZED, "sh", "-c", "exit 7", code=7)


@test
def suite_counts_and_tells_failures(t):
    t.write("bad/test_bad.py", BAD_TESTS)
    r = t.run(ROOT / "tests" / "suite", "--process-dir", t.dir / "bad", "--no-unit", code=1)
    expect(r.out.splitlines()[-1] == "1 passed, 5 failed", r.out)
    expect("1 skipped" in r.out and "no reason" in r.out, r.out)


@test
def a_socket_that_is_only_bound_does_not_listen(t):
    path = t.dir / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(path))
        expect(path.exists() and not listening(path), "bound was taken for listening")
        bound.listen()
        expect(listening(path), "it listens, and was not seen to")
