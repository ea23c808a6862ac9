# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments as a client may give them: at bad addresses, half unmapped, changing, lying."""

import ctypes
import errno
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from abi_client.building import POOL_SIZE, bloom
from abi_client.verbs import bus_items
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    DST_ID_BROADCAST,
    Command,
    ItemType,
    ListFlag,
    MsgFlag,
    PayloadType,
)
from kdbusfs.abi.structs import U64
from mount.raw import (
    PAGE,
    Bus,
    Connection,
    File,
    Mapping,
    Memory,
    Vec,
    execute,
    fails,
    ioctl,
    libc,
    make_message,
    outcome,
)

READ = mmap.PROT_READ
SYS_MEMFD_SECRET = 447
WILD = [0x8, 0x10000, 0x7FFFFFFFF000, 0x800000000000, 0xFFFF888000000000, (1 << 64) - PAGE]
"""Addresses where nothing is: low, at the end of user space, beyond it, the kernel's."""

# What each command takes on a connection, to be put anywhere in memory.
ARGUMENTS = {
    Command.BYEBYE: (24, []),
    Command.FREE: (32, [POOL_SIZE]),
    Command.CONN_INFO: (56, [0, 0, 0, 0]),
    Command.BUS_CREATOR_INFO: (56, [0, 0, 0, 0]),
    Command.LIST: (40, [0, 0]),
    Command.SEND: (56, [0, 0, 0, 0]),
    Command.RECV: (64, [0, 0, 0, 0, 0]),
    Command.UPDATE: (24, []),
    Command.NAME_ACQUIRE: (24, []),
    Command.NAME_RELEASE: (24, []),
    Command.MATCH_ADD: (32, [1]),
    Command.MATCH_REMOVE: (32, [1]),
}


def argument(code: int) -> bytes:
    size, fields = ARGUMENTS[Command(code)]
    return b"".join(U64.pack(word) for word in (size, 0, 0, *fields))


@pytest.fixture
def conn(bus: Bus) -> Iterator[Connection]:
    with bus.connect() as conn:
        yield conn


@pytest.fixture
def edge() -> Iterator[Mapping]:
    """A page with nothing behind it."""
    mapping = Mapping.anonymous(2 * PAGE)
    mapping.unmap(PAGE)
    mapping.size = PAGE
    yield mapping
    mapping.unmap()


def put(edge: Mapping, data: bytes) -> int:
    """Put *data* at the very end of the page; its address."""
    edge.write(PAGE - len(data), data)
    return edge.address + PAGE - len(data)


@pytest.mark.parametrize("code", ARGUMENTS)
def test_an_argument_that_is_not_there_is_efault(conn: Connection, code: int) -> None:
    for address in (0, *WILD):
        with fails(errno.EFAULT):
            ioctl(conn.fd, code, address)


@pytest.mark.parametrize("code", ARGUMENTS)
def test_an_unaligned_argument_is_efault(conn: Connection, code: int) -> None:
    content = argument(code)
    for shift in range(1, 8):
        memory = Memory(bytes(shift) + content)
        with fails(errno.EFAULT):
            ioctl(conn.fd, code, memory.address + shift)
        assert bytes(memory) == bytes(shift) + content


@pytest.mark.parametrize("code", ARGUMENTS)
def test_an_argument_cut_off_by_the_end_of_a_page_is_efault(
    conn: Connection, edge: Mapping, code: int
) -> None:
    content = argument(code)
    for missing in range(8, len(content), 8):
        address = put(edge, content[:-missing])
        with fails(errno.EFAULT):
            ioctl(conn.fd, code, address)


def test_an_argument_may_end_with_its_page(conn: Connection, edge: Mapping) -> None:
    address = put(edge, argument(Command.FREE))
    ioctl(conn.fd, Command.FREE, address)
    name = build_string(ItemType.NAME, b"com.example.edge")
    content = U64.pack(24 + len(name)) + bytes(16) + name
    ioctl(conn.fd, Command.NAME_ACQUIRE, put(edge, content))
    message, kept = make_message(conn.id, [b"at the edge"])
    command = structs.CMD_SEND.pack(56, 0, 0, put(edge, message), 0, 0, 0)
    execute(conn.fd, Command.SEND, command)
    del kept
    assert conn.take().data == b"at the edge"


