# SPDX-License-Identifier: LGPL-2.1-or-later
"""User and PID namespaces of other processes, as seen from our own (namespaces(7), ioctl_ns(2)).

A namespace is known by its inode number, which the kernel gives to another one as soon as the
namespace is gone. So each one that is referred to is held open, and looked up by number only
while it is.
"""

from __future__ import annotations

import fcntl
import os
import struct
from errno import EPERM, ESRCH
from weakref import WeakValueDictionary

from ..abi.errors import CommandError
from ..bus.metadata import PidNamespace, Ranges, UserNamespace
from . import procfs

_NS_GET_PARENT = 0xB702
_NS_GET_OWNER_UID = 0xB704
_NS_GET_PID_FROM_PIDNS = 0x8004B706
"""Linux 6.11: what is our number of a thread that has a given one in a PID namespace."""


def _inode(path: str) -> int:
    """The number in a namespace link such as user:[4026531837]."""
    return os.stat(path).st_ino


def _hidepid_group() -> int | None:
    """Who may see foreign processes in our /proc (proc(5), hidepid and gid); None: everybody."""
    group = None
    with open("/proc/self/mountinfo") as file:
        for fields in map(str.split, file):
            if fields[4] != "/proc":
                continue
            # The last one is on top.
            options = dict(option.partition("=")[::2] for option in fields[-1].split(","))
            hides = options.get("hidepid", "off") not in ("off", "0")
            group = int(options.get("gid", "0")) if hides else None
    return group


OWN_USER = UserNamespace(_inode("/proc/self/ns/user"))
OWN_PID = PidNamespace((_inode("/proc/self/ns/pid"),), _hidepid_group())
_OUTSIDE = UserNamespace(0)
"""Stands for what is above those namespaces that are not below ours."""
_OWN_USER_LINK = os.readlink(b"/proc/self/ns/user")
_OWN_PID_LINK = os.readlink(b"/proc/self/ns/pid")

_users: WeakValueDictionary[int, UserNamespace] = WeakValueDictionary()
_pids: WeakValueDictionary[int, PidNamespace] = WeakValueDictionary()


class _Pin:
    """An open namespace, which keeps its number for so long."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _Maps:
    """The id maps of a user namespace, which may be written at any time after it was made.

    Open files of /proc/<tid>/*_map belong to the namespace, not to the thread: they can be read
    when nobody is left in it, and keep it.
    """

    def __init__(self, tid: int) -> None:
        self._uid_map = _Pin(os.open(f"/proc/{tid}/uid_map", os.O_RDONLY | os.O_CLOEXEC))
        self._gid_map = _Pin(os.open(f"/proc/{tid}/gid_map", os.O_RDONLY | os.O_CLOEXEC))

    def __call__(self) -> tuple[Ranges, Ranges]:
        return _read_map(self._uid_map.fd), _read_map(self._gid_map.fd)


def _read_map(fd: int) -> Ranges:
    ranges = []
    for line in os.pread(fd, 65536, 0).splitlines():
        inside, outside, count = map(int, line.split())
        if outside != 0xFFFFFFFF:
            ranges.append((inside, outside, count))
    return tuple(ranges)


def _ancestry(fd: int, own: int, owners: bool) -> tuple[list[tuple[int, int]], bool]:
    """(inode, owner uid) of the namespace *fd* and those above it, up to, without, *own*; and
    whether that is above them."""
    found: list[tuple[int, int]] = []
    fd = os.dup(fd)
    while True:
        try:
            inode = os.fstat(fd).st_ino
            if inode == own:
                return found, True
            owner = 0
            if owners:
                buffer = bytearray(4)
                fcntl.ioctl(fd, _NS_GET_OWNER_UID, buffer)
                (owner,) = struct.unpack("=I", buffer)
            found.append((inode, owner))
            parent = fcntl.ioctl(fd, _NS_GET_PARENT)
        except OSError:
            return found, False
        finally:
            os.close(fd)
        fd = parent


def _open(tid: int, name: str) -> _Pin:
    """A namespace of a thread. EPERM: then nobody can say what the thread may do."""
    try:
        return _Pin(os.open(f"/proc/{tid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        raise CommandError(EPERM, f"the {name} namespace of {tid} can't be told") from None


def user_namespace(tid: int) -> UserNamespace:
    """The user namespace of a thread."""
    if procfs.readlink(tid, "ns/user") == _OWN_USER_LINK:
        return OWN_USER
    pin = _open(tid, "user")
    known = _users.get(os.fstat(pin.fd).st_ino)
    if known is not None:
        return known
    chain, is_below = _ancestry(pin.fd, OWN_USER.id, owners=True)
    namespace = OWN_USER if is_below else _OUTSIDE
    for inode, owner in reversed(chain[1:]):
        namespace = UserNamespace(inode, namespace, owner)
    inode, owner = chain[0]
    namespace = UserNamespace(inode, namespace, owner, read_maps=_Maps(tid))
    _users[inode] = namespace
    return namespace


def pid_namespace(tid: int) -> PidNamespace:
    """The PID namespace that a thread is in (not the one its children will be in)."""
    if procfs.readlink(tid, "ns/pid") == _OWN_PID_LINK:
        return OWN_PID
    pin = _open(tid, "pid")
    known = _pids.get(os.fstat(pin.fd).st_ino)
    if known is not None:
        return known
    chain, _ = _ancestry(pin.fd, OWN_PID.id, owners=False)
    inodes = (OWN_PID.id, *(inode for inode, _ in reversed(chain)))
    namespace = PidNamespace(inodes, pin=pin)
    _pids[namespace.id] = namespace
    return namespace


def own_number(number: int, namespace: PidNamespace) -> int:
    """What the process that is *number* in *namespace* is in ours, 0 if there is none; OSError
    ENOTTY where the kernel can't tell."""
    pin = namespace.pin
    assert isinstance(pin, _Pin), "of our own namespace, or one made by hand"
    try:
        return fcntl.ioctl(pin.fd, _NS_GET_PID_FROM_PIDNS, number)
    except OSError as error:
        if error.errno == ESRCH:
            return 0
        raise
