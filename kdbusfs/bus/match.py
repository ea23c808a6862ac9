# SPDX-License-Identifier: LGPL-2.1-or-later
"""Matches (kdbus.match(7)): which broadcasts and signals a connection takes.

A match is a set of rules under a cookie; a message passes it if all rules are true, and is taken
if any match of the connection passes. Rules for messages (BLOOM_MASK, ID, DST_ID, NAME) are false
for notifications and the other way round, so a match serves one world, or, without rules, both.

All must be true, so the rules of a match are joined when it is made, into one condition: at most
one id of each kind, one set of names, one bloom mask for each generation. What a message then
costs does not depend on how many rules there were, nor does what is kept.

A bus asks its `MatchIndex` who might want a message, instead of asking every match of every
connection. Each match is filed once, under its most selective condition; candidates are then
looked at in full. What has nothing but a bloom mask is filed under the least used of the mask's
bits: only those bits of a message's filter count under which something is filed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ..abi.numbers import ID_ANY, ItemType

if TYPE_CHECKING:
    from .connection import Connection

_BLOOM_MASK = int(ItemType.BLOOM_MASK)
_ID = int(ItemType.ID)
_DST_ID = int(ItemType.DST_ID)
_NAME = int(ItemType.NAME)
_ID_CHANGES = (int(ItemType.ID_ADD), int(ItemType.ID_REMOVE))
_NAME_CHANGES = (int(ItemType.NAME_ADD), int(ItemType.NAME_REMOVE), int(ItemType.NAME_CHANGE))

_SIGNALS = 1
_CHANGES = 2
_OVERHEAD = 1024
"""Bytes that a match takes beside its masks and names: its objects, and its places in the index."""
_BITS_COMPARED = 64
"""Of a mask with more bits, the least used of so many is good enough to file it under."""
_PLACES = 8
"""A match whose generations would have to be filed under more bits is filed under none."""


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


class Rule(NamedTuple):
    """One item of MATCH_ADD. Which fields count depends on *type*."""

    type: int
    id: int = 0
    """The id of ID, DST_ID, ID_ADD, ID_REMOVE; the new id of NAME_*."""
    old_id: int = 0
    name: bytes | None = None
    """The name of NAME, or of NAME_* (None: any)."""
    masks: tuple[int, ...] = ()
    """BLOOM_MASK: one integer per generation, byte 0 lowest."""


class Match:
    """What *connection* wants under *cookie*: all of its *rules*, joined."""

    __slots__ = (
        "connection",
        "cookie",
        "keys",
        "worlds",
        "src_id",
        "dst_id",
        "names",
        "masks",
        "change_type",
        "old_id",
        "new_id",
        "changed_name",
    )

    def __init__(self, connection: Connection, cookie: int, rules: Iterable[Rule]) -> None:
        self.connection = connection
        self.cookie = cookie
        self.keys: tuple[Hashable, ...] = ()
        """Where the index filed it."""
        self.worlds = _SIGNALS | _CHANGES
        """What may pass it at all; 0 if its rules contradict each other."""
        self.src_id = self.dst_id = self.old_id = self.new_id = ID_ANY
        self.names: frozenset[bytes] = frozenset()
        """Names that the sender has to own."""
        self.masks: tuple[int, ...] = ()
        self.change_type = 0
        self.changed_name: bytes | None = None
        names, blooms = [], []
        for rule in rules:
            if rule.type == _BLOOM_MASK:
                blooms.append(rule.masks)
            elif rule.type == _NAME:
                assert rule.name is not None
                names.append(rule.name)
            elif rule.type == _ID:
                self.src_id = self._joined(self.src_id, rule.id)
            elif rule.type == _DST_ID:
                self.dst_id = self._joined(self.dst_id, rule.id)
            else:
                self._add_change(rule)
                continue
            self.worlds &= _SIGNALS
        self.names = frozenset(names)
        self.masks = _joined_masks(blooms)

    def _joined(self, known: int, wanted: int) -> int:
        """One id for two of which each must be the message's, or be ID_ANY."""
        if known == ID_ANY:
            return wanted
        if wanted not in (known, ID_ANY):
            self.worlds = 0
        return known

    def _add_change(self, rule: Rule) -> None:
        self.worlds &= _CHANGES
        if self.change_type not in (0, rule.type):
            self.worlds = 0
        self.change_type = rule.type
        self.new_id = self._joined(self.new_id, rule.id)
        if rule.type in _NAME_CHANGES:
            self.old_id = self._joined(self.old_id, rule.old_id)
            if rule.name is not None:
                if self.changed_name not in (None, rule.name):
                    self.worlds = 0
                self.changed_name = rule.name

    @property
    def size(self) -> int:
        """How many bytes of memory it takes, about."""
        size = _OVERHEAD + sum(len(name) + 64 for name in self.names)
        return size + sum(mask.bit_length() // 8 + 40 for mask in self.masks)

    def passes_signal(self, signal: Signal) -> bool:
        if not self.worlds & _SIGNALS or self.src_id not in (ID_ANY, signal.src_id):
            return False
        if self.dst_id not in (ID_ANY, signal.dst_id) or not self.names <= signal.names:
            return False
        masks = self.masks
        if not masks:
            return True
        mask = masks[min(signal.generation, len(masks) - 1)]
        return signal.bloom & mask == mask

    def passes_change(self, change: Change) -> bool:
        if not self.worlds & _CHANGES:
            return False
        if not self.change_type:
            return True
        if self.change_type != change.type:
            return False
        if change.type in _ID_CHANGES:
            return self.new_id in (change.id, ID_ANY)
        return (
            self.old_id in (change.old_id, ID_ANY)
            and self.new_id in (change.new_id, ID_ANY)
            and self.changed_name in (None, change.name)
        )


def _joined_masks(blooms: list[tuple[int, ...]]) -> tuple[int, ...]:
    """One mask for each generation: bits of any rule are wanted. The last mask of a rule serves
    all later generations, too."""
    if not blooms:
        return ()
    n_generations = max(map(len, blooms))
    own = [0] * n_generations
    lasting = [0] * n_generations
    for masks in blooms:
        for generation, mask in enumerate(masks[:-1]):
            own[generation] |= mask
        lasting[len(masks) - 1] |= masks[-1]
    joined, so_far = [], 0
    for generation in range(n_generations):
        so_far |= lasting[generation]
        joined.append(own[generation] | so_far)
    return tuple(joined)


_ALL: Hashable = "all"
_ANY_BLOOM: Hashable = "bloom"


class MatchIndex:
    """All matches of a bus, found by what they ask for."""

    __slots__ = ("_bits", "_filed", "_use")

    def __init__(self) -> None:
        self._filed: dict[Hashable, dict[Match, None]] = {}
        self._use: Counter[int] = Counter()
        """How many matches are filed under each bloom bit."""
        self._bits = 0
        """The bits under which any is, as a mask."""

    def add(self, match: Match) -> None:
        match.keys = tuple(self._keys(match))
        for key in match.keys:
            self._filed.setdefault(key, {})[match] = None
            if isinstance(key, int):
                self._use[key] += 1
                self._bits |= 1 << key

    def remove(self, match: Match) -> None:
        for key in match.keys:
            filed = self._filed[key]
            del filed[match]
            if not filed:
                del self._filed[key]
            if isinstance(key, int):
                self._use[key] -= 1
                if not filed:
                    del self._use[key]
                    self._bits ^= 1 << key

    def _keys(self, match: Match) -> Iterable[Hashable]:
        """Where to file *match*: one place, or one bit for each generation of a bloom mask.

        Each is something that whatever passes the match has as well, so who looks under all that a
        signal or change has, misses none; whether it does pass is then asked of the match itself.
        The more special, the fewer ask in vain: so the sender goes before its name, and of a
        bloom mask the bit under which the fewest are filed stands for all.
        """
        if not match.worlds:
            return ()
        if match.change_type in _ID_CHANGES:
            return ((match.change_type, match.new_id),)
        if match.change_type:
            return ((match.change_type, match.changed_name),)
        if match.src_id != ID_ANY:
            return ((_ID, match.src_id),)
        if match.names:
            return ((_NAME, min(match.names)),)
        if match.worlds & _CHANGES:
            return (_ALL,)
        # A generation without any bit passes every filter.
        bits = {self._rarest(mask) for mask in match.masks} if match.masks else {None}
        return (_ANY_BLOOM,) if None in bits or len(bits) > _PLACES else bits

    def _rarest(self, mask: int) -> int | None:
        return min(islice(_bits(mask), _BITS_COMPARED), key=self._use.__getitem__, default=None)

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
        keys += _bits(signal.bloom & self._bits)
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
        assert use == self._use
        assert self._bits == sum(1 << bit for bit in use)


def _bits(mask: int) -> Iterator[int]:
    """The numbers of the bits set in *mask*, in time that grows with its length, not its square."""
    data = mask.to_bytes((mask.bit_length() + 63) // 64 * 8, "little")
    for at in range(0, len(data), 8):
        word = int.from_bytes(data[at : at + 8], "little")
        while word:
            low = word & -word
            yield 8 * at + low.bit_length() - 1
            word ^= low
