# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing files that others handed over, where that may take time.

close(2) may wait: for a socket that lingers, for the server of a FUSE file, for all that lies in
an AF_UNIX socket's queue. So threads do it. Whoever caused it is answered when it is done, so
that a file is closed when the call returns, but for no longer than `LIMIT`.

Mostly it takes no time, and a thread that runs Python would take far more than the close. So a
file is first given to a thread in C (native/closing.c), for which the thread that runs the bus
waits `QUICK_NS`, and no longer. If a file of some user is not closed by then, it waits for no other
one of that user before a second has passed and that file is closed.

A user has up to `PER_USER` of the threads, and one while more than `CROWDED` are busy. Somebody
whose files turned out to be slow is not waited for by others for a while: they have to close
their own copies anyway, and should not pay twice. Nor does it wait for itself while none of its
threads is free.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from functools import partial

from ..bus.principals import PRINCIPALS
from ..native import lib

QUICK_NS = 200_000
"""How long the thread that runs the bus waits for a close, to save a far longer way."""
_NOT_QUICK_SECONDS = 1.0
"""How long it waits for none of a user's again, after one that took longer."""
LIMIT = 0.25
"""Seconds after which a call is answered though a file of it is still being closed."""
MAX_THREADS = 256
CROWDED = 128
PER_USER = 4
_SLOW_SECONDS = 0.02
_DISTRUST_SECONDS = 10.0
_IDLE_SECONDS = 5.0

Action = Callable[[], None]


class Closing:
    """What has to be done before one call, of user *uid*, is answered."""

    __slots__ = ("_callback", "_closers", "_left", "uid")

    def __init__(self, closers: Closers, uid: int) -> None:
        self.uid = uid
        self._closers = closers
        self._left: list[int] = []
        """Users whose files are still being closed, one entry for each file."""
        self._callback: Action | None = None

    def add(self, uid: int) -> None:
        self._left.append(uid)

    def done(self, uid: int) -> None:
        """One of them is closed."""
        with self._closers.lock:
            self._left.remove(uid)
            if self._left:
                return
            callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def when_done(self, callback: Action) -> None:
        """Have *callback* called, in whatever thread, when all is closed or `LIMIT` is over."""
        with self._closers.lock:
            if self._left and self._closers.limit(self):
                self._callback = callback
                return
        callback()

    def wait(self) -> None:
        """Wait until all is closed or `LIMIT` is over; not for the thread that runs the bus."""
        event = threading.Event()
        self.when_done(event.set)
        event.wait()

    def give_up(self) -> None:
        """`LIMIT` is over."""
        with self._closers.lock:
            callback, self._callback = self._callback, None
            for uid in self._left:
                self._closers.distrust(uid)
        if callback is not None:
            callback()


