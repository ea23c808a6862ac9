# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router: one thread reads every request of the mount, in order.

Handle requests are answered right there. Tree requests go over a SOCK_SEQPACKET pair to pyfuse3,
which takes its end for a FUSE device; a second thread carries its replies to the kernel. Two
things are mended on that way: INIT, so that what we negotiate ourselves is negotiated and
pyfuse3's library does not splice, and the inode numbers, because pyfuse3 knows no difference
between a nodeid and st_ino.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from ..abi.errors import CommandError
from ..abi.items import Buffer
from ..abi.structs import U32
from ..bus.domain import Domain
from ..native import ffi, lib
from ..peer.process import renew_scratch
from ..peer.procfs import Status
from ..peer.turn import TURN
from . import wire
from .backing import Backing, CacheBacking, PassthroughBacking, can_pass_through
from .handles import Handles
from .storer import Storer
from .trace import Trace
from .tree import Tree
from .watchdog import Watchdog
from .watches import Watches
from .wire import IN_HEADER, IN_HEADER_SIZE, OUT_HEADER, OUT_HEADER_SIZE, Opcode

log = logging.getLogger(__name__)

_BUFFER_SIZE = 1 << 18
_MAX_WRITE = 65536
_MAX_BACKGROUND = 65535
_LONGEST_WAIT_NS = 3600 * 10**9
"""A deadline may be any 64-bit number, centuries ahead; a wait that ends too soon does no harm."""
_LOG_PERIOD_NS = 60 * 10**9
_PROTOCOL_MINOR = 40
_SHOWN_MINOR = 13
"""What pyfuse3's library is shown: from 7.14 on it splices, which a socket can't do."""
_ENTRY_ATTR = 40
"""Offset of attr in struct fuse_entry_out."""
_ATTR_ATTR = 16
"""Offset of attr in struct fuse_attr_out."""
_DIRENTPLUS = struct.Struct("=Q")
_DIRENT = struct.Struct("=QQII")
_ENTRY_OUT_SIZE = 128

_unpack_header = IN_HEADER.unpack_from
_unpack_u32 = U32.unpack_from
_IOCTL = int(Opcode.IOCTL)
_POLL = int(Opcode.POLL)
_READ = int(Opcode.READ)
_PAGES = frozenset({_READ, int(Opcode.WRITE)})
"""What the kernel asks with a page locked: a fault, or a client's scribbling to be written back."""


