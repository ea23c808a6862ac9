# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fair shares: what each user may keep queued at each receiver, and what a user may make.

A *user* is whom messages are charged to: one for each real uid and domain, one for each custom
endpoint, one for the bus itself. For each (receiver, user) an `Account` counts what is queued.
A user may fill at most a third of what the others left of half the pool, so that a first user
who floods a receiver still leaves room for a second, and that one for a third. Room in the pool
that received but unfreed slices take is no business of the quota (kdbus.pool(7)).

What the daemon itself has only so much of is divided elsewhere (`shares`).
"""

from __future__ import annotations

from errno import EMFILE, ENOBUFS
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.numbers import Limit

if TYPE_CHECKING:
    from .pool import Arena

_MESSAGES = int(Limit.USER_MESSAGES)
_FDS = int(Limit.USER_FDS)


class User:
    """Somebody whom messages, connections and buses are charged to."""

    __slots__ = ("uid", "n_connections", "n_buses")

    def __init__(self, uid: int | None = None) -> None:
        self.uid = uid
        """Real uid, or None for a custom endpoint's or the kernel's own user."""
        self.n_connections = 0
        self.n_buses = 0


class Account:
    """What one user has queued at one receiver."""

    __slots__ = ("size", "messages", "fds")

    def __init__(self) -> None:
        self.size = 0
        self.messages = 0
        self.fds = 0


class Quota:
    """The accounts of one receiver with a pool of *pool_size* bytes. Several whose pools lie in one
    *arena* have a part of their halves each, so that together they take no more than one would."""

    __slots__ = ("_arena", "_half", "queued", "accounts")

    def __init__(self, pool_size: int, arena: Arena | None = None) -> None:
        self._half = pool_size // 2
        self._arena = arena
        self.queued = 0
        """Bytes queued by all users together."""
        self.accounts: dict[User, Account] = {}

    @property
    def half(self) -> int:
        """How many bytes may be queued by all users together."""
        arena = self._arena
        return self._half if arena is None or arena.n_pools < 2 else self._half // arena.n_pools

    def charge(self, user: User, size: int, fds: int) -> None:
        """Charge *user* a message of *size* bytes with *fds* descriptors.

        ENOBUFS: its share of the pool, or of the queue, is used up; EMFILE: too many descriptors
        are queued. Nothing is charged then.
        """
        account = self.accounts.get(user)
        if account is None:
            account = Account()
        half = self.half
        if half < self.queued:
            raise CommandError(ENOBUFS, "half of the pool is queued")
        share = (half - self.queued + account.size) // 3
        if size > share - account.size:
            raise CommandError(ENOBUFS, f"{account.size} of {share} bytes queued, {size} more")
        if account.messages >= _MESSAGES:
            raise CommandError(ENOBUFS, f"{account.messages} messages queued")
        if account.fds + fds > _FDS:
            raise CommandError(EMFILE, f"{account.fds} descriptors queued, {fds} more")
        account.size += size
        account.messages += 1
        account.fds += fds
        self.queued += size
        self.accounts[user] = account

    def discharge(self, user: User, size: int, fds: int) -> None:
        """Give back what `charge` took."""
        account = self.accounts[user]
        account.size -= size
        account.messages -= 1
        account.fds -= fds
        self.queued -= size
        if not account.messages:
            del self.accounts[user]
