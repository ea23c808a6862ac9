# SPDX-License-Identifier: LGPL-2.1-or-later
"""User and PID namespaces of other processes, as seen from our own (namespaces(7), ioctl_ns(2))."""

from __future__ import annotations

import fcntl
import os
import struct

from ..bus.metadata import PidNamespace, UserNamespace
from . import procfs

_NS_GET_PARENT = 0xB702
_NS_GET_OWNER_UID = 0xB704

Ranges = tuple[tuple[int, int, int], ...]


def _inode(path: str) -> int:
    """The number in a namespace link such as user:[4026531837]."""
    return os.stat(path).st_ino


OWN_USER = UserNamespace(_inode("/proc/self/ns/user"))
OWN_PID = PidNamespace((_inode("/proc/self/ns/pid"),))
_OWN_USER_LINK = os.readlink(b"/proc/self/ns/user")
_OWN_PID_LINK = os.readlink(b"/proc/self/ns/pid")


def _parse_map(text: bytes | None) -> Ranges:
    ranges = []
    for line in (text or b"").splitlines():
        inside, outside, count = map(int, line.split())
        ranges.append((inside, outside, count))
    return tuple(ranges)


def _ancestry(path: str, own: int) -> list[tuple[int, int]]:
    """(inode, owner uid) of the namespace *path* leads to and of those above it, below *own*."""
    found: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    while True:
        try:
            inode = os.fstat(fd).st_ino
            if inode == own:
                return found
            owner = 0
            if "user" in path:
                buffer = bytearray(4)
                fcntl.ioctl(fd, _NS_GET_OWNER_UID, buffer)
                (owner,) = struct.unpack("=I", buffer)
            found.append((inode, owner))
            parent = fcntl.ioctl(fd, _NS_GET_PARENT)
        except OSError:
            # Not below ours: nothing of it can be translated.
            return found
        finally:
            os.close(fd)
        fd = parent


def user_namespace(tid: int) -> UserNamespace:
    """The user namespace of a thread."""
    if procfs.readlink(tid, "ns/user") == _OWN_USER_LINK:
        return OWN_USER
    try:
        chain = _ancestry(f"/proc/{tid}/ns/user", OWN_USER.id)
    except OSError:
        return OWN_USER
    namespace = OWN_USER
    for inode, owner in reversed(chain[1:]):
        namespace = UserNamespace(inode, namespace, owner)
    inode, owner = chain[0]
    return UserNamespace(
        inode,
        namespace,
        owner,
        _parse_map(procfs.read(tid, "uid_map")),
        _parse_map(procfs.read(tid, "gid_map")),
    )


def pid_namespace(tid: int) -> PidNamespace:
    """The PID namespace that a thread is in (not the one its children will be in)."""
    if procfs.readlink(tid, "ns/pid") == _OWN_PID_LINK:
        return OWN_PID
    try:
        chain = _ancestry(f"/proc/{tid}/ns/pid", OWN_PID.id)
    except OSError:
        return OWN_PID
    return PidNamespace((OWN_PID.id, *(inode for inode, _ in reversed(chain))))
