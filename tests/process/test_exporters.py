"""Metrics as others read them: promtool, and a real node_exporter over the mount."""
import os
import re
import signal
import socket
import time
import urllib.request

from lib.harness import expect, test, wait_for
from lib.view import until


def busy_mount(t):
    """A mount over a daemon that has done something, so that labels and histograms have values."""
    d = t.daemon()
    m = t.mount(d)
    d.hearth("run", "ember", "Once upon a time", "--max-tokens", "8")
    d.hearth("embed", "ember", "a text", code=None, err=".*")
    until(m, "metrics/models_ready", "1\n")
    return d, m


def check(t, promtool, text):
    r = t.run(promtool, "check", "metrics", input=text)
    expect(r.out == "", f"{r}")


@test
def promtool_finds_nothing_to_complain_of(t):
    promtool = t.need_program("promtool", "packaging/packages exporters")
    d, m = busy_mount(t)
    text = m.read("metrics/hearth.prom")
    expect("hearth_up 1" in text and "_bucket{" in text, "there is little to check")
    check(t, promtool, text)
    d.stop()
    until(m, "status", "inactive\n")
    check(t, promtool, m.read("metrics/hearth.prom"))


@test
def node_exporter_reads_the_mount(t):
    exporter = t.need_program("prometheus-node-exporter", "packaging/packages exporters")
    d, m = busy_mount(t)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    t.start(exporter, "--collector.disable-defaults", "--collector.textfile",
            f"--collector.textfile.directory={m.path}/metrics", "--web.disable-exporter-metrics",
            f"--web.listen-address=127.0.0.1:{port}")

    def scrape():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                return page.read().decode()
        except OSError:
            return ""
    page = wait_for(scrape, "node_exporter to answer")
    expect(re.search(r"^node_textfile_scrape_error 0$", page, re.MULTILINE), page[-2000:])
    ours = {line.split(" ")[2] for line in m.read("metrics/hearth.prom").splitlines()
            if line.startswith("# TYPE ")}
    theirs = {line.split(" ")[2] for line in page.splitlines() if line.startswith("# TYPE hearth_")}
    expect(ours == theirs and "hearth_up" in ours, f"missing: {sorted(ours ^ theirs)}")
    expect("\nhearth_up 1\n" in page and "\nhearth_models_ready 1\n" in page, "values are missing")
    d.stop()
    until(m, "status", "inactive\n")
    page = scrape()
    expect("\nhearth_up 0\n" in page, "node_exporter says that it is up")
    expect(re.search(r"^node_textfile_scrape_error 0$", page, re.MULTILINE), page[-2000:])


@test
def a_file_is_as_old_as_its_values(t):
    d = t.daemon()
    m = t.mount(d)

    def written():
        m.read("metrics/hearth.prom")
        return os.stat(m.path / "metrics" / "hearth.prom").st_mtime_ns
    first = written()
    wait_for(lambda: written() > first + 10**9, "values a second newer")
    os.kill(d.pid, signal.SIGSTOP)
    until(m, "status", "unresponsive\n")
    last = written()
    time.sleep(1)
    expect(written() < last + 5 * 10**8, "values of a silent daemon grow no newer")
    os.kill(d.pid, signal.SIGCONT)
    wait_for(lambda: written() > last, "newer values")
    expect(os.stat(m.path / "metrics").st_mtime_ns < first, "a directory does not change")
