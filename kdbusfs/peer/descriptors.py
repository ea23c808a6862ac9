# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of a caller, duplicated into the daemon on their way to receivers.

What a caller hands over may be served by anybody, even by this very daemon, so the thread that
runs the bus must never make a call that asks the file's server: no fstat, poll or read on it, and
no close, which may flush. Type and device are looked up without asking; closing is left to a
thread of its own unless the file is known to be harmless.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable
from errno import EBADF, EINVAL, EMEDIUMTYPE, ETXTBSY
from queue import SimpleQueue

from ..abi.errors import CommandError
from ..native import ffi, lib

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_O_PATH = os.O_PATH


def is_kdbusfs_device(device: tuple[int, int]) -> bool:
    """Whether *device* (major, minor) is a kdbusfs mount, of this daemon or another one.

    FUSE mounts have anonymous devices (major 0); which they are is read from our mount table,
    and nothing that may block is asked.
    """
    if device[0]:
        return False
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[2] == f"{device[0]}:{device[1]}":
                return fields[fields.index("-") + 1] == "fuse.kdbusfs"
    return False


class _Closer:
    """Closes descriptors in a thread that may block for as long as it likes."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, fd: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kdbusfs-closer", daemon=True)
            self._thread.start()
        self._queue.put(fd)

    def _run(self) -> None:
        while True:
            os.close(self._queue.get())


_closer = _Closer()

Watcher = Callable[[int, Callable[[], None]], Callable[[], None] | None]
"""Calls back when a descriptor is readable; returns what ends the watch, None if that can't be."""


class FileDescriptor:
    """One open file of a caller, under a number of ours; closed with its last reference."""

    __slots__ = ("_mode", "_device", "_flags", "_watcher", "fd")

    def __init__(self, fd: int, watcher: Watcher) -> None:
        self.fd = fd
        self._watcher = watcher
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fields = ffi.new("uint32_t[3]")
        if lib.kdbusfs_stat(fd, fields, fields + 1, fields + 2) < 0:
            fields[0] = 0
        self._mode = int(fields[0])
        self._device = (int(fields[1]), int(fields[2]))

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if stat.S_ISFIFO(self._mode) or stat.S_ISSOCK(self._mode):
            os.close(fd)
        else:
            _closer.close(fd)

    def is_path(self) -> bool:
        return bool(self._flags & _O_PATH)

    def is_kdbus(self) -> bool:
        return stat.S_ISREG(self._mode) and is_kdbusfs_device(self._device)

    def is_unix_socket(self) -> bool:
        if not stat.S_ISSOCK(self._mode):
            return False
        with socket.socket(fileno=os.dup(self.fd)) as ours:
            return ours.family == socket.AF_UNIX

    def sealed_size(self) -> int:
        try:
            seals = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError:
            raise CommandError(EMEDIUMTYPE, "no memfd") from None
        if seals & _SEALS != _SEALS:
            raise CommandError(ETXTBSY, f"memfd with seals {seals:#x}")
        # A file that knows seals is in memory: nobody has to be asked.
        return os.fstat(self.fd).st_size

    def check_pollable(self) -> None:
        if self.is_path():
            raise CommandError(EBADF, "cancel descriptor is O_PATH")
        kind = stat.S_IFMT(self._mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFBLK):
            raise CommandError(EINVAL, "cancel descriptor can't be polled")

    def watch(self, callback: Callable[[], None]) -> Callable[[], None] | None:
        return self._watcher(self.fd, callback)
