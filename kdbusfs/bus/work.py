# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that takes longer than others should have to wait.

What may take more than a millisecond is cut into pieces: a generator that yields between two of
them, each of a fraction of that. The shell has a piece done between any two requests. Users take
turns, and each has its works done one after the other, so that it is the user who wants a lot who
waits for it, and not much is half done at a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .quota import User


class Work:
    """All work of a domain that is under way. It is true as long as there is some."""

    __slots__ = ("_works",)

    def __init__(self) -> None:
        self._works: OrderedDict[User, deque[Iterator[None]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._works)

    def add(self, user: User, work: Iterator[None]) -> None:
        """Have *work* done on behalf of *user*. It deals with its own exceptions."""
        self._works.setdefault(user, deque()).append(work)

    def proceed(self) -> None:
        """Do one piece."""
        user, works = self._works.popitem(last=False)
        work = works.popleft()
        try:
            next(work)
        except StopIteration:
            pass
        else:
            works.appendleft(work)
        if works:
            self._works[user] = works
