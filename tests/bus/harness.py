# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain without a mount, and clients that speak to it in kdbus's words.

Commands go in as bytes and results are read from the caller's memory and from pools as bytes, so
that the tests stand on the ABI alone. `File.ioctl` does what the FUSE side does for a request.
"""

import errno as _errno
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from errno import EFAULT
from typing import Any

import pytest

from abi_client.building import (
    BLOOM_SIZE,
    POOL_SIZE,
    command,
    hello,
    send_command,
    text,
)
from abi_client.received import Received
from abi_client.verbs import (
    SECOND,
    ConnectionVerbs,
    MakingConnections,
    Sending,
    Transport,
    bus_items,
)
from bus.fakes import HOME_USERS, FakeClock, FakeMemory, FakePeer
from kdbusfs.abi import structs
from kdbusfs.abi.errors import CommandError, Fault, Stalled
from kdbusfs.abi.numbers import ATTACH_ALL, Command, ItemType, MsgFlag, SendFlag
from kdbusfs.abi.specs import COMMAND_SPECS, find_command
from kdbusfs.bus.bus import Bus as CoreBus
from kdbusfs.bus.call import CONTINUE, PENDING, WAITS_AGAIN, Call
from kdbusfs.bus.domain import Domain
from kdbusfs.bus.handle import Handle
from kdbusfs.bus.pool import Inode

_DIRECTION_WRITE = 0x40000000


@contextmanager
def fails(errno: int) -> Iterator[None]:
    """What is inside ends with this errno."""
    with pytest.raises(CommandError) as caught:
        yield
    seen = _errno.errorcode[caught.value.errno]
    assert seen == _errno.errorcode[errno], caught.value


class Pending:
    """A command that waits; `error` is None until it has ended."""

    def __init__(self, file: "File", call: Call, inline_size: int = 0) -> None:
        self.file = file
        self.call = call
        self.inline_size = inline_size
        self.block = b""
        """What the argument of a call that goes on has become."""
        self._error: int | None = None
        self.completed = False
        call.complete = self._complete

    def renew(self) -> None:
        """Start from the beginning, or for a block where it says."""
        call = self.call
        self.call = Call(call.code, call.spec, call.peer, call.address)
        self.call.complete = self._complete
        if call.spec.is_block and call.read:
            self.block = bytes(call.data)

    def _complete(self, call: Call, error: int) -> None:
        assert not self.completed, "completed twice"
        self.completed = True
        self.file.domain.completed.append(self)

    def finish(self) -> None:
        """What the FUSE side does for a call that has been completed."""
        error = self.file.handle.finish(self.call)
        if error == WAITS_AGAIN:
            self.completed = False
        else:
            self.end(error)

    def end(self, error: int) -> None:
        """It is answered with *error*."""
        self._error = self.file.store(self.call, error)

    @property
    def error(self) -> int | None:
        self.file.domain.finish()
        return self._error

    @property
    def waiting(self) -> bool:
        return self.error is None

    def struct(self) -> bytes:
        return self.file.peer.read(self.call.address, self.call.spec.size)

    @property
    def reply(self) -> Received:
        assert self.error == 0, self.error
        offset, size, flags = struct.unpack_from("=QQQ", self.struct(), 32)
        return Received(offset, self.file.visible(offset, size), msg_return_flags=flags)

    def interrupt(self) -> None:
        """A signal arrives."""
        self.call.interrupt()
        self.file.domain.finish()


class File(Transport):
    """An open file of a domain, used by a process."""

    def __init__(
        self,
        domain: "FakeDomain",
        path: str,
        peer: FakePeer,
        new_memory: Callable[[int], FakeMemory] = FakeMemory,
        inode: Inode | None = None,
    ) -> None:
        self.domain = domain
        self.peer = peer
        node = domain.node(path)
        self.handle = Handle(domain.core, node, peer.credentials(), new_memory, inode)
        self.closed = False
        domain.files.append(self)

    def holding(self, data: bytes) -> AbstractContextManager[int]:
        return self.peer.holding(data)

    def read(self, address: int, size: int) -> bytes:
        return self.peer.read(address, size)

    def execute(self, code: int, address: int) -> int:
        error = self.start(code, address).error
        assert error is not None, "the command waits"
        return error

    def failure(self, number: int) -> CommandError:
        return CommandError(number)

    def now(self) -> int:
        return self.domain.clock.now

    def start(self, code: int, address: int) -> Pending:
        """Begin a command; it may have ended already."""
        inline_size = code >> 16 & 0x3FFF if code & _DIRECTION_WRITE else 0
        code = find_command(code)
        assert code in COMMAND_SPECS
        pending = Pending(self, Call(code, COMMAND_SPECS[code], self.peer, address), inline_size)
        try:
            self._execute(pending)
        except Stalled:
            pending.renew()
            try:
                self._execute(pending)
            except Stalled:
                pending.end(EFAULT)
        self.domain.finish()
        self.domain.check()
        return pending

    def _execute(self, pending: Pending) -> None:
        call = pending.call
        # The kernel brings and takes what direction and size in the code say.
        try:
            inline = pending.block
            if pending.inline_size and not inline:
                inline = self.peer.read(call.address, pending.inline_size)
            result = self.handle.execute(call, inline)
        except CommandError as error:
            pending.end(error.errno)
        else:
            if result == CONTINUE:
                pending.renew()
                self.domain.put_off.append(pending)
            elif result != PENDING:
                pending.end(0)

    def go_on(self, pending: Pending) -> None:
        """The turn of a call that was put off has come."""
        self.domain.put_off.remove(pending)
        self._execute(pending)
        self.domain.finish()
        self.domain.check()

    def store(self, call: Call, error: int) -> int:
        """Write the results of *call* back and install its descriptors; returns its errno."""
        if not call.read:
            return error
        start, end = call.store_on_error if error else call.store
        if call.code & 0x80000000:
            start = 0
        if call.fds is not None:
            if not error:
                numbers = [self.peer.install(d) for d in call.fds.descriptors]
                struct.pack_into("=Q", call.data, end - 8, call.fds.installed(numbers))
            call.fds.release()
        try:
            call.peer.write(call.address + start, call.data[start:end])
        except Fault as fault:
            return fault.errno
        return error

    def visible(self, offset: int, size: int) -> bytes:
        memory = self.handle.connection.pool.memory
        return bytes(memory.visible[offset : offset + size])

    def close(self) -> None:
        self.closed = True
        self.handle.close()
        self.domain.finish()
        self.domain.check()

    @property
    def hung_up(self) -> bool:
        return self.handle.hung_up

    @property
    def readable(self) -> bool:
        return self.handle.readable

    # --- BUS_MAKE, ENDPOINT_MAKE, HELLO

    def bus_make(self, *items: bytes, flags: int = 0) -> bytes:
        return self.ioctl(Command.BUS_MAKE, command(flags, *items))

    def endpoint_make(self, *items: bytes, flags: int = 0) -> bytes:
        return self.ioctl(Command.ENDPOINT_MAKE, command(flags, *items))

    def endpoint_update(self, *items: bytes) -> bytes:
        return self.ioctl(Command.ENDPOINT_UPDATE, command(0, *items))

    def hello(
        self,
        *items: bytes,
        flags: int = 0,
        send: int = ATTACH_ALL,
        recv: int = 0,
        pool_size: int = POOL_SIZE,
    ) -> bytes:
        argument = hello(*items, flags=flags, send=send, recv=recv, pool_size=pool_size)
        return self.ioctl(Command.HELLO, argument)


class Client(File, Sending):
    """A connection."""

    def __init__(
        self,
        bus: "Bus",
        *items: bytes,
        peer: FakePeer | None = None,
        endpoint: str = "bus",
        free: bool = True,
        inode: Inode | None = None,
        **options: Any,
    ) -> None:
        peer = peer if peer is not None else FakePeer(bus.owner.who.euid)
        super().__init__(bus.domain, f"{bus.name}/{endpoint}", peer, inode=inode)
        self.bus = bus
        self.connect(*items, free=free, **options)

    @property
    def connection(self) -> Any:
        return self.handle.connection

    @property
    def memory(self) -> FakeMemory:
        return self.connection.pool.memory

    @contextmanager
    def used_by(self, peer: FakePeer) -> Iterator["Client"]:
        """Another process has the descriptor, as after fork(2)."""
        before, self.peer = self.peer, peer
        try:
            yield self
        finally:
            self.peer = before

    def call(
        self,
        to: ConnectionVerbs | int | str,
        *items: bytes,
        command_items: tuple[bytes, ...] = (),
        timeout: int | None = None,
        **fields: Any,
    ) -> Pending:
        """SEND with SYNC_REPLY."""
        if timeout is None:
            timeout = self.domain.clock.now + SECOND
        fields = {"flags": MsgFlag.EXPECT_REPLY, **fields}
        with self._message(to, *items, timeout=timeout, **fields) as address:
            argument = send_command(address, *command_items, flags=SendFlag.SYNC_REPLY)
            return self.start(Command.SEND, self.peer.put(argument))

    def inbox(self) -> list[Received]:
        """Everything that is queued."""
        found = []
        while self.connection.queue:
            found.append(self.recv())
        return found

    def lost(self) -> int:
        """How many messages it lost, as RECV tells when there is none."""
        assert not self.connection.queue
        if not self.readable:
            return 0
        number, result = self._recv()
        assert number == _errno.EAGAIN
        fields = structs.CMD_RECV.unpack(result)
        assert fields[2] == (2 if fields[4] else 0)
        return int(fields[4])


class Bus(MakingConnections):
    """A bus and the file that keeps it alive."""

    def __init__(
        self,
        domain: "FakeDomain",
        owner: FakePeer,
        string: str = "test",
        *items: bytes,
        flags: int = 0,
        bloom_size: int = BLOOM_SIZE,
    ) -> None:
        self.domain = domain
        self.owner = owner
        self.name = f"{owner.who.euid}-{string}"
        self.file = File(domain, "control", owner)
        self.file.bus_make(bus_items(self.name, size=bloom_size), *items, flags=flags)

    @property
    def core(self) -> CoreBus:
        core = self.file.handle.bus
        assert core is not None
        return core

    def hello(self, *items: bytes, **options: Any) -> Client:
        """An ordinary connection; of the bus's owner unless *peer* says otherwise."""
        return Client(self, *items, **options)

    def endpoint(self, string: str = "1000-custom", *policy: bytes) -> File:
        """A custom endpoint, made by the bus's owner, with this policy."""
        file = File(self.domain, f"{self.name}/bus", self.owner)
        file.endpoint_make(text(ItemType.MAKE_NAME, string))
        file.endpoint_update(*policy)
        return file

    def open(self, path: str = "bus", peer: FakePeer | None = None) -> File:
        return File(self.domain, f"{self.name}/{path}", peer or self.owner)

    def owner_of(self, string: str) -> int | None:
        owner = self.core.names.owner_of(string.encode())
        return owner.id if owner else None


