# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: OPEN, RELEASE, POLL and READ, and what can't be done to a file of kdbus. All of it is
answered at once, in the router's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from errno import (
    EBADF,
    EBUSY,
    EINVAL,
    EIO,
    EMFILE,
    ENODEV,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
)
from functools import partial
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
from time import monotonic_ns
from typing import Protocol

from ..abi.errors import CommandError
from ..abi.items import Buffer
from ..abi.numbers import Limit
from ..abi.structs import U32, U64
from ..bus.connection import Connection
from ..bus.domain import Domain
from ..bus.endpoint import Endpoint
from ..bus.handle import Handle
from ..bus.node import Node
from ..bus.peer import Credentials
from ..bus.pool import Inode
from ..bus.shares import Share
from ..peer.closers import CLOSERS
from ..peer.descriptors import Watcher
from ..peer.fd_table import check_exhausted
from ..peer.memory import PoolMemory
from ..peer.process import Process
from . import wire
from .backing import Backing
from .device import Device
from .tree import Tree
from .wire import IN_HEADER_SIZE, Ids, Opcode

log = logging.getLogger(__name__)

_HUNG_UP = POLLERR | POLLHUP
_WRITABLE = POLLOUT | POLLWRNORM
_READABLE = POLLIN | POLLRDNORM | _WRITABLE
_MAX_OPEN = 4 * int(Limit.USER_CONNECTIONS)
"""Endpoints a user may have open, but for root: all its connections, and many that have not said
HELLO."""
_OPENS = 1 << 17
_MOST_OPENS = 2 * _MAX_OPEN
"""Files of the mount that may be open at all, and by one user."""
_SLOW_WAKE_NS = 1_000_000
_SLOW_WAKES = 2
"""As many wakes of a file that have taken longer than that, and the next is left to a thread."""


class NewBacking(Protocol):
    """Makes the pool side of an endpoint that user *uid* is opening under a nodeid."""

    def __call__(self, nodeid: int, uid: int) -> Backing: ...


class OpenInode:
    """A nodeid of which files are open. All of them have one *backing*, so only whoever is the same
    *opener* may open it again."""

    __slots__ = ("backing", "label", "memory", "opener", "shared")

    def __init__(self, opener: Credentials, label: bytes | None) -> None:
        self.opener = opener
        self.label = label
        """How a security module calls the opener."""
        self.backing: Backing
        self.shared = Inode()
        """The same for the bus."""
        self.memory: PoolMemory | None = None

    def new_memory(self, size: int) -> PoolMemory:
        self.memory = None
        self.memory = self.backing.new_memory(size)
        return self.memory


class OpenFile:
    """What an fh of ours stands for: a handle of the bus and how the kernel sees it."""

    __slots__ = ("fh", "handle", "inode", "kh", "n_slow_wakes", "nodeid", "poll_wanted", "uid")

    def __init__(self, fh: int, nodeid: int) -> None:
        self.fh = fh
        self.nodeid = nodeid
        self.inode: OpenInode | None = None
        """Of an endpoint."""
        self.handle: Handle
        self.uid = 0
        """Who opened it."""
        self.kh = 0
        """The kernel's name for whoever polls this file."""
        self.poll_wanted = False
        self.n_slow_wakes = 0
        """How many times in a row it has taken long to wake those who poll it."""


def _no_pool(size: int) -> PoolMemory:
    raise CommandError(ENODEV, "no pool behind this file")


