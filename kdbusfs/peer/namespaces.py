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
from typing import NoReturn
from weakref import WeakValueDictionary

from ..abi.errors import CommandError
from ..bus.metadata import PidNamespace, Ranges, UserNamespace
from ..mount.mountinfo import mounts
from . import procfs
from .fd_table import FD_TABLE, check_exhausted

_NS_GET_PARENT = 0xB702
_NS_GET_OWNER_UID = 0xB704
_NS_GET_PID_FROM_PIDNS = 0x8004B706
"""Linux 6.11: what is our number of a thread that has a given one in a PID namespace."""
_LARGEST_PID = 0x7FFFFFFF


def _inode(path: str) -> int:
    """The number in a namespace link such as user:[4026531837]."""
    return os.stat(path).st_ino


def _hidepid_group() -> int | None:
    """Who may see foreign processes in our /proc (proc(5), hidepid and gid); None: everybody."""
    group = None
    for mount in mounts():
        if mount.path != "/proc":
            continue
        # The last one is on top.
        options = dict(option.partition("=")[::2] for option in mount.options.split(","))
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
    """An open file of a thread's in /proc, for which user *uid* is charged: a namespace, which
    keeps its number for so long, or a map of one."""

    def __init__(self, tid: int, name: str, uid: int) -> None:
        self.fd = -1
        self._uid = uid
        FD_TABLE.charge(uid)
        try:
            self.fd = os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            FD_TABLE.discharge(uid)
            check_exhausted(error.errno)
            # Nobody can say then what the thread may do.
            raise CommandError(EPERM, f"the {name} of {tid} is unknown") from None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            FD_TABLE.discharge(self._uid)


class _Maps:
    """The id maps of a user namespace, which may be written at any time after it was made.

    Open files of /proc/<tid>/*_map belong to the namespace, not to the thread: they can be read
    when nobody is left in it, and keep it.
    """

    def __init__(self, tid: int, uid: int) -> None:
        self._uid_map = _Pin(tid, "uid_map", uid)
        self._gid_map = _Pin(tid, "gid_map", uid)

    def __call__(self) -> tuple[Ranges, Ranges]:
        return _read_map(self._uid_map.fd), _read_map(self._gid_map.fd)


def _read_map(fd: int) -> Ranges:
    ranges = []
    try:
        text = os.pread(fd, 65536, 0)
    except OSError as error:
        check_exhausted(error.errno)
        return ()
    for line in text.splitlines():
        numbers = procfs.numbers(line)
        if len(numbers) == 3 and numbers[1] != 0xFFFFFFFF:
            ranges.append((numbers[0], numbers[1], numbers[2]))
    return tuple(ranges)


def _ancestry(fd: int, own: int, owners: bool) -> tuple[list[tuple[int, int]], bool]:
    """(inode, owner uid) of the namespace *fd* and those above it, up to, without, *own*; and
    whether that is above them."""
    found: list[tuple[int, int]] = []
    ours = -1
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
        except OSError as error:
            check_exhausted(error.errno)
            return found, False
        finally:
            if ours >= 0:
                os.close(ours)
        fd = ours = parent


def user_namespace(tid: int, uid: int) -> UserNamespace:
    """The user namespace of a thread, for what *uid* is charged. EPERM: it can't be found out."""
    if procfs.readlink(tid, "ns/user") == _OWN_USER_LINK:
        return OWN_USER
    pin = _Pin(tid, "ns/user", uid)
    known = _users.get(_inode_of(pin))
    if known is not None:
        return known
    chain, is_below = _ancestry(pin.fd, OWN_USER.id, owners=True)
    if not chain:
        return OWN_USER if is_below else _untold(tid)
    namespace = OWN_USER if is_below else _OUTSIDE
    for inode, owner in reversed(chain[1:]):
        namespace = UserNamespace(inode, namespace, owner)
    inode, owner = chain[0]
    namespace = UserNamespace(inode, namespace, owner, read_maps=_Maps(tid, uid))
    _users[inode] = namespace
    return namespace


def _inode_of(pin: _Pin) -> int:
    try:
        return os.fstat(pin.fd).st_ino
    except OSError as error:
        check_exhausted(error.errno)
        raise CommandError(EPERM, f"a namespace is unknown: {error}") from None


def _untold(tid: int) -> NoReturn:
    raise CommandError(EPERM, f"the namespaces of {tid} are unknown")


def pid_namespace(tid: int, uid: int) -> PidNamespace:
    """The PID namespace that a thread is in (not the one its children will be in), for which *uid*
    is charged. EPERM: it can't be found out."""
    if procfs.readlink(tid, "ns/pid") == _OWN_PID_LINK:
        return OWN_PID
    pin = _Pin(tid, "ns/pid", uid)
    known = _pids.get(_inode_of(pin))
    if known is not None:
        return known
    chain, is_own = _ancestry(pin.fd, OWN_PID.id, owners=False)
    if not chain:
        return OWN_PID if is_own else _untold(tid)
    inodes = (OWN_PID.id, *(inode for inode, _ in reversed(chain)))
    namespace = PidNamespace(inodes, pin=pin)
    _pids[namespace.id] = namespace
    return namespace


def own_number(number: int, namespace: PidNamespace) -> int:
    """What the process that is *number* in *namespace* is in ours, 0 if there is none; OSError
    ENOTTY where the kernel can't tell."""
    pin = namespace.pin
    assert isinstance(pin, _Pin), "of our own namespace, or one made by hand"
    if number > _LARGEST_PID:
        return 0
    try:
        return fcntl.ioctl(pin.fd, _NS_GET_PID_FROM_PIDNS, number)
    except OSError as error:
        if error.errno == ESRCH:
            return 0
        raise
