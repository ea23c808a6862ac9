# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router: one thread reads every request of the mount, in order.

Handle requests are answered right there; requests on the tree are pyfuse3's, by way of the relay.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
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
from .invalidator import Invalidator
from .relay import Relay
from .storer import Storer
from .trace import Trace
from .tree import Tree
from .watchdog import Watchdog
from .watches import Watches
from .wire import IN_HEADER, OUT_HEADER, OUT_HEADER_SIZE, Opcode

log = logging.getLogger(__name__)

_BUFFER_SIZE = 1 << 18
_LONGEST_WAIT_NS = 3600 * 10**9
"""A deadline may be any 64-bit number, centuries ahead; a wait that ends too soon does no harm."""
_LOG_PERIOD_NS = 60 * 10**9
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
        self._invalidator = Invalidator(device, tree.nodeid)
        domain.root.on_unlink = self._invalidator.drop
        self.relay = Relay(device, tree, tree_socket, trace, self._initialise)
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
        self._invalidator.start()
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
        self._invalidator.close()
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
        elif opcode == Opcode.FORGET:
            self._tree.forget_one(nodeid, request)
        elif opcode == Opcode.BATCH_FORGET:
            self._tree.forget_many(request)
        elif opcode == _READ:
            handles.read(unique, ids, request)
        elif opcode in _REFUSED:
            handles.refuse(unique, ids, Opcode(opcode).name)
        else:
            self.relay.take(opcode, unique, nodeid, ids, request)

    def _write(self, data: Buffer) -> None:
        try:
            os.write(self._device, data)
        except OSError as error:
            log.debug("reply not taken: %s", error)

    # --- pools

    def _initialise(self) -> None:
        """In the relay's thread: the kernel has been told what we can do."""
        self._set_up_pools()
        self._on_initialised()

    def _set_up_pools(self) -> None:
        passes_through = self.pool != "cache" and can_pass_through(self._device)
        if self.pool == "auto":
            self.pool = "passthrough" if passes_through else "cache"
        self.has_pools = self.pool == "cache" or passes_through
        if self.has_pools:
            log.info("pools by %s", self.pool)

    def _new_backing(self, nodeid: int, uid: int) -> Backing:
        if self.pool == "passthrough":
            return PassthroughBacking(self._device, uid)
        direct_io = bool(self.relay.kernel_flags2 & wire.FLAG2_DIRECT_IO_ALLOW_MMAP)
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
