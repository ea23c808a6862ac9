# SPDX-License-Identifier: LGPL-2.1-or-later
"""The world around the bus, made of plain objects: processes, their files, pools, the time.

They are stricter than the real ones: memory has guard gaps, so that a byte read too much is a
Fault; a pool refuses writes outside of itself and being read; what is gathered about a process
is written down.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from errno import EBADF, EINVAL, EMEDIUMTYPE, ENOMEM, ETXTBSY

from kdbusfs.abi.errors import CommandError, Fault
from kdbusfs.abi.numbers import AttachFlag
from kdbusfs.bus.metadata import Capabilities, PidNamespace, ProcessMetadata, UserNamespace
from kdbusfs.bus.peer import Credentials

Buffer = bytes | bytearray | memoryview

HOME_USERS = UserNamespace(1)
HOME_PIDS = PidNamespace((1,))
HOME_ROOT = "/"
LAST_CAPABILITY = 40
ALL_CAPABILITIES = (1 << (LAST_CAPABILITY + 1)) - 1


class FakeClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000_000
        self.offset = 1_700_000_000_000_000_000
        self.tick = 0
        """How far it moves each time somebody looks."""

    def monotonic_ns(self) -> int:
        self.now += self.tick
        return self.now

    def realtime_ns(self) -> int:
        return self.now + self.offset


class FakeMemory:
    """A pool. `visible` is what its client sees: what has been published to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = bytearray(size)
        self.visible = bytearray(size)
        self.sealed = False
        self.closed = False
        self.mapped = False
        """Whether the client goes on to have it mapped when it is closed."""
        self.may_read = False
        """Whether payload may be read back, which only a migrating message needs."""

    def _check(self, offset: int, size: int) -> None:
        assert not self.closed, "pool used after its end"
        assert 0 <= offset <= offset + size <= self.size, f"{offset}+{size} outside the pool"

    def write(self, offset: int, data: Buffer) -> None:
        self._check(offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        assert self.may_read, "pool read back"
        self._check(offset, size)
        return bytes(self.bytes[offset : offset + size])

    def publish(self, offset: int, size: int) -> None:
        self._check(offset, size)
        self.visible[offset : offset + size] = self.bytes[offset : offset + size]

    def seal(self) -> None:
        self.sealed = True

    def close(self, gone: Callable[[], None]) -> None:
        self.closed = True
        self._gone = gone
        if not self.mapped:
            gone()

    def unmap(self) -> None:
        """The client gives up its mapping."""
        self.mapped = False
        if self.closed:
            self._gone()


@dataclass(eq=False)
class FakeFile:
    """An open file of a process."""

    holds_files: bool = False
    """A kdbus file, AF_UNIX socket or io_uring."""
    own_channel: bool = False
    """A socket to the caller itself."""
    path: bool = False
    """O_PATH"""
    size: int | None = None
    """Of a memfd; None: not one."""
    sealed: bool = True
    pollable: bool = True
    readable: bool = False
    watchers: list[Callable[[], None]] = field(default_factory=list)
    holders: int = 0
    """How many the bus has of it."""

    def hold(self) -> None:
        assert self.holders, "held by nobody, and so closed"
        self.holders += 1

    def release(self) -> None:
        assert self.holders, "released too often"
        self.holders -= 1

    def can_hold_files(self) -> bool:
        assert self.holders
        return self.holds_files

    def become_channel(self) -> None:
        if self.path:
            raise CommandError(EBADF, "O_PATH")
        if not self.own_channel:
            raise CommandError(EINVAL, "no channel")

    def is_path(self) -> bool:
        return self.path

    def sealed_size(self) -> int:
        if self.size is None:
            raise CommandError(EMEDIUMTYPE, "no memfd")
        if not self.sealed:
            raise CommandError(ETXTBSY, "not sealed")
        return self.size

    def check_pollable(self) -> None:
        if self.path:
            raise CommandError(EBADF, "O_PATH")
        if not self.pollable:
            raise CommandError(EINVAL, "can't be polled")

    def watch(self, callback: Callable[[], None]) -> Callable[[], None] | None:
        if self.readable:
            return None
        self.watchers.append(callback)
        self.hold()

        def unwatch() -> None:
            self.watchers.remove(callback)
            self.release()

        return unwatch

    def become_readable(self) -> None:
        self.readable = True
        for callback in list(self.watchers):
            callback()


@dataclass
class Region:
    """Mapped memory of a process."""

    start: int
    data: bytearray
    readable: bool = True
    writable: bool = True

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class FakePeer:
    """A process with one thread."""

    _next_pid = 100

    def __init__(self, uid: int = 1000, gid: int | None = None, **identity: object) -> None:
        FakePeer._next_pid += 1
        gid = uid if gid is None else gid
        self.tid = FakePeer._next_pid
        self.who = Credentials(uid, uid, gid, gid, frozenset(), False, HOME_USERS)
        self.pids = HOME_PIDS
        self.root_directory: object = HOME_ROOT
        self.processes = {self.tid: (self.tid,)}
        """What `find_process` finds."""
        self.metadata = ProcessMetadata()
        """What `gather` finds, credentials aside."""
        self.describe()
        self.gathered: Counter[AttachFlag] = Counter()
        """How often each kind was gathered."""
        self.files: dict[int, FakeFile] = {}
        self.taken: list[FakeFile] = []
        """What the bus took."""
        self.n_files_max = 1024
        """RLIMIT_NOFILE"""
        self._regions: list[Region] = []
        self._top = 0x10000
        self.become(**identity)

    def become(self, **identity: object) -> "FakePeer":
        """Change credentials, as setresuid(2) and its like do."""
        self.who = replace(self.who, **identity)  # type: ignore[arg-type]
        return self

    @property
    def uid(self) -> int:
        return self.who.euid

    @property
    def gid(self) -> int:
        return self.who.egid

    def describe(self) -> None:
        metadata = self.metadata
        metadata.pids = ((self.tid,), (self.tid,), (1,))
        metadata.tid_comm = b"thread"
        metadata.pid_comm = b"process"
        metadata.exe = b"/usr/bin/fake"
        metadata.cmdline = b"fake"
        metadata.cgroup = b"/fake"
        metadata.caps = Capabilities(LAST_CAPABILITY, 0, 1 << 15, 1 << 15, ALL_CAPABILITIES)
        metadata.seclabel = b"unconfined"
        metadata.audit = (7, self.who.uid)

    # --- memory

    def map(self, size: int, *, readable: bool = True, writable: bool = True) -> int:
        """Map *size* bytes, aligned to a page and with unmapped memory on both sides."""
        region = Region(self._top, bytearray(size), readable, writable)
        self._regions.append(region)
        self._top = (region.end + 0x1FFF) & ~0xFFF
        return region.start

    def put(self, data: Buffer, *, writable: bool = True) -> int:
        """Map exactly these bytes."""
        address = self.map(len(data), writable=writable)
        self._regions[-1].data[:] = data
        return address

    def unmap(self, address: int) -> None:
        self._regions = [r for r in self._regions if r.start != address]

    @contextmanager
    def holding(self, data: Buffer) -> Iterator[int]:
        """*data* in memory, for a while."""
        address = self.put(data)
        try:
            yield address
        finally:
            self.unmap(address)

    def region(self, address: int) -> Region | None:
        for region in reversed(self._regions):
            if region.start <= address < region.end:
                return region
        return None

    def read(self, address: int, size: int) -> bytes:
        found = self.read_some(address, size)
        if len(found) < size:
            raise Fault
        return bytes(found)

    def read_some(self, address: int, size: int) -> bytearray:
        region = self.region(address)
        if region is None or not region.readable:
            raise Fault
        at = address - region.start
        return region.data[at : at + size]

    def write(self, address: int, data: Buffer) -> None:
        region = self.region(address)
        if region is None or not region.writable or address + len(data) > region.end:
            raise Fault
        at = address - region.start
        region.data[at : at + len(data)] = data

    def fill(self, memory: FakeMemory, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        for address, size in segments:
            memory.write(offset, self.read(address, size) if address else bytes(size))
            offset += size

    # --- identity

    def credentials(self) -> Credentials:
        return self.who

    def gather(self, metadata: ProcessMetadata, kinds: int) -> None:
        mine, who = self.metadata, self.who
        for flag in AttachFlag:
            if flag & kinds:
                self.gathered[flag] += 1
        if kinds & (AttachFlag.CREDS | AttachFlag.CAPS):
            uids = (who.uid, who.euid, who.uid, who.euid)
            metadata.creds = (*uids, who.gid, who.egid, who.gid, who.egid)
        if kinds & AttachFlag.AUXGROUPS:
            metadata.groups = tuple(sorted(who.groups))
        if kinds & AttachFlag.PIDS:
            metadata.pids = mine.pids
            metadata.pid_namespace = self.pids
        if kinds & AttachFlag.CAPS:
            metadata.caps = mine.caps
            metadata.user_namespace = who.user_namespace
        for name in ("tid_comm", "pid_comm", "exe", "cmdline", "cgroup", "seclabel", "audit"):
            if kinds & AttachFlag[name.upper()]:
                setattr(metadata, name, getattr(mine, name))

    def pid_namespace(self) -> PidNamespace:
        return self.pids

    def root(self) -> object:
        return self.root_directory

    def find_process(self, pid: int) -> tuple[int, ...] | None:
        return self.processes.get(pid)

    # --- descriptors

    def open(self, file: FakeFile) -> int:
        """Give *file* the lowest free number."""
        fd = next(n for n in range(len(self.files) + 1) if n not in self.files)
        self.files[fd] = file
        return fd

    def install(self, file: FakeFile) -> int:
        """As `open`, but -1 beyond the limit."""
        return self.open(file) if len(self.files) < self.n_files_max else -1

    def take(self, fd: int) -> FakeFile:
        file = self.files.get(fd)
        if file is None:
            raise CommandError(EBADF, f"descriptor {fd} is not open")
        file.holders += 1
        self.taken.append(file)
        return file


def no_memory(size: int) -> FakeMemory:
    """Make no pool: there is no memory for it."""
    raise CommandError(ENOMEM, f"no memory for {size} bytes")