class Closers:
    """The threads, and what waits for them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)
        self._jobs: dict[int, deque[tuple[Action, Closing | None]]] = {}
        """What waits, by user."""
        self._turns: OrderedDict[int, None] = OrderedDict()
        """Users with something that waits, who may have one more thread."""
        self._busy: dict[int, int] = {}
        """Threads that are at work, by user."""
        self._n_threads = 0
        self._n_idle = 0
        self._distrusted: dict[int, float] = {}
        self._limits: deque[tuple[float, Closing]] = deque()
        self._limits_changed = threading.Condition(self.lock)
        self._has_limiter = False
        self._not_quick: dict[int, float] = {}
        """Until when nobody waits for a user's files, of those of which one was not quick."""
        self._in_lanes: set[int] = set()
        """Users of whom a thread in C has not closed a file yet."""
        self._local = threading.local()

    # --- whom a file is closed for

    def collect(self, uid: int) -> None:
        """From here on what this thread has closed belongs to a call of user *uid*."""
        local = self._local
        local.uid = uid
        local.closing = None

    def collected(self) -> Closing | None:
        """What belongs to the call and may not be closed yet. The next is another call's."""
        local = self._local
        closing: Closing | None = getattr(local, "closing", None)
        local.uid = local.closing = None
        return closing

    def _closing_for(self, uid: int) -> Closing | None:
        """Whoever waits for a file of user *uid* that this thread has closed now."""
        local = self._local
        caller: int | None = getattr(local, "uid", None)
        if caller is None:
            return None
        caller = PRINCIPALS.of(caller)
        if self._is_distrusted(uid) and (caller != uid or self._busy.get(uid, 0) >= self._share()):
            # It would be in vain where all of the user's threads are stuck.
            return None
        closing: Closing | None = local.closing
        if closing is None:
            closing = local.closing = Closing(self, caller)
        closing.add(uid)
        return closing

    # --- the work

    def n_waiting(self, uid: int) -> int:
        """How much of a user's waits to be done."""
        jobs = self._jobs.get(PRINCIPALS.of(uid))
        return len(jobs) if jobs is not None else 0

    def close(self, uid: int, fd: int, closed: Action) -> None:
        """Close *fd*, a file of user *uid*, and call *closed* then: right now, if it is quick, else
        in a thread."""
        uid = PRINCIPALS.of(uid)
        lane = lib.kdbusfs_close_quickly(fd, QUICK_NS) if self._may_be_quick(uid) else -EAGAIN
        if lane == 0:
            closed()
        elif lane > 0:
            with self.lock:
                now = time.monotonic()
                self._not_quick = {u: until for u, until in self._not_quick.items() if until > now}
                self._not_quick[uid] = now + _NOT_QUICK_SECONDS
                self._in_lanes.add(uid)
            self.submit(uid, partial(self._join, lane, uid, closed))
        else:
            self.submit(uid, partial(_close, fd, closed))

    def _may_be_quick(self, uid: int) -> bool:
        if not self._not_quick and not self._distrusted:
            return True
        if uid in self._in_lanes or self._is_distrusted(uid):
            return False
        return self._not_quick.get(uid, 0.0) <= time.monotonic()

    def _join(self, lane: int, uid: int, closed: Action) -> None:
        lib.kdbusfs_close_join(lane)
        with self.lock:
            self._in_lanes.discard(uid)
        closed()

    def submit(self, uid: int, action: Action, is_waited_for: bool = True) -> None:
        """Have *action*, which concerns a file of user *uid*, done in a thread; whether the call
        that brings it about is to be answered after that."""
        uid = PRINCIPALS.of(uid)
        with self.lock:
            job = action, self._closing_for(uid) if is_waited_for else None
            jobs = self._jobs.get(uid)
            if jobs is None:
                jobs = self._jobs[uid] = deque()
            jobs.append(job)
            self._give_turn(uid)
            if len(self._turns) > self._n_idle:
                self.start_thread()
            self._work.notify()

    def _give_turn(self, uid: int) -> None:
        if self._busy.get(uid, 0) < self._share():
            self._turns[uid] = None

    def _share(self) -> int:
        return PER_USER if self._n_threads - self._n_idle < CROWDED else 1

    def start_thread(self) -> None:
        """One thread more, if it can be had: else what there is goes on, and the next `submit`
        tries again."""
        with self.lock:
            if self._n_threads >= MAX_THREADS:
                return
            thread = threading.Thread(target=self._run, name="kdbusfs-close", daemon=True)
            self._n_threads += 1
            self._n_idle += 1
            try:
                thread.start()
            except RuntimeError:
                self._n_threads -= 1
                self._n_idle -= 1

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (job := self._next()) is not None:
            uid, action, closing = job
            start = time.monotonic()
            # What a close reports (a full disk) is the sender's, not ours.
            with suppress(OSError):
                action()
            with self.lock:
                if time.monotonic() - start > _SLOW_SECONDS:
                    self.distrust(uid)
                self._finish(uid)
            if closing is not None:
                closing.done(uid)

    def _next(self) -> tuple[int, Action, Closing | None] | None:
        """The next job, whose user's turn it is; None for a thread that is not needed."""
        with self.lock:
            while True:
                while self._turns:
                    uid, _ = self._turns.popitem(last=False)
                    jobs = self._jobs.get(uid)
                    # The share may have become smaller since; `_finish` gives another turn.
                    if jobs and self._busy.get(uid, 0) < self._share():
                        self._n_idle -= 1
                        self._busy[uid] = self._busy.get(uid, 0) + 1
                        action, closing = jobs.popleft()
                        if jobs:
                            self._give_turn(uid)
                        else:
                            del self._jobs[uid]
                        if len(self._turns) > self._n_idle:
                            self.start_thread()
                        return uid, action, closing
                # One stays: there may be no thread to be had when it is needed.
                if not self._work.wait(_IDLE_SECONDS) and not self._turns and self._n_threads > 1:
                    self._n_threads -= 1
                    self._n_idle -= 1
                    return None

    def _finish(self, uid: int) -> None:
        self._n_idle += 1
        n_busy = self._busy.pop(uid) - 1
        if n_busy:
            self._busy[uid] = n_busy
        if uid in self._jobs:
            self._give_turn(uid)

    # --- patience

    def distrust(self, uid: int) -> None:
        """A file of user *uid* was slow to close."""
        now = time.monotonic()
        self._distrusted = {u: until for u, until in self._distrusted.items() if until > now}
        self._distrusted[uid] = now + _DISTRUST_SECONDS

    def _is_distrusted(self, uid: int) -> bool:
        return self._distrusted.get(uid, 0.0) > time.monotonic()

    def limit(self, closing: Closing) -> bool:
        """Let *closing* give up after `LIMIT`; False if nobody is there to see to that."""
        with self.lock:
            if not self._has_limiter:
                limiter = threading.Thread(target=self._limit, name="kdbusfs-limit", daemon=True)
                try:
                    limiter.start()
                except RuntimeError:
                    return False
                self._has_limiter = True
            # All have the same time, so the first one to come is the first one to be over.
            self._limits.append((time.monotonic() + LIMIT, closing))
            if len(self._limits) == 1:
                self._limits_changed.notify()
            return True

    def _limit(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self.lock:
                while not self._limits:
                    self._limits_changed.wait()
                end, closing = self._limits[0]
                left = end - time.monotonic()
                if left > 0:
                    # Nothing comes before the first one: there is nothing to be woken for.
                    self._limits_changed.wait(left)
                    continue
                self._limits.popleft()
            closing.give_up()


def _close(fd: int, closed: Action) -> None:
    try:
        os.close(fd)
    finally:
        closed()


CLOSERS = Closers()
