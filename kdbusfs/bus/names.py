# SPDX-License-Identifier: LGPL-2.1-or-later
"""The name registry of a bus (kdbus.name(7)): who owns which well-known name, who waits for it.

An entry exists while it has an activator or somebody in its queue. The *primary* is the head of
the queue; the *owner* is the primary, or else the activator. What an operation did to a name's
ownership is returned as a `NameChange`: the registry does not know who must be told.
"""

from __future__ import annotations

from errno import E2BIG, EADDRINUSE, EEXIST, ESRCH
from typing import TYPE_CHECKING, NamedTuple

from ..abi.errors import CommandError
from ..abi.numbers import ItemType, Limit, NameFlag
from .migration import Migration

if TYPE_CHECKING:
    from .connection import Connection
    from .shares import Share

_REPLACE_EXISTING = int(NameFlag.REPLACE_EXISTING)
_ALLOW_REPLACEMENT = int(NameFlag.ALLOW_REPLACEMENT)
_QUEUE = int(NameFlag.QUEUE)
_IN_QUEUE = int(NameFlag.IN_QUEUE)
_ACTIVATOR = int(NameFlag.ACTIVATOR)
_PRIMARY = int(NameFlag.PRIMARY)
_ACQUIRED = int(NameFlag.ACQUIRED)


class NameClaim:
    """A connection's claim to a name: as owner, in the queue, or as activator; *flags* are NameFlag
    bits."""

    __slots__ = ("connection", "entry", "flags")

    def __init__(self, connection: Connection, entry: NameEntry, flags: int) -> None:
        self.connection = connection
        self.entry = entry
        self.flags = flags


class NameEntry:
    """A name that exists. Its identity is what messages addressed to it remember: a name that
    went away and came back is another entry."""

    __slots__ = ("name", "activator", "queue")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.activator: NameClaim | None = None
        self.queue: list[NameClaim] = []

    @property
    def owner(self) -> NameClaim | None:
        return self.queue[0] if self.queue else self.activator


class NameChange(NamedTuple):
    """A name got an owner, lost it, or passed on; ids are 0 where there is none."""

    type: ItemType
    name: bytes
    old_id: int
    old_flags: int
    new_id: int
    new_flags: int


class Acquired(NamedTuple):
    """What NAME_ACQUIRE comes to. *return_flags* are to be stored even with an *error*."""

    return_flags: int
    change: NameChange | None
    error: int = 0


class NamesView:
    """The names of *connection* at one moment. They are looked up when somebody asks, unless they
    are about to change: then they are copied, once for all who have this view."""

    __slots__ = ("connection", "_kept")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._kept: list[tuple[bytes, int]] | None = None

    @staticmethod
    def of(connection: Connection) -> NamesView:
        """The view of *connection* as it is now."""
        view = connection.view
        if view is None:
            view = connection.view = NamesView(connection)
        return view

    def names(self) -> list[tuple[bytes, int]]:
        """Names and flags of its claims, in order of acquisition."""
        if self._kept is not None:
            return self._kept
        return [(name, claim.flags) for name, claim in self.connection.names.items()]

    def keep(self) -> None:
        """The names are about to change."""
        self._kept = self.names()


def _keep(claim: NameClaim) -> None:
    """The claim is about to come, go or change its flags."""
    connection = claim.connection
    if connection.view is not None:
        connection.view.keep()
        connection.view = None


def claim_size(name: bytes) -> int:
    """How many bytes of memory a connection's claim to *name* takes, about."""
    return 512 + len(name)


def _may_take(queue: list[NameClaim], flags: int) -> bool:
    """Whether a newcomer becomes the primary at once."""
    return not queue or bool(flags & _REPLACE_EXISTING and queue[0].flags & _ALLOW_REPLACEMENT)


