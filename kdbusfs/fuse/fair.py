# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose request is next when more wait than can be served at once.

Requests wait by user, in order. Next is the first one of the user who has had the least of the
time (start-time fair queueing): one whose requests cost much, or stall, comes after those whose
requests cost little, and how many threads a user has makes no difference to the others. A user
who comes new starts level with whoever is served at that moment, so nobody saves up time, and
when nobody waits all is forgotten.

It takes as much memory as there are requests. Each has a thread of its caller that waits for it,
so what bounds threads (RLIMIT_NPROC, pids.max) bounds them.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests that wait, each of a user."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[T]] = {}
        """By user; nobody without a request is in it."""
        self._order: list[tuple[int, int, int]] = []
        """A heap of (time used, arrival, user), one for each user who waits."""
        self._used: dict[int, int] = {}
        """The time each user has used, of those that are ahead of `_now`."""
        self._now = 0
        self._n_arrivals = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def push(self, uid: int, request: T) -> None:
        waiting = self._waiting.get(uid)
        if waiting is not None:
            waiting.append(request)
            return
        self._waiting[uid] = deque((request,))
        self._enter(uid)

    def _enter(self, uid: int) -> None:
        self._n_arrivals += 1
        used = max(self._used.get(uid, 0), self._now)
        heapq.heappush(self._order, (used, self._n_arrivals, uid))

    def pop(self) -> tuple[int, T]:
        """Whose turn it is, and that user's first request."""
        while True:
            used, _, uid = heapq.heappop(self._order)
            if self._used.get(uid, 0) <= used:
                break
            # It was charged since it has been given this place.
            self._enter(uid)
        self._now = used
        waiting = self._waiting[uid]
        request = waiting.popleft()
        if waiting:
            self._enter(uid)
        else:
            del self._waiting[uid]
            if not self._waiting:
                self._now = 0
                self._used.clear()
        return uid, request

    def charge(self, uid: int, time: int) -> None:
        """Say how long it took to serve a request of *uid*, in any unit that is always the same.
        Means nothing when nobody waits."""
        if self._waiting:
            self._used[uid] = max(self._used.get(uid, 0), self._now) + time
            if len(self._used) > 2 * len(self._waiting) + 64:
                self._used = {u: t for u, t in self._used.items() if t > self._now}
