# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools that are closed, and still mapped by their clients.

Their memory is there for as long as the client likes, and goes on to be somebody's: whoever had
the connection. The kernel tells by inotify(7) when a memfd is gone, without being kept by that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from struct import Struct

from ..native import lib

_EVENT = Struct("=iIII")
"""struct inotify_event: watch, mask, cookie, length of the name."""
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_BUFFER_SIZE = 65536

Action = Callable[[], None]


class Leftovers:
    """Knows which of the memfds that it was shown still exist."""

    def __init__(self) -> None:
        self._inotify = int(lib.kdbusfs_inotify_init())
        self._actions: dict[int, Action | None] = {}
        """What is to be done when a file is gone, by watch."""

    def watch(self, fd: int) -> int:
        """A number for the file behind *fd*, -1 if it can't be watched."""
        number = int(lib.kdbusfs_inotify_add(self._inotify, fd))
        if number < 0:
            return -1
        self._actions[number] = None
        return number

    def when_gone(self, number: int, action: Action) -> None:
        """Have *action* done by `collect` when the file is gone; right now if it is, or if that
        can't be known."""
        if number in self._actions:
            self._actions[number] = action
        else:
            action()

    def collect(self) -> None:
        """Do what is to be done for files that have gone."""
        try:
            events = os.read(self._inotify, _BUFFER_SIZE)
        except OSError:
            return
        for number, mask, _, _ in _EVENT.iter_unpack(events):
            if mask & _IN_Q_OVERFLOW:
                self._forget()
            elif mask & _IN_IGNORED:
                action = self._actions.pop(number, None)
                if action is not None:
                    action()

    def _forget(self) -> None:
        """The kernel could not tell of all: let nobody be charged for ever."""
        closed = [number for number, action in self._actions.items() if action is not None]
        for number in closed:
            action = self._actions.pop(number)
            assert action is not None
            action()

    def close(self) -> None:
        if self._inotify >= 0:
            os.close(self._inotify)
