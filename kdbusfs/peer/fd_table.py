# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has how many of the daemon's open files.

A file on its way, the memory of a pool before HELLO, a namespace that somebody is in: each takes
a number in the table of one process, for everybody. Users have shares of it (`bus.shares.Share`),
but for `RESERVE` numbers: with them the daemon reads /proc, opens pidfds and talks to a thread that
receives descriptors.
"""

from __future__ import annotations

import resource
import threading
from errno import EMFILE, ENFILE, ENOMEM

from ..abi.errors import CommandError
from ..bus.shares import Share

RESERVE = 256
MOST = 1 << 15


class FdTable:
    """*size* numbers; without it, as many as the process may have when it is first asked."""

    def __init__(self, size: int = 0) -> None:
        self._lock = threading.RLock()
        self._share = self._divide(size) if size else None

    @staticmethod
    def _divide(size: int) -> Share:
        return Share("descriptors", EMFILE, size - min(RESERVE, size // 2), MOST)

    def charge(self, uid: int) -> None:
        """Let user *uid* have one more; EMFILE: its share is used up."""
        with self._lock:
            if self._share is None:
                self._share = self._divide(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            self._share.charge(uid, 1)

    def discharge(self, uid: int) -> None:
        """Give one back."""
        with self._lock:
            assert self._share is not None
            self._share.discharge(uid, 1)

    def taken(self, uid: int) -> int:
        """How many user *uid* has."""
        return self._share.taken(uid) if self._share is not None else 0


FD_TABLE = FdTable()

_EXHAUSTED = frozenset({EMFILE, ENFILE})


def check_exhausted(number: int | None) -> None:
    """Raise what a caller is told if the errno *number*, which the daemon got, says that the
    daemon, or the machine, is short of something: ENFILE or ENOMEM. Nothing of the caller's is
    wrong then, and nothing may be left out or judged as if it were not there."""
    if number in _EXHAUSTED:
        raise CommandError(ENFILE, "the daemon has no free descriptor")
    if number == ENOMEM:
        raise CommandError(ENOMEM, "the daemon has no memory")
