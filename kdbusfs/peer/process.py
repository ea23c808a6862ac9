# SPDX-License-Identifier: LGPL-2.1-or-later
"""The thread inside a call: the real `bus.peer.Peer`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from errno import EBADF, EFAULT, EINVAL, EPERM, ESTALE
from struct import Struct

from ..abi.errors import CommandError, Fault
from ..abi.items import Buffer
from ..abi.numbers import AttachFlag
from ..bus.metadata import PidNamespace, ProcessMetadata
from ..bus.peer import Credentials, Memory
from ..native import ffi, lib
from . import procfs
from .descriptors import FileDescriptor, Watcher, charge
from .fd_table import FD_TABLE, check_exhausted
from .memory import PoolMemory
from .namespaces import OWN_USER, own_number, pid_namespace, user_namespace
from .procfs import CAP_IPC_OWNER, Status
from .stall import fail, leave

# Plain numbers: what an enumeration makes of `&` costs as much as a system call.
_CREDS = int(AttachFlag.CREDS)
_PIDS = int(AttachFlag.PIDS)
_AUXGROUPS = int(AttachFlag.AUXGROUPS)
_CAPS = int(AttachFlag.CAPS)
_TID_COMM = int(AttachFlag.TID_COMM)
_PID_COMM = int(AttachFlag.PID_COMM)
_EXE = int(AttachFlag.EXE)
_CMDLINE = int(AttachFlag.CMDLINE)
_CGROUP = int(AttachFlag.CGROUP)
_SECLABEL = int(AttachFlag.SECLABEL)
_AUDIT = int(AttachFlag.AUDIT)
_STATUS = _CREDS | _PIDS | _AUXGROUPS | _CAPS
"""The kinds of metadata that come from /proc/<tid>/status."""
_TEXT = _AUXGROUPS | _CAPS
"""Those of them that come from nowhere else."""
_IDS = Struct("=11I")
"""See kdbusfs_pidfd_info()."""
_ids = ffi.new("uint32_t[11]")
_ids_view = ffi.buffer(_ids)
_identity = ffi.new("uint64_t *")
_at_home: set[int] = set()
"""Threads that are in our own PID namespace, by identity."""
_MOST_AT_HOME = 1 << 16

_scratch = bytearray(1 << 16)
_scratch_pointer = ffi.from_buffer(_scratch)
_pidfd_info = lib.kdbusfs_pidfd_info
_vm_read = lib.kdbusfs_vm_read
_vm_read_some = lib.kdbusfs_vm_read_some
_vm_write = lib.kdbusfs_vm_write
_vm_fill = lib.kdbusfs_vm_fill
_vm_store = lib.kdbusfs_vm_store
_NOT_STORED = 2
"""What kdbusfs_vm_store() returns if others went first and the store has failed as well."""
_read_cmdline = lib.kdbusfs_read_cmdline
_ARGV0_MAX = 32768
_from_buffer = ffi.from_buffer


def renew_scratch() -> None:
    """Let a thread that stalled in a read have the old buffer for itself."""
    global _scratch, _scratch_pointer
    _scratch = bytearray(len(_scratch))
    _scratch_pointer = ffi.from_buffer(_scratch)


class NotHeld(Exception):
    """A fault of ours: the process was let go, and must not be touched any more."""


class _Pin:
    """A thread as it was once: its pidfd, or before Linux 6.9 when it started."""

    __slots__ = ("_device", "_pidfd", "_started", "_tid")

    def __init__(self, tid: int, device: int) -> None:
        self._tid = tid
        self._device = device
        self._pidfd: int = lib.kdbusfs_pidfd_open(tid)
        self._started = procfs.start_time(tid) if self._pidfd < 0 else None

    def is_held(self) -> bool:
        """Whether the thread lives, and the kernel has not let go of all callers by itself."""
        if not lib.kdbusfs_is_held(self._device, max(self._pidfd, -1)):
            return False
        if self._pidfd >= 0:
            return True
        return self._started is not None and procfs.start_time(self._tid) == self._started

    def __del__(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)


class Process:
    """A thread that is held in a request of ours, known by its id and filesystem ids from there.

    The kernel holds it until the request is answered, even if it is killed meanwhile, so the
    thread id can't come to mean anybody else. Whoever gives the answer calls `let_go` first; from
    then on every access is NotHeld, so that nothing is ever read from, written to or taken from a
    thread that may be somewhere else. A request that is kept for long is pinned: the kernel lets
    all callers go by itself when the connection is aborted, and each later access looks first.
    One thread of the daemon uses all of these.
    """

    __slots__ = ("_held", "_pin", "_status", "_watcher", "gid", "tid", "uid")

    def __init__(self, tid: int, uid: int, gid: int, watcher: Watcher) -> None:
        self.tid = tid
        """For the log; `thread` is what accesses use."""
        self.uid = uid
        self.gid = gid
        self._watcher = watcher
        self._held = True
        self._pin: _Pin | None = None
        self._status: Status | None = None

    def thread(self) -> int:
        """The id of the thread, which is held at this moment. NotHeld if it was let go, Fault if
        the kernel has let go of it."""
        if not self._held:
            raise NotHeld(f"{self.tid} has been let go")
        if self._pin is not None and not self._pin.is_held():
            raise Fault("the kernel has let go of the caller")
        return self.tid

    def pin(self, device: int) -> None:
        """Its request, which came from *device*, will be kept for a while."""
        if self._pin is None:
            self._pin = _Pin(self.tid, device)

    def renewed(self) -> Process:
        """The same thread, at the start of its request as it were; this one is let go."""
        process = Process(self.tid, self.uid, self.gid, self._watcher)
        process._pin = self._pin
        self.let_go()
        return process

    def is_killed(self) -> bool:
        """Whether SIGKILL is pending, so that it ends as soon as its request is answered."""
        return procfs.is_killed(self.thread())

    def let_go(self) -> None:
        """Its request is being answered."""
        self._held = False
        self._pin = None
        self._status = None

    # --- memory

    def read(self, address: int, size: int) -> bytes:
        tid = self.thread()
        if size > len(_scratch):
            data = bytearray(size)
            if (error := _vm_read(tid, address, _from_buffer(data), size)) < 0:
                fail(error)
            return bytes(data)
        if (error := _vm_read(tid, address, _scratch_pointer, size)) < 0:
            fail(error)
        return bytes(_scratch[:size])

    def read_some(self, address: int, size: int) -> bytearray:
        n = _vm_read_some(self.thread(), address, _scratch_pointer, size)
        if n < 0:
            fail(n)
        return _scratch[:n]

    def write(self, address: int, data: Buffer) -> None:
        if (error := _vm_write(self.thread(), address, _from_buffer(data), len(data))) < 0:
            fail(error)

    def store(self, address: int, data: Buffer) -> tuple[int, bool]:
        """Write the results of a command that is finished. Returns 0 or EFAULT, and whether the
        thread of ours that called still runs the bus: not, if this took too long."""
        result: int = _vm_store(self.thread(), address, _from_buffer(data), len(data))
        if result > 0:
            leave()
        return (EFAULT if result < 0 or result == _NOT_STORED else 0), result <= 0

    def fill(self, memory: Memory, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        assert isinstance(memory, PoolMemory)
        tid = self.thread()
        memory.version += 1
        to = memory.pointer + offset
        if len(segments) == 1 and segments[0][0]:
            address, size = segments[0]
            if (error := _vm_read(tid, address, to, size)) < 0:
                fail(error)
            return
        pairs = array("Q", [n for segment in segments for n in segment])
        pointer = _from_buffer("uint64_t[]", pairs)
        if (error := _vm_fill(tid, to, pointer, len(segments))) < 0:
            fail(error)

    # --- identity

    @property
    def status(self) -> Status:
        """EPERM for a caller that is outside of our PID namespace, or hidden in our /proc."""
        if self._status is None:
            status = Status(self.thread())
            if not status:
                # It is held in a call of ours, so it is there.
                raise CommandError(EPERM, f"no /proc/{self.tid}")
            self._status = status
        return self._status

    def credentials(self) -> Credentials:
        status = self.status
        users = user_namespace(self.thread(), self.uid)
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

    def security_label(self) -> bytes | None:
        """What a security module calls it, None without one."""
        return procfs.security_label(self.thread())

    def pid_namespace(self) -> PidNamespace:
        return pid_namespace(self.thread(), self.uid)

    def root(self) -> object:
        """Mount and directory that `/` is for it, None if that can't be found out.

        The directory may be in a file system that a user serves, so nothing is asked of it.
        """
        return procfs.root(self.thread())

    def find_process(self, pid: int) -> tuple[int, ...] | None:
        namespace = self.pid_namespace()
        if namespace.level == 0:
            return Status(pid).numbers(b"NSpid") or None
        try:
            own = own_number(pid, namespace)
        except OSError:
            return _search_process(pid, namespace, self.uid)
        return Status(own).numbers(b"NSpid") or None if own else None

    def gather(self, metadata: ProcessMetadata, kinds: int) -> None:
        tid = self.thread()
        if kinds & _STATUS:
            self._gather_status(metadata, kinds)
        if not kinds & ~_STATUS:
            return
        # Not of the process's first thread, which may have exited.
        if kinds & _TID_COMM:
            metadata.tid_comm = procfs.comm(tid)
        if kinds & _PID_COMM:
            process = self.status.process()
            known = metadata.tid_comm if process == tid else None
            metadata.pid_comm = procfs.comm(process) if known is None else known
        if kinds & _EXE:
            metadata.exe = procfs.readlink(tid, "exe")
        if kinds & _CMDLINE:
            # This one is read from the caller's memory.
            metadata.cmdline = _argv0(tid)
        if kinds & _CGROUP:
            metadata.cgroup = procfs.cgroup(tid)
        if kinds & _SECLABEL:
            metadata.seclabel = procfs.security_label(tid)
        if kinds & _AUDIT:
            metadata.audit = procfs.audit(tid)

    def _gather_ids(self, metadata: ProcessMetadata, kinds: int) -> bool:
        """CREDS and PIDS without /proc; False if that can't be done.

        Credentials may change at any time, so they are asked for each time. The numbers of a
        thread never change, nor does the PID namespace it is in: whether that is ours is
        remembered of each thread by a number that the kernel gives to no other.
        """
        error: int = _pidfd_info(self.thread(), _identity, _ids)
        if error:
            check_exhausted(-error)
            return False
        identity = _identity[0]
        if kinds & _PIDS and identity not in _at_home:
            if len(self.status.numbers(b"NSpid")) != 1:
                return False
            if len(_at_home) >= _MOST_AT_HOME:
                _at_home.clear()
            _at_home.add(identity)
        tid, tgid, parent, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid = _IDS.unpack(_ids_view)
        if kinds & _CREDS:
            metadata.creds = (ruid, euid, suid, fsuid, rgid, egid, sgid, fsgid)
        if kinds & _PIDS:
            metadata.pid_namespace = None
            metadata.pids = ((tgid,), (tid,), (parent,))
        return True

    def _gather_status(self, metadata: ProcessMetadata, kinds: int) -> None:
        if not kinds & _TEXT and self._status is None and self._gather_ids(metadata, kinds):
            return
        status = self.status
        if kinds & (_CREDS | _CAPS):
            metadata.creds = (*status.uids(), *status.gids())
        if kinds & _AUXGROUPS:
            metadata.groups = status.groups()
        if kinds & _PIDS:
            self._gather_pids(metadata)
        if kinds & _CAPS:
            metadata.caps = status.capabilities()
            metadata.user_namespace = user_namespace(self.thread(), self.uid)

    def _gather_pids(self, metadata: ProcessMetadata) -> None:
        status = self.status
        thread = status.numbers(b"NSpid") or status.numbers(b"Pid")
        group = status.numbers(b"NStgid") or status.numbers(b"Tgid")
        parent = status.numbers(b"PPid")
        if not thread or len(group) != len(thread) or len(parent) != 1:
            return
        metadata.pid_namespace = None
        if len(thread) > 1:
            metadata.pid_namespace = pid_namespace(self.thread(), self.uid)
            if parent[0]:
                parent = Status(parent[0]).numbers(b"NSpid") or parent
        metadata.pids = (group, thread, parent)

    # --- descriptors

    def take(self, fd: int) -> FileDescriptor:
        charge(self.uid)
        try:
            taken = self._take(fd)
        except BaseException:
            FD_TABLE.discharge(self.uid)
            raise
        return FileDescriptor(taken, self._watcher, self.uid)

    def _take(self, fd: int) -> int:
        taken: int = lib.kdbusfs_pidfd_take(self.thread(), fd)
        if taken == -EINVAL:
            taken = self._take_of_process(fd)
        if taken < 0:
            check_exhausted(-taken)
            raise CommandError(EBADF, f"descriptor {fd} is not open")
        return taken

    def _take_of_process(self, fd: int) -> int:
        """Before Linux 6.9 a pidfd is of a process; its threads share the table all but always."""
        pidfd: int = lib.kdbusfs_pidfd_open_process(self.status.process())
        if pidfd < 0:
            return pidfd
        try:
            return int(lib.kdbusfs_pidfd_getfd(pidfd, fd))
        finally:
            os.close(pidfd)


def _argv0(tid: int) -> bytes | None:
    """The first string of the argument area; None if there is none (a kernel thread).

    A process can let that area be all of its memory (PR_SET_MM in prctl(2)), so no more is read
    than a name may take.
    """
    text = bytearray(_ARGV0_MAX)
    n: int = _read_cmdline(tid, _from_buffer(text), len(text))
    if n == -ESTALE:
        fail(n)
    check_exhausted(-n)
    return bytes(text[:n]).split(b"\0", 1)[0] if n > 0 else None


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
