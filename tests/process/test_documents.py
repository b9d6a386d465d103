"""Documents and manuals say what is there: links, files, commands, options, the library's example."""
import re

from lib.harness import ROOT, expect, test

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md",
             *sorted((ROOT / "docs").glob("*.md"))]
MANUALS = {name: ROOT / path for name, path in (("hearth", "cli/hearth.1.scd"),
                                                ("hearthd", "daemon/hearthd.8.scd"),
                                                ("hearthfs", "fs/hearthfs.8.scd"),
                                                ("libhearth", "lib/hearth.3.scd"))}
OPTION = r"(?<![\w-])(--[a-z][a-z-]*)"


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)


def anchors(path):
    """What `#...` may name in a document: its headings, in small letters with hyphens."""
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", prose(path), re.M)}


def section(manual, title):
    return re.search(rf"^# {title}\n(.*?)(?=^# |\Z)", manual.read_text(), re.M | re.S)[1]


@test
def every_link_leads_somewhere(t):
    broken = []
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            if re.match(r"[a-z]+:", link):
                continue
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    expect(not broken, f"links that lead nowhere: {broken}")


@test
def every_file_that_a_document_names_exists(t):
    missing = []
    for document in DOCUMENTS:
        if document.parent == ROOT / "tests":
            continue  # its paths begin in tests/process
        for name in re.findall(r"`((?:daemon|lib|cli|fs|bench|tests|packaging|docs)/[\w./*-]*)`",
                               prose(document)):
            if not list(ROOT.glob(name.rstrip("*/") + "*")):
                missing.append(f"{document.relative_to(ROOT)}: {name}")
    expect(not missing, f"named and not there: {missing}")


@test
def the_manual_of_hearth_has_the_commands_that_there_are(t):
    helps = t.run("hearth", "--help").out
    there = set(re.findall(r"^  (\w+) ", helps.split("Commands:")[1].split("\n\n")[0], re.M))
    told = set(re.findall(r"^\*(\w+)\*(?: .*)?$", section(MANUALS["hearth"], "COMMANDS"), re.M))
    expect(there and told == there, f"hearth --help: {sorted(there)}, hearth(1): {sorted(told)}")


@test
def the_manuals_have_the_options_that_there_are(t):
    commands = re.findall(r"^\*(\w+)\*(?: .*)?$", section(MANUALS["hearth"], "COMMANDS"), re.M)
    helps = {"hearth": "".join(t.run("hearth", c, "--help").out for c in commands),
             "hearthd": t.run("hearthd", "--help").out,
             "hearthfs": t.run("hearthfs", "--help").out}
    for name, text in helps.items():
        there = set(re.findall(OPTION, text))
        told = set(re.findall(r"\*(--[a-z][a-z-]*)\*",
                              "\n".join(re.findall(r"^\*.*$", section(MANUALS[name], "OPTIONS"), re.M))))
        expect(there and told == there, f"{name}: only in --help {sorted(there - told)}, "
                                        f"only in the manual {sorted(told - there)}")


@test
def every_manual_is_well_formed(t):
    t.need_program("scdoc")
    t.need_program("mandoc")
    found = sorted(p for p in ROOT.glob("*/*.scd"))
    expect(found == sorted(MANUALS.values()), f"a manual is not in this test: {found}")
    for path in found:
        page = t.write(path.stem, t.run("scdoc", input=path.read_text()).out)
        r = t.run("mandoc", "-T", "lint", "-W", "error", page, code=None, err=".*")
        expect(r.code == 0 and not r.out, f"{r}")


@test
def the_example_of_the_library_s_manual_compiles(t):
    t.need_program("cc")
    code = re.search(r"```\n(#include.*?)```", MANUALS["libhearth"].read_text(), re.S)[1]
    t.run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "lib",
          t.write("example.c", code))


@test
def the_library_s_manual_names_functions_that_there_are(t):
    header = (ROOT / "lib/hearth.h").read_text()
    names = re.findall(r"\*(hearth_\w+)\*\(\)", MANUALS["libhearth"].read_text())
    gone = [n for n in names if not re.search(rf"\b{n}\(", header)]
    expect(names and not gone, f"not in hearth.h: {gone}")