class FakeDomain:
    """A domain with a clock that stands still."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.core = Domain(self.clock, HOME_USERS)
        self.files: list[File] = []
        self.completed: list[Pending] = []
        self.put_off: list[Pending] = []
        """Calls to be gone on with, see `File.go_on`."""
        self.works = True
        """Whether `finish` does what takes long."""

    def node(self, path: str) -> Any:
        node = self.core.root
        for part in path.split("/"):
            node = node.children[part]
        return node

    def paths(self) -> set[str]:
        """Every file there is."""
        return {
            f"{directory.name}/{name_}"
            for directory in self.core.root.children.values()
            for name_ in directory.children
        }

    def make_bus(self, string: str = "test", *items: bytes, uid: int = 1000, **options: Any) -> Bus:
        return Bus(self, FakePeer(uid), string, *items, **options)

    def advance(self, ns: int) -> None:
        """Let time pass."""
        self.clock.now += ns
        self.core.expire()
        self.finish()
        self.check()

    def finish(self) -> None:
        """Do the work that is left and finish the calls that have been completed, as the FUSE side
        does between requests."""
        while self.completed or (self.core.work and self.works):
            if self.core.work and self.works:
                self.core.work.proceed()
            while self.completed:
                self.completed.pop(0).finish()

    def check(self) -> None:
        """Assert what must hold between any two calls, in all of the domain."""
        self.core.check()

    def end(self) -> None:
        """Close every file and assert that nothing is left behind."""
        for file in self.files:
            if not file.closed:
                file.close()
        self.works = True
        self.finish()
        assert not self.paths()
        assert self.core.next_deadline() is None
        for file in self.files:
            assert not any(taken.holders for taken in file.peer.taken)
        for user in self.core._users.values():
            assert user.n_connections == 0
            assert user.n_buses == 0
        for share in self.core.budget.all():
            share.check_empty()
