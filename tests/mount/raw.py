# SPDX-License-Identifier: LGPL-2.1-or-later
"""A raw kdbus client: open(), ioctl(), mmap() and nothing between them and the test.

What libkdbus does for its users is deliberately not done here: no private socket, no retry, no
cleaning up behind a failed call. Structs and numbers are those of `kdbusfs.abi`, which tests/abi
holds against the header. Every failure of a system call is an OSError with its errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

import daemons
from abi_client.building import (
    GARBAGE,
    POOL_SIZE,
    Memfd,
    bloom,
    command,
    memfd,
    message,
    text,
    u64,
    vec,
)
from abi_client.building import fds as fds_item
from abi_client.received import Received
from abi_client.verbs import ConnectionVerbs, Transport, bus_items
from kdbusfs.abi import structs
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    DST_ID_BROADCAST,
    Command,
    HelloFlag,
    ItemType,
    MsgFlag,
    PayloadType,
    RecvFlag,
    SendFlag,
)
from kdbusfs.abi.structs import U64, align8

PAGE = mmap.PAGESIZE
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value

_numbers = itertools.count(1)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextmanager
def fails(number: int) -> Iterator[None]:
    """What is done inside fails with this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    given = errno.errorcode.get(caught.value.errno or 0, str(caught.value))
    assert given == errno.errorcode[number]


def outcome(function: Callable[[], object]) -> str:
    """`0`, or the name of the errno that *function* fails with."""
    try:
        function()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "0"


def succeeds(function: Callable[[], object], *otherwise: int) -> bool:
    """Whether *function* succeeds; it may fail with one of *otherwise*, and with nothing else."""
    result = outcome(function)
    assert result in ("0", *(errno.errorcode[number] for number in otherwise))
    return result == "0"


def ioctl(fd: int, code: int, address: int) -> int:
    """ioctl(2) with an address, which nobody copies, aligns or looks at on the way."""
    return _check(libc.ioctl(fd, code, address))