class NameRegistry:
    """All names of a bus. Each claim takes from its connection's share of *memory*."""

    __slots__ = ("_memory", "entries")

    def __init__(self, memory: Share) -> None:
        self.entries: dict[bytes, NameEntry] = {}
        self._memory = memory

    def _strike(self, connection: Connection, name: bytes) -> None:
        """Take the claim to *name* off *connection*'s list."""
        del connection.names[name]
        self._memory.discharge(connection.opener.uid, claim_size(name))

    def drop(self, connection: Connection, name: bytes) -> None:
        """The bus has ended, and all names with it: forget one, without any heir."""
        claim = connection.names[name]
        self._strike(connection, name)
        self.entries.pop(name, None)
        claim.entry.activator = None
        claim.entry.queue.clear()

    def owner_of(self, name: bytes) -> Connection | None:
        """The connection that owns *name*, activators included."""
        entry = self.entries.get(name)
        if entry is None or entry.owner is None:
            return None
        return entry.owner.connection

    def check_activator(self, name: bytes) -> None:
        """EEXIST: *name* has an activator."""
        entry = self.entries.get(name)
        if entry is not None and entry.activator is not None:
            raise CommandError(EEXIST, f"{name.decode()} has an activator")

    def activate(self, connection: Connection, name: bytes) -> NameChange | None:
        """Make *connection* the activator of *name*, which has none (`check_activator`). The claim
        has been charged."""
        entry = self.entries.get(name)
        if entry is None:
            entry = self.entries[name] = NameEntry(name)
        claim = entry.activator = NameClaim(connection, entry, _ACTIVATOR)
        _keep(claim)
        connection.names[name] = claim
        if entry.queue:
            claim.flags |= _IN_QUEUE
            return None
        claim.flags |= _PRIMARY
        return NameChange(ItemType.NAME_ADD, name, 0, 0, connection.id, claim.flags)

    def acquire(self, connection: Connection, name: bytes, flags: int) -> Acquired:
        """NAME_ACQUIRE: own *name*, or queue for it. E2BIG, ENOMEM: too many names already."""
        entry = self.entries.get(name) or NameEntry(name)
        me = connection.names.get(name)
        newcomer = me is None
        if me is None:
            if len(connection.names) >= Limit.CONNECTION_NAMES:
                raise CommandError(E2BIG, f"{len(connection.names)} names already")
            me = NameClaim(connection, entry, 0)
        queue, activator, migration = entry.queue, entry.activator, None
        if not queue and activator is not None:
            migration = Migration(entry, activator.connection, connection)
        if newcomer and (flags & _QUEUE or _may_take(queue, flags)):
            try:
                self._memory.charge(connection.opener.uid, claim_size(name))
            except CommandError:
                if migration is not None:
                    migration.undo()
                raise
        # Nothing below can fail but for a name that is taken, which changes nothing.
        _keep(me)
        me.flags = flags & (_ALLOW_REPLACEMENT | _QUEUE)
        change: NameChange | None = None
        acquired = False

        if not queue:
            acquired = True
            change = self._take_free(me, migration)
        elif queue[0] is me:
            me.flags |= _PRIMARY
        elif _may_take(queue, flags):
            acquired = True
            change = self._replace_owner(me)
        elif flags & _QUEUE:
            if newcomer:
                queue.append(me)
                acquired = True
            me.flags |= _IN_QUEUE
        elif not newcomer:
            queue.remove(me)
            self._strike(connection, name)
            return Acquired(me.flags, None)
        else:
            return Acquired(me.flags, None, EEXIST)

        if newcomer:
            self.entries[name] = entry
            connection.names[name] = me
        return Acquired(me.flags | (_ACQUIRED if acquired else 0), change)

    def _take_free(self, me: NameClaim, migration: Migration | None) -> NameChange:
        """Nobody has the name but maybe an activator, whose messages *migration* moves."""
        entry, new_id = me.entry, me.connection.id
        entry.queue.append(me)
        me.flags |= _PRIMARY
        activator = entry.activator
        if activator is None or migration is None:
            return NameChange(ItemType.NAME_ADD, entry.name, 0, 0, new_id, me.flags)
        old_id, old_flags = activator.connection.id, activator.flags
        migration.commit()
        _keep(activator)
        activator.flags = activator.flags & ~_PRIMARY | _IN_QUEUE
        return NameChange(ItemType.NAME_CHANGE, entry.name, old_id, old_flags, new_id, me.flags)

    def _replace_owner(self, me: NameClaim) -> NameChange:
        """The owner waits in the queue from now on, if it said so, or loses the name."""
        name, queue = me.entry.name, me.entry.queue
        head = queue[0]
        _keep(head)
        if me in queue:
            queue.remove(me)
        queue.insert(0, me)
        me.flags |= _PRIMARY
        old_id, new_id = head.connection.id, me.connection.id
        change = NameChange(ItemType.NAME_CHANGE, name, old_id, head.flags, new_id, me.flags)
        if head.flags & _QUEUE:
            head.flags = head.flags & ~_PRIMARY | _IN_QUEUE
        else:
            queue.remove(head)
            self._strike(head.connection, name)
        return change

    def release(self, connection: Connection, name: bytes) -> NameChange | None:
        """NAME_RELEASE, or disconnect. ESRCH: no such name; EADDRINUSE: it is somebody else's."""
        entry = self.entries.get(name)
        if entry is None:
            raise CommandError(ESRCH, "no such name")
        me = connection.names.get(name)
        if me is None:
            raise CommandError(EADDRINUSE, "the name is not yours")
        was_owner = entry.owner is me
        migration = None
        if was_owner and len(entry.queue) == 1 and entry.activator is not None:
            migration = Migration(entry, connection, entry.activator.connection)
        # Nothing below can fail.
        _keep(me)
        self._strike(connection, name)
        if entry.activator is me:
            entry.activator = None
        else:
            entry.queue.remove(me)
        if entry.owner is None:
            del self.entries[name]
        if not was_owner:
            return None
        heir = entry.owner
        if heir is None:
            return NameChange(ItemType.NAME_REMOVE, name, connection.id, me.flags, 0, 0)
        if migration is not None:
            migration.commit()
        _keep(heir)
        heir.flags = heir.flags & ~_IN_QUEUE | _PRIMARY
        return NameChange(
            ItemType.NAME_CHANGE,
            name,
            connection.id,
            me.flags,
            heir.connection.id,
            heir.flags,
        )

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for name, entry in self.entries.items():
            assert entry.name == name and entry.owner is not None
            claims = entry.queue + ([entry.activator] if entry.activator else [])
            for claim in claims:
                assert claim.entry is entry and claim.connection.names[name] is claim
                assert claim.connection.alive
                assert bool(claim.flags & _PRIMARY) == (claim is entry.owner), name
                assert bool(claim.flags & _IN_QUEUE) == (claim is not entry.owner), name
                assert bool(claim.flags & _ACTIVATOR) == (claim is entry.activator), name
