# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of a caller, duplicated into the daemon on their way to receivers.

What a caller hands over may be served by anybody, even by this very daemon, so the thread that
runs the bus must never make a call that asks the file's server: no fstat, poll or read on it, and
no close, which may flush. Type and device are looked up without asking; closing is left to other
threads unless the file is known to be harmless.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import EBADF, EINVAL, EMEDIUMTYPE, EMFILE, ETXTBSY
from queue import Empty, SimpleQueue
from struct import Struct

from ..abi.errors import CommandError
from ..native import ffi, lib

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_O_PATH = os.O_PATH
_UCRED = Struct("=iII")
"""struct ucred (unix(7)): pid, uid, gid."""


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
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[2] == f"{device[0]}:{device[1]}":
                return fields[fields.index("-") + 1] == "fuse.kdbusfs"
    return False


class _Closers:
    """Closes descriptors in threads that may block for as long as they like.

    Each user has one: a file whose server never answers holds up only what else the same user
    handed over. A thread ends when it was idle for a while.
    """

    _MAX_THREADS = 256
    _IDLE_SECONDS = 5.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[int, SimpleQueue[int]] = {}

    def n_waiting(self, uid: int) -> int:
        """How many descriptors of a user wait to be closed."""
        queue = self._queues.get(uid)
        return queue.qsize() if queue is not None else 0

    def close(self, fd: int, uid: int) -> None:
        with self._lock:
            queue = self._queues.get(uid)
            if queue is None and len(self._queues) >= self._MAX_THREADS:
                queue = min(self._queues.values(), key=SimpleQueue.qsize)
            if queue is not None:
                queue.put(fd)
                return
            queue = self._queues[uid] = SimpleQueue()
            queue.put(fd)
        name = f"kdbusfs-close-{uid}"
        threading.Thread(target=self._run, args=(uid, queue), name=name, daemon=True).start()

    def _run(self, uid: int, queue: SimpleQueue[int]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            try:
                fd = queue.get(timeout=self._IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if queue.empty():
                        del self._queues[uid]
                        return
            else:
                with suppress(OSError):
                    # What the close reports (a full disk) is the sender's, not ours.
                    os.close(fd)


_closers = _Closers()

_MAX_WAITING = 2048
"""Descriptors of one user that may wait to be closed before no more are taken. A user whose 1,024
connections end at once has as many sockets to be closed, and is in no way malicious."""
_SMALL = 1 << 20
"""A memfd up to this size is freed in no time."""

Watcher = Callable[[int, Callable[[], None]], Callable[[], None] | None]
"""Calls back when a descriptor is readable; returns what ends the watch, None if that can't be."""


class FileDescriptor:
    """One open file of a caller, under a number of ours; closed with its last reference.

    *uid* is whose it was. EMFILE: so many of that user's wait to be closed that it looks like
    malice.
    """

    __slots__ = ("_device", "_flags", "_harmless", "_mode", "_uid", "_watcher", "fd")

    def __init__(self, fd: int, watcher: Watcher, uid: int) -> None:
        self.fd = fd
        self._watcher = watcher
        self._uid = uid
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fields = ffi.new("uint32_t[3]")
        if lib.kdbusfs_stat(fd, fields, fields + 1, fields + 2) < 0:
            # A file system that lets us know nothing: believe the worst of it.
            fields[0] = stat.S_IFREG
        self._mode = int(fields[0])
        self._device = (int(fields[1]), int(fields[2]))
        self._harmless = stat.S_ISFIFO(self._mode)
        """Whether closing it can't wait: a socket may linger (SO_LINGER), a file has a server."""
        if not self._harmless and _closers.n_waiting(uid) > _MAX_WAITING:
            raise CommandError(EMFILE, f"descriptors of {uid} can't be closed")

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if getattr(self, "_harmless", False):
            os.close(fd)
        elif not sys.is_finalizing():
            # Else no thread can be started any more, and the end of the process closes it.
            _closers.close(fd, self._uid)

    def is_path(self) -> bool:
        return bool(self._flags & _O_PATH)

    def is_kdbus(self) -> bool:
        return stat.S_ISREG(self._mode) and is_kdbusfs_device(self._device)

    def is_unix_socket(self) -> bool:
        if not stat.S_ISSOCK(self._mode):
            return False
        with socket.socket(fileno=os.dup(self.fd)) as ours:
            return ours.family == socket.AF_UNIX

    def is_own_channel(self) -> bool:
        """An AF_UNIX socket that somebody else listens on would take what we send for words of
        the daemon's own user: so a pair made by the caller it must be, or at least its own peer.
        """
        if not self.is_unix_socket():
            return False
        with socket.socket(fileno=os.dup(self.fd)) as ours:
            credentials = ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            _, uid, _ = _UCRED.unpack(credentials)
            return ours.type == socket.SOCK_SEQPACKET and uid == self._uid

    def sealed_size(self) -> int:
        try:
            seals = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError:
            raise CommandError(EMEDIUMTYPE, "no memfd") from None
        if seals & _SEALS != _SEALS:
            raise CommandError(ETXTBSY, f"memfd with seals {seals:#x}")
        # A file that knows seals is in memory: nobody has to be asked.
        size = os.fstat(self.fd).st_size
        self._harmless = size <= _SMALL
        return size

    def check_pollable(self) -> None:
        if self.is_path():
            raise CommandError(EBADF, "cancel descriptor is O_PATH")
        if stat.S_IFMT(self._mode) in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR):
            return
        # Others may be served by anybody, and poll asks their server. What is left has no type:
        # eventfd and its like. An epoll instance is one, too, and asks all that it watches.
        link = os.readlink(f"/proc/self/fd/{self.fd}")
        if stat.S_IFMT(self._mode) or link == "anon_inode:[eventpoll]":
            raise CommandError(EINVAL, "cancel descriptor can't be polled")

    def watch(self, callback: Callable[[], None]) -> Callable[[], None] | None:
        return self._watcher(self.fd, callback)
