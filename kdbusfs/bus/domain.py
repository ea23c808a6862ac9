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
        """Called with an unexpected exception where nothing can be undone any more."""
        self._last_id = 0
        self._users: dict[int, User] = {}
        self._free_inos: list[int] = []
        self._next_ino = 3
        self._deadlines: list[tuple[int, int]] = []
        """A heap of (deadline, number), also of some waits that have ended."""
        self._watched: dict[int, Waiter | Reply] = {}
        """Those that have not, by number."""
        self._n_deadlines = 0

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
        """Have *waiter* expire at its deadline."""
        self._n_deadlines += 1
        waiter.deadline_number = self._n_deadlines
        self._watched[self._n_deadlines] = waiter
        heapq.heappush(self._deadlines, (waiter.deadline, self._n_deadlines))

    def unwatch_deadline(self, waiter: Waiter | Reply) -> None:
        """A watched wait has ended. Its deadline may be far away, so that is not waited for: a
        request would keep two connections with their pools, and the heap would grow."""
        watched = self._watched
        watched.pop(waiter.deadline_number, None)
        waiter.deadline_number = 0
        n_stale = len(self._deadlines) - len(watched)
        if n_stale > 64 and n_stale > len(self._deadlines) // 2:
            self._deadlines = [d for d in self._deadlines if d[1] in watched]
            heapq.heapify(self._deadlines)

    @property
    def watches_deadlines(self) -> bool:
        """Whether `next_deadline` is worth asking."""
        return bool(self._deadlines)

    def next_deadline(self) -> int | None:
        """When `expire` has something to do next (CLOCK_MONOTONIC ns), or None."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1] not in self._watched:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def expire(self) -> None:
        """End every request whose deadline has passed."""
        now = self.clock.monotonic_ns()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            waiter = self._watched.pop(heapq.heappop(self._deadlines)[1])
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
        watched = self._watched.values()
        assert self._watched.keys() <= {number for _, number in self._deadlines}
        assert all(waiter.deadline_number == n for n, waiter in self._watched.items())
        waiting: set[Waiter | Reply] = {
            w for c in connections for w in c.waiters if w.deadline_number
        }
        waiting |= {r for c in connections for r in (*c.requests, *c.suspended.values())}
        assert waiting == {r for r in watched if r.bus.alive}
