# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a client comes to see its pool: the two kinds, and which one the kernel can do.

*passthrough* (Linux 6.9 and later): each open of an endpoint has a memfd that is registered as
its backing file; mmap goes there, and what we write is seen at once.

*cache*: the pool is private memory of ours, and each slice is pushed into the page cache of the
open's inode (FUSE_NOTIFY_STORE) when its offset is told; pages that were never pushed, or were
dropped since, are asked for with FUSE_READ.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from errno import EBUSY, ENOMEM
from typing import Protocol
from weakref import ref

from ..abi.errors import CommandError
from ..abi.items import Buffer
from ..peer.fd_table import FD_TABLE
from ..peer.leftovers import Leftovers
from ..peer.memory import PoolMemory
from . import wire

_F_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE


MAX_POOL_SIZE = 1 << 32
"""A pool takes address space of the daemon, if no memory: nobody is to use all of it up."""


def _check_size(size: int) -> None:
    if size > MAX_POOL_SIZE:
        raise CommandError(ENOMEM, f"pool of {size} bytes, {MAX_POOL_SIZE} is the limit")


class Backing(Protocol):
    """The pool side of an endpoint's inode that is open, maybe more than once."""

    open_flags: int
    reopen_flags: int
    """More of them, for those who open the same inode later."""
    backing_id: int

    def new_memory(self, size: int) -> PoolMemory:
        """Memory for a pool of *size* bytes. ENOMEM, EBUSY: what was made before is in use. May be
        called again until it is sealed."""

    def close(self) -> None: ...


class PassthroughBacking:
    """A memfd, open until the pool is sealed; the kernel keeps it from then on. User *uid* is
    charged for it."""

    reopen_flags = 0

    def __init__(self, device: int, uid: int, leftovers: Leftovers) -> None:
        self._device = device
        self._uid = uid
        self._leftovers = leftovers
        self._watch = -1
        self._memfd = -1
        FD_TABLE.charge(uid)
        try:
            self._memfd = os.memfd_create("kdbus-conn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.backing_id = wire.backing_open(device, self._memfd)
        except OSError:
            if self._memfd >= 0:
                os.close(self._memfd)
            FD_TABLE.discharge(uid)
            raise
        self._memory: Callable[[], PoolMemory | None] = lambda: None
        """The mapping that was made last, as long as somebody has it."""
        # With DIRECT_IO read and write come to us, to be refused, and mmap still goes to the file.
        self.open_flags = wire.FOPEN_PASSTHROUGH | wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH

    def new_memory(self, size: int) -> PoolMemory:
        _check_size(size)
        self._leftovers.collect()
        before = self._memory()
        if before is not None and before.pointer is not None:
            # What is cut off a file is SIGBUS to whoever has it mapped: to ourselves.
            raise CommandError(EBUSY, "the file has a pool already")
        try:
            os.ftruncate(self._memfd, 0)
            os.ftruncate(self._memfd, size)
        except (OSError, OverflowError):
            raise CommandError(ENOMEM, f"no memory for a pool of {size} bytes") from None
        memory = PoolMemory(self._memfd, size, on_seal=self._seal, on_close=self._when_gone)
        self._memory = ref(memory)
        return memory

    def _seal(self) -> None:
        fcntl.fcntl(self._memfd, fcntl.F_ADD_SEALS, _SEALS)
        self._watch = self._leftovers.watch(self._memfd)
        self._close_memfd()

    def _when_gone(self, action: Callable[[], None]) -> None:
        self._leftovers.when_gone(self._watch, action)

    def _close_memfd(self) -> None:
        if self._memfd >= 0:
            os.close(self._memfd)
            self._memfd = -1
            FD_TABLE.discharge(self._uid)

    def close(self) -> None:
        wire.backing_close(self._device, self.backing_id)
        self._close_memfd()


class CacheBacking:
    """Private memory, pushed into the page cache of an inode by *push*."""

    backing_id = 0
    reopen_flags = wire.FOPEN_KEEP_CACHE
    """The pages of those who have it open stay."""

    def __init__(
        self, push: Callable[[int, Buffer], None], set_size: Callable[[int], None], direct_io: bool
    ) -> None:
        self._push = push
        self._set_size = set_size
        # Where DIRECT_IO does not forbid shared mappings, it lets us refuse read and write.
        self.open_flags = wire.FOPEN_NOFLUSH | (wire.FOPEN_DIRECT_IO if direct_io else 0)

    def new_memory(self, size: int) -> PoolMemory:
        _check_size(size)
        memory = PoolMemory(-1, size, self._push)
        self._set_size(size)
        # The last page makes the inode as large as the pool.
        memory.publish(size - 1, 1)
        return memory

    def close(self) -> None:
        self._set_size(0)


def can_pass_through(device: int) -> bool:
    """Whether the kernel takes backing files on this connection, which has been initialised."""
    memfd = os.memfd_create("kdbusfs-probe", os.MFD_CLOEXEC)
    try:
        wire.backing_close(device, wire.backing_open(device, memfd))
    except OSError:
        return False
    finally:
        os.close(memfd)
    return True
