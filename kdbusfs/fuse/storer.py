# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way into a cache pool: FUSE_NOTIFY_STORE, from a thread that may wait."""

from __future__ import annotations

import logging
import os
import signal
import threading

from ..abi.items import Buffer
from . import wire

log = logging.getLogger(__name__)


class Storer:
    """A thread that pushes data into page caches (FUSE_NOTIFY_STORE)."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work = threading.Semaphore(0)
        self._job: tuple[int, int, Buffer] | None = None
        self._thread: threading.Thread | None = None

    def submit(self, nodeid: int, offset: int, data: Buffer) -> int:
        """Start one push; the descriptor that is returned gets readable when it is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kdbusfs-storer", daemon=True)
            self._thread.start()
        self._job = nodeid, offset, data
        self._work.release()
        return self._done

    def is_done(self) -> bool:
        try:
            return os.eventfd_read(self._done) > 0
        except BlockingIOError:
            return False

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            self._work.acquire()
            if self._job is None:
                return
            job, self._job = self._job, None
            self.store(*job)
            os.eventfd_write(self._done, 1)

    def store(self, nodeid: int, offset: int, data: Buffer) -> None:
        """Push right here."""
        size = wire.NOTIFY_STORE.size + len(data)
        header = wire.NOTIFY_STORE.pack(
            size, wire.NOTIFY_CODE_STORE, 0, nodeid, offset, len(data), 0
        )
        try:
            os.writev(self._device, [header, data])
        except OSError as error:
            # ENOENT: the inode is gone, nobody maps it any more.
            log.debug("slice not pushed: %s", error)

    def close(self) -> None:
        self._job = None
        self._work.release()
        if self._thread is not None:
            self._thread.join()
        os.close(self._done)