class Router:
    """Reads requests from *device* until the mount is gone.

    *pool* is `passthrough`, `cache`, or `auto`: whichever the kernel can do best. *tree_socket*
    is our end of the pair whose other end pyfuse3 has.
    """

    def __init__(
        self,
        device: int,
        domain: Domain,
        tree: Tree,
        tree_socket: socket.socket,
        *,
        pool: str,
        spin_us: int,
        trace: Trace | None,
    ) -> None:
        self._device = device
        self._domain = domain
        self._tree = tree
        self._socket = tree_socket
        self.pool = pool
        self._spin_ns = spin_us * 1000
        self._trace = trace
        self._watches = Watches()
        self._handles = Handles(
            device,
            domain,
            tree,
            self._new_backing,
            self._watches.watch,
            trace,
            self._put_back,
            self._watches.wake,
        )
        self._watchdog = Watchdog(self._is_blocked, self._take_over)
        self._quiet_until = 0
        self._tid = 0
        """The router's thread, as the system calls it."""
        self._backlog: deque[bytearray] = deque()
        self._kernel_flags2 = 0
        self._kernel_minor = 0
        self._relayed: dict[int, tuple[int, tuple[int, int, int], str]] = {}
        """Opcode, caller and target of requests pyfuse3 has, by unique."""
        self._storer = Storer(device)
        self.has_pools = True
        """Whether the kernel can do the kind of pool that is wanted."""

    # --- the loop

    def start(self, on_initialised: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Answer requests, in a thread, until the file system is unmounted. *on_initialised* is
        called when the kernel has been answered first, *on_end* at the end."""
        self._on_initialised = on_initialised
        self._on_end = on_end
        TURN.acquire()
        self._watchdog.start()
        self._start_thread()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="kdbusfs-router", daemon=True)
        self._thread.start()

    def _is_blocked(self) -> bool:
        """Whether the router's thread sleeps, as opposed to waiting for its turn on a busy CPU."""
        try:
            status = Status(self._tid)
        except CommandError:
            # No descriptor to look with: what can't be told does not hold up the others.
            return True
        return not status.field(b"State").strip().startswith(b"R")

    def _take_over(self) -> None:
        """The router's thread is stuck in a caller's memory: have another go on, in its turn."""
        now = time.monotonic_ns()
        if now >= self._quiet_until:
            # Whoever does it on purpose is not to fill the log.
            self._quiet_until = now + _LOG_PERIOD_NS
            log.warning("a caller's memory does not fault in: another thread takes over")
        renew_scratch()
        self._watches.keep_waking()
        self._start_thread()

    def _put_back(self, request: bytes) -> None:
        """In a thread that was overtaken: leave a request to the successor."""
        self._backlog.append(bytearray(request))
        self._watches.wake()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._loop()
        except Exception:
            log.exception("ERROR: the router ended")
        if threading.current_thread() is self._thread:
            self._close()
            TURN.release()
            self._on_end()
        else:
            self._write_reply()
            TURN.release()

    def _loop(self) -> None:
        """Holding the turn: handle requests until the mount is gone, or somebody took over."""
        domain, watches, handles = self._domain, self._watches, self._handles
        watchdog, me = self._watchdog, threading.current_thread()
        self._tid = threading.get_native_id()
        buffer = bytearray(_BUFFER_SIZE)
        device, spin = self._device, self._spin_ns
        pointer, size = ffi.from_buffer(buffer), len(buffer)
        view = memoryview(buffer)
        next_request, monotonic = lib.kdbusfs_next, time.monotonic_ns
        acquire, release = TURN.acquire, TURN.release
        while self._thread is me:
            if handles.completed:
                handles.finish()
                continue
            if self._backlog:
                self._write_reply()
                request = self._backlog.popleft()
                self._dispatch(memoryview(request), len(request))
                continue
            timeout = -1
            if domain.watches_deadlines:
                deadline = domain.next_deadline()
                if deadline is not None:
                    timeout = min(max(deadline - monotonic(), 0), _LONGEST_WAIT_NS)
            reply, handles.reply = handles.reply, b""
            release()
            n = next_request(
                device, reply, len(reply), watches.fd, pointer, size, timeout, spin
            )
            acquire()
            if watchdog.asleep:
                watchdog.wake()
            if n > 0:
                self._dispatch(view, n)
            elif n == -errno.ENODEV:
                return
            elif n == 0 or n in (-errno.EINTR, -errno.ENOENT):
                watches.dispatch()
                domain.expire()
            else:
                raise OSError(-n, os.strerror(-n))

    def _write_reply(self) -> None:
        reply, self._handles.reply = self._handles.reply, b""
        if reply:
            self._write(reply)

    def _close(self) -> None:
        self._watchdog.close()
        self._handles.close()
        self._storer.close()
        self._watches.close()

    def _dispatch(self, request: memoryview, size: int) -> None:
        try:
            if _unpack_u32(request, 4)[0] == _IOCTL:
                self._handles.ioctl(request)
                return
            _, opcode, unique, nodeid, uid, gid, tid, _, _ = _unpack_header(request)
            ids = (uid, gid, tid)
            if opcode == _POLL:
                self._handles.poll(unique, ids, request)
            else:
                self._dispatch_rare(opcode, unique, nodeid, ids, request[:size])
        except Exception:
            # A broken invariant is ours alone: the caller gets EIO, the others go on.
            _, opcode, unique, *_ = _unpack_header(request)
            log.exception("ERROR: request %d failed", opcode)
            self._write(OUT_HEADER.pack(OUT_HEADER_SIZE, -errno.EIO, unique))

    def _dispatch_rare(
        self, opcode: int, unique: int, nodeid: int, ids: tuple[int, int, int], request: memoryview
    ) -> None:
        handles = self._handles
        if opcode == Opcode.OPEN:
            handles.open(unique, nodeid, ids, request)
        elif opcode == Opcode.RELEASE:
            handles.release(unique, ids, request)
        elif opcode == Opcode.INTERRUPT:
            handles.interrupt(request)
        elif opcode == _READ:
            handles.read(unique, ids, request)
        elif opcode in _REFUSED:
            handles.refuse(unique, ids, Opcode(opcode).name)
        else:
            self._relay(opcode, unique, nodeid, ids, request)

    def _write(self, data: Buffer) -> None:
        try:
            os.write(self._device, data)
        except OSError as error:
            log.debug("reply not taken: %s", error)

    # --- the tree's part

    def _relay(
        self, opcode: int, unique: int, nodeid: int, ids: tuple[int, int, int], request: memoryview
    ) -> None:
        if opcode == Opcode.INIT:
            _, self._kernel_minor, _, flags, flags2 = wire.INIT_IN.unpack_from(
                request, IN_HEADER_SIZE
            )
            self._kernel_flags2 = flags2 if flags & wire.FLAG_INIT_EXT else 0
            struct.pack_into("=I", request, IN_HEADER_SIZE + 4, _SHOWN_MINOR)
        if opcode not in _UNANSWERED:
            target = f"nodeid={nodeid}"
            if self._trace is not None and opcode == Opcode.LOOKUP:
                target += f" {bytes(request[IN_HEADER_SIZE:-1]).decode(errors='replace')}"
            self._relayed[unique] = opcode, ids, target
        elif self._trace is not None:
            self._trace.line(Opcode(opcode).name, ids, 0, f"nodeid={nodeid}")
        self._socket.send(request)

    def relay_replies(self) -> None:
        """Carry pyfuse3's replies to the kernel, until its end of the pair is closed."""
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
            opcode, ids, target = self._relayed.pop(unique, (0, (0, 0, 0), ""))
            data = view[:size]
            if not error:
                data = self._mend(opcode, data)
            self._write(data)
            if opcode == Opcode.INIT:
                self._set_up_pools()
                self._on_initialised()
            if self._trace is not None and opcode:
                name = Opcode(opcode).name if opcode in _OPCODES else str(opcode)
                self._trace.line(name, ids, -error, target)

    def _mend(self, opcode: int, reply: memoryview) -> memoryview:
        if opcode == Opcode.INIT:
            return memoryview(self._mended_init(reply))
        if opcode == Opcode.LOOKUP:
            self._mend_attr(reply, OUT_HEADER_SIZE + _ENTRY_ATTR)
        elif opcode in (Opcode.GETATTR, Opcode.SETATTR):
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
        (nodeid,) = _DIRENTPLUS.unpack_from(reply, at)
        node = self._tree.node(nodeid)
        if node is not None:
            _DIRENTPLUS.pack_into(reply, at, node.ino)

    def _mended_init(self, reply: memoryview) -> bytes:
        body = bytes(reply[OUT_HEADER_SIZE:]).ljust(wire.INIT_OUT.size, b"\0")
        major, _, max_readahead, flags, *_ = wire.INIT_OUT.unpack(body[: wire.INIT_OUT.size])
        flags2 = self._kernel_flags2 & (wire.FLAG2_PASSTHROUGH | wire.FLAG2_DIRECT_IO_ALLOW_MMAP)
        flags |= wire.FLAG_MAX_PAGES | wire.FLAG_DO_READDIRPLUS
        flags |= wire.FLAG_INIT_EXT if flags2 else 0
        mended = wire.INIT_OUT.pack(
            major,
            min(self._kernel_minor, _PROTOCOL_MINOR),
            max_readahead,
            flags,
            _MAX_BACKGROUND,
            _MAX_BACKGROUND,
            _MAX_WRITE,
            1,
            32,
            0,
            flags2,
            1 if flags2 & wire.FLAG2_PASSTHROUGH else 0,
            0,
        )
        header = OUT_HEADER.unpack_from(reply)
        return OUT_HEADER.pack(OUT_HEADER_SIZE + len(mended), 0, header[2]) + mended

    # --- pools

    def _set_up_pools(self) -> None:
        passes_through = self.pool != "cache" and can_pass_through(self._device)
        if self.pool == "auto":
            self.pool = "passthrough" if passes_through else "cache"
        self.has_pools = self.pool == "cache" or passes_through
        if self.has_pools:
            log.info("pools by %s", self.pool)

    def _new_backing(self, nodeid: int) -> Backing:
        if self.pool == "passthrough":
            return PassthroughBacking(self._device)
        direct_io = bool(self._kernel_flags2 & wire.FLAG2_DIRECT_IO_ALLOW_MMAP)
        return CacheBacking(
            lambda offset, data: self._store(nodeid, offset, data),
            lambda size: self._tree.set_size(nodeid, size),
            direct_io,
        )

    def _store(self, nodeid: int, offset: int, data: Buffer) -> None:
        """Push *data* into the page cache of *nodeid*.

        That waits for pages which a client is just faulting in, or which it has written to and
        the kernel wants to have written back, and the answer is ours to give. So another thread
        does the push, while this one answers such requests; whatever else comes in meanwhile is
        kept for later, in order.
        """
        if threading.current_thread() is not self._thread:
            self._storer.store(nodeid, offset, data)
            return
        done = self._storer.submit(nodeid, offset, data)
        buffer = bytearray(_BUFFER_SIZE)
        while not self._storer.is_done():
            pointer, size = ffi.from_buffer(buffer), len(buffer)
            n = lib.kdbusfs_next(self._device, b"", 0, done, pointer, size, -1, 0)
            if n <= 0:
                if n == -errno.ENODEV:
                    return
                continue
            if _unpack_header(buffer)[1] in _PAGES:
                self._dispatch(memoryview(buffer), n)
            else:
                self._backlog.append(buffer[:n])


_REFUSED = frozenset(
    {
        Opcode.WRITE,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
        Opcode.LSEEK,
        Opcode.FSYNC,
        Opcode.FLUSH,
    }
)
_UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET})
_OPCODES = frozenset(int(o) for o in Opcode)
