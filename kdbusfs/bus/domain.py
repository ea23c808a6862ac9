# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain (kdbus(7)): one mount, an isolated set of buses, users and ids."""

from __future__ import annotations

import heapq
import stat
import weakref
from collections import Counter
from collections.abc import Callable
from errno import EMFILE
from typing import TYPE_CHECKING, Protocol

from ..abi.errors import CommandError
from ..abi.numbers import Limit
from .bus import Bus
from .metadata import UserNamespace
from .node import Node
from .quota import User
from .shares import Budget
from .work import Work

if TYPE_CHECKING:
    from .call import Waiter
    from .connection import Connection
    from .node import Subject
    from .peer import Credentials
    from .reply import Reply


class Clock(Protocol):
    """The time, in nanoseconds (clock_gettime(2))."""

    def monotonic_ns(self) -> int: ...
    def realtime_ns(self) -> int: ...


def _raise(error: BaseException) -> None:
    raise error


class Domain:
    """Ids, users, nodes and deadlines of one mount.

    *user_namespace* is that of the mounter: names of nodes tell ids as they are in it. *budget* is
    what its users may have.
    """

    def __init__(
        self, clock: Clock, user_namespace: UserNamespace, budget: Budget | None = None
    ) -> None:
        self.clock = clock
        self.budget = budget or Budget()
        self.user_namespace = user_namespace
        self.root = Node(1, "", stat.S_IFDIR | 0o555, self)
        self.root.link(Node(2, "control", stat.S_IFREG | 0o666, self))
        self.kernel_user = User()
        """Whom notifications are charged to."""
        self.work = Work()
        """What takes long: to be done in pieces, as long as there is some."""
        self.report: Callable[[BaseException], None] = _raise
        """Told of an exception that nobody expected where nothing can be undone any more."""
        self._last_id = 0
        self._users: dict[int, User] = {}
        self._free_inos: list[int] = []
        self._next_ino = 3
        self._deadlines: list[tuple[int, int, list[Waiter | Reply]]] = []
        self._n_deadlines = 0
        self._n_stale = 0
        """How many entries of the heap are of requests that have ended."""

    def next_id(self) -> int:
        """An id for a bus or connection; never the same twice."""
        self._last_id += 1
        return self._last_id

    def user(self, uid: int) -> User:
        """The user of a real uid."""
        user = self._users.get(uid)
        if user is None:
            user = self._users[uid] = User(uid)
        return user

    def connect(self, user: User) -> None:
        """Count a connection of *user*; EMFILE at 1024."""
        if user.n_connections >= Limit.USER_CONNECTIONS:
            raise CommandError(EMFILE, f"{user.n_connections} connections of this user")
        user.n_connections += 1

    def new_node(self, name: str, mode: int, subject: Subject, who: Credentials) -> Node:
        """A node owned by *who*, not linked yet, with the lowest free inode number. That is free
        again when nobody refers to the node any more."""
        if self._free_inos:
            ino = heapq.heappop(self._free_inos)
        else:
            ino = self._next_ino
            self._next_ino += 1
        node = Node(ino, name, mode, subject, who.euid, who.egid)
        weakref.finalize(node, heapq.heappush, self._free_inos, ino).atexit = False
        return node

    # --- long work

    def step(self) -> None:
        """Do one piece of `work`, of about a millisecond at most."""
        self.work.proceed()

    # --- deadlines of requests

    def watch_deadline(self, waiter: Waiter | Reply) -> None:
        """Have *waiter*, which is in its `watch`, expire at its deadline."""
        self._n_deadlines += 1
        heapq.heappush(self._deadlines, (waiter.deadline, self._n_deadlines, waiter.watch))

    def unwatch_deadline(self, waiter: Waiter | Reply) -> None:
        """A watched request has ended: let go of it, and the heap not grow with what is over.

        Its deadline may be far away, and through it two connections with their pools would stay.
        """
        waiter.watch.clear()
        self._n_stale += 1
        if self._n_stale > 64 and self._n_stale > len(self._deadlines) // 2:
            self._deadlines = [d for d in self._deadlines if d[2]]
            heapq.heapify(self._deadlines)
            self._n_stale = 0

    @property
    def watches_deadlines(self) -> bool:
        """Whether `next_deadline` is worth asking."""
        return bool(self._deadlines)

    def next_deadline(self) -> int | None:
        """When `expire` has something to do next (CLOCK_MONOTONIC ns), or None."""
        deadlines = self._deadlines
        while deadlines and not deadlines[0][2]:
            heapq.heappop(deadlines)
            self._n_stale -= 1
        return deadlines[0][0] if deadlines else None

    def expire(self) -> None:
        """End every request whose deadline has passed."""
        now = self.clock.monotonic_ns()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            (waiter,) = heapq.heappop(self._deadlines)[2]
            # It will be counted as stale when it ends, in a moment.
            self._n_stale -= 1
            try:
                waiter.expire()
            except Exception as error:
                self.report(error)

    def check(self) -> None:
        """Assert what must hold between any two calls, on every bus."""
        self.budget.check()
        connections: list[Connection] = []
        makers: Counter[User] = Counter()
        for node in self.root.children.values():
            if isinstance(node.subject, Bus):
                connections += node.subject.check()
                makers[node.subject.creator] += 1
        members = Counter(c.user for c in connections)
        for user in {*self._users.values(), *members}:
            assert user.n_connections >= members[user]
            assert user.n_buses == makers[user]
        assert len({c.id for c in connections}) == len(connections)
        watched = [reply for _, _, watch in self._deadlines for reply in watch]
        assert self._n_stale == len(self._deadlines) - len(watched)
        waiting: set[Waiter | Reply] = {w for c in connections for w in c.waiters if w.watch}
        waiting |= {r for c in connections for r in (*c.requests, *c.suspended.values())}
        assert waiting == {r for r in watched if r.bus.alive}