def test_items_that_run_off_the_page_are_efault(conn: Connection, edge: Mapping) -> None:
    name = build_string(ItemType.NAME, b"com.example.edge")
    content = U64.pack(24 + len(name)) + bytes(16) + name
    address = put(edge, content[:-8])
    with fails(errno.EFAULT):
        ioctl(conn.fd, Command.NAME_ACQUIRE, address)
    message, _ = make_message(conn.id, [b"cut"])
    command = structs.CMD_SEND.pack(56, 0, 0, put(edge, message[:-8]), 0, 0, 0)
    with fails(errno.EFAULT):
        execute(conn.fd, Command.SEND, command)


@pytest.mark.parametrize("code", [Command.FREE, Command.RECV, Command.LIST, Command.CONN_INFO])
def test_an_argument_that_cannot_be_written_to_is_efault(conn: Connection, code: int) -> None:
    mapping = Mapping.anonymous(PAGE)
    content = bytearray(argument(code))
    if code == Command.CONN_INFO:
        U64.pack_into(content, 24, conn.id)
    mapping.write(0, bytes(content))
    mapping.protect(READ)
    with fails(errno.EFAULT):
        ioctl(conn.fd, code, mapping.address)
    assert mapping.read(0, len(content)) == content
    mapping.unmap()


def test_the_effect_of_a_command_stands_when_its_result_cannot_be_stored(
    conn: Connection,
) -> None:
    conn.send(conn.id, b"lost to a fault")
    conn.send(conn.id, b"next")
    mapping = Mapping.anonymous(PAGE)
    mapping.write(0, argument(Command.RECV))
    mapping.protect(READ)
    with fails(errno.EFAULT):
        ioctl(conn.fd, Command.RECV, mapping.address)
    assert conn.take().data == b"next"
    # Its slice was handed out all the same, at the pool's start.
    conn.free(0)
    mapping.unmap()


@pytest.mark.parametrize("what", ["BUS_MAKE", "ENDPOINT_MAKE", "HELLO"])
def test_a_setup_command_that_cannot_store_its_result_undoes_itself(bus: Bus, what: str) -> None:
    mapping = Mapping.anonymous(PAGE)
    if what == "HELLO":
        content = structs.CMD_HELLO.pack(96, 0, 0, 0, 0, 0, 0, POOL_SIZE, 0, 0, bytes(16))
    elif what == "BUS_MAKE":
        content = bus_items("0-undone")
    else:
        content = build_string(ItemType.MAKE_NAME, b"0-undone")
    if what != "HELLO":
        content = U64.pack(24 + len(content)) + bytes(16) + content
    mapping.write(0, content)
    mapping.protect(READ)
    before = sorted(os.listdir(bus.root)), sorted(os.listdir(bus.directory))
    with (
        bus.connect() as watcher,
        File(bus.root / "control" if what == "BUS_MAKE" else bus.path) as file,
    ):
        connected = watcher.list(ListFlag.UNIQUE)
        with fails(errno.EFAULT):
            ioctl(file.fd, Command[what], mapping.address)
        assert (sorted(os.listdir(bus.root)), sorted(os.listdir(bus.directory))) == before
        assert len(watcher.list(ListFlag.UNIQUE)) == len(connected)
        # Unbound as it was, it can be tried again.
        mapping.protect(READ | mmap.PROT_WRITE)
        ioctl(file.fd, Command[what], mapping.address)
    mapping.unmap()


