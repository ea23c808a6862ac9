# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a tree request: over a SOCK_SEQPACKET pair to pyfuse3, and its reply to the kernel.

pyfuse3 takes its end of the pair for a FUSE device. The router hands requests in, and a thread of
the relay's own carries replies out. Two things are mended on the way: INIT, so that what we
negotiate ourselves is negotiated and pyfuse3's library does not splice, and the inode numbers,
because pyfuse3 knows no difference between a nodeid and st_ino.

pyfuse3 writes a reply while it holds the interpreter's lock, which whoever reads it needs, too. So
that write must never wait: no more than `MAX_OUTSTANDING` requests are with pyfuse3 at a time, and
the pair has room for all their replies. The others wait here, by user. The same bound keeps the
router's own send from waiting.
"""

from __future__ import annotations

import logging
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

from ..abi.items import Buffer
from . import wire
from .device import Device
from .fair import FairQueue
from .tree import Tree
from .wire import IN_HEADER_SIZE, OUT_HEADER, OUT_HEADER_SIZE, Ids, Opcode

log = logging.getLogger(__name__)

MAX_PAGES = 32
"""What the kernel may ask for or bring at once: 128 KiB."""
MAX_WRITE = 65536
MAX_OUTSTANDING = 8
_SO_SNDBUFFORCE = 32
_ROOM = MAX_OUTSTANDING * (MAX_PAGES * 4096 + MAX_WRITE)
"""Of the pair, for each direction; the kernel doubles it, for what it adds to each message."""
_MAX_BACKGROUND = 65535
_PROTOCOL_MINOR = 40
_SHOWN_MINOR = 13
"""What pyfuse3's library is shown: from 7.14 on it splices, which a socket can't do."""
_ENTRY_ATTR = 40
"""Offset of attr in struct fuse_entry_out."""
_ATTR_ATTR = 16
"""Offset of attr in struct fuse_attr_out."""
_INO = struct.Struct("=Q")
_DIRENT = struct.Struct("=QQII")
_ENTRY_OUT_SIZE = 128
_OPCODES = frozenset(int(o) for o in Opcode)


def tree_pair() -> tuple[socket.socket, socket.socket]:
    """Our end and pyfuse3's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM)
    return ours, theirs


