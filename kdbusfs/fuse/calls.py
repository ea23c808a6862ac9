# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands: each IOCTL from its arrival to its answer.

Each is answered in the router's thread, to the end, but for three kinds: a synchronous SEND stays
unanswered until the bus completes it, a call whose caller must be stopped by ptrace, to get
descriptors, is answered by a worker thread, and a command whose results stall by the thread that
was the router when they did (`peer.stall`). All answers go through `_send`, or else are granted by
`Ioctls.settle` (fuse/ioctl.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from errno import EFAULT, EINTR, EIO, ENOTTY

from ..abi.errors import CommandError, Stalled
from ..abi.specs import COMMAND_SPECS, find_command
from ..abi.structs import CMD_RETURN_FLAGS, U64
from ..bus.call import PENDING, WAITS_AGAIN, Call
from ..bus.connection import FdTransfer
from ..bus.domain import Domain
from ..peer.closers import CLOSERS, Closing
from ..peer.descriptors import Watcher
from ..peer.process import Process
from ..peer.stall import MAX_OF_CALL
from ..peer.tracer import Tracer
from . import fds, wire
from .device import Device
from .files import OpenFiles
from .interrupts import Interrupts
from .ioctl import Ioctl, Ioctls
from .wire import IOCTL_AT, OUT_HEADER_SIZE

log = logging.getLogger(__name__)

_DIRECTION_READ = 0x80000000
"""_IOC_READ: the kernel copies what our reply brings to the caller's struct."""
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
    log.error("ERROR: unexpected failure", exc_info=error)


class Calls:
    """The commands on all *files*; *watcher* watches cancel descriptors. *put_back* leaves a
    request to be started anew, *put_off* one to be gone on with when others have had their turn;
    *wake* tells the router that there is something to do."""

    def __init__(
        self,
        device: Device,
        domain: Domain,
        files: OpenFiles,
        watcher: Watcher,
        put_back: Callable[[bytes], None] = lambda request: None,
        put_off: Callable[[bytes], None] = lambda request: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        domain.report = _report
        self._files = files
        self._by_fh = files.by_fh
        files.on_close = self._forget
        self._watcher = watcher
        self._ioctls = Ioctls()
        self.interrupts = Interrupts(self._ioctls, self._refuse)
        self._interrupted = self.interrupts.pending
        self._put_back = put_back
        self._put_off = put_off
        self._wake_router = wake
        self.completed: deque[Ioctl] = deque()
        """Calls whose wait is over, to be finished."""
        self.current: Ioctl | None = None
        """The call that is being handled, or was the latest."""
        self._tracer = Tracer(device.fd)
        # One that is there whatever comes.
        CLOSERS.start_thread()

    def close(self) -> None:
        """The mount is gone: all callers have been let go, and nothing is stored any more. Every
        file is closed."""
        for ioctl in self._ioctls:
            self._ioctls.settle(ioctl)
        self._files.close()
        self._tracer.close()

    def _forget(self) -> None:
        """A file is closed: the latest call may be its own, and would keep alive all it had."""
        self.current = None

    # --- requests

    def ioctl(self, request: memoryview) -> None:
        """A request that has just come."""
        ioctl = self._accept(request)
        if ioctl is not None:
            self._execute(ioctl, request)

    def hold(self, request: memoryview) -> None:
        """A request that has just come, but has to wait: `again` will be called with it."""
        ioctl = self._accept(request)
        if ioctl is not None:
            ioctl.process.pin(self._device.fd)

    def again(self, request: memoryview) -> None:
        """Start a request anew, unless its caller has been let go meanwhile."""
        earlier = self._ioctls.get(_unpack_request(request)[0])
        if earlier is None:
            return
        ioctl = self._accept(request)
        assert ioctl is not None
        ioctl.process = ioctl.peer = earlier.process.renewed()
        ioctl.n_stalls, ioctl.interrupted = earlier.n_stalls, earlier.interrupted
        if earlier.read and earlier.spec.is_block:
            # It says what has been done already.
            ioctl.block = earlier.data
        self._execute(ioctl, request)

    def note_stall(self) -> int:
        """In the watch's thread: the current call stalls. Returns whose it is."""
        ioctl = self.current
        if ioctl is None:
            return 0
        ioctl.n_stalls += 1
        ioctl.process.pin(self._device.fd)
        return ioctl.process.uid

    def _accept(self, request: memoryview) -> Ioctl | None:
        unique, uid, gid, tid, fh, flags, code, address, in_size = _unpack_request(request)
        code = find_command(code)
        spec = COMMAND_SPECS.get(code)
        if spec is not None and spec.is_block and in_size < spec.size:
            spec = None
        file = self._by_fh.get(fh)
        # The fh of a directory is pyfuse3's, and may be the same number as one of ours.
        if spec is None or file is None or flags & wire.IOCTL_DIR:
            self._device.reply(unique, ENOTTY)
            self._device.traced("IOCTL", (uid, gid, tid), ENOTTY, f"{code:#x} fh={fh}")
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
            inline = request[IOCTL_AT : IOCTL_AT + in_size] if ioctl.block is None else ioctl.block
            result = file.handle.execute(ioctl, inline)
            if result:
                if result == PENDING:
                    self._keep_waiting(ioctl)
                else:
                    ioctl.process.pin(self._device.fd)
                    self._put_off(bytes(request))
                return
        except CommandError as failure:
            error = failure.errno
            if self._device.trace is not None:
                # Without its traceback, which would keep this frame and all it holds alive.
                why = failure.with_traceback(None)
            if ioctl.read and in_size and not ioctl.code & _DIRECTION_READ:
                (before,) = _unpack_u64(request, IOCTL_AT + CMD_RETURN_FLAGS)
                (after,) = _unpack_u64(ioctl.data, CMD_RETURN_FLAGS)
                if not before and not after and self._device.trace is None:
                    # It failed, and return_flags is 0 as it was: not worth a write (1.3 us).
                    self._send(ioctl, _pack_out_header(OUT_HEADER_SIZE, -error, ioctl.unique))
                    return
        connection = file.handle.connection
        if connection is not None and connection.waker is None:
            self._files.wake_by(connection, file)
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
        """After an unexpected exception: answer request *unique* with EIO, unless it has been
        answered, and let its caller go."""
        ioctl = self._ioctls.get(unique)
        if ioctl is not None:
            self._ioctls.settle(ioctl)
        self._device.reply(unique, EIO)

    # --- calls that wait

    def _keep_waiting(self, ioctl: Ioctl) -> None:
        if ioctl.completed:
            return
        if ioctl.spec.is_block:
            # All that is left to do is done in its reply, and in the pool.
            ioctl.process.let_go()
        else:
            ioctl.process.pin(self._device.fd)
        ioctl.waits = True
        if ioctl.interrupted:
            ioctl.interrupt()

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
            if error == WAITS_AGAIN:
                ioctl.completed = False
                if ioctl.interrupted:
                    ioctl.interrupt()
            elif error == EINTR:
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
        elif has_turn and not self._device.pending:
            self._device.pending = reply
        else:
            self._device.write(reply)

    # A function with another one in it costs each of its calls an object.

    def _write_when_done(self, closing: Closing, reply: bytes) -> None:
        closing.when_done(lambda: self._device.write(reply))

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
        socket = fds.socket_of(ioctl)
        if socket is not None:
            fds.send(socket, ioctl, transfer)
        elif ioctl.spec.is_block:
            fds.expect_incomplete(ioctl)
            transfer.release()
        else:
            self._install(ioctl, transfer)
            return
        reply, has_turn = self._result(ioctl, 0)
        self._send(ioctl, reply, has_turn)
        self._traced_call(ioctl, 0)

    def _install(self, ioctl: Ioctl, transfer: FdTransfer) -> None:
        """Have the call answered, and descriptors put into its caller's table."""
        # As long as it is held: the store below may stall, and be killed.
        uid, tid = ioctl.process.uid, ioctl.process.thread()
        fds.expect_incomplete(ioctl)
        reply, _ = self._result(ioctl, 0)
        job = fds.installation(ioctl, tid, uid, reply, transfer, self._device)
        if not self._ioctls.settle(ioctl):
            transfer.release()
        elif not self._tracer.install(job):
            self._device.write(reply)

    # --- signals

    def _restart(self, ioctl: Ioctl) -> None:
        """A signal has ended the wait: let the kernel decide, by its handler, whether the call is
        made again or fails with EINTR. It hands the result of an ioctl on as it is, ERESTARTSYS
        too, and the signal is pending for as long as the thread is in its call."""
        reply, has_turn = self._result(ioctl, _ERESTARTSYS)
        self._send(ioctl, reply, has_turn)
        self._traced_call(ioctl, EINTR)

    def _traced_call(self, call: Call, error: int, why: CommandError | None = None) -> None:
        if self._device.trace is not None:
            self._device.trace.call(call, error, why)
