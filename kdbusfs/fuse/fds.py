# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors on their way to the caller of a command: over a socket of its connection, which
libkdbus has, or put into its table by the tracer (`peer.tracer`)."""

from __future__ import annotations

import logging
from functools import partial
from struct import Struct

from ..abi.items import Buffer
from ..abi.numbers import ExtensionCommand, RecvReturnFlag
from ..abi.structs import U64
from ..bus.connection import FdTransfer
from ..bus.peer import Descriptor
from ..peer.closers import CLOSERS
from ..peer.descriptors import FileDescriptor, can_be_sent
from ..peer.tracer import Installation
from .device import Device
from .ioctl import Ioctl

log = logging.getLogger(__name__)

_INCOMPLETE = int(RecvReturnFlag.INCOMPLETE_FDS)
_SOCKET_HEADER = Struct("=QQ")
"""What precedes descriptors on a connection's socket: offset of the slice, how many."""
_SOCKET_HEADER_LOST = Struct("=QQQ")
"""The same if some could not be sent: _LOST is set in how many, and their positions follow."""
_LOST = 1 << 63
_BY_SOCKET = frozenset({ExtensionCommand.RECV, ExtensionCommand.SEND, ExtensionCommand.EXCHANGE})


def socket_of(ioctl: Ioctl) -> FileDescriptor | None:
    """The socket that descriptors for this caller go over, if they do."""
    connection = ioctl.file.handle.connection
    assert connection is not None
    socket = connection.fd_socket
    return socket if ioctl.code in _BY_SOCKET and isinstance(socket, FileDescriptor) else None


def send(socket: FileDescriptor, ioctl: Ioctl, transfer: FdTransfer) -> None:
    """Send descriptors over *socket*, as many as it takes."""
    complete = _send_fds(socket, transfer.slice.offset, transfer.descriptors)
    transfer.release()
    _put_return_flags(ioctl, 0 if complete and transfer.accepted else _INCOMPLETE)


def _send_fds(to: FileDescriptor, offset: int, descriptors: list[Descriptor]) -> bool:
    """Send descriptors of the slice at *offset* over a connection's own socket; False if it would
    not take them all."""
    fds = [d.fd for d in descriptors if isinstance(d, FileDescriptor)]
    if not fds:
        return True
    try:
        to.send(_SOCKET_HEADER.pack(offset, len(fds)), fds)
    except BlockingIOError as error:
        log.debug("descriptors not sent: %s", error)
        return False
    except OSError as error:
        log.debug("some descriptors not sent: %s", error)
        _send_some_fds(to, offset, fds)
        return False
    return True


def _send_some_fds(to: FileDescriptor, offset: int, fds: list[int]) -> None:
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


def _put_return_flags(ioctl: Ioctl, flags: int) -> None:
    """Set msg.return_flags (RECV) or reply.return_flags (SEND), or those of the last message that
    an EXCHANGE receives."""
    is_block = ioctl.spec.is_block
    at = ioctl.store[1] - U64.size if is_block else ioctl.spec.msg_return_flags
    U64.pack_into(ioctl.data, at, flags)


def expect_incomplete(ioctl: Ioctl) -> None:
    """Have the worst case stored first; it is mended when it did not come."""
    _put_return_flags(ioctl, _INCOMPLETE)


def content(ioctl: Ioctl) -> Buffer:
    """What is in the caller's struct in the end."""
    return ioctl.data[: ioctl.store[1]]


class Handover:
    """Descriptors on their way to the caller of *ioctl*, as a worker of the tracer sees them.

    A class, since a function inside of another one, compiled, refers to itself: what it knows would
    stay until the collector comes by.
    """

    __slots__ = ("_ioctl", "_transfer", "_uid")

    def __init__(self, ioctl: Ioctl, transfer: FdTransfer, uid: int) -> None:
        self._ioctl = ioctl
        self._transfer = transfer
        self._uid = uid

    def release(self) -> None:
        """Let go of the descriptors, and wait until they are closed."""
        CLOSERS.collect(self._uid)
        self._transfer.release()
        closing = CLOSERS.collected()
        if closing is not None:
            closing.wait()

    def tell(self, numbers: list[int]) -> Buffer:
        """What is to be in the caller's struct when it has got *numbers*."""
        ioctl = self._ioctl
        _put_return_flags(ioctl, self._transfer.installed(numbers))
        self.release()
        return content(ioctl)


def installation(
    ioctl: Ioctl, tid: int, uid: int, reply: bytes, transfer: FdTransfer, device: Device
) -> Installation:
    """The tracer's job: have thread *tid*, which user *uid* is charged for, answered with *reply*,
    and descriptors put into its table."""
    handover = Handover(ioctl, transfer, uid)
    return Installation(
        tid,
        uid,
        reply,
        ioctl.address,
        content(ioctl),
        [d.fd for d in transfer.descriptors if isinstance(d, FileDescriptor)],
        handover.tell,
        handover.release,
        partial(_traced_call, device, ioctl),
    )


def _traced_call(device: Device, ioctl: Ioctl) -> None:
    if device.trace is not None:
        device.trace.call(ioctl, 0)
