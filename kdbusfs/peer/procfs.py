# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading /proc/<tid> (proc(5)) of a thread that is held in its call.

Every reader returns None, or leaves something out, where the kernel has nothing to show or shows
what nobody expects: what stands there is partly up to the caller. Only where the daemon itself is
short of descriptors or memory does a reader fail, with ENFILE or ENOMEM: what is missing then must
not be taken for something that is not there.
"""

from __future__ import annotations

import os
from errno import EPERM

from ..abi.errors import CommandError
from ..bus.metadata import Capabilities
from ..native import ffi, lib
from .fd_table import check_exhausted

CAP_IPC_OWNER = 15
_ROOM = 1 << 13
"""What all but a few files fit into."""
_LARGEST_TID = 0x7FFFFFFF
_LARGEST = 1 << 22
"""More of a file is not read: far more than 65,536 groups take."""
_LAST_CAPABILITY = "/proc/sys/kernel/cap_last_cap"


def read(tid: int, name: str, limit: int = 0) -> bytes | None:
    """The whole of /proc/<tid>/<name>, or its first *limit* bytes; None if it can't be read."""
    if tid > _LARGEST_TID:
        # A number that a caller made up.
        return None
    room = limit or _ROOM
    buffer = ffi.new("char[]", room)
    n: int = lib.kdbusfs_proc_read(tid, name.encode(), buffer, room)
    if n < 0:
        check_exhausted(-n)
        return None
    if n < room or limit:
        return bytes(ffi.buffer(buffer, n))
    return _read_long(tid, name)


def _read_long(tid: int, name: str) -> bytes | None:
    try:
        fd = os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        check_exhausted(error.errno)
        return None
    try:
        data = os.read(fd, 65536)
        # A file that fills the buffer is rare (AUXGROUPS of 64k groups).
        while len(data) % 65536 == 0 and len(data) < _LARGEST and (more := os.read(fd, 65536)):
            data += more
        return data
    except OSError as error:
        check_exhausted(error.errno)
        return None
    finally:
        os.close(fd)


def readlink(tid: int, name: str) -> bytes | None:
    """Where the link /proc/<tid>/<name> leads, or None."""
    buffer = ffi.new("char[]", _ROOM)
    n: int = lib.kdbusfs_proc_link(tid, name.encode(), buffer, _ROOM)
    if n < 0:
        check_exhausted(-n)
        return None
    return bytes(ffi.buffer(buffer, n))


def root(tid: int) -> bytes | None:
    """What tells the root directory of a thread from others, or None."""
    buffer = ffi.new("char[]", _ROOM)
    n: int = lib.kdbusfs_proc_root(tid, buffer, _ROOM)
    if n < 0:
        check_exhausted(-n)
        return None
    return bytes(ffi.buffer(buffer, n))


def numbers(text: bytes) -> tuple[int, ...]:
    """The numbers that *text* consists of, none if it is anything else: each fits into 32 bits."""
    words = text.split()
    if not all(word.isdigit() and len(word) <= 10 for word in words):
        return ()
    found = tuple(map(int, words))
    return found if all(n <= 0xFFFFFFFF for n in found) else ()


def _hexadecimal(text: bytes) -> int | None:
    try:
        return int(text, 16) if len(text) < 32 else None
    except ValueError:
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
        """The numbers in one line; none if it is missing, or holds anything else."""
        return numbers(self.field(name))

    def _ids(self, name: bytes) -> tuple[int, ...]:
        ids = self.numbers(name)
        if len(ids) != 4:
            raise CommandError(EPERM, f"no {name.decode()} in /proc")
        return ids

    def uids(self) -> tuple[int, ...]:
        """real, effective, saved, filesystem; EPERM if that can't be found out"""
        return self._ids(b"Uid")

    def gids(self) -> tuple[int, ...]:
        return self._ids(b"Gid")

    def process(self) -> int:
        """The process that the thread is of; EPERM if that can't be found out."""
        found = self.numbers(b"Tgid")
        if len(found) != 1:
            raise CommandError(EPERM, "no Tgid in /proc")
        return found[0]

    def groups(self) -> tuple[int, ...]:
        return self.numbers(b"Groups")

    def has_capability(self, capability: int) -> bool:
        """Whether it is in the effective set."""
        return bool((_hexadecimal(self.field(b"CapEff")) or 0) >> capability & 1)

    def capabilities(self) -> Capabilities | None:
        """All sets, None if one can't be found out."""
        last = last_capability()
        names = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd")
        sets = [_hexadecimal(self.field(name)) for name in names]
        known = [one for one in sets if one is not None]
        if last is None or len(known) < len(names):
            return None
        mask = (1 << (last + 1)) - 1
        return Capabilities(last, *(one & mask for one in known))


_last_capability: int | None = None


def last_capability() -> int | None:
    """The highest capability the kernel knows, None if it does not say."""
    global _last_capability
    if _last_capability is None:
        try:
            with open(_LAST_CAPABILITY, "rb") as file:
                found = numbers(file.read(64))
        except OSError as error:
            check_exhausted(error.errno)
            return None
        if len(found) == 1 and found[0] < 64:
            _last_capability = found[0]
    return _last_capability


def comm(tid: int) -> bytes | None:
    text = read(tid, "comm")
    return None if text is None else text.removesuffix(b"\n")


_START_TIME = 19
"""Field 22 of /proc/<tid>/stat, counted from behind the name."""
_SIGKILL = 1 << 8


def start_time(tid: int) -> int | None:
    """When a thread started, in clock ticks since the boot; None if that can't be found out."""
    try:
        fields = (read(tid, "stat") or b"").rpartition(b")")[2].split()
        return int(fields[_START_TIME])
    except (CommandError, IndexError, ValueError):
        return None


def is_killed(tid: int) -> bool:
    """Whether SIGKILL is pending for a thread, so that it ends as soon as it is let go."""
    try:
        return bool(int(Status(tid).field(b"SigPnd"), 16) & _SIGKILL)
    except (CommandError, ValueError):
        return False


def cgroup(tid: int) -> bytes | None:
    """The path in the v1 hierarchy with the lowest id, on pure cgroup-v2 systems that of v2."""
    best: tuple[int, bytes] | None = None
    unified: bytes | None = None
    for line in (read(tid, "cgroup") or b"").splitlines():
        id_, _, rest = line.partition(b":")
        _, colon, path = rest.partition(b":")
        number = numbers(id_)
        if not colon or len(number) != 1:
            continue
        if number[0] == 0:
            unified = path
        elif best is None or number[0] < best[0]:
            best = number[0], path
    return best[1] if best else unified


def security_label(tid: int) -> bytes | None:
    label = read(tid, "attr/current")
    return label.split(b"\0", 1)[0].rstrip(b"\n") if label else None


def audit(tid: int) -> tuple[int, int] | None:
    """Session id and login uid."""
    session = numbers(read(tid, "sessionid") or b"")
    login = numbers(read(tid, "loginuid") or b"")
    return (session[0], login[0]) if len(session) == len(login) == 1 else None