class Memory:
    """Bytes at an address that is a multiple of 8 and stays the same."""

    def __init__(self, data: bytes | bytearray | int) -> None:
        size = data if isinstance(data, int) else len(data)
        self.size = size
        self._words = (ctypes.c_uint64 * (align8(max(size, 1)) // 8))()
        self.address = ctypes.addressof(self._words)
        if not isinstance(data, int):
            ctypes.memmove(self.address, bytes(data), size)

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def u64(self, offset: int) -> int:
        return int(U64.unpack_from(bytes(self), offset)[0])


class Mapping:
    """A mapping, by mmap(2) itself: Python's own asks for the file's size first."""

    def __init__(
        self,
        fd: int,
        size: int,
        protection: int = mmap.PROT_READ,
        flags: int = mmap.MAP_SHARED,
        offset: int = 0,
    ) -> None:
        address = libc.mmap(None, size, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            _check(-1)
        assert isinstance(address, int)
        self.address, self.size = address, size

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0
        assert offset + size <= self.size
        return ctypes.string_at(self.address + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.address + offset, data, len(data))

    def protect(self, protection: int, offset: int = 0, size: int | None = None) -> None:
        size = self.size - offset if size is None else size
        _check(libc.mprotect(self.address + offset, size, protection))

    def unmap(self, offset: int = 0, size: int | None = None) -> None:
        """Unmap a part, or what is left."""
        _check(libc.munmap(self.address + offset, self.size - offset if size is None else size))

    @classmethod
    def anonymous(cls, size: int) -> Mapping:
        return cls(-1, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON)


def execute(fd: int, code: int, argument: bytes) -> Memory:
    """ioctl(2) with *argument* as it is; returns it as it is afterwards."""
    memory = Memory(argument)
    ioctl(fd, code, memory.address)
    return memory


# --- what messages are made of


@dataclass(frozen=True)
class Vec:
    """A PAYLOAD_VEC of whatever lies there; address 0 stands for zeros without data."""

    address: int
    size: int


Part = bytes | Vec | Memfd


def make_message(
    dst_id: int = 0,
    parts: Sequence[Part] = (),
    *,
    flags: int = 0,
    priority: int = 0,
    src_id: int = 0,
    payload_type: int = PayloadType.DBUS,
    cookie: int = 1,
    last: int = 0,
    name: str | None = None,
    fds: Sequence[int] = (),
    items: bytes = b"",
) -> tuple[bytes, list[Memory]]:
    """A struct kdbus_msg with its items, and the memory its vecs point at. *last* is timeout_ns
    or cookie_reply, *items* goes in front of all others."""
    chain, kept = [items], []
    for part in parts:
        if isinstance(part, Memfd):
            chain.append(memfd(part.fd, part.size, part.start))
            continue
        if isinstance(part, bytes):
            kept.append(memory := Memory(part))
            part = Vec(memory.address, len(part))
        chain.append(vec(part.address, part.size))
    if fds:
        chain.append(fds_item(*fds))
    if name is not None:
        chain.append(text(ItemType.DST_NAME, name))
    content = message(
        *(dst_id, *chain),
        flags=flags,
        priority=priority,
        src_id=src_id,
        payload_type=payload_type,
        cookie=cookie,
        timeout=last,
    )
    return content, kept


# --- files


class File(Transport):
    """An open node, to be closed once."""

    access = os.O_RDWR

    def __init__(self, path: str | Path, dir_fd: int | None = None) -> None:
        self.fd = os.open(path, self.access | os.O_CLOEXEC, dir_fd=dir_fd)

    def fileno(self) -> int:
        return self.fd

    @contextmanager
    def holding(self, data: bytes) -> Iterator[int]:
        memory = Memory(data)
        yield memory.address

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def execute(self, code: int, address: int) -> int:
        return ctypes.get_errno() if libc.ioctl(self.fd, code, address) < 0 else 0

    def failure(self, number: int) -> OSError:
        return OSError(number, os.strerror(number))

    def now(self) -> int:
        return monotonic_ns(0)

    def command(self, code: int, *fields: int, items: bytes = b"", flags: int = 0) -> Memory:
        """One ioctl; returns its argument as it is afterwards."""
        return execute(self.fd, code, command(flags, items, fields=u64(*fields)))

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Bus(File):
    """A bus, for as long as this file is open."""

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        *,
        flags: int = 0,
        attach: int | None = ATTACH_ALL,
    ) -> None:
        super().__init__(Path(root) / "control")
        self.name = name or f"{os.geteuid()}-raw-{os.getpid()}-{next(_numbers)}"
        self.root = Path(root)
        self.directory = self.root / self.name
        self.path = self.directory / "bus"
        try:
            self.command(Command.BUS_MAKE, flags=flags, items=bus_items(self.name, attach=attach))
        except OSError:
            self.close()
            raise

    def connect(self, **options: int | bytes) -> Connection:
        return Connection(self.path, **options)  # type: ignore[arg-type]


class Connection(File, ConnectionVerbs):
    """A connection to the endpoint at *path*."""

    def __init__(
        self,
        path: str | Path,
        *,
        flags: int = HelloFlag.ACCEPT_FD,
        send: int = ATTACH_ALL,
        recv: int = 0,
        pool_size: int = POOL_SIZE,
        items: bytes = b"",
        dir_fd: int | None = None,
    ) -> None:
        super().__init__(path, dir_fd)
        try:
            self.hello(flags, send, recv, pool_size, items)
        except OSError:
            self.close()
            raise

    def hello(self, flags: int, send: int, recv: int, pool_size: int, items: bytes) -> None:
        self._pool: Mapping | None = None
        self.connect(items, flags=flags, send=send, recv=recv, pool_size=pool_size)

    def visible(self, offset: int, size: int) -> bytes:
        return self.pool.read(offset, size)

    @property
    def pool(self) -> Mapping:
        """The pool, mapped when it is first looked at."""
        if self._pool is None:
            self._pool = Mapping(self.fd, self.pool_size)
        return self._pool

    def close(self) -> None:
        super().close()
        if getattr(self, "_pool", None) is not None:
            assert self._pool is not None
            self._pool.unmap()
            self._pool = None

    def close_others(self, root: str | Path) -> None:
        """In a forked child: close what it inherited of the domain at *root*, but for this."""
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                is_node = os.readlink(f"/proc/self/fd/{name}").startswith(f"{root}/")
                if is_node and int(name) != self.fd:
                    os.close(int(name))

    # --- messages

    def send(
        self,
        dst_id: int = 0,
        *parts: Part,
        sync: bool = False,
        command_items: bytes = b"",
        **message: object,
    ) -> Received | None:
        """SEND. A synchronous call returns its reply."""
        content, kept = make_message(dst_id, parts, **message)  # type: ignore[arg-type]
        argument = Memory(content)
        result = self.command(
            *(Command.SEND, argument.address, GARBAGE, GARBAGE, GARBAGE),
            flags=SendFlag.SYNC_REPLY if sync else 0,
            items=command_items,
        )
        del kept
        assert result.u64(16) == 0
        assert bytes(argument) == content, "SEND leaves the message as it is"
        offset, size, flags = structs.MSG_INFO.unpack_from(bytes(result), 32)
        if sync:
            return Received(offset, self.pool.read(offset, size), msg_return_flags=flags)
        assert (offset, size, flags) == (self.pool_size, 0, 0)
        return None

    def call(
        self, dst_id: int = 0, *parts: Part, timeout: float = 10.0, **message: object
    ) -> Received:
        """SEND with SYNC_REPLY, to end after *timeout* seconds."""
        flags = MsgFlag.EXPECT_REPLY
        deadline = monotonic_ns(timeout)
        reply = self.send(dst_id, *parts, sync=True, flags=flags, last=deadline, **message)  # type: ignore[arg-type]
        assert reply is not None
        return reply

    def request(
        self, dst_id: int = 0, *parts: Part, timeout: float = 10.0, **message: object
    ) -> None:
        """SEND with EXPECT_REPLY."""
        flags, deadline = MsgFlag.EXPECT_REPLY, monotonic_ns(timeout)
        self.send(dst_id, *parts, flags=flags, last=deadline, **message)  # type: ignore[arg-type]

    def reply(self, to: Received, *parts: Part, **message: object) -> None:
        self.send(to.src_id, *parts, last=to.cookie, **message)  # type: ignore[arg-type]

    def broadcast(self, *parts: Part, **message: object) -> None:
        self.send(DST_ID_BROADCAST, *parts, flags=MsgFlag.SIGNAL, items=bloom(), **message)  # type: ignore[arg-type]

    def recv(self, flags: int = 0, priority: int = 0, *, free: bool = False) -> Received:
        """RECV; EAGAIN at once if there is nothing. The slice stays."""
        return super().recv(flags, priority, free=free)

    def recv_raw(self, flags: int = 0, priority: int = 0) -> Memory:
        """RECV; its argument as it is afterwards."""
        return self.command(Command.RECV, priority, *[GARBAGE] * 4, flags=flags)

    def take(self, seconds: float = daemons.DEADLINE_SECONDS) -> Received:
        """Wait for a message, receive it and free its slice (the bytes are ours by then)."""
        self.wait(seconds)
        return self.recv(free=True)

    def drop(self) -> None:
        self.recv_raw(RecvFlag.DROP)

    def wait(self, seconds: float = daemons.DEADLINE_SECONDS) -> None:
        """Until it is readable."""
        events = poll(self, seconds)
        assert events & select.POLLIN, f"not readable after {seconds} s: {events:#x}"


# --- small things


def monotonic_ns(seconds: float) -> int:
    """A deadline, *seconds* from now, as kdbus counts it."""
    return time.monotonic_ns() + int(seconds * 1e9)


def poll(file: File | int, seconds: float = 0.0, events: int = 0xFFFF) -> int:
    """The revents of poll(2) once POLLIN, POLLERR or POLLHUP is among them or the time is up."""
    poller = select.poll()
    poller.register(file, events & ~(select.POLLOUT | select.POLLWRNORM))
    found = dict(poller.poll(seconds * 1000)) if seconds else {}
    poller.modify(file, events)
    now = dict(poller.poll(0))
    number = file if isinstance(file, int) else file.fd
    return now.get(number, 0) | found.get(number, 0)


SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, SHRINK, GROW, WRITE: what a memfd payload must have."""


def sealed_memfd(content: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
