# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading /proc/<tid> (proc(5)) of a thread that is held in its call.

Every reader returns None, or leaves something out, where the kernel has nothing to show.
"""

from __future__ import annotations

import os

from ..bus.metadata import Capabilities

CAP_IPC_OWNER = 15


def read(tid: int, name: str, limit: int = 0) -> bytes | None:
    """The whole of /proc/<tid>/<name>, or its first *limit* bytes; None if it can't be read."""
    try:
        fd = os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if limit:
            return os.read(fd, limit)
        data = os.read(fd, 65536)
        # A file that fills the buffer is rare (AUXGROUPS of 64k groups).
        while len(data) % 65536 == 0 and (more := os.read(fd, 65536)):
            data += more
        return data
    except OSError:
        return None
    finally:
        os.close(fd)


def readlink(tid: int, name: str) -> bytes | None:
    """Where the link /proc/<tid>/<name> leads, or None."""
    try:
        return os.readlink(b"/proc/%d/%b" % (tid, name.encode()))
    except OSError:
        return None


class Status:
    """/proc/<tid>/status, taken apart as far as somebody asks."""

    __slots__ = ("_text",)

    def __init__(self, tid: int) -> None:
        self._text = read(tid, "status") or b""

    def __bool__(self) -> bool:
        return bool(self._text)

    def field(self, name: bytes) -> bytes:
        """The value of one line."""
        start = self._text.find(b"\n" + name + b":") + len(name) + 2
        if start == len(name) + 1:
            return b""
        return self._text[start : self._text.find(b"\n", start)]

    def numbers(self, name: bytes) -> tuple[int, ...]:
        return tuple(map(int, self.field(name).split()))

    def uids(self) -> tuple[int, ...]:
        """real, effective, saved, filesystem"""
        return self.numbers(b"Uid")

    def gids(self) -> tuple[int, ...]:
        return self.numbers(b"Gid")

    def groups(self) -> tuple[int, ...]:
        return self.numbers(b"Groups")

    def has_capability(self, capability: int) -> bool:
        """Whether it is in the effective set."""
        return bool(int(self.field(b"CapEff") or b"0", 16) >> capability & 1)

    def capabilities(self) -> Capabilities:
        last = last_capability()
        mask = (1 << (last + 1)) - 1
        names = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd")
        return Capabilities(last, *(int(self.field(name), 16) & mask for name in names))


_last_capability = -1


def last_capability() -> int:
    """The highest capability the kernel knows."""
    global _last_capability
    if _last_capability < 0:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            _last_capability = int(file.read())
    return _last_capability


def comm(tid: int) -> bytes | None:
    text = read(tid, "comm")
    return None if text is None else text.removesuffix(b"\n")


_ARGV0_MAX = 32768


def argv0(tid: int) -> bytes | None:
    """The first string of the argument area; None if there is none (a kernel thread).

    A process can let that area be all of its memory (PR_SET_MM in prctl(2)), so no more is read
    than a name may take.
    """
    text = read(tid, "cmdline", _ARGV0_MAX)
    return text.split(b"\0", 1)[0] if text else None


def cgroup(tid: int) -> bytes | None:
    """The path in the v1 hierarchy with the lowest id, on pure cgroup-v2 systems that of v2."""
    best: tuple[int, bytes] | None = None
    unified: bytes | None = None
    for line in (read(tid, "cgroup") or b"").splitlines():
        id_, _, path = line.split(b":", 2)
        if id_ == b"0":
            unified = path
        elif best is None or int(id_) < best[0]:
            best = int(id_), path
    return best[1] if best else unified


def security_label(tid: int) -> bytes | None:
    label = read(tid, "attr/current")
    return label.rstrip(b"\n\0") if label else None


def audit(tid: int) -> tuple[int, int] | None:
    """Session id and login uid."""
    session, login = read(tid, "sessionid"), read(tid, "loginuid")
    return None if session is None or login is None else (int(session), int(login))
