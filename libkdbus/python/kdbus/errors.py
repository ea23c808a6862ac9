# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong: OSError with kdbus's errno, in classes that can be caught.

Whose doing it was decides the class: nothing there yet (`NoMessage`), nobody to
talk to (`NoDestination`), not allowed (`NotPermitted`), no room at the receiver
(`NoRoom`), no answer (`NoReply`, `TimedOut`), the connection itself at its end
(`Disconnected`), or the connection of a parent process (`Inherited`). All else is
a plain `KdbusError`.
"""

import errno
import os
from typing import NoReturn


class KdbusError(OSError):
    """A kdbus command failed; `errno` says why."""

    n_sent = 0
    """Raised by `Connection.send_many`: how many messages were sent before this one."""


class NoMessage(KdbusError, BlockingIOError):
    """The queue is empty (EAGAIN)."""


class NoDestination(KdbusError, ProcessLookupError):
    """Nobody there: ESRCH no owner of the name, ENXIO no such connection,
    EADDRNOTAVAIL only an activator, EREMCHG the name has another owner."""


class NotPermitted(KdbusError, PermissionError):
    """The policy, or the mode of a node, forbids it (EPERM, EACCES)."""


class NameTaken(KdbusError, FileExistsError):
    """The name of a bus, endpoint or connection has an owner already (EEXIST)."""


class NoRoom(KdbusError):
    """ENOBUFS: the sender's share of the receiver's pool is used up; EXFULL: the
    pool is."""


class NoReply(KdbusError):
    """A request will not be answered: EPIPE its receiver ended or dropped it,
    ECANCELED we gave up, EREMOTEIO the reply could not be delivered."""


class TimedOut(KdbusError, TimeoutError):
    """The deadline has passed (ETIMEDOUT)."""


class NoNode(KdbusError, FileNotFoundError):
    """There is no such bus or endpoint (ENOENT)."""


class NotWaiting(KdbusError):
    """Nobody waits for this reply (any more), or there is no such match (EBADSLT)."""


class Disconnected(KdbusError, ConnectionError):
    """Gone: ECONNRESET the connection, ESHUTDOWN the bus or endpoint, ENOTCONN the
    whole file system, ECONNABORTED the file system during the call."""


class Inherited(KdbusError, ChildProcessError):
    """The connection or endpoint belongs to the process that this one was forked
    from (ECHILD). It can be closed here, which leaves the parent's alone."""


_CLASSES: dict[int, type[KdbusError]] = {
    errno.EAGAIN: NoMessage,
    errno.ENOENT: NoNode,
    errno.ESRCH: NoDestination,
    errno.ENXIO: NoDestination,
    errno.EADDRNOTAVAIL: NoDestination,
    errno.EREMCHG: NoDestination,
    errno.EPERM: NotPermitted,
    errno.EACCES: NotPermitted,
    errno.EEXIST: NameTaken,
    errno.ENOBUFS: NoRoom,
    errno.EXFULL: NoRoom,
    errno.EPIPE: NoReply,
    errno.ECANCELED: NoReply,
    errno.EREMOTEIO: NoReply,
    errno.ETIMEDOUT: TimedOut,
    errno.EBADSLT: NotWaiting,
    errno.ECONNRESET: Disconnected,
    errno.ESHUTDOWN: Disconnected,
    errno.ENOTCONN: Disconnected,
    errno.ECONNABORTED: Disconnected,
    errno.ECHILD: Inherited,
}


def fail(number: int, path: str | None = None) -> NoReturn:
    """Raise what errno *number* stands for."""
    raise _CLASSES.get(number, KdbusError)(number, os.strerror(number), path)


def check(result: int, path: str | None = None) -> None:
    """Raise if *result* of a function of libkdbus is a negative errno."""
    if result < 0:
        fail(-result, path)
