# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stalls: accesses to a caller's memory, or pushes into a page cache, that do not end soon.

One thread runs the bus. It reads the memory of callers itself, which is fast, but a caller may
have put its data where a page fault takes as long as somebody likes: on a FUSE file system of its
own, say. So each access is an *operation* with a number (native/memory.c), and a watch that sees
the same one for too long, with its thread asleep, has another thread take over, between two
states of the bus. What becomes of the thread that stalled:

- Out of most accesses it comes, if ever, to `fail`: it waits for its turn and raises `Stalled`.
  What its request had begun is undone, the request is left to the successor, which starts it anew,
  and the thread ends.
- Where the results of a finished command are stored, there is nothing to do anew. It `leave`s:
  it answers its caller, touches the bus no more, and ends.

The next thread stands ready before anybody is overtaken. If no thread is to be had, nobody is
overtaken, and the bus waits with the one that stalls, until there are threads again.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from errno import ESTALE
from typing import NoReturn

from ..abi.errors import Fault, Stalled
from ..bus.principals import PRINCIPALS
from ..native import lib

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.001
"""How often the watch looks while there are operations; what it sees twice stalls."""
MAX_OF_CALL = 64
"""How often one request may stall before it fails with EFAULT."""
MAX_OF_USER = 32
"""How many calls of one user may stall at a time: each has a thread of ours."""
MAX_OF_ALL = 256
"""How many may stall at a time, until only those users get another thread who have none."""
_STACK_SIZE = 1 << 19
_NO_THREAD_SECONDS = 0.02

TURN = threading.Lock()
"""Held by whoever touches the bus: one daemon serves one mount."""


def fail(error: int) -> NoReturn:
    """Raise what the negative *error* of an operation stands for."""
    if error == -ESTALE:
        TURN.acquire()
        raise Stalled
    raise Fault


def leave() -> None:
    """Of a thread that stalled in its last access: never touch the bus again."""
    worker = threading.current_thread()
    assert isinstance(worker, Worker)
    worker.has_turn = False


def has_left() -> bool:
    """Whether the thread that asks has to keep off the bus, since it has stored results late."""
    worker = threading.current_thread()
    return isinstance(worker, Worker) and not worker.has_turn


class Users:
    """Whose calls stall, and how many do. Each takes a thread of ours, so nobody gets many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n: dict[int, int] = {}

    def begin(self, uid: int) -> None:
        uid = PRINCIPALS.of(uid)
        with self._lock:
            self._n[uid] = self._n.get(uid, 0) + 1

    def end(self, uid: int) -> None:
        uid = PRINCIPALS.of(uid)
        with self._lock:
            n = self._n.pop(uid) - 1
            if n:
                self._n[uid] = n

    def __bool__(self) -> bool:
        """Whether anybody's do."""
        return bool(self._n)

    def has_its_share(self, uid: int) -> bool:
        """Whether the next call of *uid* has to wait until an earlier one stalls no more."""
        n = self._n.get(PRINCIPALS.of(uid), 0)
        return n >= MAX_OF_USER or (n > 0 and sum(self._n.values()) >= MAX_OF_ALL)


class Worker(threading.Thread):
    """A thread that runs the bus when it is called, until it is overtaken."""

    def __init__(self, crew: Crew) -> None:
        super().__init__(name="kdbusfs-router", daemon=True)
        self.has_turn = False
        self.user: int | None = None
        """Who made the call in which it stalled."""
        self._crew = crew
        self._called = threading.Semaphore(0)

    def call(self) -> None:
        """Have it go on: it inherits the turn."""
        self._called.release()

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._called.acquire()
        if self._crew.current is self:
            self.has_turn = True
            self._crew.work()
        if self.user is not None:
            self._crew.users.end(self.user)
            self._crew.on_end()
        if self.has_turn:
            TURN.release()


class Crew:
    """The threads that run the bus, one after the other, and the watch over them.

    *work* is what each of them does from when it is called: it holds the turn, and has to come
    back when it `is_overtaken`. *on_stall* is called in the watch's thread, when the current one
    has been overtaken and before the next one is called, and tells whose call it is that stalls;
    *on_end* in the thread that stalled, when that is over.
    """

    def __init__(
        self,
        work: Callable[[], None],
        on_stall: Callable[[], int],
        on_end: Callable[[], None],
    ) -> None:
        self.work = work
        self._on_stall = on_stall
        self.on_end = on_end
        self.users = Users()
        self._spare: Worker | None = None
        self._closed = False
        self.current: Worker | None = None
        self._watch = threading.Thread(target=self._run, name="kdbusfs-watch", daemon=True)

    def start(self) -> None:
        threading.stack_size(_STACK_SIZE)
        TURN.acquire()
        self.current = self._new_spare()
        if self.current is None:
            raise OSError("no thread to be had")
        self.current.call()
        self._watch.start()

    def is_overtaken(self) -> bool:
        """Whether the thread that asks is no more, or never was, the one that runs the bus."""
        return threading.current_thread() is not self.current

    def close(self) -> None:
        """By the current one: it was the last. It keeps the turn, so that those who come back
        from where they stalled find the bus closed to them."""
        self._closed = True
        lib.kdbusfs_watch_end()
        worker = self.current
        assert worker is not None
        worker.has_turn = False
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.call()

    def _new_spare(self) -> Worker | None:
        worker = Worker(self)
        try:
            worker.start()
        except (RuntimeError, MemoryError):
            return None
        return worker

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._closed:
            if self._spare is None:
                self._spare = self._new_spare()
            number = lib.kdbusfs_watch(int(LOOK_SECONDS * 1e9))
            if not number:
                return
            if self._spare is None and (spare := self._new_spare()) is not None:
                self._spare = spare
            if self._spare is None:
                time.sleep(_NO_THREAD_SECONDS)
            elif lib.kdbusfs_overtake(number) == 0:
                self._take_over(self._spare)

    def _take_over(self, worker: Worker) -> None:
        stalled = self.current
        assert stalled is not None
        try:
            uid = self._on_stall()
            self.users.begin(uid)
            stalled.user = uid
        except Exception:
            log.exception("ERROR: a stall could not be handled")
        self._spare = None
        self.current = worker
        worker.call()
