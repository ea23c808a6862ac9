# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exceptions where the bus calls the world around it, and the state of a bus as one value.

`Faults.install` puts a point in front of every method of the protocols in `kdbusfs.bus.peer` and
`kdbusfs.bus.domain`, as the fakes have them, and of what the shell hands in. A point that is hit
counts, and the one it is set to raises.
"""

import enum
import errno
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bus import fakes
from kdbusfs.abi.errors import CommandError, Stalled
from kdbusfs.bus import peer
from kdbusfs.bus.domain import Clock
from kdbusfs.bus.metadata import PidNamespace, ProcessMetadata, UserNamespace
from kdbusfs.bus.peer import Credentials
from kdbusfs.bus.quota import User

NEVER = {"hold", "release"}
"""These can't fail."""
MAY_STALL = {"publish", "new_memory"}
"""Beside all that is asked of a caller, these may take long."""
AFTERWARDS = {"close", "unwatch", "wake"}
"""What ends something has ended it also if it raises."""
_ERRNOS = (errno.EMFILE, errno.ENAMETOOLONG, errno.ESRCH, errno.EACCES, errno.EPERM)

KINDS: dict[str, Callable[[int], BaseException]] = {
    "stalled": lambda n: Stalled(),
    "os error": lambda n: OSError(_ERRNOS[n % len(_ERRNOS)], "injected"),
    "another error": lambda n: (MemoryError, ValueError)[n % 2]("injected"),
    "command error": lambda n: CommandError(_ERRNOS[n % len(_ERRNOS)], "injected"),
}


def _methods(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_") and name not in NEVER]


class Faults:
    """Where to raise next, and what has been raised."""

    def __init__(self) -> None:
        self.kind = ""
        self.at = -1
        self.n_hit = 0
        self.raised: BaseException | None = None
        self.where = ""

    @contextmanager
    def armed(self, kind: str, at: int) -> Iterator[None]:
        """The point that is hit as number *at* raises."""
        self.kind, self.at, self.n_hit, self.raised, self.where = kind, at, 0, None, ""
        try:
            yield
        finally:
            self.at = -1

    def hit(self, name: str, *, may_stall: bool = False) -> None:
        if self.at < 0 or (self.kind == "stalled" and not may_stall):
            return
        self.n_hit += 1
        if self.n_hit == self.at + 1:
            self.raised, self.where = KINDS[self.kind](self.at), name
            raise self.raised

    def wrap(self, name: str, function: Callable[..., Any], *, may_stall: bool) -> Any:
        def point(*args: Any, **options: Any) -> Any:
            if name in AFTERWARDS:
                result = function(*args, **options)
                self.hit(name, may_stall=may_stall)
                return result
            self.hit(name, may_stall=may_stall)
            result = function(*args, **options)
            if name == "watch" and result is not None:
                return self.wrap("unwatch", result, may_stall=False)
            return result

        return point

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for protocol, fake in (
            (peer.Peer, fakes.FakePeer),
            (peer.Memory, fakes.FakeMemory),
            (peer.Descriptor, fakes.FakeFile),
            (Clock, fakes.FakeClock),
        ):
            for name in _methods(protocol):
                may_stall = fake is fakes.FakePeer or name in MAY_STALL
                patch.setattr(fake, name, self.wrap(name, getattr(fake, name), may_stall=may_stall))


# --- the state of a bus

_PLAIN = (int, float, str, bytes, bool, type(None), enum.Enum)
_APART = (
    fakes.FakePeer,
    fakes.FakeClock,
    Credentials,
    ProcessMetadata,
    UserNamespace,
    PidNamespace,
)
"""What the bus does not change."""
_BURNT = {
    *("_seqnum", "_last_id", "_n_deadlines", "_next_ino"),
    *("report", "new_memory", "waker", "view"),
}
"""Numbers that a failing call uses up, and what is not state."""
_KINDS: dict[type, int] = {}
"""0: a value, 1: known by its type alone, 2: to be looked into."""
_FIELDS: dict[type, list[str]] = {}


def _fields(cls: type) -> list[str]:
    """The attributes that objects of *cls* have, compiled or not."""
    if cls not in _FIELDS:
        kinds = ("member_descriptor", "getset_descriptor")
        _FIELDS[cls] = [
            name
            for base in cls.__mro__
            for name, value in vars(base).items()
            if type(value).__name__ in kinds and name not in _BURNT and name[:2] != "__"
        ]
    return _FIELDS[cls]


def _parts(thing: Any) -> list[tuple[Any, Any]]:
    """What *thing* is made of."""
    if isinstance(thing, fakes.FakeMemory):
        return [("visible", bytes(thing.visible)), ("flags", (thing.sealed, thing.closed))]
    if isinstance(thing, fakes.FakeFile):
        return [("holders", thing.holders), ("watchers", len(thing.watchers))]
    if isinstance(thing, bytearray | memoryview):
        return [("bytes", bytes(thing))]
    if isinstance(thing, dict):
        pairs = [p for p in thing.items() if not isinstance(p[1], User) or _counts(p[1])]
        if pairs and all(type(key) is int for key, _ in pairs):
            pairs.sort()
        return pairs
    if isinstance(thing, set | frozenset):
        return [("set", sorted(thing, key=repr))]
    if isinstance(thing, list | tuple | deque):
        return list(enumerate(thing))
    if callable(thing):
        return [("callable", getattr(thing, "__qualname__", ""))]
    found = [(name, getattr(thing, name, None)) for name in _fields(type(thing))]
    found += [(n, v) for n, v in getattr(thing, "__dict__", {}).items() if n not in _BURNT]
    return found


def _counts(user: User) -> bool:
    """Whether anything is known of a user but its number."""
    return bool(user.n_connections or user.n_buses)


def snapshot(*roots: Any) -> list[Any]:
    """All that can be reached from *roots*, as a value that can be compared. Objects are told by
    the order in which they are found."""
    seen: dict[int, int] = {}
    waiting: deque[Any] = deque()
    keep: list[Any] = []

    def name(thing: Any) -> Any:
        cls = type(thing)
        kind = _KINDS.get(cls)
        if kind is None:
            kind = 0 if isinstance(thing, _PLAIN) else 1 if isinstance(thing, _APART) else 2
            _KINDS[cls] = kind
        if kind == 0:
            return thing
        if kind == 1:
            return cls.__name__
        number = seen.get(id(thing))
        if number is None:
            number = seen[id(thing)] = len(seen)
            keep.append(thing)
            waiting.append(thing)
        return "object", number

    state: list[Any] = [name(root) for root in roots]
    while waiting:
        thing = waiting.popleft()
        parts = [(name(key), name(value)) for key, value in _parts(thing)]
        state.append((type(thing).__name__, parts))
    return state
