# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata: who sent this, told by the bus and not by the sender (kdbus.item(7)).

`ProcessMetadata` is what was found out about a process, in the terms of the domain's own
namespaces. It is gathered lazily, while the caller is held in its call, and only the kinds that
somebody wants. Each receiver gets them translated for its own user and PID namespace (`Viewer`).
A kind whose source does not exist stays None and gives no item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..abi.items import build, build_string
from ..abi.numbers import ATTACH_ALL, AttachFlag, ItemType
from ..abi.structs import AUDIT, CREDS, PIDS, U32, U64

if TYPE_CHECKING:
    from .connection import Connection
    from .peer import Peer

OVERFLOW_ID = 65534
"""What an id without a place in the reader's user namespace is shown as."""
UNSET_ID = 0xFFFFFFFF

_TIMESTAMP = int(AttachFlag.TIMESTAMP)
_CREDS = int(AttachFlag.CREDS)
_PIDS = int(AttachFlag.PIDS)
_AUXGROUPS = int(AttachFlag.AUXGROUPS)
_NAMES = int(AttachFlag.NAMES)
_CAPS = int(AttachFlag.CAPS)
_DESCRIPTION = int(AttachFlag.CONN_DESCRIPTION)
_TID_COMM = int(AttachFlag.TID_COMM)
_PID_COMM = int(AttachFlag.PID_COMM)
_EXE = int(AttachFlag.EXE)
_CMDLINE = int(AttachFlag.CMDLINE)
_CGROUP = int(AttachFlag.CGROUP)
_SECLABEL = int(AttachFlag.SECLABEL)
_AUDIT = int(AttachFlag.AUDIT)

PROCESS = ATTACH_ALL & ~(_TIMESTAMP | _NAMES | _DESCRIPTION)
"""The kinds that describe a process."""
IMPLICIT = _CREDS | _PIDS | _AUXGROUPS | _NAMES | _DESCRIPTION | _TIMESTAMP
"""The kinds that a sender can't withhold from the receivers of its messages."""


Ranges = tuple[tuple[int, int, int], ...]
"""(first id inside, first id outside, count) of each line of an id map."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class UserNamespace:
    """A user namespace as seen from the domain's, whose own has no parent (user_namespaces(7))."""

    id: int
    parent: UserNamespace | None = None
    owner: int = 0
    """Effective uid of whoever made it."""
    uids: Ranges = ()
    """Unused where there is no parent."""
    gids: Ranges = ()
    read_maps: Callable[[], tuple[Ranges, Ranges]] | None = None
    """Reads both maps, asked as long as one is empty: each is written once, at any time."""

    def _look_up(self) -> None:
        if self.read_maps is not None and not (self.uids and self.gids):
            self.uids, self.gids = self.read_maps()

    def uid(self, uid: int, unmapped: int = OVERFLOW_ID) -> int:
        """What a uid of the domain is called in here."""
        if self.parent is None:
            return uid
        self._look_up()
        return _inside(self.uids, uid, unmapped)

    def gid(self, gid: int, unmapped: int = OVERFLOW_ID) -> int:
        if self.parent is None:
            return gid
        self._look_up()
        return _inside(self.gids, gid, unmapped)

    def outer_uid(self, uid: int) -> int | None:
        """What a uid of in here is called in the domain, None if nothing."""
        if self.parent is None:
            return uid
        self._look_up()
        return _outside(self.uids, uid)

    def outer_gid(self, gid: int) -> int | None:
        if self.parent is None:
            return gid
        self._look_up()
        return _outside(self.gids, gid)

    def below(self, ancestor: UserNamespace) -> UserNamespace | None:
        """The namespace directly under *ancestor* on the way down to this one, if there is one."""
        at: UserNamespace | None = self
        while at is not None and at.parent is not None:
            if at.parent.id == ancestor.id:
                return at
            at = at.parent
        return None


def _inside(ranges: Iterable[tuple[int, int, int]], outer: int, unmapped: int) -> int:
    for inside, outside, count in ranges:
        if outside <= outer < outside + count:
            return inside + outer - outside
    return unmapped


def _outside(ranges: Iterable[tuple[int, int, int]], inner: int) -> int | None:
    for inside, outside, count in ranges:
        if inside <= inner < inside + count:
            return outside + inner - inside
    return None


@dataclass(eq=False, slots=True, weakref_slot=True)
class PidNamespace:
    """A PID namespace: the ids of the ones above it, the domain's first, and its own last."""

    chain: tuple[int, ...]
    hidepid_group: int | None = None
    """The group that sees foreign processes in /proc; None: everybody does."""
    pin: object = field(default=None, repr=False)
    """Keeps its id from being given to another namespace."""

    @property
    def level(self) -> int:
        return len(self.chain) - 1

    @property
    def id(self) -> int:
        return self.chain[-1]

    def number(self, numbers: tuple[int, ...], home: PidNamespace) -> int:
        """What a process of *home*, with *numbers* from the top on, is called in here, or 0."""
        level = len(self.chain) - 1
        if level == 0:
            return numbers[0]
        if level < len(numbers) and level < len(home.chain) and home.chain[level] == self.id:
            return numbers[level]
        return 0


class Viewer(NamedTuple):
    """Through whose eyes metadata is told: those of a receiving connection."""

    user_namespace: UserNamespace
    pid_namespace: PidNamespace
    root: object


