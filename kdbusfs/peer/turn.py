# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose turn it is to touch the bus.

One thread runs the bus, the router's. It reads the memory of callers itself, which is fast, but a
caller may have put its data where a page fault never ends: on a FUSE file system of its own, say.
So each such read is an *operation* with a number, and a watchdog that sees the same one for too
long lets another thread take over as the router, between two states of the bus. The thread that
was overtaken comes back, if ever, to `fail`: it waits for its turn, undoes what it had begun
(`Stalled`) and leaves the request to its successor.
"""

from __future__ import annotations

import threading
from errno import ESTALE
from typing import NoReturn

from ..abi.errors import Fault, Stalled
from ..native import lib

TURN = threading.Lock()
"""Held by whoever touches the bus: one daemon serves one mount."""


def fail(error: int) -> NoReturn:
    """Raise what the negative *error* of an operation stands for."""
    if error == -ESTALE:
        TURN.acquire()
        raise Stalled
    raise Fault


class Operation:
    """Around a piece of Python that may fault in a caller's memory (/proc/<pid>/cmdline does)."""

    __slots__ = ("_number",)

    def __enter__(self) -> None:
        self._number = lib.kdbusfs_operation_begin()

    def __exit__(self, *_: object) -> None:
        if lib.kdbusfs_operation_end(self._number):
            fail(-ESTALE)
