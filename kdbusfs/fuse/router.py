# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router: one thread reads every request of the mount.

Requests on open files are answered right there, and so are LOOKUP and GETATTR, which each open
brings along; all else on the tree is pyfuse3's, by way of the relay.

While nobody waits each request is handled as it comes. When they come faster, all that are there
are read, and served in turn (`fair.py`): those of one user in order, those of several users by the
time each has had. Nobody can tell: two requests that wait have two threads that wait for them, so
neither was made after the other was answered, and kdbus could have had them in any order. What
nobody waits for, or the kernel waits for with a page locked, is handled when it is read, ahead of
all that wait. So RELEASE comes no later than anything that was asked for after that close(2); it
can't come earlier than a request on the same file, which the kernel holds open until the answer.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from pyfuse3 import FUSEError

from ..abi.items import Buffer
from ..abi.structs import U32
from ..bus.domain import Domain
from ..bus.principals import PRINCIPALS
from ..native import ffi, lib
from ..peer.leftovers import Leftovers
from ..peer.process import renew_scratch
from ..peer.stall import TURN, Crew, fail, has_left
from . import wire
from .backing import Backing, CacheBacking, PassthroughBacking, can_pass_through
from .calls import Calls
from .device import Device
from .fair import FairQueue
from .files import OpenFiles
from .invalidator import Invalidator
from .relay import Relay
from .trace import Trace
from .tree import Tree
from .watches import Watches
from .wire import (
    IN_HEADER,
    IN_HEADER_OPCODE,
    IN_HEADER_SIZE,
    IN_HEADER_UID,
    OUT_HEADER,
    OUT_HEADER_SIZE,
    Ids,
    Opcode,
)

log = logging.getLogger(__name__)

_BUFFER_SIZE = 1 << 18
_LONGEST_WAIT_NS = 3600 * 10**9
"""A deadline may be any 64-bit number, centuries ahead; a wait that ends too soon does no harm."""
_LOG_PERIOD_NS = 60 * 10**9
_LOOK_EVERY = 16
"""Watched descriptors are looked at every so many requests, if there is no pause before."""
_MOST_QUEUED = 1024
"""No command's struct is as large: what is, is refused, and takes no memory to wait for that."""
_unpack_head = Struct("=IIQ").unpack_from
_unpack_header = IN_HEADER.unpack_from
_unpack_u32 = U32.unpack_from
_IOCTL = int(Opcode.IOCTL)
_POLL = int(Opcode.POLL)
_DUE = -2
_LOOK_NS = 50_000_000
"""How often a caller that can't be let go is looked at, in case it is killed."""
_INTERRUPT = int(Opcode.INTERRUPT)
_LOOKUP = int(Opcode.LOOKUP)
_GETATTR = int(Opcode.GETATTR)
_QUEUED = frozenset({_IOCTL, _POLL, _LOOKUP, _GETATTR, int(Opcode.OPEN)})
"""What a thread waits for and the router answers."""