class Capabilities(NamedTuple):
    """capabilities(7) of a thread, as bit masks; *last* is the highest one the kernel knows."""

    last: int
    inheritable: int
    permitted: int
    effective: int
    bounding: int


class ProcessMetadata:
    """What is known of a process, and which kinds have been asked for already (*gathered*)."""

    __slots__ = (
        "gathered",
        "creds",
        "pids",
        "groups",
        "tid_comm",
        "pid_comm",
        "exe",
        "cmdline",
        "cgroup",
        "caps",
        "seclabel",
        "audit",
        "user_namespace",
        "pid_namespace",
    )

    def __init__(self) -> None:
        self.gathered = 0
        self.creds: tuple[int, ...] | None = None
        """uid, euid, suid, fsuid, gid, egid, sgid, fsgid; UNSET_ID where faked and left out."""
        self.pids: tuple[tuple[int, ...], ...] | None = None
        """Numbers of process, thread and parent in each PID namespace from the domain's down."""
        self.groups: tuple[int, ...] | None = None
        self.tid_comm: bytes | None = None
        self.pid_comm: bytes | None = None
        self.exe: bytes | None = None
        self.cmdline: bytes | None = None
        self.cgroup: bytes | None = None
        self.caps: Capabilities | None = None
        self.seclabel: bytes | None = None
        self.audit: tuple[int, int] | None = None
        """Session id and login uid."""
        self.user_namespace: UserNamespace | None = None
        self.pid_namespace: PidNamespace | None = None

    def visible(self, reader: Connection) -> bool:
        """Whether the reader could find this process in its own /proc (proc(5), hidepid)."""
        pids, home = self.pids, self.pid_namespace
        namespace = reader.viewer.pid_namespace
        if pids is None:
            return False
        if namespace.level and (home is None or not namespace.number(pids[1], home)):
            return False
        group = namespace.hidepid_group
        if group is None or reader.opener.egid == group:
            return True
        own = reader.metadata.pids
        return own is not None and own[1] == pids[1]

    def items(self, kinds: int, viewer: Viewer, caller: Peer) -> list[bytes]:
        """The items of these *kinds* for the reader, in the order kdbus has them. EXE is told
        only if *caller*, who makes the bus tell, has the reader's root directory."""
        found: list[bytes] = []
        users = viewer.user_namespace
        if kinds & _CREDS and self.creds is not None:
            found.append(build(ItemType.CREDS, _creds(self.creds, users)))
        if kinds & _PIDS and self.pids is not None:
            home = self.pid_namespace or viewer.pid_namespace
            number = viewer.pid_namespace.number
            found.append(build(ItemType.PIDS, PIDS.pack(*(number(p, home) for p in self.pids))))
        if kinds & _AUXGROUPS and self.groups is not None:
            groups = b"".join(U64.pack(users.gid(g)) for g in self.groups)
            found.append(build(ItemType.AUXGROUPS, groups))
        if not kinds & ~(_CREDS | _PIDS | _AUXGROUPS):
            return found
        exe = self.exe
        if kinds & _EXE and exe is not None:
            root = caller.root()
            if root is None or root != viewer.root:
                exe = None
        for flag, type_, text in (
            (_TID_COMM, ItemType.TID_COMM, self.tid_comm),
            (_PID_COMM, ItemType.PID_COMM, self.pid_comm),
            (_EXE, ItemType.EXE, exe),
            (_CMDLINE, ItemType.CMDLINE, self.cmdline),
            (_CGROUP, ItemType.CGROUP, self.cgroup),
        ):
            if kinds & flag and text is not None:
                found.append(build_string(type_, text))
        if kinds & _CAPS and self.caps is not None:
            found.append(build(ItemType.CAPS, self._caps(self.caps, users)))
        if kinds & _SECLABEL and self.seclabel is not None:
            found.append(build_string(ItemType.SECLABEL, self.seclabel))
        if kinds & _AUDIT and self.audit is not None:
            session, login = self.audit
            login = login if login == UNSET_ID else users.uid(login, UNSET_ID)
            found.append(build(ItemType.AUDIT, AUDIT.pack(session, login)))
        return found

    def _caps(self, caps: Capabilities, users: UserNamespace) -> bytes:
        own = self.user_namespace or users
        sets = caps[1:]
        if own.id != users.id:
            below = users.below(own)
            full = (1 << (caps.last + 1)) - 1
            if below is None:
                sets = (0, 0, 0, 0)
            elif self.creds is not None and below.owner == self.creds[1]:
                # The maker of a user namespace has every capability in it (user_namespaces(7)).
                sets = (0, full, full, full)
        return U32.pack(caps.last) + b"".join(U64.pack(mask) for mask in sets)


def _creds(ids: tuple[int, ...], users: UserNamespace) -> bytes:
    if users.parent is None:
        return CREDS.pack(*ids)
    uids = (i if i == UNSET_ID else users.uid(i) for i in ids[:4])
    gids = (i if i == UNSET_ID else users.gid(i) for i in ids[4:])
    return CREDS.pack(*uids, *gids)


def join(items: list[bytes]) -> tuple[bytes, int]:
    """The *items* in one piece, and its length without the padding of the last one."""
    if not items:
        return b"", 0
    chain = b"".join(items)
    last = items[-1]
    return chain, len(chain) - (len(last) - U64.unpack_from(last)[0])
