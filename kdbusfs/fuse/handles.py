# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handle requests: OPEN, RELEASE, IOCTL, POLL, INTERRUPT, READ, WRITE.

Each is answered in the router's thread, to the end, but for two kinds of ioctl: a synchronous
SEND stays unanswered until the bus completes it, and a call whose caller must be stopped by
ptrace (descriptors to install, a system call to restart) is answered by a worker thread.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import (
    EBADF,
    EBUSY,
    EFAULT,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    ENODEV,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
)
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
from struct import Struct
from typing import Protocol

from ..abi.commands import FORMS
from ..abi.errors import CommandError, Fault, Stalled
from ..abi.items import Buffer
from ..abi.numbers import ExtensionCommand, Limit, RecvReturnFlag
from ..abi.structs import U32, U64
from ..bus.call import PENDING, Call
from ..bus.connection import Delivery
from ..bus.domain import Domain
from ..bus.endpoint import Endpoint
from ..bus.handle import Handle
from ..bus.node import Node
from ..bus.quota import Shares
from ..native import ffi, lib
from ..peer.closers import CLOSERS
from ..peer.descriptors import FileDescriptor, Watcher
from ..peer.memory import PoolMemory
from ..peer.process import Process
from ..peer.table import check_exhausted
from . import wire
from .backing import Backing
from .trace import Trace
from .tree import Tree
from .wire import IN_HEADER_SIZE, IOCTL_AT, OUT_HEADER_SIZE

log = logging.getLogger(__name__)

_DIRECTION_READ = 0x80000000
"""_IOC_READ: the kernel copies what our reply brings to the caller's struct."""
_HUNG_UP = POLLERR | POLLHUP
_WRITABLE = POLLOUT | POLLWRNORM
_READABLE = POLLIN | POLLRDNORM | _WRITABLE
_TRACERS = 16
"""How many callers may be under ptrace at a time; each can take up to the timeout."""
_TRACER_TIMEOUT_NS = 5_000_000_000
_INCOMPLETE = int(RecvReturnFlag.INCOMPLETE_FDS)
_MAX_OPEN = 4 * int(Limit.USER_CONNECTIONS)
"""Endpoints a user may have open, but for root: all its connections, and many that have not said
HELLO."""
_OPENS = 1 << 17
_MOST_OPENS = 2 * _MAX_OPEN
"""Files of the mount that may be open at all, and by one user."""
_SOCKET_HEADER = Struct("=QQ")
"""What precedes descriptors on a connection's socket: offset of the slice, how many."""
_BY_SOCKET = frozenset({ExtensionCommand.RECV, ExtensionCommand.SEND})

_collect, _collected = CLOSERS.collect, CLOSERS.collected
_unpack_request = wire.IOCTL_REQUEST.unpack_from
_unpack_u64 = U64.unpack_from
_pack_out_header = wire.OUT_HEADER.pack
_pack_ioctl_out = wire.IOCTL_OUT.pack
_IOCTL_OUT_SIZE = wire.IOCTL_OUT.size


class NewBacking(Protocol):
    """Makes the pool side of an endpoint that user *uid* is opening under a nodeid."""

    def __call__(self, nodeid: int, uid: int) -> Backing: ...


class OpenFile:
    """What an fh of ours stands for: a handle of the bus and how the kernel sees it."""

    __slots__ = ("backing", "fh", "handle", "kh", "memory", "nodeid", "poll_wanted", "uid")

    def __init__(self, fh: int, nodeid: int, backing: Backing | None) -> None:
        self.fh = fh
        self.nodeid = nodeid
        self.backing = backing
        self.handle: Handle
        self.memory: PoolMemory | None = None
        self.uid = 0
        """Who opened it."""
        self.kh = 0
        """The kernel's name for whoever polls this file."""
        self.poll_wanted = False

    def new_memory(self, size: int) -> PoolMemory:
        if self.backing is None:
            raise CommandError(ENODEV, "no pool behind this file")
        self.memory = self.backing.new_memory(size)
        return self.memory


