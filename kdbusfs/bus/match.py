# SPDX-License-Identifier: LGPL-2.1-or-later
"""Matches (kdbus.match(7)): which broadcasts and signals a connection takes.

A match is a set of rules under a cookie; a message passes it if all rules are true, and is taken
if any match of the connection passes. Rules for messages (BLOOM_MASK, ID, DST_ID, NAME) are false
for notifications and the other way round, so a match serves one world, or, without rules, both.

A bus asks its `MatchIndex` who might want a message, instead of asking every match of every
connection. Each match is filed once, under its most selective rule; candidates are then judged
in full. What has no rule but a bloom mask is filed under the least used of the mask's bits: only
the bits set in a message's filter have to be looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..abi.numbers import ID_ANY, ItemType

if TYPE_CHECKING:
    from .connection import Connection

_BLOOM_MASK = int(ItemType.BLOOM_MASK)
_ID = int(ItemType.ID)
_DST_ID = int(ItemType.DST_ID)
_NAME = int(ItemType.NAME)
_ID_CHANGES = (int(ItemType.ID_ADD), int(ItemType.ID_REMOVE))
_NAME_CHANGES = (int(ItemType.NAME_ADD), int(ItemType.NAME_REMOVE), int(ItemType.NAME_CHANGE))


class Signal:
    """What rules look at in a message of a connection."""

    __slots__ = ("src_id", "dst_id", "names", "bloom", "generation")

    def __init__(
        self, src_id: int, dst_id: int, names: Iterable[bytes], bloom: int, generation: int
    ) -> None:
        self.src_id = src_id
        self.dst_id = dst_id
        self.names = frozenset(names)
        """Names the sender owns."""
        self.bloom = bloom
        """The filter as one integer, byte 0 lowest."""
        self.generation = generation


class Change:
    """What rules look at in a notification: ID_* or NAME_* *type*."""

    __slots__ = ("type", "id", "old_id", "new_id", "name")

    def __init__(
        self, type_: int, id_: int = 0, old_id: int = 0, new_id: int = 0, name: bytes = b""
    ) -> None:
        self.type = type_
        self.id = id_
        self.old_id = old_id
        self.new_id = new_id
        self.name = name


class Rule:
    """One item of MATCH_ADD. Which fields count depends on *type*."""

    __slots__ = ("type", "id", "old_id", "name", "masks")

    def __init__(
        self,
        type_: int,
        id_: int = 0,
        old_id: int = 0,
        name: bytes | None = None,
        masks: tuple[int, ...] = (),
    ) -> None:
        self.type = type_
        self.id = id_
        """The id of ID, DST_ID, ID_ADD, ID_REMOVE; the new id of NAME_*."""
        self.old_id = old_id
        self.name = name
        """The name of NAME, or of NAME_* (None: any)."""
        self.masks = masks
        """BLOOM_MASK: one integer per generation, byte 0 lowest."""

    def passes_signal(self, signal: Signal) -> bool:
        type_ = self.type
        if type_ == _BLOOM_MASK:
            mask = self.masks[min(signal.generation, len(self.masks) - 1)]
            return signal.bloom & mask == mask
        if type_ == _ID:
            return self.id in (signal.src_id, ID_ANY)
        if type_ == _NAME:
            return self.name in signal.names
        return type_ == _DST_ID and self.id in (signal.dst_id, ID_ANY)

    def passes_change(self, change: Change) -> bool:
        if self.type != change.type:
            return False
        if self.type in _ID_CHANGES:
            return self.id in (change.id, ID_ANY)
        return (
            self.old_id in (change.old_id, ID_ANY)
            and self.id in (change.new_id, ID_ANY)
            and (self.name is None or self.name == change.name)
        )


class Match:
    """The *rules* that *connection* filed under *cookie*."""

    __slots__ = ("connection", "cookie", "rules", "keys")

    def __init__(self, connection: Connection, cookie: int, rules: list[Rule]) -> None:
        self.connection = connection
        self.cookie = cookie
        self.rules = rules
        self.keys: tuple[Hashable, ...] = ()
        """Where the index filed it."""

    def passes_signal(self, signal: Signal) -> bool:
        return all(rule.passes_signal(signal) for rule in self.rules)

    def passes_change(self, change: Change) -> bool:
        return all(rule.passes_change(change) for rule in self.rules)


_ALL: Hashable = "all"
_ANY_BLOOM: Hashable = "bloom"


class MatchIndex:
    """All matches of a bus, found by what they ask for."""

    __slots__ = ("_filed", "_use")

    def __init__(self) -> None:
        self._filed: dict[Hashable, dict[Match, None]] = {}
        self._use: Counter[int] = Counter()
        """How many matches are filed under each bloom bit."""

    def add(self, match: Match) -> None:
        match.keys = tuple(self._keys(match))
        for key in match.keys:
            self._filed.setdefault(key, {})[match] = None

    def remove(self, match: Match) -> None:
        for key in match.keys:
            filed = self._filed[key]
            del filed[match]
            if not filed:
                del self._filed[key]
            if isinstance(key, int):
                self._use[key] -= 1

    def _keys(self, match: Match) -> Iterator[Hashable]:
        if not match.rules:
            yield _ALL
            return
        best: Hashable = None
        bloom: Rule | None = None
        for rule in match.rules:
            if rule.type in _ID_CHANGES:
                best = (rule.type, rule.id)
                break
            if rule.type in _NAME_CHANGES:
                best = (rule.type, rule.name)
                break
            if rule.type == _ID and rule.id != ID_ANY:
                best = (_ID, rule.id)
            elif rule.type == _NAME and best is None:
                best = (_NAME, rule.name)
            elif rule.type == _BLOOM_MASK:
                bloom = rule
        if best is not None:
            yield best
            return
        # One bit per generation; a generation without any bit passes every filter.
        bits = {self._rarest(mask) for mask in bloom.masks} if bloom else {None}
        if None in bits:
            yield _ANY_BLOOM
            return
        for bit in bits:
            assert bit is not None
            self._use[bit] += 1
            yield bit

    def _rarest(self, mask: int) -> int | None:
        return min(_bits(mask), key=self._use.__getitem__, default=None)

    def _candidates(self, keys: Iterable[Hashable]) -> Iterator[Match]:
        for key in keys:
            filed = self._filed.get(key)
            if filed:
                yield from filed

    def takers_of_signal(self, signal: Signal) -> list[Connection]:
        """The connections with a match that *signal* passes, each once."""
        takers: dict[Connection, None] = {}
        keys: list[Hashable] = [_ALL, (_ID, signal.src_id), _ANY_BLOOM]
        keys += [(_NAME, name) for name in signal.names]
        keys += _bits(signal.bloom)
        for match in self._candidates(keys):
            if match.connection not in takers and match.passes_signal(signal):
                takers[match.connection] = None
        return list(takers)

    def takers_of_change(self, change: Change) -> list[Connection]:
        """The connections with a match that the notification passes, each once."""
        takers: dict[Connection, None] = {}
        keys: list[Hashable] = [_ALL]
        if change.type in _ID_CHANGES:
            keys += [(change.type, change.id), (change.type, ID_ANY)]
        else:
            keys += [(change.type, change.name), (change.type, None)]
        for match in self._candidates(keys):
            if match.connection not in takers and match.passes_change(change):
                takers[match.connection] = None
        return list(takers)

    def check(self, matches: Iterable[Match]) -> None:
        """Assert that exactly these *matches* are filed, each where it says."""
        filed = {(key, match) for key, found in self._filed.items() for match in found}
        assert filed == {(key, match) for match in matches for key in match.keys}
        use = Counter(key for key, _ in filed if isinstance(key, int))
        assert use == +self._use


def _bits(mask: int) -> Iterator[int]:
    """The numbers of the bits set in *mask*."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
