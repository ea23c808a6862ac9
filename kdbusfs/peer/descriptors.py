# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of a caller, duplicated into the daemon on their way to receivers.

What a caller hands over may be served by anybody, even by this very daemon, so the thread that
runs the bus must never make a call that asks the file's server: no fstat, poll or read on it, and
no close, which may flush. Type and device are looked up without asking; what is known to be
harmless is closed at once, all else by other threads (`closers`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import sys
import termios
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EAGAIN, EBADF, EINVAL, EMEDIUMTYPE, EMFILE, ETXTBSY
from functools import partial

from ..abi.errors import CommandError
from ..mount.mountinfo import FILESYSTEM_TYPE, fstype_of
from ..native import ffi, lib
from .closers import CLOSERS
from .fd_table import FD_TABLE, check_exhausted

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_O_PATH = os.O_PATH
_SO_DOMAIN = 39

_ours: set[tuple[int, int]] = set()
"""Devices of our own mounts, which may be bound where our mount table does not show them."""


def know_as_ours(device: int) -> None:
    """Let files of *device* (st_dev of a mount of this daemon) count as kdbus files for good."""
    _ours.add((os.major(device), os.minor(device)))


def is_kdbusfs_device(device: tuple[int, int]) -> bool:
    """Whether *device* (major, minor) is a kdbusfs mount, of this daemon or another one.

    FUSE mounts have anonymous devices (major 0); which they are is read from our mount table,
    and nothing that may block is asked.
    """
    if device in _ours:
        return True
    if device[0]:
        return False
    try:
        return fstype_of(os.makedev(*device)) == FILESYSTEM_TYPE
    except OSError as error:
        check_exhausted(error.errno)
        raise CommandError(EBADF, f"the mount table can't be read: {error}") from None


MAX_WAITING = 2048
"""Descriptors of one user that may wait to be closed before no more are taken. A user whose 1,024
connections end at once has as many sockets to be closed, and is in no way malicious."""
MAX_UNREAD = 512
"""Descriptors that may lie in a connection's own socket. Nobody has these who could be charged for
them. libkdbus reads those of one message, 253 at most, before it asks for another."""
_PACKET_SIZE = 512
"""Each packet takes more than that of a socket's send buffer: the kernel counts its own structs."""
_SMALL = 1 << 20
"""A memfd up to this size is freed in no time."""
_N_DRAINED = 1024
"""Packets that can lie in a socket's queue (net.unix.max_dgram_qlen), and more than that."""
_HARMLESS = frozenset(
    f"anon_inode:[{kind}]" for kind in ("eventfd", "pidfd", "timerfd", "signalfd")
)
"""What has no server and holds nothing."""
_POLLABLE = _HARMLESS | {"anon_inode:inotify"}
_POLLABLE_FAMILIES = frozenset({socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK})
"""What can be polled without waiting, whatever others do with it."""

Watcher = Callable[[int, Callable[[], None]], Callable[[], None] | None]
"""Calls back when a descriptor is readable; returns what ends the watch, None if that can't be.
The descriptor stays open for so long."""

_holders_lock = threading.Lock()


def charge(uid: int) -> None:
    """Let user *uid* have one more descriptor in the daemon. EMFILE: its share is used up, or so
    many wait to be closed that it looks like malice. `FileDescriptor` gives it back."""
    if CLOSERS.n_waiting(uid) > MAX_WAITING:
        raise CommandError(EMFILE, f"descriptors of {uid} can't be closed")
    FD_TABLE.charge(uid)


def _send_fds(to: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """Never waits. `socket.send_fds` does: it takes flags, and leaves them out."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))
    to.sendmsg([data], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def can_be_sent(fd: int) -> bool:
    """Whether an AF_UNIX socket takes it: not an io_uring, nor what a security module denies."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, b:
        try:
            _send_fds(a, b"", [fd])
        except OSError:
            return False
    return True


class _Unread:
    """How many of the descriptors sent on a channel may not have been read.

    Those are of the packets that were sent last, and the kernel tells how much of the send buffer
    is taken by these. Whoever else sends there only adds to it, so none is ever missed.
    """

    __slots__ = ("_counts", "_fd", "_sum")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # What lies there to begin with may be full of them.
        self._counts: deque[int] = deque((MAX_UNREAD,))
        self._sum = MAX_UNREAD

    def has_room(self, n: int) -> bool:
        """Whether *n* more may be sent."""
        if self._sum + n > MAX_UNREAD:
            self._look()
        return self._sum + n <= MAX_UNREAD

    def add(self, n: int) -> None:
        """*n* were sent, in one packet."""
        self._counts.append(n)
        self._sum += n

    def _look(self) -> None:
        """Forget those that have been read."""
        taken = int.from_bytes(fcntl.ioctl(self._fd, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)
        n_packets = -(-taken // _PACKET_SIZE)
        while len(self._counts) > n_packets:
            self._sum -= self._counts.popleft()


class FileDescriptor:
    """One open file of a caller, under a number *fd* of ours that user *uid* was charged for: the
    real `bus.peer.Descriptor`. It is closed when its last holder releases it; what nobody released
    is closed with its last reference."""

    __slots__ = (
        "_device",
        "_flags",
        "_holders",
        "_in_memory",
        "_mode",
        "_uid",
        "_unread",
        "_watcher",
        "fd",
    )

    def __init__(self, fd: int, watcher: Watcher, uid: int) -> None:
        self.fd = fd
        self._holders = 1
        self._watcher = watcher
        self._uid = uid
        self._in_memory = False
        """Whether it has turned out to be a memfd of no great size."""
        self._unread: _Unread | None = None
        """As a connection's channel: what has been sent on it."""
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fields = ffi.new("uint32_t[3]")
        if lib.kdbusfs_stat(fd, fields, fields + 1, fields + 2) < 0:
            # A file system that lets us know nothing: believe the worst of it.
            fields[0] = stat.S_IFREG
        self._mode = int(fields[0])
        self._device = (int(fields[1]), int(fields[2]))

    # --- how long it is open

    def hold(self) -> None:
        with _holders_lock:
            self._holders += 1

    def release(self) -> None:
        with _holders_lock:
            self._holders -= 1
            if self._holders:
                return
        self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        closed = partial(FD_TABLE.discharge, self._uid)
        if self._is_harmless(fd):
            try:
                with suppress(OSError):
                    os.close(fd)
            finally:
                closed()
        else:
            CLOSERS.close(self._uid, fd, closed)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self._close()

    def _is_harmless(self, fd: int) -> bool:
        """Whether closing it can't wait: a socket may linger (SO_LINGER), a file has a server."""
        mode = stat.S_IFMT(self._mode)
        if mode == stat.S_IFIFO or self._in_memory:
            return True
        if self.is_path():
            # It may be the last that keeps a file system mounted.
            return False
        if self._device in _ours:
            # We ask for no FLUSH, and RELEASE is sent without waiting for it.
            return True
        return not mode and self._link() in _HARMLESS

    # --- what it is

    def is_path(self) -> bool:
        return bool(self._flags & _O_PATH)

    def can_hold_files(self) -> bool:
        mode = stat.S_IFMT(self._mode)
        if mode == stat.S_IFREG:
            return is_kdbusfs_device(self._device)
        if mode == stat.S_IFSOCK:
            return self._family() == socket.AF_UNIX
        return not mode and self._link() == "anon_inode:[io_uring]"

    def _link(self) -> str:
        """What the kernel calls it; an absolute path if it has one."""
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError as error:
            check_exhausted(error.errno)
            return ""

    @contextmanager
    def _socket(self) -> Iterator[socket.socket]:
        """The socket it is, whatever its family, for a few calls."""
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=self.fd)
        try:
            yield ours
        finally:
            ours.detach()

    def _family(self) -> int:
        """Of the socket it is."""
        with self._socket() as ours:
            return ours.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)

    # --- the socket for descriptors

    def become_channel(self) -> None:
        # An AF_UNIX socket that somebody else listens on would take what we send for words of
        # the daemon's own user: so a pair made by the caller it must be, or at least its own peer.
        if self.is_path():
            raise CommandError(EBADF, "O_PATH descriptor")
        if not stat.S_ISSOCK(self._mode):
            raise CommandError(EINVAL, "not a socket")
        # A connection that lies in the queue of its own socket would never end, since nobody but us
        # holds that socket any more.
        n_queued: int = lib.kdbusfs_make_channel(self.fd, self._uid)
        if n_queued == -EINVAL:
            raise CommandError(EINVAL, "not an AF_UNIX socket to the caller's own user")
        self._unread = _Unread(self.fd)
        # Packets without files may lie there as long as they like.
        if n_queued:
            self.hold()
            CLOSERS.submit(self._uid, self._drain)

    def _drain(self) -> None:
        """Drop the files that were sent before. Empty packets look like the end, so it is asked
        often."""
        try:
            with self._socket() as ours:
                for _ in range(_N_DRAINED):
                    ours.recv(1, socket.MSG_DONTWAIT)
        finally:
            self.release()

    def send(self, data: bytes, descriptors: list[int]) -> None:
        """Send *descriptors* over this channel; OSError if it does not take them now."""
        unread, n = self._unread, len(descriptors)
        assert unread is not None, "not a channel"
        if not unread.has_room(n):
            raise BlockingIOError(EAGAIN, "too many descriptors lie there unread")
        with self._socket() as ours:
            _send_fds(ours, data, descriptors)
        unread.add(n)

    # --- memfds

    def sealed_size(self) -> int:
        try:
            seals = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError:
            raise CommandError(EMEDIUMTYPE, "not a memfd") from None
        # A file that knows seals is in memory: nobody has to be asked.
        size = os.fstat(self.fd).st_size
        self._in_memory = size <= _SMALL
        if seals & _SEALS != _SEALS:
            raise CommandError(ETXTBSY, f"memfd with seals {seals:#x}")
        return size

    # --- cancel descriptors

    def check_pollable(self) -> None:
        if self.is_path():
            raise CommandError(EBADF, "cancel descriptor is O_PATH")
        mode = stat.S_IFMT(self._mode)
        if mode == stat.S_IFIFO or (not mode and self._link() in _POLLABLE):
            return
        # Others may be served by anybody, and poll asks their server; or it waits for a lock that
        # callers can hold: that of a terminal's line discipline, or of a socket that receives.
        if mode != stat.S_IFSOCK or self._family() not in _POLLABLE_FAMILIES:
            raise CommandError(EINVAL, "cancel descriptor can't be polled")

    def watch(self, callback: Callable[[], None]) -> Callable[[], None] | None:
        unwatch = self._watcher(self.fd, callback)
        if unwatch is None:
            return None
        self.hold()

        def end() -> None:
            unwatch()
            self.release()

        return end