class Handles:
    """All open files of a mount. *device* is /dev/fuse, *watcher* watches cancel descriptors."""

    def __init__(
        self,
        device: int,
        domain: Domain,
        tree: Tree,
        new_backing: NewBacking,
        watcher: Watcher,
        trace: Trace | None,
        put_back: Callable[[bytes], None] = lambda request: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._domain = domain
        self._tree = tree
        self._new_backing = new_backing
        self._watcher = watcher
        self._trace = trace
        self._files: dict[int, OpenFile] = {}
        self._open_nodeids: set[int] = set()
        self._n_open: dict[int, int] = {}
        """Open endpoints by uid: each takes descriptors of ours."""
        self._opens = Shares(_OPENS, _MOST_OPENS)
        """All open files: even `control`, which takes nothing but memory."""
        self._warned: set[Node] = set()
        self._next_fh = 1
        self._waiting: dict[int, Call] = {}
        """Calls that are PENDING, by the unique of their request. The origin of a call is its
        (OpenFile, unique)."""
        self._put_back = put_back
        self._wake_router = wake
        self._stalled: set[int] = set()
        """Requests that have been tried again once."""
        self._current: Call | None = None
        """The call whose request is being handled."""
        self.completed: deque[Call] = deque()
        """Calls the bus has completed, to be finished when nothing else is under way."""
        self.reply: Buffer = b""
        """Its answer, if that is ready: the router writes it as it goes for the next request."""
        self._workers = ThreadPoolExecutor(_TRACERS, "kdbusfs-tracer")
        # One that is there whatever comes.
        CLOSERS.start_thread()

    def close(self) -> None:
        """The mount is gone: every file is closed, in the order of opening."""
        for fh in list(self._files):
            self._close_file(fh)
        self._workers.shutdown()

    # --- replies

    def _reply(self, unique: int, error: int = 0, body: bytes = b"") -> None:
        header = wire.OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), -error, unique)
        self._write(header + body)

    def _write(self, data: Buffer) -> None:
        try:
            os.write(self._device, data)
        except OSError as error:
            # ENOENT: the request was aborted (the mount is being torn down).
            log.debug("reply not taken: %s", error)

    # --- open and release

    def open(self, unique: int, nodeid: int, ids: tuple[int, int, int], request: Buffer) -> None:
        node = self._tree.node(nodeid)
        try:
            if node is None or node.is_directory:
                raise CommandError(EIO, "no file")
            peer = self._peer(ids)
            has_pool = isinstance(node.subject, Endpoint)
            if has_pool and nodeid in self._open_nodeids:
                if not U32.unpack_from(request, IN_HEADER_SIZE)[0]:
                    # open(2) brings O_LARGEFILE at least: it is the kernel, on behalf of lsattr(1)
                    # and others that ask for attributes, which kdbus has none of.
                    raise CommandError(ENOTTY, "no file attributes")
                self._warn_of_second_open(node)
                raise CommandError(EBUSY, "an inode has one pool")
            if has_pool and peer.uid and self._n_open.get(peer.uid, 0) >= _MAX_OPEN:
                raise CommandError(EMFILE, f"{_MAX_OPEN} endpoints open of this user")
            file = self._new_file(nodeid, node, peer)
            if file.backing is not None:
                self._open_nodeids.add(nodeid)
                self._n_open[peer.uid] = self._n_open.get(peer.uid, 0) + 1
            flags, backing_id = wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH, 0
            if file.backing is not None:
                flags, backing_id = file.backing.open_flags, file.backing.backing_id
        except CommandError as error:
            self._reply(unique, error.errno)
            self._traced("OPEN", ids, error.errno, f"nodeid={nodeid}", error)
            return
        self._next_fh += 1
        self._files[file.fh] = file
        self._reply(unique, 0, wire.OPEN_OUT.pack(file.fh, flags, backing_id))
        assert node is not None
        self._traced("OPEN", ids, 0, f"{node.name} fh={file.fh}")

    def _new_file(self, nodeid: int, node: Node, peer: Process) -> OpenFile:
        """An open file that is charged to *peer*; EMFILE, ENFILE, ENOMEM."""
        file = OpenFile(self._next_fh, nodeid, None)
        file.uid = peer.uid
        self._opens.charge(peer.uid, 1, EMFILE)
        try:
            file.handle = Handle(self._domain, node, peer.credentials(), file.new_memory)
            if isinstance(node.subject, Endpoint):
                file.backing = self._new_backing(nodeid, peer.uid)
        except OSError as error:
            self._opens.discharge(peer.uid, 1)
            check_exhausted(error.errno)
            raise CommandError(error.errno or EIO, "no backing for a pool") from None
        except BaseException:
            self._opens.discharge(peer.uid, 1)
            raise
        return file

    def release(self, unique: int, ids: tuple[int, int, int], request: Buffer) -> None:
        (fh,) = U64.unpack_from(request, IN_HEADER_SIZE)
        self._close_file(fh)
        self._reply(unique)
        self._traced("RELEASE", ids, 0, f"fh={fh}")

    def _close_file(self, fh: int) -> None:
        file = self._files.pop(fh)
        # The latest call may be the file's own, and would keep alive all that it had.
        self._current = None
        self._opens.discharge(file.uid, 1)
        file.handle.close()
        file.memory = None
        if file.handle.connection is not None:
            file.handle.connection.waker = None
        if file.backing is not None:
            self._open_nodeids.discard(file.nodeid)
            n_open = self._n_open.pop(file.uid) - 1
            if n_open:
                self._n_open[file.uid] = n_open
            file.backing.close()

    def _warn_of_second_open(self, node: Node) -> None:
        """Say once for each node what its users can't find out: they could fill the log."""
        if node in self._warned:
            return
        self._warned = {known for known in self._warned if known.alive} | {node}
        log.warning(
            "second open of one inode of %s refused: bind-mount the bus's directory, "
            "not the endpoint alone",
            node.name,
        )

    def _peer(self, ids: tuple[int, int, int]) -> Process:
        uid, gid, tid = ids
        if not tid:
            # The caller has no place in our PID namespace: it can be neither read nor named.
            raise CommandError(EPERM, "caller from outside the daemon's PID namespace")
        return Process(tid, uid, gid, self._watcher)

    # --- ioctl

    def ioctl(self, request: memoryview) -> None:
        unique, uid, gid, tid, fh, flags, code, address, in_size = _unpack_request(request)
        form = FORMS.get(code)
        file = self._files.get(fh)
        # The fh of a directory is pyfuse3's, and may be the same number as one of ours.
        if form is None or file is None or flags & wire.IOCTL_DIR:
            self._reply(unique, ENOTTY)
            self._traced("IOCTL", (uid, gid, tid), ENOTTY, f"{code:#x} fh={fh}")
            return
        peer = Process(tid, uid, gid, self._watcher)
        _collect(uid)
        call = Call(code, form, peer, address, self._complete, (file, unique))
        self._current = call
        why = None
        try:
            if file.handle.execute(call, request[IOCTL_AT : IOCTL_AT + in_size]) == PENDING:
                if call.wait is not None:
                    self._waiting[unique] = call
                return
            error = 0
        except (CommandError, Stalled) as failure:
            if isinstance(failure, CommandError):
                error = failure.errno
                if self._trace is not None:
                    # Without its traceback, which would keep this frame and all it holds alive.
                    why = failure.with_traceback(None)
            else:
                if self._try_again(unique, request):
                    return
                error = EFAULT
            if call.read and in_size and not code & _DIRECTION_READ:
                (before,) = _unpack_u64(request, IOCTL_AT + 16)
                (after,) = _unpack_u64(call.data, 16)
                if not before and not after and self._trace is None:
                    # It failed, and return_flags is 0 as it was: not worth a write (1.3 us).
                    self._hand_over(call, _pack_out_header(OUT_HEADER_SIZE, -error, unique))
                    return
        connection = file.handle.connection
        if connection is not None and connection.waker is None:
            connection.waker = lambda: self._wake(file)
        self._answer(call, error, why)

    def _try_again(self, unique: int, request: memoryview) -> bool:
        """Whether a request that stalled is left to our successor, which starts it anew."""
        if unique in self._stalled:
            self._stalled.discard(unique)
            return False
        self._stalled.add(unique)
        self._put_back(bytes(request))
        return True

    def _complete(self, call: Call, error: int) -> None:
        self._waiting.pop(call.origin[1], None)
        self.completed.append(call)

    def finish(self) -> None:
        """Answer the calls that have been completed."""
        while self.completed:
            call = self.completed.popleft()
            handle, unique = call.origin[0].handle, call.origin[1]
            _collect(call.peer.uid)
            try:
                error = handle.finish(call)
            except Stalled:
                if unique not in self._stalled:
                    self._stalled.add(unique)
                    self.completed.append(call)
                    self._wake_router()
                    return
                handle.abandon(call)
                error = EFAULT
            except CommandError as failure:
                error = failure.errno
            except Exception:
                log.exception("ERROR: a call was not finished")
                error = EIO
            if error == EINTR:
                self._restart(call)
            else:
                self._answer(call, error)

    def _answer(self, call: Call, error: int, why: CommandError | None = None) -> None:
        """Store the results of *call* in its caller's memory and let it go."""
        delivery: Delivery | None = call.fds
        if delivery is not None:
            # The latest call is remembered, but must keep nobody's files open.
            call.fds = None
            if not error:
                self._deliver(call, delivery)
                return
            delivery.release()
        if self._stalled:
            self._stalled.discard(call.origin[1])
        self._hand_over(call, self._result(call, error))
        if self._trace is not None:
            self._trace.call(call, error, why)

    def _hand_over(self, call: Call, result: bytes) -> None:
        """Give *call* its answer, as soon as what it let go of is closed (`peer.closers`)."""
        closing = _collected()
        if closing is not None:
            closing.when_done(lambda: self._write(result))
        elif call is self._current:
            self.reply = result
        else:
            self._write(result)

    def _result(self, call: Call, error: int) -> bytes:
        """The reply to *call*; what FUSE does not carry back itself has been written."""
        unique = call.origin[1]
        if not call.read:
            return wire.OUT_HEADER.pack(OUT_HEADER_SIZE, -error, unique)
        start, end = call.store_on_error if error else call.store
        if call.code & _DIRECTION_READ:
            header = _pack_ioctl_out(_IOCTL_OUT_SIZE + end, 0, unique, -error, 0, 0, 0)
            return header + call.data[:end]
        try:
            call.peer.write(call.address + start, call.data[start:end])
        except (Fault, Stalled):
            error = EFAULT
        return _pack_ioctl_out(_IOCTL_OUT_SIZE, 0, unique, -error, 0, 0, 0)

    # --- descriptors for the caller

    def _deliver(self, call: Call, delivery: Delivery) -> None:
        connection = call.origin[0].handle.connection
        assert connection is not None
        if call.code in _BY_SOCKET and isinstance(connection.fd_socket, FileDescriptor):
            complete = self._send_fds(connection.fd_socket, delivery)
            delivery.release()
            self._put_return_flags(call, 0 if complete and delivery.accepted else _INCOMPLETE)
            self._hand_over(call, self._result(call, 0))
            if self._trace is not None:
                self._trace.call(call, 0)
        else:
            # The flags are stored for the worst case first, and mended when it did not come.
            self._put_return_flags(call, _INCOMPLETE)
            reply = self._result(call, 0)
            self._workers.submit(self._install, call, delivery, reply)

    def _send_fds(self, to: FileDescriptor, delivery: Delivery) -> bool:
        """Send descriptors over a connection's own socket; False if it would not take them."""
        fds = [d.fd for d in delivery.descriptors if isinstance(d, FileDescriptor)]
        if not fds:
            return True
        header = _SOCKET_HEADER.pack(delivery.slice.offset, len(fds))
        try:
            to.send(header, fds)
        except OSError as error:
            log.debug("descriptors not sent: %s", error)
            return False
        return True

    def _put_return_flags(self, call: Call, flags: int) -> None:
        """Set msg.return_flags (RECV) or reply.return_flags (SEND)."""
        U64.pack_into(call.data, call.store[1] - 8, flags)

    def _install(self, call: Call, delivery: Delivery, reply: bytes) -> None:
        """In a worker: answer the call and put descriptors into its caller's table."""
        _collect(call.peer.uid)
        fds = [d.fd for d in delivery.descriptors if isinstance(d, FileDescriptor)]
        numbers = ffi.new("int32_t[]", [-1] * max(len(fds), 1))
        state = ffi.new("struct kdbusfs_install *")
        error = lib.kdbusfs_install_begin(
            state,
            self._device,
            reply,
            len(reply),
            call.peer.tid,
            ffi.new("int32_t[]", fds),
            len(fds),
            numbers,
            _TRACER_TIMEOUT_NS,
        )
        if error:
            log.debug("descriptors not installed in %d: %s", call.peer.tid, os.strerror(-error))
            delivery.release()
            self._wait_for_closing()
            self._write(reply)
        elif state.held:
            try:
                flags = delivery.installed(list(numbers)[: len(fds)])
                if not flags:
                    at = call.address + call.store[1] - 8
                    lib.kdbusfs_vm_write_held(call.peer.tid, at, bytes(8), 8)
                delivery.release()
                self._wait_for_closing()
            finally:
                lib.kdbusfs_install_end(state)
        else:
            delivery.release()
        if self._trace is not None:
            self._trace.call(call, 0)

    @staticmethod
    def _wait_for_closing() -> None:
        """In a worker: wait for what this thread let go of."""
        closing = _collected()
        if closing is not None:
            closing.wait()

    # --- signals

    def interrupt(self, request: Buffer) -> None:
        """A signal is pending for the caller of one of our calls; only those that wait care."""
        (unique,) = U64.unpack_from(request, IN_HEADER_SIZE)
        call = self._waiting.get(unique)
        if call is not None:
            connection = call.origin[0].handle.connection
            assert connection is not None
            connection.bus.interrupt(call)

    def _restart(self, call: Call) -> None:
        reply = self._result(call, EINTR)
        self._workers.submit(self._restart_in_worker, call, reply)

    def _restart_in_worker(self, call: Call, reply: bytes) -> None:
        """Answer with EINTR in such a way that the kernel restarts the call where it should."""
        error = lib.kdbusfs_interrupt(
            self._device, reply, len(reply), call.peer.tid, _TRACER_TIMEOUT_NS
        )
        if error:
            log.debug("plain EINTR for %d: %s", call.peer.tid, os.strerror(-error))
            self._write(reply)
        if self._trace is not None:
            self._trace.call(call, EINTR)

    # --- poll

    def poll(self, unique: int, ids: tuple[int, int, int], request: Buffer) -> None:
        fh, kh, flags, _ = wire.POLL_IN.unpack_from(request, IN_HEADER_SIZE)
        file = self._files.get(fh)
        if file is None:
            self._reply(unique, EBADF)
            return
        handle = file.handle
        if flags & wire.POLL_SCHEDULE_NOTIFY:
            file.kh = kh
            file.poll_wanted = True
        revents = _HUNG_UP if handle.hung_up else _READABLE if handle.readable else _WRITABLE
        self._reply(unique, 0, wire.POLL_OUT.pack(revents, 0))
        if self._trace is not None:
            self._trace.line("POLL", ids, 0, f"fh={fh} revents={revents:#x}")

    def _wake(self, file: OpenFile) -> None:
        if file.poll_wanted:
            file.poll_wanted = False
            self._write(wire.NOTIFY_POLL.pack(24, wire.NOTIFY_CODE_POLL, 0, file.kh))

    # --- read and write: page faults of a cache pool, and what users must not do

    def read(self, unique: int, ids: tuple[int, int, int], request: Buffer) -> None:
        fh, offset, size, read_flags, *_ = wire.READ_IN.unpack_from(request, IN_HEADER_SIZE)
        file = self._files.get(fh)
        memory = file.memory if file is not None else None
        by_read = read_flags & wire.READ_LOCKOWNER
        if file is None or by_read or memory is None or self._is_passthrough(file):
            self._reply(unique, EINVAL)
            self._traced("READ", ids, EINVAL, f"fh={fh}")
            return
        self._reply(unique, 0, memory.read(offset, min(size, max(memory.size - offset, 0))))
        self._traced("READ", ids, 0, f"fh={fh} offset={offset} size={size}")

    def _is_passthrough(self, file: OpenFile) -> bool:
        return file.backing is None or file.backing.backing_id != 0

    def refuse(self, unique: int, ids: tuple[int, int, int], name: str) -> None:
        """WRITE and other things that can't be done to a kdbus file."""
        # What kdbus's files had no operation for, the VFS answers in its own way.
        error = EOPNOTSUPP if name == "FALLOCATE" else EINVAL
        self._reply(unique, error)
        self._traced(name, ids, error, "")

    def _traced(
        self,
        name: str,
        ids: tuple[int, int, int],
        error: int,
        text: str,
        why: CommandError | None = None,
    ) -> None:
        if self._trace is not None:
            self._trace.line(name, ids, error, text, why)
