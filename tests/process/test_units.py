"""The units that an installation gets, as systemd sees them."""
import json
import re

from lib.harness import BUILD, ROOT, expect, program, test


def units(t):
    """The units with the built programs in place of the installed ones."""
    t.need_program("systemd-analyze")
    built = {"hearthd": program("hearthd"), "hearthfs": program("hearthfs")}
    paths = {"hearthd.socket": ROOT / "packaging/systemd/hearthd.socket",
             "hearthd.service": BUILD / "packaging/hearthd.service",
             "hearthfs.service": BUILD / "packaging/hearthfs.service"}
    return [t.write(f"units/{name}",
                    re.sub(r"/\S*/(hearthd|hearthfs)(?=[ #])", lambda m: str(built[m[1]]),
                           path.read_text()))
            for name, path in paths.items()]


@test
def systemd_verifies_the_units_without_a_word(t):
    # It exits with 0 on a key it does not know, so its silence is what counts.
    r = t.run("systemd-analyze", "verify", "--man=no", *units(t), err="")
    expect(r.out == "", f"{r}")


@test
def verify_speaks_up_on_an_unknown_key(t):
    path = units(t)[1]
    path.write_text(path.read_text().replace("[Service]", "[Service]\nNoSuchKey=1"))
    r = t.run("systemd-analyze", "verify", "--man=no", path, code=None, err=".*")
    expect("NoSuchKey" in r.err, f"{r}")


@test
def the_daemon_s_unit_is_hardened(t):
    r = t.run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=10",
              "--json=short", units(t)[1], code=None, err=".*")
    expect(r.code == 0, f"exposure over 1.0: {r}")
    rows = json.loads(r.out)
    expect(rows, f"{r}")


@test
def the_units_keep_what_the_product_needs(t):
    text = (BUILD / "packaging/hearthd.service").read_text()
    keys = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    expect(keys["Type"] == "notify" and "WatchdogSec" in keys and keys["LimitCORE"] == "0", text)
    expect(keys["ExecStart"].endswith("/hearthd --config /etc/hearth/hearth.yaml"), text)
    for key in ("PrivateUsers", "MemoryDenyWriteExecute"):
        expect(key not in keys, f"{key} breaks the product")
    expect("@resources" not in "".join(v for k, v in keys.items() if k == "SystemCallFilter"), text)
    expect(keys["RuntimeDirectory"] != "hearth", "it would remove the listening socket")
    # Where no daemon has ever run the filesystem has nothing else to know the models by.
    view = (BUILD / "packaging/hearthfs.service").read_text()
    expect(re.search(r"^ExecStartPre=-.*/hearthd .* --socket /run/hearth/hearth\.sock .*--list$", view,
                     re.MULTILINE), view)
    socket = (ROOT / "packaging/systemd/hearthd.socket").read_text()
    for line in ("ListenStream=/run/hearth/hearth.sock", "SocketMode=0660", "SocketGroup=hearth"):
        expect(line in socket.splitlines(), line)


@test
def an_installation_has_what_the_units_start(t):
    t.need_program("meson")
    r = t.run("meson", "introspect", "--installed", BUILD)
    installed = set(json.loads(r.out).values())
    for unit, name in (("hearthd.service", "hearthd"), ("hearthfs.service", "hearthfs")):
        text = (BUILD / "packaging" / unit).read_text()
        path = re.search(rf"^ExecStart=.*?(/\S*/{name})\b", text, re.MULTILINE)[1]
        expect(path in installed, f"{unit} starts {path}, installed are {sorted(installed)}")
    names = {path.rsplit("/", 1)[1] for path in installed}
    for name in ("hearth", "hearthd.socket", "hearthd.service", "hearthfs.service", "hearth.yaml"):
        expect(name in names, f"{name} is not installed: {sorted(names)}")
