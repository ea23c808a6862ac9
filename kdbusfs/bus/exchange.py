# SPDX-License-Identifier: LGPL-2.1-or-later
"""KDBUSFS_CMD_EXCHANGE (kdbus/extension.h): free, send, wait and receive in one call.

It does what as many FREEs, SENDs and RECVs would do, one after the other, and no more: each message
passes the same checks, takes its own place in the order of the bus, and is told of or refused by
itself. What it adds is the wait of a receiver, of which there may be several on a connection: the
one that has waited longest is told of a message first.

The block says how far the call has come, and is what the caller gets back whatever the end. So a
call that is made again, by the kernel after a signal or by ourselves after a stall, goes on there.

A block may hold many messages, and each may have many receivers. If that takes long, the call is
put off (CONTINUE) until others have been served.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, ECANCELED, EINTR, EINVAL, EOPNOTSUPP, ETIMEDOUT
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.numbers import ExchangeFlag, RecvReturnFlag
from ..abi.specs import EXCHANGE_MESSAGE
from ..abi.structs import (
    CMD_EXCHANGE,
    CMD_EXCHANGE_DROPPED_MSGS,
    CMD_EXCHANGE_FD_SOCKET,
    CMD_EXCHANGE_N_FREED,
    CMD_EXCHANGE_N_RECEIVED,
    CMD_EXCHANGE_N_SENT,
    I32,
    MSG_INFO,
    MSG_SIZE,
    U32,
    U64,
    align8,
)
from .call import CONTINUE, PENDING, Argument, Call, Waiter
from .message import Message

if TYPE_CHECKING:
    from .bus import Bus
    from .connection import Connection, QueueEntry
    from .peer import Descriptor

_WAIT = int(ExchangeFlag.WAIT)
_CALL = int(ExchangeFlag.CALL)
_DROPPED_MSGS = int(RecvReturnFlag.DROPPED_MSGS)
_NEVER = (1 << 64) - 1
_HEAD = CMD_EXCHANGE.size
_PIECE_NS = 1_000_000
"""How long messages are sent before others are served."""
_MAX_FREE = 512
_MAX_SEND = 64
_MAX_RECV = 64
"""How much one block may ask for: more would take long, and gain nothing."""


class Exchange(Waiter):
    """An EXCHANGE on its way: *call*, made on *connection*."""

    __slots__ = (
        "call",
        "cancel",
        "cancelled",
        "connection",
        "n_recv",
        "n_send",
        "next_at",
        "unwatch",
    )

    def __init__(self, connection: Connection, call: Call) -> None:
        super().__init__()
        self.connection = connection
        self.call = call
        self.n_send = 0
        self.n_recv = 0
        self.next_at = 0
        """Where in the block the next message to be sent is."""
        self.cancel: Descriptor | None = None
        """What ends its wait; held as long as it is here."""
        self.cancelled = False
        self.unwatch: Callable[[], None] | None = None

    def start(self) -> int:
        """Do all that can be done at once. Returns 0, PENDING or CONTINUE."""
        call, connection = self.call, self.connection
        data = call.data
        (_, _, _, self.deadline, _, n_free, n_freed, self.n_send, n_sent, self.n_recv, _, *fds) = (
            CMD_EXCHANGE.unpack_from(data)
        )
        cancel_fd, fd_socket = fds
        if n_free > _MAX_FREE or self.n_send > _MAX_SEND or self.n_recv > _MAX_RECV:
            raise CommandError(E2BIG, "too much for one block")
        free_at = _HEAD + self.n_recv * MSG_INFO.size
        self.next_at = free_at + n_free * U64.size
        if self.next_at > len(data) or n_freed > n_free or n_sent > self.n_send:
            raise CommandError(EINVAL, "no room for what is counted")
        if call.flags & _CALL and (self.n_send != 1 or not self.n_recv):
            raise CommandError(EINVAL, "a call has one message, and room for its reply")
        if self.n_send and connection.kind:
            raise CommandError(EOPNOTSUPP, "this kind of connection sends nothing")
        U64.pack_into(data, CMD_EXCHANGE_DROPPED_MSGS, 0)
        U32.pack_into(data, CMD_EXCHANGE_N_RECEIVED, 0)
        call.store = call.store_on_error = (0, _HEAD)
        if fd_socket >= 0:
            connection.set_fd_socket(call.peer.take(fd_socket))
            I32.pack_into(data, CMD_EXCHANGE_FD_SOCKET, -1)
        self._free(free_at, n_free, n_freed)
        # A call that goes on is found by the cookie of its message.
        for _ in range(0 if call.flags & _CALL else n_sent):
            self.next_at = align8(self.next_at + self._size_of_next())
        try:
            if cancel_fd >= 0:
                self.cancel = call.peer.take(cancel_fd)
                self.cancel.check_pollable()
            return self._proceed()
        except BaseException:
            self._release_cancel()
            raise

    def _release_cancel(self) -> None:
        cancel, self.cancel = self.cancel, None
        if cancel is not None:
            cancel.release()

    def _free(self, at: int, n_free: int, n_freed: int) -> None:
        pool, data = self.connection.pool, self.call.data
        for n in range(n_freed, n_free):
            (offset,) = U64.unpack_from(data, at + n * U64.size)
            if offset != pool.size:
                pool.free(offset)
            U32.pack_into(data, CMD_EXCHANGE_N_FREED, n + 1)

    def _proceed(self) -> int:
        """Send, and then receive or wait."""
        flags = self.call.flags
        if flags & _CALL:
            return self._call()
        if not self._send():
            self._release_cancel()
            return CONTINUE
        if not self.n_recv or self._receive() or not flags & _WAIT:
            self._release_cancel()
            return 0
        self._wait()
        return PENDING

    # --- sending

    def _send(self) -> bool:
        """Send messages. False: there are more, and others are to be served first."""
        data, bus, n_send = self.call.data, self.connection.bus, self.n_send
        (n,) = U32.unpack_from(data, CMD_EXCHANGE_N_SENT)
        # Of one message nobody looks at the clock.
        end = bus.domain.clock.monotonic_ns() + _PIECE_NS if n_send - n > 1 else 0
        while n < n_send:
            bus.send(self._next_message(False), self.call, sync=False, cancel=None)
            n += 1
            U32.pack_into(data, CMD_EXCHANGE_N_SENT, n)
            if n < n_send and bus.domain.clock.monotonic_ns() > end:
                return False
        return True

    def _call(self) -> int:
        """Send the last message, and wait for its reply."""
        message = self._next_message(True)
        result = self.connection.bus.send(message, self.call, sync=True, cancel=self.cancel)
        # Nothing below can fail.
        self._release_cancel()
        U32.pack_into(self.call.data, CMD_EXCHANGE_N_SENT, self.n_send)
        return result

    def _size_of_next(self) -> int:
        data, at = self.call.data, self.next_at
        size: int = U64.unpack_from(data, at)[0] if at + MSG_SIZE <= len(data) else 0
        if size < MSG_SIZE or at + size > len(data):
            raise CommandError(EINVAL, "a message that is not all in the block")
        return size

    def _next_message(self, sync: bool) -> Message:
        call, at, size = self.call, self.next_at, self._size_of_next()
        argument = Argument(EXCHANGE_MESSAGE, call.peer, call.address + at)
        argument.load(call.data[at : at + size])
        argument.validate()
        if argument.negotiating:
            raise CommandError(EINVAL, "messages in a block don't negotiate")
        message = Message(self.connection, argument, sync, call.data, call.address)
        if self.n_send > 1 and not message.is_inline:
            raise CommandError(EINVAL, "one of several messages brings what is not in the block")
        self.next_at = align8(at + size)
        return message

    # --- receiving

    def _receive(self) -> bool:
        """Receive what is there. False: nothing is, and no message was lost either."""
        call, connection = self.call, self.connection
        entries = self._publish()
        # Nothing below can fail.
        lost, connection.lost = connection.lost, 0
        if lost:
            call.returns(_DROPPED_MSGS)
            U64.pack_into(call.data, CMD_EXCHANGE_DROPPED_MSGS, lost)
        at = _HEAD
        for entry in entries:
            connection.queue.remove(entry)
            connection.discard(entry)
            MSG_INFO.pack_into(call.data, at, entry.slice.offset, entry.size, 0)
            at += MSG_INFO.size
        U32.pack_into(call.data, CMD_EXCHANGE_N_RECEIVED, len(entries))
        call.store = (0, at)
        return bool(entries or lost)

    def _publish(self) -> list[QueueEntry]:
        """Hand as many messages to user space as there is room for, all or none. One with
        descriptors is the last."""
        connection = self.connection
        entries: list[QueueEntry] = []
        peeked: list[QueueEntry] = []
        entry = connection.queue.first
        try:
            while entry is not None and len(entries) < self.n_recv:
                if not entry.slice.user:
                    peeked.append(entry)
                entries.append(entry)
                self.call.fds = connection.publish(entry)
                if entry.positions:
                    break
                entry = entry.after
        except BaseException:
            for entry in peeked:
                entry.slice.user = False
            raise
        return entries

    # --- waiting

    def _wait(self) -> None:
        """Wait for a message."""
        if self.deadline <= self.connection.bus.domain.clock.monotonic_ns():
            raise CommandError(ETIMEDOUT, "deadline has passed")
        if self.cancel is not None:
            self.unwatch = self.cancel.watch(self._cancel)
            if self.unwatch is None:
                raise CommandError(ECANCELED, "cancelled before it waits")
        # Nothing below can fail.
        self._release_cancel()
        self._enlist()

    def _enlist(self) -> None:
        connection = self.connection
        connection.waiters[self] = None
        self.call.wait = self
        if self.deadline != _NEVER:
            connection.bus.domain.watch_deadline(self)

    def end(self, error: int) -> None:
        """End the wait, with *error* or, if that is 0, to receive what is there."""
        del self.connection.waiters[self]
        if self.deadline_number:
            self.connection.bus.domain.unwatch_deadline(self)
        if error:
            self.end_watch()
        self.connection.complete(self.call, error, None if error else self)

    def _cancel(self) -> None:
        self.cancelled = True
        if self in self.connection.waiters:
            self.end(ECANCELED)

    @property
    def bus(self) -> Bus:
        return self.connection.bus

    def interrupt(self) -> None:
        self.end(EINTR)

    def expire(self) -> None:
        self.end(ETIMEDOUT)

    def end_watch(self) -> None:
        """End the watch on the cancel descriptor, if there is one."""
        self._release_cancel()
        unwatch, self.unwatch = self.unwatch, None
        if unwatch is not None:
            try:
                unwatch()
            except Exception as error:
                self.connection.bus.domain.report(error)

    # --- as what is held for the completed call

    def hand_over(self, call: Call) -> None:
        """Receive, or wait again if somebody else was faster."""
        if self._receive():
            self.end_watch()
        elif self.cancelled:
            call.error = ECANCELED
        else:
            self._enlist()

    def undo(self) -> None:
        """The caller won't get anything: the message that it was told of is for the next one."""
        self.end_watch()
        connection = self.connection
        if connection.alive and connection.readable:
            connection.wake_waiter()
