# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy databases (kdbus.policy(7)): who may see, talk to and own which names.

A bus has one, filled by policy holders and activators; each custom endpoint has its own, filled
by ENDPOINT_UPDATE. An entry names a well-known name, or with a last element `*` all names with
exactly one more element; an exact entry hides a wildcard, even if it grants nothing. Nothing is
cached, so a change acts at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from errno import E2BIG, EEXIST, EINVAL
from typing import NamedTuple

from ..abi.errors import CommandError
from ..abi.numbers import ItemType, PolicyAccess, PolicyType
from ..abi.structs import POLICY_ACCESS
from ..abi.valid_names import is_policy_name
from .call import Argument
from .metadata import UserNamespace
from .peer import Credentials
from .shares import Share

NOTHING = -1
"""The answer of a query that no line of the database speaks to."""


class Line(NamedTuple):
    """One POLICY_ACCESS: *access* for whom *type* and *id* say."""

    type: int
    access: int
    id: int

    def speaks_of(self, who: Credentials) -> bool:
        if self.type == PolicyType.USER:
            return self.id == who.euid
        if self.type == PolicyType.GROUP:
            return who.in_group(self.id)
        return True


Entries = dict[bytes, list[Line]]
"""Name or wildcard → its lines, in order."""


def policy_size(entries: Entries) -> int:
    """How many bytes of memory *entries* take, about."""
    return sum(256 + len(name) + 128 * len(lines) for name, lines in entries.items())


class PolicyDatabase:
    """The entries of one bus or custom endpoint, each owned by whoever stored it, and taken from
    its share of *memory*."""

    __slots__ = ("_entries", "_memory", "_owned")

    def __init__(self, memory: Share) -> None:
        self._entries: dict[bytes, tuple[Hashable, list[Line]]] = {}
        self._owned: dict[Hashable, tuple[int, Entries]] = {}
        """By owner: the uid that is charged, and what for."""
        self._memory = memory

    def query(self, who: Credentials, name: bytes) -> int:
        """The highest access *who* has to *name*: a PolicyAccess, or NOTHING."""
        found = self._entries.get(name)
        if found is None:
            found = self._entries.get(name[: name.rfind(b".")] + b".*")
            if found is None:
                return NOTHING
        return max((line.access for line in found[1] if line.speaks_of(who)), default=NOTHING)

    def grants(self, who: Credentials, names: Iterable[bytes], access: PolicyAccess) -> bool:
        """Whether *who* has *access* to any of the *names*."""
        return any(self.query(who, name) >= access for name in names)

    def check_owner(self, owner: Hashable, entries: Entries) -> None:
        """EEXIST: somebody else than *owner* holds one of the names."""
        for name in entries:
            held = self._entries.get(name)
            if held is not None and held[0] is not owner:
                raise CommandError(EEXIST, f"policy for {name.decode()} is held by another")

    def replace(self, owner: Hashable, uid: int, entries: Entries) -> None:
        """Put *entries*, whose names nobody else holds, in the place of all that *owner* has. They
        have been charged to *uid*."""
        self.remove(owner)
        self._owned[owner] = uid, entries
        for name, lines in entries.items():
            self._entries[name] = (owner, lines)

    def remove(self, owner: Hashable) -> None:
        """Drop all entries of *owner*."""
        uid, entries = self._owned.pop(owner, (0, {}))
        for name in entries:
            del self._entries[name]
        self._memory.discharge(uid, policy_size(entries))

    def clear(self) -> None:
        """Drop all entries."""
        for owner in list(self._owned):
            self.remove(owner)

    def names(self) -> list[bytes]:
        return list(self._entries)


def parse_entries(
    argument: Argument,
    users: UserNamespace,
    limit: int | None = None,
    wildcards: bool = True,
) -> Entries:
    """Read NAME and POLICY_ACCESS items, ids being those of the caller's user namespace *users*.

    E2BIG: more than *limit* names. EINVAL: an invalid name, a wildcard where none is allowed, a
    POLICY_ACCESS in front of any name or with a number out of range, an id that does not map.
    EEXIST: a name given twice.
    """
    entries: Entries = {}
    lines: list[Line] | None = None
    n_names = 0
    for item in argument.items:
        payload = argument.payload(item)
        if item.type == ItemType.NAME:
            n_names += 1
            if limit is not None and n_names > limit:
                raise CommandError(E2BIG, f"more than {limit} policy name")
            name = payload[:-1]
            if not is_policy_name(name):
                raise CommandError(EINVAL, "invalid policy name")
            if not wildcards and name.endswith(b".*"):
                raise CommandError(EINVAL, "wildcard not allowed here")
            if name in entries:
                raise CommandError(EEXIST, f"{name.decode()} given twice")
            lines = entries[name] = []
        elif item.type == ItemType.POLICY_ACCESS:
            if lines is None:
                raise CommandError(EINVAL, "POLICY_ACCESS in front of any name")
            lines.append(_parse_line(payload, users))
    return entries


def _parse_line(payload: bytes, users: UserNamespace) -> Line:
    type_, access, id_ = POLICY_ACCESS.unpack(payload)
    if access > PolicyAccess.OWN:
        raise CommandError(EINVAL, f"policy access {access}")
    if type_ == PolicyType.WORLD:
        return Line(type_, access, 0)
    if type_ not in (PolicyType.USER, PolicyType.GROUP):
        raise CommandError(EINVAL, f"policy type {type_}")
    # The original narrows the id to 32 bits before it maps it; -1 is no id.
    id_ &= 0xFFFFFFFF
    outer = users.outer_uid(id_) if type_ == PolicyType.USER else users.outer_gid(id_)
    if outer is None or id_ == 0xFFFFFFFF:
        raise CommandError(EINVAL, f"id {id_} is not mapped")
    return Line(type_, access, outer)
