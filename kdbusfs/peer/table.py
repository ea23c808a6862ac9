# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has how many of the daemon's open files.

A file on its way, the memory of a pool before HELLO, a namespace that somebody is in: each takes
a number in the table of one process, for everybody. A user may have a third of what others leave,
as with the quota of a pool, and no more than `MOST`. Three quarters are for users; what is left
of it is for root alone, which is held to no share. `RESERVE` numbers are for nobody: with them the
daemon reads /proc, opens pidfds and talks to a thread that receives descriptors.
"""

from __future__ import annotations

import resource
import threading
from errno import EMFILE, ENFILE, ENOMEM

from ..abi.errors import CommandError

RESERVE = 256
MOST = 1 << 15

_EXHAUSTED = frozenset({EMFILE, ENFILE})


class Table:
    """*size* numbers; without it, as many as the process may have when it is first asked."""

    def __init__(self, size: int = 0) -> None:
        self._size = size
        self._lock = threading.RLock()
        self._taken: dict[int, int] = {}
        self._n_taken = 0

    def charge(self, uid: int) -> None:
        """Let user *uid* have one more; EMFILE: its share is used up."""
        if not self._size:
            self._size = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = self._size - min(RESERVE, self._size // 2)
        if uid:
            room -= room // 4
        with self._lock:
            mine = self._taken.get(uid, 0)
            share = room - self._n_taken + mine
            if uid:
                share = min(share // 3, MOST)
            if mine >= share:
                raise CommandError(EMFILE, f"{mine} descriptors of user {uid}")
            self._taken[uid] = mine + 1
            self._n_taken += 1

    def discharge(self, uid: int) -> None:
        """Give one back."""
        with self._lock:
            left = self._taken.pop(uid) - 1
            if left:
                self._taken[uid] = left
            self._n_taken -= 1

    def taken(self, uid: int) -> int:
        """How many user *uid* has."""
        return self._taken.get(uid, 0)


TABLE = Table()


def check_exhausted(number: int | None) -> None:
    """Raise what a caller is told if the errno *number*, which the daemon got, says that the
    daemon, or the machine, is short of something: ENFILE or ENOMEM. Nothing of the caller's is
    wrong then, and nothing may be left out or judged as if it were not there."""
    if number in _EXHAUSTED:
        raise CommandError(ENFILE, "no descriptor for the daemon itself")
    if number == ENOMEM:
        raise CommandError(ENOMEM, "no memory for the daemon itself")