def test_return_flags_are_stored_on_failure_but_not_before_the_struct_is_read(
    conn: Connection,
) -> None:
    garbage = 0xDEAD
    # Refused for its flags: read in full, so return_flags is reset.
    memory = Memory(U64.pack(32) + U64.pack(1 << 40) + U64.pack(garbage) + U64.pack(0))
    with fails(errno.EINVAL):
        ioctl(conn.fd, Command.FREE, memory.address)
    assert memory.u64(16) == 0
    memory = Memory(U64.pack(32) + U64.pack(0) + U64.pack(garbage) + U64.pack(8))
    with fails(errno.ENXIO):
        ioctl(conn.fd, Command.FREE, memory.address)
    assert memory.u64(16) == 0
    # Refused for its size.
    for size, expected in ((31, errno.EINVAL), (0, errno.EINVAL), (32769, errno.EMSGSIZE)):
        memory = Memory(U64.pack(size) + U64.pack(0) + U64.pack(garbage) + bytes(32768))
        with fails(expected):
            ioctl(conn.fd, Command.FREE, memory.address)
        assert memory.u64(16) == garbage


@pytest.mark.parametrize(
    "chain",
    [
        U64.pack(0) + U64.pack(ItemType.NAME),
        U64.pack(15) + U64.pack(ItemType.NAME),
        U64.pack(16) + U64.pack(ItemType.NAME),
        U64.pack(1 << 63) + U64.pack(ItemType.NAME),
        U64.pack((1 << 64) - 1) + U64.pack(ItemType.NAME),
        U64.pack((1 << 64) - 8) + U64.pack(ItemType.NAME) + b"a.b\0",
        U64.pack(40) + U64.pack(ItemType.NAME) + b"a.b\0",
        U64.pack(16 + 3) + U64.pack(ItemType.NAME) + b"a.b",
        U64.pack(16 + 5) + U64.pack(ItemType.NAME) + b"a.b\0\0",
        U64.pack(16 + 4) + U64.pack(ItemType.NAME) + b"a\0b\0",
        U64.pack(16 + 8) + U64.pack(ItemType.NAME) + b"a.b\0\0\0\0\0",
        build_string(ItemType.NAME, b"a.b") + bytes(8),
        build_string(ItemType.NAME, b"a.b") + bytes(15),
        build_string(ItemType.NAME, b"a.b") * 2,
        build_string(ItemType.NAME, b"a.b") + build(ItemType.ID, bytes(8)),
        build(0xFFFFFFFF, b""),
        b"\x10",
        b"",
    ],
)
def test_a_chain_of_items_that_lies_is_einval(conn: Connection, chain: bytes) -> None:
    memory = Memory(U64.pack(24 + len(chain)) + bytes(16) + chain)
    with fails(errno.EINVAL):
        ioctl(conn.fd, Command.NAME_ACQUIRE, memory.address)
    with fails(errno.ESRCH):
        conn.release("a.b")