class Relay:
    """Carries requests to pyfuse3 by *tree_socket*, our end of a `tree_pair`, and the replies to
    *device*. *on_initialised* is called when the kernel has been answered first."""

    def __init__(
        self,
        device: Device,
        tree: Tree,
        tree_socket: socket.socket,
        on_initialised: Callable[[], None],
    ) -> None:
        self._device = device
        self._tree = tree
        self._socket = tree_socket
        self._on_initialised = on_initialised
        self.kernel_flags2 = 0
        """Of INIT, what the kernel can do."""
        self._kernel_minor = 0
        self._lock = threading.Lock()
        """Guards the three below."""
        self._outstanding: dict[int, tuple[int, Ids, str, int]] = {}
        """Opcode, caller, target and time of requests pyfuse3 has, by unique."""
        self._queue: FairQueue[tuple[int, int, int, Ids, Buffer]] = FairQueue()
        self._last_reply_ns = 0

    # --- requests

    def take(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: memoryview) -> None:
        """In the router's thread: have pyfuse3 answer this, now or in its turn. Never waits."""
        if opcode == Opcode.INIT:
            _, self._kernel_minor, _, flags, flags2 = wire.INIT_IN.unpack_from(
                request, IN_HEADER_SIZE
            )
            self.kernel_flags2 = flags2 if flags & wire.FLAG_INIT_EXT else 0
            struct.pack_into("=I", request, IN_HEADER_SIZE + wire.INIT_IN_MINOR, _SHOWN_MINOR)
        with self._lock:
            if len(self._outstanding) < MAX_OUTSTANDING:
                self._send(opcode, unique, nodeid, ids, request)
            else:
                self._queue.push(ids[0], (opcode, unique, nodeid, ids, bytes(request)))

    def _send(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        target = f"nodeid={nodeid}"
        self._outstanding[unique] = opcode, ids, target, time.monotonic_ns()
        self._socket.send(request)

    def _next(self, unique: int) -> tuple[int, Ids, str]:
        """Request *unique* has been answered; whoever waits next gets its place."""
        with self._lock:
            opcode, ids, target, sent = self._outstanding.pop(unique)
            # pyfuse3 serves one at a time: the time since it was done with the one before.
            now = time.monotonic_ns()
            self._queue.charge(ids[0], now - max(sent, self._last_reply_ns))
            self._last_reply_ns = now
            if self._queue:
                self._send(*self._queue.pop()[1])
        return opcode, ids, target

    # --- replies

    def run(self) -> None:
        """In a thread: carry pyfuse3's replies to the kernel, until its end is closed."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        reply = bytearray(1 << 20)
        view = memoryview(reply)
        while True:
            try:
                size = self._socket.recv_into(reply)
            except OSError:
                return
            if not size:
                return
            _, error, unique = OUT_HEADER.unpack_from(reply)
            try:
                opcode, ids, target = self._next(unique)
            except OSError:
                return
            data = view[:size]
            if not error:
                data = self._mend(opcode, data)
            self._device.write(data)
            if opcode == Opcode.INIT:
                self._on_initialised()
            if self._device.trace is not None:
                name = Opcode(opcode).name if opcode in _OPCODES else str(opcode)
                self._device.trace.line(name, ids, -error, target)

    def _mend(self, opcode: int, reply: memoryview) -> memoryview:
        if opcode == Opcode.INIT:
            return memoryview(self._mended_init(reply))
        if opcode == Opcode.SETATTR:
            self._mend_attr(reply, OUT_HEADER_SIZE + _ATTR_ATTR)
        elif opcode == Opcode.READDIRPLUS:
            at = OUT_HEADER_SIZE
            while at < len(reply):
                self._mend_attr(reply, at + _ENTRY_ATTR)
                self._mend_attr(reply, at + _ENTRY_OUT_SIZE)
                name_length = _DIRENT.unpack_from(reply, at + _ENTRY_OUT_SIZE)[2]
                at += (_ENTRY_OUT_SIZE + _DIRENT.size + name_length + 7) & ~7
        return reply

    def _mend_attr(self, reply: memoryview, at: int) -> None:
        """Where a nodeid stands for an inode number, put the node's number."""
        (nodeid,) = _INO.unpack_from(reply, at)
        node = self._tree.node(nodeid)
        if node is not None:
            _INO.pack_into(reply, at, node.ino)

    def _mended_init(self, reply: memoryview) -> bytes:
        body = bytes(reply[OUT_HEADER_SIZE:]).ljust(wire.INIT_OUT.size, b"\0")
        major, _, max_readahead, flags, *_ = wire.INIT_OUT.unpack(body[: wire.INIT_OUT.size])
        flags2 = self.kernel_flags2 & (wire.FLAG2_PASSTHROUGH | wire.FLAG2_DIRECT_IO_ALLOW_MMAP)
        flags |= wire.FLAG_MAX_PAGES | wire.FLAG_DO_READDIRPLUS
        flags |= wire.FLAG_INIT_EXT if flags2 else 0
        mended = wire.INIT_OUT.pack(
            major,
            min(self._kernel_minor, _PROTOCOL_MINOR),
            max_readahead,
            flags,
            _MAX_BACKGROUND,
            _MAX_BACKGROUND,
            MAX_WRITE,
            1,
            MAX_PAGES,
            0,
            flags2,
            1 if flags2 & wire.FLAG2_PASSTHROUGH else 0,
            0,
        )
        header = OUT_HEADER.unpack_from(reply)
        return OUT_HEADER.pack(OUT_HEADER_SIZE + len(mended), 0, header[2]) + mended
