# SPDX-License-Identifier: LGPL-2.1-or-later
"""The thread inside a call: the real `bus.peer.Peer`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from errno import EBADF, EINVAL, EPERM

from ..abi.errors import CommandError
from ..abi.items import Buffer
from ..abi.numbers import AttachFlag
from ..bus.metadata import Facts, PidNamespace
from ..bus.peer import Credentials, Memory
from ..native import ffi, lib
from . import procfs
from .descriptors import FileDescriptor, Watcher, charge
from .memory import PoolMemory
from .namespaces import OWN_USER, own_number, pid_namespace, user_namespace
from .procfs import CAP_IPC_OWNER, Status
from .table import TABLE, check_exhausted
from .turn import Operation, fail

_STATUS = int(
    AttachFlag.CREDS | AttachFlag.PIDS | AttachFlag.AUXGROUPS | AttachFlag.CAPS
)
"""The kinds of metadata that come from /proc/<tid>/status."""

_scratch = bytearray(1 << 16)
_scratch_pointer = ffi.from_buffer(_scratch)
_vm_read = lib.kdbusfs_vm_read
_vm_read_some = lib.kdbusfs_vm_read_some
_vm_write = lib.kdbusfs_vm_write
_vm_fill = lib.kdbusfs_vm_fill
_from_buffer = ffi.from_buffer


def renew_scratch() -> None:
    """Let a thread that was overtaken in a read have the old buffer for itself."""
    global _scratch, _scratch_pointer
    _scratch = bytearray(len(_scratch))
    _scratch_pointer = ffi.from_buffer(_scratch)


class Process:
    """A caller, known by its thread id and filesystem ids from the request.

    It is held in its call until that is answered, even if it is killed meanwhile, so the thread
    id can't come to mean anybody else. One thread of the daemon uses all of these.
    """

    __slots__ = ("_status", "_watcher", "gid", "tid", "uid")

    def __init__(self, tid: int, uid: int, gid: int, watcher: Watcher) -> None:
        self.tid = tid
        self.uid = uid
        self.gid = gid
        self._watcher = watcher
        self._status: Status | None = None

    # --- memory

    def read(self, address: int, size: int) -> bytes:
        if size > len(_scratch):
            data = bytearray(size)
            if (error := _vm_read(self.tid, address, _from_buffer(data), size)) < 0:
                fail(error)
            return bytes(data)
        if (error := _vm_read(self.tid, address, _scratch_pointer, size)) < 0:
            fail(error)
        return bytes(_scratch[:size])

    def read_some(self, address: int, size: int) -> bytearray:
        n = _vm_read_some(self.tid, address, _scratch_pointer, size)
        if n < 0:
            fail(n)
        return _scratch[:n]

    def write(self, address: int, data: Buffer) -> None:
        if (error := _vm_write(self.tid, address, _from_buffer(data), len(data))) < 0:
            fail(error)

    def fill(self, memory: Memory, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        assert isinstance(memory, PoolMemory)
        to = memory.pointer + offset
        if len(segments) == 1 and segments[0][0]:
            address, size = segments[0]
            if (error := _vm_read(self.tid, address, to, size)) < 0:
                fail(error)
            return
        pairs = array("Q", [n for segment in segments for n in segment])
        pointer = _from_buffer("uint64_t[]", pairs)
        if (error := _vm_fill(self.tid, to, pointer, len(segments))) < 0:
            fail(error)

    # --- identity

    @property
    def status(self) -> Status:
        """EPERM for a caller that is outside of our PID namespace, or hidden in our /proc."""
        if self._status is None:
            status = Status(self.tid)
            if not status:
                # It is held in a call of ours, so it is there.
                raise CommandError(EPERM, f"no /proc/{self.tid}")
            self._status = status
        return self._status

    def credentials(self) -> Credentials:
        status = self.status
        users = user_namespace(self.tid, self.uid)
        uids, gids = status.uids(), status.gids()
        if uids[3] != self.uid or gids[3] != self.gid:
            # The call is made with other credentials than the thread's own (io_uring's
            # personalities, overlayfs). Of those the request tells all that can be known.
            nobody: frozenset[int] = frozenset()
            return Credentials(self.uid, self.uid, self.gid, self.gid, nobody, False, users)
        return Credentials(
            uids[0],
            uids[1],
            gids[0],
            gids[1],
            frozenset(status.groups()),
            users is OWN_USER and status.has_capability(CAP_IPC_OWNER),
            users,
        )

    def pid_namespace(self) -> PidNamespace:
        return pid_namespace(self.tid, self.uid)

    def root(self) -> object:
        """Mount and directory that `/` is for it, None if that can't be told.

        The directory may be in a file system that a user serves, so nothing is asked of it.
        """
        try:
            fd = os.open(f"/proc/{self.tid}/root", os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            check_exhausted(error.errno)
            return None
        try:
            with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
                known = [line for line in file if line.startswith((b"mnt_id", b"ino"))]
            # The path may be longer than any buffer for one: ENAMETOOLONG.
            return (*known, os.readlink(b"/proc/self/fd/%d" % fd))
        except OSError as error:
            check_exhausted(error.errno)
            return None
        finally:
            os.close(fd)

    def find_process(self, pid: int) -> tuple[int, ...] | None:
        namespace = self.pid_namespace()
        if namespace.level == 0:
            return Status(pid).numbers(b"NSpid") or None
        try:
            own = own_number(pid, namespace)
        except OSError:
            return _search_process(pid, namespace, self.uid)
        return Status(own).numbers(b"NSpid") or None if own else None

    def gather(self, facts: Facts, kinds: int) -> None:
        tid = self.tid
        if kinds & _STATUS:
            self._gather_status(facts, kinds)
        if not kinds & ~_STATUS:
            return
        # Not of the process's first thread, which may have exited.
        if kinds & AttachFlag.TID_COMM:
            facts.tid_comm = procfs.comm(tid)
        if kinds & AttachFlag.PID_COMM:
            facts.pid_comm = procfs.comm(self.status.process())
        if kinds & AttachFlag.EXE:
            facts.exe = procfs.readlink(tid, "exe")
        if kinds & AttachFlag.CMDLINE:
            # This one is read from the caller's memory.
            with Operation():
                facts.cmdline = procfs.argv0(tid)
        if kinds & AttachFlag.CGROUP:
            facts.cgroup = procfs.cgroup(tid)
        if kinds & AttachFlag.SECLABEL:
            facts.seclabel = procfs.security_label(tid)
        if kinds & AttachFlag.AUDIT:
            facts.audit = procfs.audit(tid)

    def _gather_status(self, facts: Facts, kinds: int) -> None:
        status = self.status
        if kinds & (AttachFlag.CREDS | AttachFlag.CAPS):
            facts.creds = (*status.uids(), *status.gids())
        if kinds & AttachFlag.AUXGROUPS:
            facts.groups = status.groups()
        if kinds & AttachFlag.PIDS:
            self._gather_pids(facts)
        if kinds & AttachFlag.CAPS:
            facts.caps = status.capabilities()
            facts.user_namespace = user_namespace(self.tid, self.uid)

    def _gather_pids(self, facts: Facts) -> None:
        status = self.status
        thread = status.numbers(b"NSpid") or status.numbers(b"Pid")
        group = status.numbers(b"NStgid") or status.numbers(b"Tgid")
        parent = status.numbers(b"PPid")
        if not thread or len(group) != len(thread) or len(parent) != 1:
            return
        facts.pid_namespace = None
        if len(thread) > 1:
            facts.pid_namespace = pid_namespace(self.tid, self.uid)
            if parent[0]:
                parent = Status(parent[0]).numbers(b"NSpid") or parent
        facts.pids = (group, thread, parent)

    # --- descriptors

    def take(self, fd: int) -> FileDescriptor:
        charge(self.uid)
        try:
            taken = self._take(fd)
        except BaseException:
            TABLE.discharge(self.uid)
            raise
        return FileDescriptor(taken, self._watcher, self.uid)

    def _take(self, fd: int) -> int:
        pidfd = lib.kdbusfs_pidfd_open(self.tid)
        if pidfd == -EINVAL:
            # Before Linux 6.9 a pidfd is of a process; its threads share the table all but always.
            pidfd = lib.kdbusfs_pidfd_open_process(self.status.process())
        try:
            taken: int = lib.kdbusfs_pidfd_getfd(pidfd, fd) if pidfd >= 0 else pidfd
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        if taken < 0:
            check_exhausted(-taken)
            raise CommandError(EBADF, f"descriptor {fd} is not open")
        return taken


def _search_process(pid: int, namespace: PidNamespace, uid: int) -> tuple[int, ...] | None:
    """`find_process` before Linux 6.11, for user *uid*: inner numbers can only be searched for."""
    try:
        entries = os.listdir("/proc")
    except OSError as error:
        check_exhausted(error.errno)
        return None
    for entry in entries:
        if entry.isdigit():
            numbers = Status(int(entry)).numbers(b"NSpid")
            has_number = len(numbers) > namespace.level and numbers[namespace.level] == pid
            if has_number and _is_in(int(entry), namespace, uid):
                return numbers
    return None


def _is_in(tid: int, namespace: PidNamespace, uid: int) -> bool:
    level = namespace.level
    try:
        home = pid_namespace(tid, uid)
    except CommandError as error:
        if error.errno != EPERM:
            raise
        # It has ended meanwhile.
        return False
    return home.level >= level and home.chain[level] == namespace.id