def test_chance_finds_no_argument_that_hurts(bus: Bus, conn: Connection) -> None:
    chance = random.Random(2015)
    with bus.connect() as other:
        for _ in range(400):
            code = chance.choice([*ARGUMENTS])
            if code == Command.BYEBYE:
                continue
            content = bytearray(argument(code) + chance.randbytes(8 * chance.randrange(12)))
            for _ in range(chance.randrange(1, 6)):
                at = 8 * chance.randrange(len(content) // 8)
                word = chance.choice([0, 1, 16, 24, 1 << 63, (1 << 64) - 1, len(content)])
                U64.pack_into(content, at, word)
            memory = Memory(bytes(content))
            result = outcome(lambda code=code, memory=memory: ioctl(conn.fd, code, memory.address))
            assert result not in ("EIO", "ENOSYS", "ENODEV")
        conn.inbox()
        other.send(conn.id, b"still fine")
        assert conn.take().data == b"still fine"


# --- messages and payloads


@pytest.mark.parametrize("address", [0, 1, 4, *WILD])
def test_a_message_that_is_not_there_is_efault(conn: Connection, address: int) -> None:
    command = Memory(structs.CMD_SEND.pack(56, 0, 0, address, 0, 0, 0))
    with fails(errno.EFAULT):
        ioctl(conn.fd, Command.SEND, command.address)


def test_a_message_has_its_sizes_checked(conn: Connection) -> None:
    for size, expected in (
        (0, errno.EINVAL),
        (63, errno.EINVAL),
        (32769, errno.EMSGSIZE),
        (1 << 63, errno.EMSGSIZE),
    ):
        memory = Memory(U64.pack(size) + bytes(32768))
        command = Memory(structs.CMD_SEND.pack(56, 0, 0, memory.address, 0, 0, 0))
        with fails(expected):
            ioctl(conn.fd, Command.SEND, command.address)


@pytest.mark.parametrize("address", WILD)
def test_a_wild_payload_is_efault_and_leaves_no_trace(
    bus: Bus, conn: Connection, address: int
) -> None:
    with bus.connect() as sender:
        for parts in (
            [Vec(address, 8)],
            [Vec(address, PAGE)],
            [b"good", Vec(address, 100), b"good"],
            [Vec(0, 100), Vec(address, 100)],
        ):
            with fails(errno.EFAULT):
                sender.send(conn.id, *parts)
        with fails(errno.EAGAIN):
            conn.recv()
        # Not even of the pool: all of it is free.
        for _ in range(3):
            sender.send(conn.id, bytes(POOL_SIZE // 8))
            assert conn.recv().offset == 0
            conn.free(0)


def test_a_payload_with_a_hole_is_efault(bus: Bus, conn: Connection) -> None:
    mapping = Mapping.anonymous(4 * PAGE)
    mapping.unmap(2 * PAGE, PAGE)
    with bus.connect() as sender:
        for address, size in (
            (mapping.address, 3 * PAGE),
            (mapping.address + 2 * PAGE - 1, 2),
            (mapping.address + 2 * PAGE, 1),
            (mapping.address + 3 * PAGE - 8, PAGE),
        ):
            with fails(errno.EFAULT):
                sender.send(conn.id, Vec(address, size))
        sender.send(conn.id, Vec(mapping.address, 2 * PAGE), Vec(mapping.address + 3 * PAGE, PAGE))
        assert conn.take().data == bytes(3 * PAGE)
    mapping.unmap(0, 2 * PAGE)
    mapping.unmap(3 * PAGE)


def test_hundreds_of_parts_arrive_in_order_and_one_that_is_not_there_is_efault(
    bus: Bus, conn: Connection
) -> None:
    content = random.Random(7).randbytes(PAGE)
    source = Memory(content)
    zeros = {70, 71, 200}  # so that those with data come in runs of several lengths
    parts = [Vec(0 if n in zeros else source.address + 5 * n, 1 + n % 11) for n in range(500)]
    expected = b"".join(
        bytes(part.size) if not part.address else content[5 * n :][: part.size]
        for n, part in enumerate(parts)
    )
    with bus.connect() as sender:
        sender.send(conn.id, *parts)
        assert conn.take().data == expected
        for bad in (0, 63, 64, 300, 499):
            with fails(errno.EFAULT):
                sender.send(conn.id, *parts[:bad], Vec(WILD[0], 8), *parts[bad + 1 :])
        with fails(errno.EAGAIN):
            conn.recv()


def test_a_payload_that_nobody_may_read_is_efault(conn: Connection) -> None:
    mapping = Mapping.anonymous(PAGE)
    mapping.protect(0)
    with fails(errno.EFAULT):
        conn.send(conn.id, Vec(mapping.address, 8))
    mapping.protect(READ)
    conn.send(conn.id, Vec(mapping.address, 8))
    assert conn.take().data == bytes(8)
    mapping.unmap()


def test_a_broadcast_of_unreadable_payload_is_lost_at_each_receiver(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect() as one, bus.connect() as two:
        one.match()
        two.match()
        sender.send(DST_ID_BROADCAST, Vec(0x10000, 8), flags=MsgFlag.SIGNAL, items=bloom())
        for conn in (one, two):
            memory = Memory(argument(Command.RECV))
            with fails(errno.EAGAIN):
                ioctl(conn.fd, Command.RECV, memory.address)
            assert memory.u64(32) == 1, "dropped_msgs"
            assert memory.u64(16) == 2, "DROPPED_MSGS"


def test_payload_is_read_when_it_is_sent(conn: Connection) -> None:
    mapping = Mapping.anonymous(PAGE)
    mapping.write(0, b"at the time")
    conn.send(conn.id, Vec(mapping.address, 11))
    mapping.write(0, b"later words")
    mapping.unmap()
    assert conn.take().data == b"at the time"


def test_items_may_come_without_their_last_padding(conn: Connection) -> None:
    name = build_string(ItemType.DST_NAME, b"com.example.odd")
    conn.acquire("com.example.odd")
    message, _ = make_message(items=name)
    odd = Memory(U64.pack(64 + 16 + 16) + message[8 : 64 + 16 + 16])
    command = Memory(structs.CMD_SEND.pack(56, 0, 0, odd.address, 0, 0, 0))
    ioctl(conn.fd, Command.SEND, command.address)
    received = conn.take()
    assert received.one(ItemType.DST_NAME) == b"com.example.odd\0"
    assert received.payload_type == PayloadType.DBUS


def test_negotiation_tells_flags_and_items(conn: Connection) -> None:
    negotiate = 1 << 63
    for code, allowed in (
        (Command.RECV, 7),
        (Command.LIST, 15),
        (Command.FREE, 0),
        (Command.SEND, 1),
        (Command.MATCH_ADD, 1),
    ):
        asked = build(ItemType.NEGOTIATE, b"".join(U64.pack(n) for n in (1, 6, 14, 0x1000, 0)))
        memory = Memory(bytearray(argument(code)) + asked)
        content = bytearray(bytes(memory))
        U64.pack_into(content, 0, len(content))
        U64.pack_into(content, 8, negotiate)
        memory = Memory(bytes(content))
        ioctl(conn.fd, code, memory.address)
        assert memory.u64(8) == allowed
        known = {Command.SEND: [6], Command.MATCH_ADD: [14]}.get(Command(code), [])
        answered = [memory.u64(len(argument(code)) + 16 + 8 * n) for n in range(5)]
        assert answered == [1, *(n if n in known else 0 for n in (6, 14)), 0, 0]


# --- with a second thread that plays tricks


@pytest.mark.parametrize(
    ("trick", "possible"),
    [
        ("size", {"0", "EINVAL", "EMSGSIZE"}),
        ("items", {"0", "EINVAL", "EMSGSIZE"}),
        ("unmap", {"0", "EFAULT"}),
    ],
)
def test_what_changes_while_it_is_read_hurts_nobody(
    bus: Bus, conn: Connection, programs: Path, trick: str, possible: set[str]
) -> None:
    rounds = 3000
    result = subprocess.run(
        [programs / "hammer", bus.path, trick, str(rounds)],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, "a message that got through was not sound"
    lines = [line.split() for line in result.stdout.splitlines()]
    counts = {errno.errorcode.get(int(number), "0"): int(count) for number, count in lines}
    assert sum(counts.values()) == rounds
    assert counts.keys() <= possible
    conn.send(conn.id, b"still fine")
    assert conn.take().data == b"still fine"


def test_secret_memory_is_out_of_reach(bus: Bus) -> None:
    """memfd_secret(2): the kernel reads it for its owner alone, so write(2) does and SEND can't."""
    secret = libc.syscall(SYS_MEMFD_SECRET, 0)
    if secret < 0:
        pytest.skip("no memfd_secret(2) here")
    os.ftruncate(secret, PAGE)
    at = libc.mmap(None, PAGE, READ | mmap.PROT_WRITE, mmap.MAP_SHARED, secret, 0)
    ctypes.memmove(at, b"key", 3)
    read, write = os.pipe()
    assert libc.write(write, ctypes.c_void_p(at), ctypes.c_size_t(3)) == 3
    with bus.connect() as conn:
        with fails(errno.EFAULT):
            conn.send(conn.id, Vec(at, 3))
        content, _ = make_message(conn.id, (b"x",))
        ctypes.memmove(at, content, len(content))
        with fails(errno.EFAULT):
            conn.command(Command.SEND, at, 0, 0, 0)
        with fails(errno.EAGAIN):
            conn.recv()
        # What is copied elsewhere before goes well.
        conn.send(conn.id, ctypes.string_at(at, 3))
        assert conn.recv().data == content[:3]
    libc.munmap(at, PAGE)
    for fd in (secret, read, write):
        os.close(fd)
