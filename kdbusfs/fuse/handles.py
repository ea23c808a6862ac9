# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handle requests: OPEN, RELEASE, IOCTL, POLL, INTERRUPT, READ, WRITE.

Each is answered in the router's thread, to the end, but for three kinds of ioctl: a synchronous
SEND stays unanswered until the bus completes it, a call whose caller must be stopped by ptrace, to
get descriptors, is answered by a worker thread, and a command whose results stall by the thread
that was the router when they did (`peer.stall`). All answers of ioctls go through `_send`, or else
are granted by `Ioctls.settle` (fuse/ioctl.py).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
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
from functools import partial
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
from struct import Struct
from typing import Protocol

from ..abi.errors import CommandError, Fault, Stalled
from ..abi.items import Buffer
from ..abi.numbers import ExtensionCommand, Limit, RecvReturnFlag
from ..abi.specs import COMMAND_SPECS
from ..abi.structs import CMD_RETURN_FLAGS, U32, U64
from ..bus.call import PENDING, Call
from ..bus.connection import Connection, FdTransfer
from ..bus.domain import Domain
from ..bus.endpoint import Endpoint
from ..bus.handle import Handle
from ..bus.node import Node
from ..bus.shares import Share
from ..peer.closers import CLOSERS, Closing
from ..peer.descriptors import FileDescriptor, Watcher, can_be_sent
from ..peer.fd_table import check_exhausted
from ..peer.memory import PoolMemory
from ..peer.process import Process
from ..peer.stall import MAX_OF_CALL
from ..peer.tracer import Installation, Tracer
from . import wire
from .backing import Backing
from .ioctl import Ioctl, Ioctls
from .trace import Trace
from .tree import Tree
from .wire import IN_HEADER_SIZE, IOCTL_AT, OUT_HEADER_SIZE

log = logging.getLogger(__name__)

_DIRECTION_READ = 0x80000000
"""_IOC_READ: the kernel copies what our reply brings to the caller's struct."""
_HUNG_UP = POLLERR | POLLHUP
_WRITABLE = POLLOUT | POLLWRNORM
_READABLE = POLLIN | POLLRDNORM | _WRITABLE
_INCOMPLETE = int(RecvReturnFlag.INCOMPLETE_FDS)
_MAX_OPEN = 4 * int(Limit.USER_CONNECTIONS)
"""Endpoints a user may have open, but for root: all its connections, and many that have not said
HELLO."""
_OPENS = 1 << 17
_MOST_OPENS = 2 * _MAX_OPEN
"""Files of the mount that may be open at all, and by one user."""
_SOCKET_HEADER = Struct("=QQ")
"""What precedes descriptors on a connection's socket: offset of the slice, how many."""
_SOCKET_HEADER_LOST = Struct("=QQQ")
"""The same if some could not be sent: _LOST is set in how many, and their positions follow."""
_LOST = 1 << 63
_BY_SOCKET = frozenset({ExtensionCommand.RECV, ExtensionCommand.SEND})

_ERESTARTSYS = 512
"""In linux/errno.h, for the kernel alone: restart the call after a handler with SA_RESTART, or
none; else EINTR."""

_collect, _collected = CLOSERS.collect, CLOSERS.collected
_unpack_request = wire.IOCTL_REQUEST.unpack_from
_unpack_u64 = U64.unpack_from
_pack_out_header = wire.OUT_HEADER.pack
_pack_ioctl_out = wire.IOCTL_OUT.pack
_IOCTL_OUT_SIZE = wire.IOCTL_OUT.size


def _report(error: BaseException) -> None:
    log.error("ERROR: nobody expected this", exc_info=error)


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
        self.memory = None
        self.memory = self.backing.new_memory(size)
        return self.memory


