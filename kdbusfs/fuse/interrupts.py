# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals for callers of commands: INTERRUPT ends a wait, and SIGKILL a stall."""

from __future__ import annotations

import logging
from collections.abc import Callable
from errno import EINTR

from ..abi.errors import CommandError, Fault
from ..abi.items import Buffer
from .ioctl import Ioctl, Ioctls
from .wire import Ids, interrupted

log = logging.getLogger(__name__)


class Interrupts:
    """The signals that are pending for callers of *ioctls*; *refuse* answers one with an errno."""

    def __init__(self, ioctls: Ioctls, refuse: Callable[[Ioctl, int], None]) -> None:
        self._ioctls = ioctls
        self._refuse = refuse
        self.pending: set[int] = set()
        """Requests that stall or have to wait, and whose callers have a signal pending."""

    def take(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        """INTERRUPT: a signal is pending for the caller of one of our calls. FUSE says so once
        only."""
        of = interrupted(request)
        ioctl = self._ioctls.get(of)
        if ioctl is None:
            return
        if ioctl.completed:
            # It may have to wait on.
            ioctl.interrupted = True
        elif ioctl.waits:
            ioctl.interrupt()
        else:
            ioctl.interrupted = True
            self.pending.add(of)
            self.look_for_killed()

    def expect(self, unique: int) -> None:
        """The same for a request that is handed to us next: it may stall."""
        self.pending.add(unique)

    def look_for_killed(self) -> None:
        """Let those go at once who stall, or have to wait, and are killed: else they could not
        end. Whether the signal of an interruption, or one that came after it, is SIGKILL, is
        nothing that FUSE tells."""
        for unique in list(self.pending):
            ioctl = self._ioctls.get(unique)
            if ioctl is None or ioctl.waits:
                self.pending.discard(unique)
                continue
            try:
                if ioctl.process.is_killed():
                    self._refuse(ioctl, EINTR)
            except Fault:
                # The kernel has released it already.
                self._ioctls.settle(ioctl)
            except (CommandError, OSError) as error:
                # This time it can't be known, for want of a descriptor for instance.
                log.debug("request %d not looked at: %s", unique, error)
