# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client can say in kdbus's words, whatever carries it.

`Transport` is what a way to issue commands has to offer. There are two: bus/harness.py executes
commands on a domain without a mount, mount/raw.py has open(2), ioctl(2) and mmap(2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from errno import EAGAIN
from typing import Any

from abi_client.building import (
    BLOOM_SIZE,
    GARBAGE,
    bloom,
    bloom_parameter,
    command,
    hello,
    item,
    message,
    name,
    send_command,
    text,
    u64,
    vec,
)
from abi_client.received import Info, Received, records
from kdbusfs.abi import structs
from kdbusfs.abi.numbers import ATTACH_ALL, ID_ANY, Command, HelloFlag, ItemType, MsgFlag

SECOND = 1_000_000_000


def return_flags(result: bytes) -> int:
    """Those of the command that has left *result*."""
    (flags,) = structs.U64.unpack_from(result, structs.CMD_RETURN_FLAGS)
    return int(flags)


def bus_items(string: str, *, attach: int | None = None, size: int = BLOOM_SIZE) -> bytes:
    """What BUS_MAKE needs; *attach* is the creator mask."""
    items = text(ItemType.MAKE_NAME, string) + bloom_parameter(size)
    if attach is not None:
        items += item(ItemType.ATTACH_FLAGS_SEND, u64(attach))
    return items


class Transport:
    """An open file, and the memory of the process that uses it."""

    def holding(self, data: bytes) -> AbstractContextManager[int]:
        """*data* in memory for a while; its address."""
        raise NotImplementedError

    def read(self, address: int, size: int) -> bytes:
        """What lies in memory."""
        raise NotImplementedError

    def execute(self, code: int, address: int) -> int:
        """Execute a command that does not wait; 0 or its errno."""
        raise NotImplementedError

    def failure(self, number: int) -> Exception:
        """What is raised for this errno."""
        raise NotImplementedError

    def now(self) -> int:
        """CLOCK_MONOTONIC, in nanoseconds."""
        raise NotImplementedError

    def issue(self, code: int, address: int, size: int = 0) -> bytes:
        """Execute a command; returns *size* bytes of its argument as they are afterwards."""
        number = self.execute(code, address)
        if number:
            raise self.failure(number)
        return self.read(address, size)

    def ioctl(self, code: int, argument: bytes | int) -> bytes:
        """Execute a command; returns its struct and items as they are afterwards. An int is the
        address of an argument that lies in memory already."""
        if isinstance(argument, int):
            return self.issue(code, argument)
        with self.holding(argument) as address:
            return self.issue(code, address, len(argument))


class ConnectionVerbs(Transport):
    """What a connection says. A command fails with the transport's exception, or returns what is
    worth knowing."""

    id: int
    pool_size: int

    def visible(self, offset: int, size: int) -> bytes:
        """What the mapped pool shows."""
        raise NotImplementedError

    def connect(self, *items: bytes, free: bool = True, flags: int = 0, **options: int) -> None:
        """HELLO. What it says about the bus is freed at once unless told otherwise."""
        result = self.ioctl(Command.HELLO, hello(*items, flags=flags, **options))
        self.said = result
        fields = structs.CMD_HELLO.unpack_from(result)
        self.bus_flags, self.id, self.pool_size, self.offset, self.items_size = fields[5:10]
        self.id128 = fields[10]
        if free and not flags & HelloFlag.POLICY_HOLDER:
            self.free(self.offset)

    def byebye(self) -> None:
        self.ioctl(Command.BYEBYE, command())

    def update(self, *items: bytes) -> None:
        self.ioctl(Command.UPDATE, command(0, *items))

    def free(self, offset: int) -> None:
        self.ioctl(Command.FREE, command(fields=u64(offset)))

    # --- names and matches

    def acquire(self, string: str, flags: int = 0) -> int:
        """NAME_ACQUIRE; returns return_flags."""
        return return_flags(self.ioctl(Command.NAME_ACQUIRE, command(flags, name(string))))

    def release(self, string: str) -> None:
        self.ioctl(Command.NAME_RELEASE, command(0, name(string)))

    def match(self, *rules: bytes, cookie: int = 1, flags: int = 0) -> None:
        """MATCH_ADD; without rules it takes everything."""
        self.ioctl(Command.MATCH_ADD, command(flags, *rules, fields=u64(cookie)))

    def unmatch(self, cookie: int = 1) -> None:
        self.ioctl(Command.MATCH_REMOVE, command(fields=u64(cookie)))

    # --- receiving

    def _recv(self, flags: int = 0, priority: int = 0) -> tuple[int, bytes]:
        """RECV: its errno, and its argument as it is afterwards."""
        argument = command(flags, fields=u64(priority, *[GARBAGE] * 4))
        with self.holding(argument) as address:
            number = self.execute(Command.RECV, address)
            return number, self.read(address, len(argument))

    def recv(self, flags: int = 0, priority: int = 0, *, free: bool = True) -> Received:
        """RECV; the slice is freed at once unless told otherwise."""
        number, result = self._recv(flags, priority)
        if number:
            raise self.failure(number)
        return self._received(result, free)

    def _received(self, result: bytes, free: bool) -> Received:
        _, _, returned, _, lost, offset, size, msg_returned = structs.CMD_RECV.unpack(result)
        raw = self.visible(offset, size) if size else b""
        if free:
            self.free(offset)
        return Received(offset, raw, returned, msg_returned, lost)

    def inbox(self) -> list[Received]:
        """Everything that is queued."""
        found: list[Received] = []
        while True:
            number, result = self._recv()
            if number == EAGAIN:
                return found
            if number:
                raise self.failure(number)
            found.append(self._received(result, free=True))

    def notifications(self) -> list[tuple[Any, ...]]:
        return [m.notification for m in self.inbox()]

    def cookies(self) -> list[int]:
        return [m.cookie for m in self.inbox()]

    # --- questions

    def info(
        self,
        id_: int = 0,
        *items: bytes,
        name: str | None = None,
        kinds: int = ATTACH_ALL,
        free: bool = True,
        code: int = Command.CONN_INFO,
    ) -> Info:
        if name is not None:
            items = (*items, text(ItemType.NAME, name))
        argument = command(0, *items, fields=u64(id_, kinds, GARBAGE, GARBAGE))
        *_, offset, size = structs.CMD_INFO.unpack_from(self.ioctl(code, argument))
        raw = self.visible(offset, size)
        if free:
            self.free(offset)
        return Info(offset, raw)

    def creator_info(self, kinds: int = ATTACH_ALL) -> Info:
        return self.info(kinds=kinds, code=Command.BUS_CREATOR_INFO)

    def entries(self, flags: int) -> list[tuple[int, int, str | None, int]]:
        """LIST: (id, HELLO flags, name or None, name flags) of each record."""
        found: list[tuple[int, int, str | None, int]] = []
        for record in self.list(flags):
            if record.items:
                ((type_, payload),) = record.items
                assert type_ == ItemType.OWNED_NAME
                assert payload[-1:] == b"\0"
                (name_flags,) = structs.U64.unpack_from(payload)
                found.append((record.id, record.flags, payload[8:-1].decode(), name_flags))
            else:
                found.append((record.id, record.flags, None, 0))
        return found

    def list(self, flags: int) -> list[Info]:
        argument = command(flags, fields=u64(GARBAGE, GARBAGE))
        *_, offset, size = structs.CMD_LIST.unpack(self.ioctl(Command.LIST, argument))
        raw = self.visible(offset, size) if size else b""
        self.free(offset)
        return records(raw, offset)


class Sending(ConnectionVerbs):
    """SEND, said item by item. *to* is a connection, an id, or a name."""

    def send(
        self,
        to: ConnectionVerbs | int | str,
        *items: bytes,
        data: bytes | None = None,
        command_items: tuple[bytes, ...] = (),
        **fields: Any,
    ) -> bytes:
        """SEND; returns the command's struct."""
        with self._message(to, *items, data=data, **fields) as address:
            return self.ioctl(Command.SEND, send_command(address, *command_items))

    def request(self, to: ConnectionVerbs | int | str, *items: bytes, **fields: Any) -> bytes:
        """SEND with EXPECT_REPLY; the answer comes as a message."""
        fields.setdefault("timeout", self.now() + SECOND)
        return self.send(to, *items, flags=MsgFlag.EXPECT_REPLY, **fields)

    def reply(self, to: ConnectionVerbs | int, answers: int, *items: bytes, **fields: Any) -> bytes:
        return self.send(to, *items, timeout=answers, **fields)

    def broadcast(self, *items: bytes, filter_: bytes | None = None, **fields: Any) -> bytes:
        filter_ = filter_ if filter_ is not None else bloom()
        return self.send(ID_ANY, filter_, *items, flags=MsgFlag.SIGNAL, **fields)

    def signal(self, to: ConnectionVerbs | int | str, *items: bytes, **fields: Any) -> bytes:
        return self.send(to, bloom(), *items, flags=MsgFlag.SIGNAL, **fields)

    @contextmanager
    def _message(
        self,
        to: ConnectionVerbs | int | str,
        *items: bytes,
        data: bytes | None = None,
        **fields: Any,
    ) -> Iterator[int]:
        chain = list(items)
        dst_id = fields.pop("dst_id", 0)
        if isinstance(to, str):
            chain.insert(0, text(ItemType.DST_NAME, to))
        else:
            dst_id = to.id if isinstance(to, ConnectionVerbs) else to
        if not data:
            with self.holding(message(dst_id, *chain, **fields)) as address:
                yield address
            return
        with self.holding(data) as payload:
            chain.append(vec(payload, len(data)))
            with self.holding(message(dst_id, *chain, **fields)) as address:
                yield address


class MakingConnections:
    """What a bus's `hello` makes, by kind of connection."""

    def hello(self, *items: bytes, **options: Any) -> Any:
        raise NotImplementedError

    def activator(self, string: str, *policy: bytes, **options: Any) -> Any:
        return self.special(HelloFlag.ACTIVATOR, name(string), *policy, **options)

    def holder(self, string: str, *policy: bytes, **options: Any) -> Any:
        return self.special(HelloFlag.POLICY_HOLDER, name(string), *policy, **options)

    def monitor(self, **options: Any) -> Any:
        return self.special(HelloFlag.MONITOR, **options)

    def special(self, kind: int, *items: bytes, flags: int = 0, **options: Any) -> Any:
        return self.hello(*items, flags=kind | flags, **options)