class _Handover:
    """Descriptors on their way to the caller of *ioctl*, as a worker of the tracer sees them.

    A class, since a function inside of another one, compiled, refers to itself: what it knows would
    stay until the collector comes by.
    """

    __slots__ = ("_transfer", "_handles", "_ioctl", "_uid")

    def __init__(self, handles: Handles, ioctl: Ioctl, transfer: FdTransfer, uid: int) -> None:
        self._handles = handles
        self._ioctl = ioctl
        self._transfer = transfer
        self._uid = uid

    def release(self) -> None:
        """Let go of the descriptors, and wait until they are closed."""
        _collect(self._uid)
        self._transfer.release()
        closing = _collected()
        if closing is not None:
            closing.wait()

    def tell(self, numbers: list[int]) -> Buffer:
        """What is to be in the caller's struct when it has got *numbers*."""
        ioctl = self._ioctl
        self._handles.put_return_flags(ioctl, self._transfer.installed(numbers))
        self.release()
        return ioctl.data[: ioctl.store[1]]


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
        domain.report = _report
        self._tree = tree
        self._new_backing = new_backing
        self._watcher = watcher
        self._trace = trace
        self._files: dict[int, OpenFile] = {}
        self._open_nodeids: set[int] = set()
        self._n_open: dict[int, int] = {}
        """Open endpoints by uid: each takes descriptors of ours."""
        self._opens = Share("open files", EMFILE, _OPENS, _MOST_OPENS)
        """All open files: even `control`, which takes nothing but memory."""
        self._warned: set[Node] = set()
        self._next_fh = 1
        self._ioctls = Ioctls()
        self._interrupted: set[int] = set()
        """Requests that stall or have to wait, and whose callers have a signal pending."""
        self._put_back = put_back
        self._wake_router = wake
        self.completed: deque[Ioctl] = deque()
        """Calls whose wait is over, to be finished."""
        self.current: Ioctl | None = None
        """The call that is being handled, or was the latest."""
        self.reply: Buffer = b""
        """Its answer, if that is ready: the router writes it as it goes for the next request."""
        self._tracer = Tracer(device)
        # One that is there whatever comes.
        CLOSERS.start_thread()

    def close(self) -> None:
        """The mount is gone: all callers have been let go, and nothing is stored any more. Every
        file is closed, in the order of opening."""
        for ioctl in self._ioctls:
            self._ioctls.settle(ioctl)
        for fh in list(self._files):
            self._close_file(fh)
        self._tracer.close()

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
        peer = self._peer(ids)
        try:
            if node is None or node.is_directory:
                raise CommandError(EIO, "no file")
            if not ids[2]:
                # The caller has no place in our PID namespace: it can be neither read nor named.
                raise CommandError(EPERM, "caller from outside the daemon's PID namespace")
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
            peer.let_go()
            self._reply(unique, error.errno)
            self._traced("OPEN", ids, error.errno, f"nodeid={nodeid}", error)
            return
        self._next_fh += 1
        self._files[file.fh] = file
        peer.let_go()
        self._reply(unique, 0, wire.OPEN_OUT.pack(file.fh, flags, backing_id))
        assert node is not None
        self._traced("OPEN", ids, 0, f"{node.name} fh={file.fh}")

    def _new_file(self, nodeid: int, node: Node, peer: Process) -> OpenFile:
        """An open file that is charged to *peer*; EMFILE, ENFILE, ENOMEM."""
        file = OpenFile(self._next_fh, nodeid, None)
        file.uid = peer.uid
        self._opens.charge(peer.uid, 1)
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
        self.current = None
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
        return Process(tid, uid, gid, self._watcher)

    # --- ioctl

    def ioctl(self, request: memoryview) -> None:
        """A request that has just come."""
        ioctl = self._accept(request)
        if ioctl is not None:
            self._execute(ioctl, request)

    def hold(self, request: memoryview) -> None:
        """A request that has just come, but has to wait: `again` will be called with it."""
        ioctl = self._accept(request)
        if ioctl is not None:
            ioctl.process.pin(self._device)

    def again(self, request: memoryview) -> None:
        """Start a request anew, unless its caller has been let go meanwhile."""
        earlier = self._ioctls.get(_unpack_request(request)[0])
        if earlier is None:
            return
        ioctl = self._accept(request)
        assert ioctl is not None
        ioctl.process = ioctl.peer = earlier.process.renewed()
        ioctl.n_stalls, ioctl.interrupted = earlier.n_stalls, earlier.interrupted
        self._execute(ioctl, request)

    def note_stall(self) -> int:
        """In the watch's thread: the current call stalls. Returns whose it is."""
        ioctl = self.current
        if ioctl is None:
            return 0
        ioctl.n_stalls += 1
        ioctl.process.pin(self._device)
        return ioctl.process.uid

    def _accept(self, request: memoryview) -> Ioctl | None:
        unique, uid, gid, tid, fh, flags, code, address, _ = _unpack_request(request)
        spec = COMMAND_SPECS.get(code)
        file = self._files.get(fh)
        # The fh of a directory is pyfuse3's, and may be the same number as one of ours.
        if spec is None or file is None or flags & wire.IOCTL_DIR:
            self._reply(unique, ENOTTY)
            self._traced("IOCTL", (uid, gid, tid), ENOTTY, f"{code:#x} fh={fh}")
            return None
        process = Process(tid, uid, gid, self._watcher)
        ioctl = Ioctl(unique, file, code, spec, process, address, self._complete)
        self._ioctls.enter(ioctl)
        if self._interrupted and unique in self._interrupted:
            ioctl.interrupted = True
        _collect(uid)
        return ioctl

    def _execute(self, ioctl: Ioctl, request: memoryview) -> None:
        self.current = ioctl
        try:
            self._try(ioctl, request)
        except Stalled:
            self._stalled(ioctl, request)
        except Exception as error:
            self._fail(ioctl, error)

    def _try(self, ioctl: Ioctl, request: memoryview) -> None:
        file, error, why = ioctl.file, 0, None
        in_size = _unpack_request(request)[8]
        try:
            if file.handle.execute(ioctl, request[IOCTL_AT : IOCTL_AT + in_size]) == PENDING:
                self._keep_waiting(ioctl)
                return
        except CommandError as failure:
            error = failure.errno
            if self._trace is not None:
                # Without its traceback, which would keep this frame and all it holds alive.
                why = failure.with_traceback(None)
            if ioctl.read and in_size and not ioctl.code & _DIRECTION_READ:
                (before,) = _unpack_u64(request, IOCTL_AT + CMD_RETURN_FLAGS)
                (after,) = _unpack_u64(ioctl.data, CMD_RETURN_FLAGS)
                if not before and not after and self._trace is None:
                    # It failed, and return_flags is 0 as it was: not worth a write (1.3 us).
                    self._send(ioctl, _pack_out_header(OUT_HEADER_SIZE, -error, ioctl.unique))
                    return
        connection = file.handle.connection
        if connection is not None and connection.waker is None:
            self._wake_by(connection, file)
        self._answer(ioctl, error, why)

    def _stalled(self, ioctl: Ioctl, request: memoryview) -> None:
        """What it had begun is undone: leave it to the successor, or to nobody, if the bus has
        ended the call meanwhile, or its caller is gone."""
        if ioctl.completed or self._ioctls.get(ioctl.unique) is None:
            return
        if ioctl.n_stalls < MAX_OF_CALL:
            self._put_back(bytes(request))
        else:
            self._refuse(ioctl, EFAULT)

    def _fail(self, ioctl: Ioctl, error: Exception) -> None:
        """A broken invariant is ours alone: the caller gets EIO, the others go on."""
        number = EIO
        if isinstance(error, CommandError):
            number = error.errno
        else:
            log.exception("ERROR: %s failed", ioctl.spec.name)
        self._refuse(ioctl, number)

    def _refuse(self, ioctl: Ioctl, error: int) -> None:
        """Answer with *error*; nothing is stored."""
        self._send(ioctl, _pack_out_header(OUT_HEADER_SIZE, -error, ioctl.unique))
        self._traced_call(ioctl, error)

    def give_up(self, unique: int) -> None:
        """Answer request *unique*, whatever has become of it, with EIO, and let go of its caller:
        nobody expected what happened."""
        ioctl = self._ioctls.get(unique)
        if ioctl is not None:
            self._ioctls.settle(ioctl)
        self._reply(unique, EIO)

    # --- calls that wait

    def _keep_waiting(self, ioctl: Ioctl) -> None:
        if ioctl.completed:
            return
        ioctl.process.pin(self._device)
        ioctl.waits = True
        if ioctl.interrupted:
            self._interrupt_wait(ioctl)

    def _complete(self, call: Call, error: int) -> None:
        """The bus has ended the wait of *call*. It is finished later, by itself: nothing that its
        caller does is to hold up whoever ended it."""
        assert isinstance(call, Ioctl)
        call.completed = True
        self.completed.append(call)

    def finish(self) -> None:
        """Answer one of the calls in `completed`."""
        ioctl = self.completed.popleft()
        handle = ioctl.file.handle
        if self._ioctls.get(ioctl.unique) is not ioctl:
            _collect(ioctl.process.uid)
            handle.abandon(ioctl)
            return
        try:
            _collect(ioctl.process.uid)
            self.current = ioctl
            error = handle.finish(ioctl)
            if error == EINTR:
                self._restart(ioctl)
            else:
                self._answer(ioctl, error)
        except Stalled:
            if ioctl.n_stalls < MAX_OF_CALL:
                self.completed.append(ioctl)
                self._wake_router()
            else:
                handle.abandon(ioctl)
                self._refuse(ioctl, EFAULT)
        except Exception as error:
            self._fail(ioctl, error)

    # --- answers

    def _send(self, ioctl: Ioctl, reply: bytes, has_turn: bool = True) -> None:
        """Answer *ioctl*, unless it has been answered. *has_turn*: this is the router's thread."""
        if not self._ioctls.settle(ioctl):
            return
        # As soon as what the call let go of is closed (`peer.closers`).
        closing = _collected()
        if closing is not None:
            self._write_when_done(closing, reply)
        elif has_turn and not self.reply:
            self.reply = reply
        else:
            self._write(reply)

    # A function with another one in it costs each of its calls an object.

    def _write_when_done(self, closing: Closing, reply: bytes) -> None:
        closing.when_done(lambda: self._write(reply))

    def _wake_by(self, connection: Connection, file: OpenFile) -> None:
        connection.waker = lambda: self._wake(file)

    def _answer(self, ioctl: Ioctl, error: int, why: CommandError | None = None) -> None:
        """Store the results of *ioctl* in its caller's memory and let it go."""
        transfer: FdTransfer | None = ioctl.fds
        if transfer is not None:
            # The latest call is remembered, but must keep nobody's files open.
            ioctl.fds = None
            if not error:
                self._deliver(ioctl, transfer)
                return
            transfer.release()
        reply, has_turn = self._result(ioctl, error)
        self._send(ioctl, reply, has_turn)
        self._traced_call(ioctl, error, why)

    def _result(self, ioctl: Ioctl, error: int) -> tuple[bytes, bool]:
        """The reply to *ioctl*; what FUSE does not carry back itself has been written. And whether
        this thread still runs the bus, after that."""
        unique = ioctl.unique
        if not ioctl.read:
            return _pack_out_header(OUT_HEADER_SIZE, -error, unique), True
        start, end = ioctl.store_on_error if error else ioctl.store
        if start == end:
            # It has been stored by the command itself.
            return _pack_ioctl_out(_IOCTL_OUT_SIZE, 0, unique, -error, 0, 0, 0), True
        if ioctl.code & _DIRECTION_READ:
            header = _pack_ioctl_out(_IOCTL_OUT_SIZE + end, 0, unique, -error, 0, 0, 0)
            return header + ioctl.data[:end], True
        address = ioctl.address + start
        fault, has_turn = ioctl.process.store(address, ioctl.data[start:end])
        error = fault or error
        return _pack_ioctl_out(_IOCTL_OUT_SIZE, 0, unique, -error, 0, 0, 0), has_turn

    # --- descriptors for the caller

    def _deliver(self, ioctl: Ioctl, transfer: FdTransfer) -> None:
        connection = ioctl.file.handle.connection
        assert connection is not None
        if ioctl.code in _BY_SOCKET and isinstance(connection.fd_socket, FileDescriptor):
            complete = self._send_fds(connection.fd_socket, transfer)
            transfer.release()
            self.put_return_flags(ioctl, 0 if complete and transfer.accepted else _INCOMPLETE)
            reply, has_turn = self._result(ioctl, 0)
            self._send(ioctl, reply, has_turn)
            self._traced_call(ioctl, 0)
        else:
            self._install(ioctl, transfer)

    def _send_fds(self, to: FileDescriptor, transfer: FdTransfer) -> bool:
        """Send descriptors over a connection's own socket; False if it would not take them all."""
        fds = [d.fd for d in transfer.descriptors if isinstance(d, FileDescriptor)]
        if not fds:
            return True
        offset = transfer.slice.offset
        try:
            to.send(_SOCKET_HEADER.pack(offset, len(fds)), fds)
        except BlockingIOError as error:
            log.debug("descriptors not sent: %s", error)
            return False
        except OSError as error:
            log.debug("some descriptors not sent: %s", error)
            self._send_some_fds(to, offset, fds)
            return False
        return True

    def _send_some_fds(self, to: FileDescriptor, offset: int, fds: list[int]) -> None:
        """Send those that can be sent."""
        lost = 0
        for position, fd in enumerate(fds):
            if not can_be_sent(fd):
                lost |= 1 << position
        rest = [fd for position, fd in enumerate(fds) if not lost >> position & 1]
        if not rest:
            return
        try:
            to.send(_SOCKET_HEADER_LOST.pack(offset, len(fds) | _LOST, lost), rest)
        except OSError as error:
            log.debug("descriptors not sent: %s", error)

    def put_return_flags(self, call: Call, flags: int) -> None:
        """Set msg.return_flags (RECV) or reply.return_flags (SEND)."""
        U64.pack_into(call.data, call.spec.msg_return_flags, flags)

    def _install(self, ioctl: Ioctl, transfer: FdTransfer) -> None:
        """Have the call answered, and descriptors put into its caller's table."""
        # As long as it is held: the store below may stall, and be killed.
        uid, tid = ioctl.process.uid, ioctl.process.thread()
        # The flags are stored for the worst case first, and mended when it did not come.
        self.put_return_flags(ioctl, _INCOMPLETE)
        reply, _ = self._result(ioctl, 0)
        content = ioctl.data[: ioctl.store[1]]
        fds = [d.fd for d in transfer.descriptors if isinstance(d, FileDescriptor)]
        handover = _Handover(self, ioctl, transfer, uid)
        job = Installation(
            tid,
            uid,
            reply,
            ioctl.address,
            content,
            fds,
            handover.tell,
            handover.release,
            partial(self._traced_call, ioctl, 0),
        )
        if not self._ioctls.settle(ioctl):
            transfer.release()
        elif not self._tracer.install(job):
            self._write(reply)

    # --- signals

    def interrupt(self, request: Buffer) -> None:
        """A signal is pending for the caller of one of our calls. FUSE says so once only."""
        (unique,) = U64.unpack_from(request, IN_HEADER_SIZE)
        ioctl = self._ioctls.get(unique)
        if ioctl is None or ioctl.completed:
            return
        if ioctl.waits:
            self._interrupt_wait(ioctl)
        else:
            ioctl.interrupted = True
            self._interrupted.add(unique)
            self.look_for_killed()

    def expect_interrupted(self, unique: int) -> None:
        """The same for a request that is handed to us next: it may stall."""
        self._interrupted.add(unique)

    def _interrupt_wait(self, ioctl: Ioctl) -> None:
        connection = ioctl.file.handle.connection
        assert connection is not None
        connection.bus.interrupt(ioctl)

    @property
    def has_interrupted(self) -> bool:
        """Whether `look_for_killed` is to be called now and then."""
        return bool(self._interrupted)

    def look_for_killed(self) -> None:
        """Let those go at once who stall, or have to wait, and are killed: else they could not
        end. Whether the signal of an interruption, or one that came after it, is SIGKILL, is
        nothing that FUSE tells."""
        for unique in list(self._interrupted):
            ioctl = self._ioctls.get(unique)
            if ioctl is None or ioctl.waits:
                self._interrupted.discard(unique)
                continue
            try:
                if ioctl.process.is_killed():
                    self._refuse(ioctl, EINTR)
            except Fault:
                # The kernel has let go of it by itself.
                self._ioctls.settle(ioctl)
            except (CommandError, OSError) as error:
                # This time it can't be known, for want of a descriptor for instance.
                log.debug("request %d not looked at: %s", unique, error)

    def _restart(self, ioctl: Ioctl) -> None:
        """A signal has ended the wait: let the kernel decide, by its handler, whether the call is
        made again or fails with EINTR. It hands the result of an ioctl on as it is, ERESTARTSYS
        too, and the signal is pending for as long as the thread is in its call."""
        reply, has_turn = self._result(ioctl, _ERESTARTSYS)
        self._send(ioctl, reply, has_turn)
        self._traced_call(ioctl, EINTR)

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
            self._write(
                wire.NOTIFY_POLL.pack(wire.NOTIFY_POLL.size, wire.NOTIFY_CODE_POLL, 0, file.kh)
            )

    # --- read and write: page faults of a cache pool, and what users must not do

    def read(self, unique: int, ids: tuple[int, int, int], request: Buffer) -> None:
        fh, offset, size, read_flags, *_ = wire.READ_IN.unpack_from(request, IN_HEADER_SIZE)
        file = self._files.get(fh)
        memory = file.memory if file is not None else None
        by_read = read_flags & wire.READ_LOCKOWNER
        if memory is not None and memory.pointer is None:
            # Of a HELLO that failed.
            memory = None
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

    def _traced_call(self, call: Call, error: int, why: CommandError | None = None) -> None:
        if self._trace is not None:
            self._trace.call(call, error, why)

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