class OpenFiles:
    """All open files of a mount. *watcher* watches cancel descriptors."""

    def __init__(
        self,
        device: Device,
        domain: Domain,
        tree: Tree,
        new_backing: NewBacking,
        watcher: Watcher,
    ) -> None:
        self._device = device
        self._domain = domain
        self._tree = tree
        self._new_backing = new_backing
        self._watcher = watcher
        self.by_fh: dict[int, OpenFile] = {}
        self.on_close: Callable[[], None] = lambda: None
        """Called when a file is about to go, so that nothing keeps it alive."""
        self._inodes: dict[int, OpenInode] = {}
        """Endpoints that are open, by nodeid."""
        self._n_open: dict[int, int] = {}
        """Open endpoints by uid: each takes descriptors of ours."""
        self._opens = Share("open files", EMFILE, _OPENS, _MOST_OPENS)
        """All open files: even `control`, which takes nothing but memory."""
        self._warned: set[Node] = set()
        self._next_fh = 1

    def close(self) -> None:
        """The mount is gone: close every file, in the order of opening."""
        for fh in list(self.by_fh):
            self._close_file(fh)

    # --- open and release

    def open(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        node = self._tree.node(nodeid)
        peer = self._peer(ids)
        try:
            if node is None or node.is_directory:
                raise CommandError(EIO, "not a file")
            if not ids[2]:
                # The caller has no place in our PID namespace: it can be neither read nor named.
                raise CommandError(EPERM, "caller from outside the daemon's PID namespace")
            has_pool = isinstance(node.subject, Endpoint)
            if has_pool and nodeid in self._inodes:
                if not U32.unpack_from(request, IN_HEADER_SIZE)[0]:
                    # open(2) brings O_LARGEFILE at least: it is the kernel, on behalf of lsattr(1)
                    # and others that ask for attributes, which kdbus has none of.
                    raise CommandError(ENOTTY, "no file attributes")
                self._check_same_opener(node, self._inodes[nodeid], peer)
            if has_pool and peer.uid and self._n_open.get(peer.uid, 0) >= _MAX_OPEN:
                raise CommandError(EMFILE, f"{_MAX_OPEN} endpoints open of this user")
            file, flags = self._new_file(nodeid, node, peer)
        except CommandError as error:
            peer.let_go()
            self._device.reply(unique, error.errno)
            self._device.traced("OPEN", ids, error.errno, f"nodeid={nodeid}", error)
            return
        backing_id = 0
        if file.inode is not None:
            self._inodes[nodeid] = file.inode
            self._n_open[peer.uid] = self._n_open.get(peer.uid, 0) + 1
            backing_id = file.inode.backing.backing_id
        self._next_fh += 1
        self.by_fh[file.fh] = file
        peer.let_go()
        self._device.reply(unique, 0, wire.OPEN_OUT.pack(file.fh, flags, backing_id))
        self._device.traced("OPEN", ids, 0, f"{node.name} fh={file.fh}")

    def _check_same_opener(self, node: Node, inode: OpenInode, peer: Process) -> None:
        """EBUSY: *inode* has been opened by somebody else, who shares no pool with *peer*."""
        if peer.credentials() == inode.opener and peer.security_label() == inode.label:
            return
        self._warn_of_second_open(node)
        raise CommandError(EBUSY, "an inode has pools of one user")

    def _new_file(self, nodeid: int, node: Node, peer: Process) -> tuple[OpenFile, int]:
        """An open file that is charged to *peer*, and how the kernel is to treat it; EMFILE,
        ENFILE, ENOMEM."""
        file = OpenFile(self._next_fh, nodeid)
        file.uid = peer.uid
        self._opens.charge(peer.uid, 1)
        flags = wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH
        try:
            opener = peer.credentials()
            if not isinstance(node.subject, Endpoint):
                file.handle = Handle(self._domain, node, opener, _no_pool)
                return file, flags
            known = self._inodes.get(nodeid)
            inode = known or OpenInode(opener, peer.security_label())
            file.handle = Handle(self._domain, node, opener, inode.new_memory, inode.shared)
            if known is None:
                inode.backing = self._new_backing(nodeid, peer.uid)
            file.inode = inode
            flags = inode.backing.open_flags
            if known is not None:
                flags |= inode.backing.reopen_flags
        except OSError as error:
            self._opens.discharge(peer.uid, 1)
            check_exhausted(error.errno)
            raise CommandError(error.errno or EIO, "no backing for a pool") from None
        except BaseException:
            self._opens.discharge(peer.uid, 1)
            raise
        return file, flags

    def release(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        (fh,) = U64.unpack_from(request, IN_HEADER_SIZE)
        self._close_file(fh)
        self._device.reply(unique)
        self._device.traced("RELEASE", ids, 0, f"fh={fh}")

    def _close_file(self, fh: int) -> None:
        file = self.by_fh.pop(fh)
        self.on_close()
        self._opens.discharge(file.uid, 1)
        file.handle.close()
        if file.handle.connection is not None:
            file.handle.connection.waker = None
        inode, file.inode = file.inode, None
        if inode is not None:
            n_open = self._n_open.pop(file.uid) - 1
            if n_open:
                self._n_open[file.uid] = n_open
            if not inode.shared.n_handles:
                del self._inodes[file.nodeid]
                inode.backing.close()

    def _warn_of_second_open(self, node: Node) -> None:
        """Say once for each node what its users can't find out: they could fill the log."""
        if node in self._warned:
            return
        self._warned = {known for known in self._warned if known.alive} | {node}
        log.warning(
            "second open of one inode of %s by somebody else refused: bind-mount the bus's "
            "directory, not the endpoint alone",
            node.name,
        )

    def _peer(self, ids: Ids) -> Process:
        uid, gid, tid = ids
        return Process(tid, uid, gid, self._watcher)

    # --- poll

    def poll(self, unique: int, ids: Ids, request: Buffer) -> None:
        fh, kh, flags, _ = wire.POLL_IN.unpack_from(request, IN_HEADER_SIZE)
        file = self.by_fh.get(fh)
        if file is None:
            self._device.reply(unique, EBADF)
            return
        handle = file.handle
        if flags & wire.POLL_SCHEDULE_NOTIFY:
            file.kh = kh
            file.poll_wanted = True
        revents = _HUNG_UP if handle.hung_up else _READABLE if handle.readable else _WRITABLE
        self._device.reply(unique, 0, wire.POLL_OUT.pack(revents, 0))
        if self._device.trace is not None:
            self._device.trace.line("POLL", ids, 0, f"fh={fh} revents={revents:#x}")

    # A function with another one in it costs each of its calls an object.

    def wake_by(self, connection: Connection, file: OpenFile) -> None:
        """Have who polls *file* woken when its new *connection* becomes readable."""
        connection.waker = lambda: self._wake(file)

    def _wake(self, file: OpenFile) -> None:
        if file.poll_wanted:
            file.poll_wanted = False
            if file.n_slow_wakes < _SLOW_WAKES:
                self._notify(file)
            else:
                CLOSERS.submit(file.uid, partial(self._notify, file), is_waited_for=False)

    def _notify(self, file: OpenFile) -> None:
        """Wake all who poll *file*. The kernel does that in the thread that asks for it, one after
        the other, and a file may be in an epoll instance under any number of numbers."""
        begun = monotonic_ns()
        self._device.write(
            wire.NOTIFY_POLL.pack(wire.NOTIFY_POLL.size, wire.NOTIFY_CODE_POLL, 0, file.kh)
        )
        is_slow = monotonic_ns() - begun > _SLOW_WAKE_NS
        file.n_slow_wakes = file.n_slow_wakes + 1 if is_slow else 0

    # --- read and write: page faults of a cache pool, and what users must not do

    def read(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        fh, offset, size, read_flags, *_ = wire.READ_IN.unpack_from(request, IN_HEADER_SIZE)
        file = self.by_fh.get(fh)
        inode = file.inode if file is not None else None
        memory = inode.memory if inode is not None else None
        by_read = read_flags & wire.READ_LOCKOWNER
        if memory is not None and memory.pointer is None:
            # Of a HELLO that failed.
            memory = None
        if inode is None or by_read or memory is None or inode.backing.backing_id:
            self._device.reply(unique, EINVAL)
            self._device.traced("READ", ids, EINVAL, f"fh={fh}")
            return
        self._device.reply(unique, 0, memory.read(offset, min(size, max(memory.size - offset, 0))))
        self._device.traced("READ", ids, 0, f"fh={fh} offset={offset} size={size}")

    def refuse(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        """WRITE and other things that can't be done to a kdbus file."""
        # What kdbus's files had no operation for, the VFS answers in its own way.
        error = EOPNOTSUPP if opcode == Opcode.FALLOCATE else EINVAL
        self._device.reply(unique, error)
        self._device.traced(Opcode(opcode).name, ids, error, "")
