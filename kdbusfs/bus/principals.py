# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which uids count as one user where something of the daemon is shared out.

Whoever owns subordinate ids (subuid(5)) can be thousands of users at a time. Where each user has a
share, or a turn, all of them are one: else those who have one uid alone would come after them.
kdbus's own limits are for each uid nevertheless, as they were in the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

BLOCK = 1 << 16
"""The ids of one container. A larger range is for several, which are not each other's doing."""


class Principals:
    """The ranges of subordinate ids, which stay the same for as long as the daemon lives."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """*ranges*: first id and number of each."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.replace(ranges)

    def replace(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have these instead, before anything is charged to anybody."""
        # Id 0 is root, and where ranges overlap, those that start later win.
        known = sorted((start, start + n) for start, n in ranges if start > 0 and n > 0)
        self._starts = [start for start, _ in known]
        self._ends = [end for _, end in known]

    def of(self, uid: int) -> int:
        """Whom *uid* counts as: itself, or the first id of its block of subordinate ones."""
        at = bisect_right(self._starts, uid) - 1
        if at < 0 or uid >= self._ends[at]:
            return uid
        start = self._starts[at]
        return start + (uid - start) // BLOCK * BLOCK


PRINCIPALS = Principals()
