# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our mapping of a pool."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import ENOMEM
from typing import Any

from ..abi.errors import CommandError, Stalled
from ..abi.items import Buffer
from ..native import ffi, lib

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


class PoolMemory:
    """*size* bytes that are the file *fd*, or private ones without. The real `bus.peer.Memory`.

    *on_publish* pushes pages to the client where it does not see ours; *on_seal* is called when
    the pool's size is final. *on_close* takes what is to be done when the client has the pool
    mapped no more; without it nobody has. The pages come into being as they are touched.
    """

    __slots__ = (
        "__weakref__",
        "_on_close",
        "_on_publish",
        "_on_seal",
        "_pushed",
        "_view",
        "is_sealed",
        "pointer",
        "size",
        "version",
    )

    def __init__(
        self,
        fd: int,
        size: int,
        on_publish: Callable[[int, Buffer], None] | None = None,
        on_seal: Callable[[], None] | None = None,
        on_close: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        pointer = lib.kdbusfs_map(fd, size)
        if pointer == ffi.NULL:
            raise CommandError(ENOMEM, f"no memory for a pool of {size} bytes")
        self.pointer: Any = ffi.cast("char *", pointer)
        self.size = size
        self._view = memoryview(ffi.buffer(self.pointer, size))
        self._on_publish = on_publish
        self._on_seal = on_seal
        self._on_close = on_close
        self.is_sealed = False
        self.version = 0
        """Counts the writes."""
        self._pushed: tuple[int, int, int] | None = None
        """What a push that stalled has pushed in the end: range and version."""

    def write(self, offset: int, data: Buffer) -> None:
        self.version += 1
        self._view[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._view[offset : offset + size])

    def publish(self, offset: int, size: int) -> None:
        if self._on_publish is None:
            return
        # Whole pages, which the kernel then never has to ask for.
        start = offset & -_PAGE_SIZE
        end = min((offset + size + _PAGE_SIZE - 1) & -_PAGE_SIZE, self.size)
        what = start, end, self.version
        if self._pushed == what:
            # By a request that has started anew since then: each page may stall, but only once.
            self._pushed = None
            return
        try:
            self._on_publish(start, self._view[start:end])
        except Stalled:
            self._pushed = what
            raise

    def seal(self) -> None:
        if self._on_seal is not None:
            self._on_seal()
        self.is_sealed = True

    def close(self, gone: Callable[[], None]) -> None:
        """The pool is gone. If it has been in use the mapping goes with the last reference, since
        a sender that was overtaken may still be filling it; else it goes now, and what is behind
        it can be made smaller."""
        self._on_publish = None
        if not self.is_sealed:
            self._unmap()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(gone)
        else:
            gone()

    def _unmap(self) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self._view.release()
            lib.kdbusfs_unmap(pointer, self.size)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._unmap()
