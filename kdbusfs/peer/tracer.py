# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only ptrace(2) can do to a caller: install descriptors.

native/tracer.c does it; here it is decided who does when. Each caller occupies a worker for as long
as its thread takes to come out of its call, which is up to that thread, so each user has few of
them, the others of a user wait for those, and users take turns. While somebody waits for a worker
of all, a thread that is late is given up sooner.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..abi.items import Buffer
from ..bus.principals import PRINCIPALS
from ..native import ffi, lib
from .closers import CLOSERS

log = logging.getLogger(__name__)

_TIMEOUT_NS = 5_000_000_000
"""How long a thread may take to come out of its call."""


class Workers:
    """Threads that run the jobs of users: *most* at a time, *share* of one user, of whom *queue*
    more may wait. They end when they are idle."""

    _IDLE_SECONDS = 10.0

    def __init__(self, most: int, share: int, queue: int) -> None:
        self._most, self._share, self._queue = most, share, queue
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[Callable[[], None]]] = {}
        """By user; who has had its turn comes last. Nobody is in here without a job."""
        self._running: dict[int, int] = {}
        self._n_threads = 0
        self._n_idle = 0
        self._closed = False

    def submit(self, uid: int, job: Callable[[], None]) -> bool:
        """Have *job* run; False: too many jobs of *uid* wait, or no thread can be had."""
        uid = PRINCIPALS.of(uid)
        with self._changed:
            jobs = self._waiting.get(uid)
            if jobs is not None and len(jobs) >= self._queue:
                return False
            if not self._n_idle and self._n_threads < self._most and not self._start():
                return False
            if jobs is None:
                jobs = self._waiting[uid] = deque()
            jobs.append(job)
            self._tell()
            self._changed.notify()
            return True

    def _start(self) -> bool:
        """Whether there is a thread after all."""
        thread = threading.Thread(target=self._run, name="kdbusfs-tracer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return self._n_threads > 0
        self._n_threads += 1
        return True

    def close(self) -> None:
        """Run what waits, and no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._n_threads)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (found := self._next()) is not None:
            uid, job = found
            try:
                job()
            except Exception:
                log.exception("a caller could not be traced")
            # What the job refers to must not live until the next one.
            del job, found
            with self._changed:
                self._running[uid] -= 1
                if not self._running[uid]:
                    del self._running[uid]

    def _next(self) -> tuple[int, Callable[[], None]] | None:
        """The next job; None for a thread that is not needed any more."""
        with self._changed:
            self._n_idle += 1
            while (found := self._take()) is None and not self._closed:
                if not self._changed.wait(self._IDLE_SECONDS):
                    found = self._take()
                    break
            self._n_idle -= 1
            if found is None:
                self._n_threads -= 1
                self._changed.notify_all()
            self._tell()
            return found

    def _take(self) -> tuple[int, Callable[[], None]] | None:
        """The next job of the next user who has not got its share."""
        can = (uid for uid in self._waiting if self._running.get(uid, 0) < self._share)
        uid = next(can, None)
        if uid is None:
            return None
        jobs = self._waiting.pop(uid)
        job = jobs.popleft()
        if jobs:
            self._waiting[uid] = jobs
        self._running[uid] = self._running.get(uid, 0) + 1
        return uid, job

    def _tell(self) -> None:
        """Have those that are late given up if others wait for them."""
        full = self._n_threads >= self._most and not self._n_idle
        lib.kdbusfs_tracer_hurry(len(self._waiting) if full else 0)


@dataclass(slots=True)
class Installation:
    """Thread *tid* of user *uid*, whose request will be answered with *reply*, is to have *fds* in
    its table."""

    tid: int
    uid: int
    reply: bytes
    room: int
    """Address of its struct, which it lends meanwhile."""
    content: Buffer
    """What is in there when it is answered."""
    fds: Sequence[int]
    tell: Callable[[list[int]], Buffer]
    """Gets the numbers, -1 for each that is lost, while the thread is held; says what is to be in
    the room then."""
    release: Callable[[], None]
    """*fds* are not needed any more. May be called more than once."""
    answered: Callable[[], None]


class Tracer:
    """Answers requests on *device* and puts descriptors into the thread that waits for the
    answer."""

    def __init__(self, device: int) -> None:
        self._device = device
        lib.kdbusfs_tracer_hurry(0)
        self._workers = Workers(most=48, share=8, queue=1024)

    def close(self) -> None:
        """The mount is gone, and its callers with it."""
        self._workers.close()

    def install(self, job: Installation) -> bool:
        """Whether the request of *job* will be answered, now or later."""
        pidfd = _Pidfd(job.tid)

        def run() -> None:
            try:
                self._install(job, pidfd.fd)
            finally:
                pidfd.close()
                job.release()
                job.answered()

        if self._workers.submit(job.uid, run):
            return True
        pidfd.close()
        return False

    def _write(self, reply: bytes) -> None:
        try:
            os.write(self._device, reply)
        except OSError as error:
            # ENOENT: the request was aborted (the mount is being torn down).
            log.debug("reply not taken: %s", error)

    def _install(self, job: Installation, pidfd: int) -> None:
        n = len(job.fds)
        numbers = ffi.new("int32_t[]", max(n, 1))
        state = ffi.new("struct kdbusfs_install *")
        error = lib.kdbusfs_install_begin(
            state,
            self._device,
            job.reply,
            len(job.reply),
            job.tid,
            pidfd,
            job.room,
            ffi.from_buffer(job.content),
            len(job.content),
            ffi.new("int32_t[]", job.fds),
            n,
            numbers,
            _TIMEOUT_NS,
        )
        if error:
            log.debug("descriptors not installed in %d: %s", job.tid, os.strerror(-error))
            job.release()
            self._write(job.reply)
        elif state.held:
            after = ffi.NULL
            try:
                after = ffi.from_buffer(job.tell(list(numbers)[:n]))
            finally:
                if lib.kdbusfs_install_end(state, after) < 0:
                    job.tell([-1] * n)
        for stray in list(state.strays)[: state.n_strays]:
            CLOSERS.submit(job.uid, partial(os.close, stray))


class _Pidfd:
    """A pidfd of a thread that is held, -1 where there are none of threads (before Linux 6.9)."""

    __slots__ = ("fd",)

    def __init__(self, tid: int) -> None:
        self.fd: int = lib.kdbusfs_pidfd_open(tid)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
