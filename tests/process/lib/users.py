"""Other users' connections, where the test runs as root: the kernel says of a socket whose it is from
the effective ids that its process had when it connected."""
import contextlib
import grp
import os
import pwd
import struct

from . import wire
from .harness import Skip

NOBODY, SOMEBODY, ADMIN_MEMBER = 65534, 4001, 4002


def names_for_admins():
    """A user and a group that the machine has: (user, uid, group, gid)."""
    for user, group in (("games", "mail"), ("daemon", "mail"), ("bin", "tty")):
        with contextlib.suppress(KeyError):
            return user, pwd.getpwnam(user).pw_uid, group, grp.getgrnam(group).gr_gid
    raise Skip("the machine has none of the users and groups that could be administrators")


def open_to_all(daemon):
    for path in (daemon.socket, daemon.status_socket):
        os.chmod(path, 0o666)


def client_of(path, uid, gid=None, groups=()):
    """A connection that belongs to that user."""
    old = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(uid if gid is None else gid)
    os.seteuid(uid)
    try:
        return wire.Client(path)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(old)


def on_behalf_of(uid, *gids):
    return ("ON_BEHALF_OF", struct.pack(f"<{1 + len(gids)}I", uid, *gids))
