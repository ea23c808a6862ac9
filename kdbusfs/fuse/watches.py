# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the router waits for beside the device."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable

log = logging.getLogger(__name__)


class Watches:
    """Descriptors that calls wait for, beside the device (an epoll of its own)."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wakes = False
        """Whether there are threads that may have to wake the router."""
        self.fd = -1
        """What gets readable with any of them, -1 if there are none."""

    def _update(self) -> None:
        self.fd = self._epoll.fileno() if self._callbacks or self._wakes else -1

    def keep_waking(self) -> None:
        """From now on `wake` is used."""
        if not self._wakes:
            self._wakes = True
            self._epoll.register(self._wakeup, select.EPOLLIN)
            self._update()

    def wake(self) -> None:
        """Let the router look around."""
        os.eventfd_write(self._wakeup, 1)

    def watch(self, fd: int, callback: Callable[[], None]) -> Callable[[], None] | None:
        """A `peer.descriptors.Watcher`. The same file may be watched under many numbers."""
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except OSError:
            return None
        self._callbacks[fd] = callback
        self._update()

        def unwatch() -> None:
            if self._callbacks.get(fd) is callback:
                del self._callbacks[fd]
                self._epoll.unregister(fd)
                self._update()

        return unwatch

    def dispatch(self) -> None:
        """Call back for everything that is readable."""
        ready = [(fd, self._callbacks.get(fd)) for fd, _ in self._epoll.poll(0)]
        for fd, callback in ready:
            if fd == self._wakeup:
                os.eventfd_read(fd)
            elif callback is not None and self._callbacks.get(fd) is callback:
                # Else what went before has ended the watch, and the number may be another's.
                try:
                    callback()
                except Exception:
                    log.exception("ERROR: the callback of a watched descriptor failed")

    def close(self) -> None:
        os.close(self._wakeup)
        self._epoll.close()