class Row(NamedTuple):
    """Who answers requests of one opcode, and how many bytes each has behind its header at least.
    It may have to answer later, but never waits."""

    handler: Callable[[int, int, int, Ids, memoryview], None]
    size: int = 0


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
        self._device = Device(device, trace)
        self._domain = domain
        self._tree = tree
        tree.on_change = self._drop_attributes
        self._invalidator = Invalidator(device, tree.nodeid)
        domain.root.on_unlink = self._invalidator.drop
        self.relay = Relay(self._device, tree, tree_socket, self._initialise)
        self.pool = pool
        self._spin_ns = spin_us * 1000
        self._trace = trace
        self._leftovers = Leftovers()
        self._watches = Watches()
        watch, wake = self._watches.watch, self._watches.wake
        self._files = OpenFiles(self._device, domain, tree, self._new_backing, watch)
        self._calls = Calls(
            self._device, domain, self._files, watch, self._put_back, self._put_off, wake
        )
        self._interrupts = self._calls.interrupts
        self._rows = self._table()
        self._crew = Crew(self._run, self._note_stall, self._watches.wake)
        self._quiet_until = 0
        self._backlog: deque[bytes] = deque()
        """Requests to be started anew."""
        self._kept: dict[int, deque[bytes]] = {}
        """By uid, requests of those whose calls stall too often already."""
        self._kept_is_next = False
        self._hurries = False
        """Whether one of these is to be served next, so that the wait for others is short."""
        self._queue: FairQueue[bytes] = FairQueue()
        """Requests that have been read and wait for their turn."""
        self._queued: set[int] = set()
        """Their uniques."""
        self._begun: set[int] = set()
        """Those of them that are to be gone on with."""
        self._queued_interrupts: set[int] = set()
        """Those of them that have been interrupted already."""
        self.has_pools = True
        """Whether the kernel can do the kind of pool that is wanted."""

    # --- the loop

    def start(self, on_initialised: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Answer requests, in a thread, until the file system is unmounted. *on_initialised* is
        called when the kernel has been answered first, *on_end* at the end."""
        self._on_initialised = on_initialised
        self._on_end = on_end
        self._invalidator.start()
        self._crew.start()

    def _note_stall(self) -> int:
        """The router's thread stalls, and another one is about to go on."""
        now = time.monotonic_ns()
        if now >= self._quiet_until:
            # Callers who stall on purpose must not fill the log.
            self._quiet_until = now + _LOG_PERIOD_NS
            log.warning("a caller's memory does not fault in: another thread takes over")
        renew_scratch()
        self._watches.keep_waking()
        return self._calls.note_stall()

    def _put_back(self, request: bytes) -> None:
        """In a thread that stalled: leave a request to the successor."""
        self._backlog.append(request)
        self._watches.wake()

    def _put_off(self, request: bytes) -> None:
        """Leave a request, which has begun, for when others have had their turn."""
        self._begun.add(_unpack_head(request)[2])
        self._queue.push(_unpack_u32(request, IN_HEADER_UID)[0], request)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            log.exception("ERROR: the router ended")
        if not self._crew.is_overtaken():
            try:
                self._close()
            finally:
                self._on_end()

    def _loop(self) -> None:
        """Holding the turn: handle requests until the mount is gone, or somebody took over.

        Each round does one thing, the most urgent: a call whose wait is over, a request to be
        started anew, a deadline, and only then the wait for requests, without the turn. After
        whatever may access a caller's memory the thread may have been overtaken: then the router's
        state is its successor's, and it has to leave without touching any.
        """
        domain, watches, calls, crew = self._domain, self._watches, self._calls, self._crew
        me, completed = crew.current, calls.completed
        buffer = bytearray(_BUFFER_SIZE)
        device, fd, spin = self._device, self._device.fd, self._spin_ns
        pointer, size = ffi.from_buffer(buffer), len(buffer)
        view = memoryview(buffer)
        next_request = lib.kdbusfs_next
        acquire, release = TURN.acquire, TURN.release
        queue, n_turns = self._queue, 0
        while crew.current is me:
            if completed:
                self._finish()
                continue
            if (self._backlog or self._kept) and (request := self._next_kept()) is not None:
                self._again(request)
                continue
            timeout = self._wait_ns()
            if timeout == _DUE:
                # However many requests there are, their turn comes after it.
                self._look_around()
                continue
            # Without the turn those who come back from a stall can undo what they had begun.
            reply, device.pending = device.pending, b""
            release()
            n = next_request(fd, reply, len(reply), watches.fd, pointer, size, timeout, spin)
            acquire()
            if n > 0:
                if queue or n != _unpack_u32(buffer)[0]:
                    self._take_in(view[:n])
                else:
                    self._dispatch(view, n)
                if crew.current is not me:
                    # What is left to be done is the successor's, who may be at it by now.
                    return
                n_turns += 1
                if watches.fd >= 0 and not n_turns % _LOOK_EVERY:
                    self._look_around()
            elif n == -errno.ENODEV:
                return
            elif n == 0 or n in (-errno.EINTR, -errno.ENOENT):
                self._look_around()
            else:
                raise OSError(-n, os.strerror(-n))
            if queue and crew.current is me:
                self._serve()
            if domain.work and crew.current is me:
                self._work()

    def _wait_ns(self) -> int:
        """How long a request may be waited for: in ns, -1 for ever, or _DUE if a deadline has
        come."""
        timeout = _LOOK_NS if self._interrupts.pending else -1
        if self._queue or self._domain.work or self._hurries:
            self._hurries, timeout = False, 0
        if not self._domain.watches_deadlines:
            return timeout
        deadline = self._domain.next_deadline()
        if deadline is None:
            return timeout
        left = min(deadline - time.monotonic_ns(), _LONGEST_WAIT_NS)
        if left <= 0:
            return _DUE
        return left if timeout < 0 else min(left, timeout)

    def _take_in(self, requests: memoryview) -> None:
        """There is more than one request: let those wait that can, by user."""
        while requests:
            size, opcode, unique = _unpack_head(requests)
            request, requests = requests[:size], requests[size:]
            if opcode in _QUEUED and size <= _MOST_QUEUED:
                uid = PRINCIPALS.of(_unpack_u32(request, IN_HEADER_UID)[0])
                self._queue.push(uid, bytes(request))
                self._queued.add(unique)
            elif opcode == _INTERRUPT and wire.interrupted(request) in self._queued:
                # It is for later, when the request it is for begins.
                self._queued_interrupts.add(wire.interrupted(request))
            else:
                self._dispatch(request, size)
                self._device.write_pending()

    def _serve(self) -> None:
        """Handle the request whose turn it is."""
        self._device.write_pending()
        uid, request = self._queue.pop()
        unique = _unpack_head(request)[2]
        self._queued.discard(unique)
        if unique in self._queued_interrupts:
            self._queued_interrupts.remove(unique)
            self._interrupts.expect(unique)
        begun = time.monotonic_ns()
        if unique in self._begun:
            self._begun.discard(unique)
            self._again(request)
        else:
            self._dispatch(memoryview(request), len(request))
        if not has_left():
            self._queue.charge(uid, time.monotonic_ns() - begun)

    def _finish(self) -> None:
        """Answer a call whose wait is over."""
        self._device.write_pending()
        try:
            self._calls.finish()
        except Exception:
            log.exception("ERROR: a call could not be finished")

    def _again(self, request: bytes) -> None:
        """Start a request anew."""
        self._device.write_pending()
        try:
            self._calls.again(memoryview(request))
        except Exception:
            log.exception("ERROR: a request could not be restarted")
            self._calls.give_up(_unpack_head(request)[2])

    def _work(self) -> None:
        """Do a piece of what takes long."""
        self._device.write_pending()
        try:
            self._domain.step()
        except Exception:
            log.exception("ERROR: a piece of work failed")

    def _look_around(self) -> None:
        """No request is there: see to what else there is to do."""
        for look in (self._watches.dispatch, self._domain.expire, self._interrupts.look_for_killed):
            try:
                look()
            except Exception:
                log.exception("ERROR: an event was not handled")

    def _next_kept(self) -> bytes | None:
        """A request that was left by somebody who stalled, or of a user who has its share of
        calls again; the latter only every other time, so that others get theirs."""
        if self._backlog:
            return self._backlog.popleft()
        users = self._crew.users
        uid = next((uid for uid in self._kept if not users.has_its_share(uid)), None)
        self._kept_is_next = uid is not None and not self._kept_is_next
        if uid is None or not self._kept_is_next:
            self._hurries = uid is not None
            return None
        queue = self._kept[uid]
        request = queue.popleft()
        if not queue:
            del self._kept[uid]
        return request

    def _close(self) -> None:
        self._crew.close()
        self._calls.close()
        self._leftovers.close()
        self._invalidator.close()

    def _dispatch(self, request: memoryview, size: int) -> None:
        try:
            if _unpack_u32(request, IN_HEADER_OPCODE)[0] == _IOCTL:
                if self._crew.users and self._has_to_wait(request, size):
                    return
                self._calls.ioctl(request)
                return
            _, opcode, unique, nodeid, uid, gid, tid, _, _ = _unpack_header(request)
            ids = (uid, gid, tid)
            if opcode == _POLL:
                self._files.poll(unique, ids, request)
            else:
                self._dispatch_rare(opcode, unique, nodeid, ids, request[:size])
        except Exception:
            # A broken invariant is ours alone: the caller gets EIO, the others go on.
            _, opcode, unique, *_ = _unpack_header(request)
            log.exception("ERROR: request %d failed", opcode)
            self._calls.give_up(unique)

    def _has_to_wait(self, request: memoryview, size: int) -> bool:
        """Whether a command is kept for later, since too many of the same user's stall."""
        uid = PRINCIPALS.of(_unpack_u32(request, IN_HEADER_UID)[0])
        if uid not in self._kept and not self._crew.users.has_its_share(uid):
            return False
        self._kept.setdefault(uid, deque()).append(bytes(request[:size]))
        self._calls.hold(request)
        return True

    def _dispatch_rare(
        self, opcode: int, unique: int, nodeid: int, ids: Ids, request: memoryview
    ) -> None:
        row = self._rows.get(opcode)
        if row is None:
            self.relay.take(opcode, unique, nodeid, ids, request)
            return
        if len(request) < IN_HEADER_SIZE + row.size:
            raise ValueError(f"request of {len(request)} bytes")
        row.handler(opcode, unique, nodeid, ids, request)

    def _table(self) -> dict[int, Row]:
        """Who answers what, but for IOCTL and POLL, which come often; all else is pyfuse3's."""
        files, tree = self._files, self._tree
        return {
            Opcode.LOOKUP: Row(self._describe, 1),
            Opcode.GETATTR: Row(self._describe),
            Opcode.OPEN: Row(files.open, wire.OPEN_IN.size),
            Opcode.RELEASE: Row(files.release, wire.RELEASE_IN.size),
            Opcode.READ: Row(files.read, wire.READ_IN.size),
            Opcode.INTERRUPT: Row(self._interrupts.take, wire.INTERRUPT_IN.size),
            Opcode.FORGET: Row(tree.forget_one, wire.FORGET_IN.size),
            Opcode.BATCH_FORGET: Row(tree.forget_many, wire.BATCH_FORGET_IN.size),
            Opcode.WRITE: Row(files.refuse),
            Opcode.FALLOCATE: Row(files.refuse),
            Opcode.COPY_FILE_RANGE: Row(files.refuse),
            Opcode.LSEEK: Row(files.refuse),
            Opcode.FSYNC: Row(files.refuse),
            Opcode.FLUSH: Row(files.refuse),
        }

    def _describe(
        self, opcode: int, unique: int, nodeid: int, ids: Ids, request: memoryview
    ) -> None:
        """LOOKUP or GETATTR."""
        name, body, error = b"", b"", 0
        try:
            if opcode == _LOOKUP:
                name = bytes(request[IN_HEADER_SIZE:-1])
                body = self._tree.entry(nodeid, name, ids[0])
            else:
                body = self._tree.attributes(nodeid)
        except FUSEError as failure:
            error = failure.errno
        # It goes with the next wait, in the same call of C.
        self._device.pending = OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), -error, unique) + body
        if self._trace is not None:
            target = f"nodeid={nodeid} {name.decode(errors='replace')}".rstrip()
            self._trace.line(Opcode(opcode).name, ids, error, target)

    def _drop_attributes(self, nodeid: int) -> None:
        """In the tree's thread: have the kernel ask anew what *nodeid* is like."""
        code = wire.NOTIFY_CODE_INVAL_INODE
        size = wire.NOTIFY_INVAL_INODE.size
        self._device.write(wire.NOTIFY_INVAL_INODE.pack(size, code, 0, nodeid, -1, 0))

    # --- pools

    def _initialise(self) -> None:
        """In the relay's thread: the kernel has been told what we can do."""
        self._set_up_pools()
        self._on_initialised()

    def _set_up_pools(self) -> None:
        passes_through = self.pool != "cache" and can_pass_through(self._device.fd)
        if self.pool == "auto":
            self.pool = "passthrough" if passes_through else "cache"
        self.has_pools = self.pool == "cache" or passes_through
        if self.has_pools:
            log.info("pools by %s", self.pool)

    def _new_backing(self, nodeid: int, uid: int) -> Backing:
        if self.pool == "passthrough":
            return PassthroughBacking(self._device.fd, uid, self._leftovers)
        direct_io = bool(self.relay.kernel_flags2 & wire.FLAG2_DIRECT_IO_ALLOW_MMAP)
        return CacheBacking(
            lambda offset, data: self._push(nodeid, offset, data),
            lambda size: self._tree.set_size(nodeid, size),
            direct_io,
        )

    def _push(self, nodeid: int, offset: int, data: Buffer) -> None:
        """Push *data* into the page cache of *nodeid* (FUSE_NOTIFY_STORE).

        That waits for pages which a client is just faulting in, or which it has written to and
        the kernel wants to have written back, and the answer is ours to give. So it is one more
        thing that may stall: then another thread gives that answer.
        """
        size = wire.NOTIFY_STORE.size + len(data)
        header = wire.NOTIFY_STORE.pack(
            size, wire.NOTIFY_CODE_STORE, 0, nodeid, offset, len(data), 0
        )
        push = lib.kdbusfs_push_held if self._crew.is_overtaken() else lib.kdbusfs_push
        error = push(self._device.fd, header, len(header), ffi.from_buffer(data), len(data))
        if error == -errno.ESTALE:
            fail(error)
        if error:
            # ENOENT: the inode is gone, nobody maps it any more.
            log.debug("slice not pushed: %s", os.strerror(-error))
