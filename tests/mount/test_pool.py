# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages as they lie in the receiver's pool, and slices: kdbus.pool(7), kdbus.message(7)."""

import errno
import hashlib
import os
import random

import pytest

from abi_client.building import Memfd, bloom
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    OFFSET_NONE,
    AttachFlag,
    Command,
    ItemType,
    MsgFlag,
    PayloadType,
    RecvFlag,
)
from kdbusfs.abi.structs import U64, align8
from mount.raw import (
    MIB,
    PAGE,
    Bus,
    Connection,
    Memory,
    Vec,
    execute,
    fails,
    make_message,
    sealed_memfd,
    succeeds,
)


def test_a_message_lies_in_the_pool_byte_for_byte(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, b"foobar", cookie=0x1234, priority=-5, last=0)
        message = receiver.recv()
        assert message.offset == 0
        expected = structs.MSG.pack(
            *(96, 0, -5, receiver.id, sender.id, PayloadType.DBUS, 0x1234, 0)
        )
        expected += structs.ITEM_HEADER.pack(32, ItemType.PAYLOAD_OFF) + structs.VEC.pack(6, 96)
        assert message.raw == expected + b"foobar\0\0"
        assert message.slice_size == 104


def test_pieces_are_packed_and_nothing_shifts_their_alignment(bus: Bus) -> None:
    data = os.urandom(131075)
    tail = b"thirteen byte"
    fd = sealed_memfd(b"sixteen bytes..!")
    with bus.connect(pool_size=4 * MIB) as conn:
        conn.send(conn.id, data, Vec(0, 5), tail, Memfd(fd, 16))
        message = conn.recv()
        assert message.size == 200
        offs = [structs.VEC.unpack(p) for p in message.all(ItemType.PAYLOAD_OFF)]
        assert offs == [(131075, 200), (5, OFFSET_NONE), (13, 131280)]
        assert message.types == [ItemType.PAYLOAD_OFF] * 3 + [ItemType.PAYLOAD_MEMFD]
        assert message.slice_size == 131296
        assert message.raw[200 : 200 + 131075] == data
        assert message.raw[131275:131280] == bytes(5)
        assert message.raw[131280:131293] == tail
        assert message.raw[131293:] == bytes(3)
        message.close_fds()
    os.close(fd)


@pytest.mark.parametrize("null", [1, 7, 8, 9, 4096, 2 * MIB])
def test_zeros_without_data_cost_their_odd_bytes_only(bus: Bus, null: int) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, Vec(0, null), b"data")
        message = conn.recv()
        offs = [structs.VEC.unpack(p) for p in message.all(ItemType.PAYLOAD_OFF)]
        assert offs == [(null, OFFSET_NONE), (4, 128 + null % 8)]
        assert message.slice_size == align8(128 + null % 8 + 4)


def test_items_and_metadata_follow_in_order_with_sizes_that_tell(bus: Bus) -> None:
    recv = int(AttachFlag.TIMESTAMP | AttachFlag.NAMES | AttachFlag.CREDS)
    name = build_string(ItemType.DST_NAME, b"com.example.odd")
    with bus.connect() as sender, bus.connect(recv=recv) as receiver:
        receiver.acquire("com.example.odd")
        sender.acquire("com.example.sender")
        sender.send(0, b"x" * 11, items=name)
        message = receiver.recv()
        assert message.dst_id == 0
        assert message.types == [
            ItemType.DST_NAME,
            ItemType.PAYLOAD_OFF,
            ItemType.CREDS,
            ItemType.OWNED_NAME,
            ItemType.TIMESTAMP,
        ]
        user = 64 + len(name) + 32
        metadata = 16 + 64 + align8(16 + 8 + 19) + 16 + 24
        assert message.size == user + metadata
        assert message.data == b"x" * 11
        assert structs.VEC.unpack(message.one(ItemType.PAYLOAD_OFF))[1] == message.size
        assert message.slice_size == message.size + 16


def test_a_message_that_ends_in_an_odd_item_has_an_odd_size(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.acquire("com.example.od")
        content, kept = make_message(0, [b"foobar"])
        name = structs.ITEM_HEADER.pack(31, ItemType.DST_NAME) + b"com.example.od\0"
        content = U64.pack(len(content) + 31) + content[8:] + name
        message = Memory(content)
        execute(conn.fd, Command.SEND, structs.CMD_SEND.pack(56, 0, 0, message.address, 0, 0, 0))
        del kept
        received = conn.recv()
        assert received.size == 64 + 32 + 31
        assert structs.VEC.unpack(received.one(ItemType.PAYLOAD_OFF)) == (6, 128)
        assert received.slice_size == 128 + 8


def test_a_message_may_be_all_header(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id)
        message = conn.recv()
        assert (message.size, message.slice_size, message.items) == (64, 64, [])


@pytest.mark.parametrize("size", [1, 7, 8, PAGE - 96, PAGE, PAGE + 1, 65536, 1_000_003, 2 * MIB])
def test_payload_of_any_size_arrives_whole(bus: Bus, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with bus.connect(pool_size=16 * MIB) as sender, bus.connect(pool_size=16 * MIB) as receiver:
        # Twice, so that it lies at an offset that is not the pool's start too.
        sender.send(receiver.id, b"first")
        sender.send(receiver.id, data)
        first, message = receiver.recv(), receiver.recv()
        assert message.offset == first.slice_size
        assert message.data == data
        assert message.offset % 8 == message.slice_size % 8 == 0


def test_payload_of_several_mebibytes_in_many_pieces_arrives_whole(bus: Bus) -> None:
    chance = random.Random(7)
    with bus.connect(pool_size=64 * MIB) as conn:
        pieces = [chance.randbytes(chance.randrange(1, 100_000)) for _ in range(120)]
        total = hashlib.sha256(b"".join(pieces)).digest()
        conn.send(conn.id, *pieces)
        message = conn.recv()
        assert hashlib.sha256(message.data).digest() == total
        assert len(message.all(ItemType.PAYLOAD_OFF)) == 120


def test_a_piece_must_not_exceed_two_mebibytes(bus: Bus) -> None:
    with bus.connect(pool_size=64 * MIB) as conn:
        data = Memory(2 * MIB + 1)
        with fails(errno.EMSGSIZE):
            conn.send(conn.id, Vec(data.address, 2 * MIB + 1))
        with fails(errno.EMSGSIZE):
            conn.send(conn.id, Vec(0, 2 * MIB + 1))
        conn.send(conn.id, *[Vec(data.address, 2 * MIB)] * 4)
        assert len(conn.take().data) == 8 * MIB


# --- FREE


def test_only_what_was_handed_out_can_be_freed_and_once(bus: Bus) -> None:
    with bus.connect() as conn:
        for offset in (0, 8, 4, conn.pool_size - 8, conn.pool_size + 8, (1 << 64) - 1):
            with fails(errno.ENXIO):
                conn.free(offset)
        conn.free(conn.pool_size)
        conn.send(conn.id, b"queued, not received")
        with fails(errno.ENXIO):
            conn.free(0)
        message = conn.recv()
        for offset in (message.offset + 8, message.offset + 1):
            with fails(errno.ENXIO):
                conn.free(offset)
        conn.free(message.offset)
        with fails(errno.ENXIO):
            conn.free(message.offset)


def test_the_slice_of_hello_is_freed_like_any_other(bus: Bus) -> None:
    with bus.connect() as conn:
        assert (conn.offset, conn.items_size) == (0, 32)
        with fails(errno.ENXIO):
            conn.free(conn.offset)


def test_freed_room_is_used_again_from_its_start(bus: Bus) -> None:
    with bus.connect() as conn:
        for n in range(6):
            conn.send(conn.id, b"%d" % n * 8)
        messages = [conn.recv() for _ in range(6)]
        assert [m.offset for m in messages] == [n * 104 for n in range(6)]
        for n in (1, 2, 4):
            conn.free(messages[n].offset)
        # The hole that fits best, from its front; neighbours have become one.
        conn.send(conn.id, bytes(8))
        assert conn.recv().offset == 4 * 104
        conn.send(conn.id, bytes(8 + 104))
        assert conn.recv().offset == 104
        # What was freed stays as it was, until it is used again.
        conn.free(messages[5].offset)
        assert conn.pool.read(messages[5].offset, 104) == messages[5].raw


def test_a_stale_offset_shows_the_next_result(bus: Bus) -> None:
    with bus.connect() as conn:
        first = conn.command(Command.CONN_INFO, conn.id, 0, 0, 0)
        offset = first.u64(40)
        conn.free(offset)
        second = conn.command(Command.CONN_INFO, conn.id, 0, 0, 0)
        assert second.u64(40) == offset
        assert structs.INFO.unpack(conn.pool.read(offset, 24)) == (24, conn.id, 1)


def test_a_pool_full_of_unfreed_slices_takes_no_more(bus: Bus) -> None:
    with bus.connect(pool_size=4 * PAGE) as conn:
        offsets = []
        with fails(errno.EXFULL):
            while True:
                conn.send(conn.id, bytes(1000))
                offsets.append(conn.recv().offset)
        assert len(offsets) == 4 * PAGE // 1096
        with fails(errno.EXFULL):
            while True:
                offsets.append(conn.command(Command.CONN_INFO, conn.id, 0, 0, 0).u64(40))
        for offset in offsets:
            conn.free(offset)
        conn.send(conn.id, bytes(2000))
        assert conn.recv().offset == 0


def test_slices_never_overlap_whatever_the_order(bus: Bus) -> None:
    chance = random.Random(4)
    with bus.connect(pool_size=MIB) as conn:
        held: dict[int, bytes] = {}
        for _ in range(600):
            if held and chance.random() < 0.45:
                offset = chance.choice([*held])
                assert conn.pool.read(offset, len(held[offset])) == held.pop(offset)
                conn.free(offset)
                continue
            data = chance.randbytes(chance.randrange(1, 30_000))
            if not succeeds(lambda data=data: conn.send(conn.id, data), errno.EXFULL):
                continue
            message = conn.recv()
            assert message.offset not in held
            held[message.offset] = message.raw
        for offset, content in held.items():
            assert conn.pool.read(offset, len(content)) == content
            conn.free(offset)
        conn.send(conn.id, bytes(100_000))
        assert conn.recv().offset == 0


# --- RECV


def test_peek_shows_without_taking(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"one")
        conn.send(conn.id, b"two")
        for _ in range(3):
            message = conn.recv(RecvFlag.PEEK)
            assert (message.offset, message.data) == (0, b"one")
        # Freeing what was peeked at gives up our hold, not the message.
        conn.free(0)
        with fails(errno.ENXIO):
            conn.free(0)
        assert conn.recv(RecvFlag.PEEK).data == b"one"
        assert [conn.take().data, conn.take().data] == [b"one", b"two"]


def test_drop_takes_without_showing(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"one")
        conn.send(conn.id, b"two")
        result = conn.recv_raw(RecvFlag.DROP)
        assert structs.MSG_INFO.unpack_from(bytes(result), 40) == (conn.pool_size, 0, 0)
        with fails(errno.ENXIO):
            conn.free(0)
        # DROP wins over PEEK.
        conn.recv_raw(RecvFlag.DROP | RecvFlag.PEEK)
        with fails(errno.EAGAIN):
            conn.drop()
        with fails(errno.EINVAL):
            conn.recv_raw(RecvFlag.DROP | RecvFlag.USE_PRIORITY)


def test_the_lowest_priority_comes_first_if_asked_for(bus: Bus) -> None:
    with bus.connect() as conn:
        for n, priority in enumerate([5, -3, 0, -3, 7]):
            conn.send(conn.id, b"%d" % n, priority=priority)
        use = RecvFlag.USE_PRIORITY
        with fails(errno.EAGAIN):
            conn.recv(use, priority=-4)
        assert conn.recv(use | RecvFlag.PEEK, priority=0).data == b"1"
        assert conn.recv(use, priority=0).data == b"1"
        assert conn.recv(use, priority=0).data == b"3"
        assert conn.recv(use, priority=4).data == b"2"
        with fails(errno.EAGAIN):
            conn.recv(use, priority=4)
        # Without the flag, in order of arrival; the value is ignored.
        assert conn.recv(0, priority=-100).data == b"0"
        assert conn.recv(use, priority=(1 << 63) - 1).data == b"4"


def test_recv_without_a_message_says_so_at_once(bus: Bus) -> None:
    with bus.connect() as conn:
        memory = Memory(structs.CMD_RECV.pack(64, 0, 0xDEAD, 0, 0xDEAD, 0xDEAD, 0xDEAD, 0xDEAD))
        with fails(errno.EAGAIN):
            execute(conn.fd, Command.RECV, bytes(memory))


def test_a_connection_can_talk_to_itself(bus: Bus) -> None:
    with bus.connect() as conn:
        for n in range(10):
            conn.send(conn.id, b"%d" % n)
        assert [m.data for m in conn.inbox()] == [b"%d" % n for n in range(10)]


def test_signals_keep_their_filter_and_requests_their_deadline(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.match()
        conn.send(conn.id, b"s", flags=MsgFlag.SIGNAL, items=bloom(b"\xaa" * 64, 3))
        signal = conn.take()
        assert signal.flags == MsgFlag.SIGNAL
        assert signal.one(ItemType.BLOOM_FILTER) == U64.pack(3) + b"\xaa" * 64
        conn.send(conn.id, flags=MsgFlag.EXPECT_REPLY, last=1 << 62, cookie=9)
        request = conn.take()
        assert (request.flags, request.cookie_reply, request.cookie) == (1, 1 << 62, 9)


def test_the_errors_of_a_message_come_in_their_order(bus: Bus) -> None:
    broadcast = (1 << 64) - 1
    reply, signal = MsgFlag.EXPECT_REPLY, MsgFlag.SIGNAL
    negotiate = build(ItemType.NEGOTIATE, b"")
    with bus.connect() as conn:
        me = conn.id
        cases: list[tuple[int, dict[str, object]]] = [
            (errno.EINVAL, {"dst_id": me, "src_id": me + 1}),
            (errno.EINVAL, {"dst_id": me, "payload_type": 0}),
            (errno.EBADMSG, {"dst_id": broadcast}),
            (errno.ENOTUNIQ, {"dst_id": broadcast, "flags": signal, "last": 1, "items": bloom()}),
            (errno.EINVAL, {"dst_id": me, "flags": reply}),
            (errno.ENOTUNIQ, {"dst_id": me, "flags": reply | signal, "last": 1}),
            (errno.EINVAL, {"dst_id": me, "flags": signal, "last": 1, "items": bloom()}),
            (errno.EBADMSG, {"dst_id": me, "flags": signal}),
            (errno.EBADMSG, {"dst_id": me, "items": bloom()}),
            (errno.EDOM, {"dst_id": me, "flags": signal, "items": bloom(bytes(32))}),
            (errno.EFAULT, {"dst_id": me, "flags": signal, "items": bloom(bytes(63))}),
            (errno.EDESTADDRREQ, {}),
            (errno.EINVAL, {"name": "invalid"}),
            (errno.EINVAL, {"name": "com.example.*"}),
            (errno.ESRCH, {"name": "com.example.nobody"}),
            (
                errno.EBADMSG,
                {"dst_id": broadcast, "flags": signal, "items": bloom(), "name": "a.b"},
            ),
            (errno.EINVAL, {"dst_id": me, "items": negotiate}),
            (errno.ENXIO, {"dst_id": me + 1000}),
            (errno.EINVAL, {"dst_id": me, "flags": 8}),
            (errno.EBADSLT, {"dst_id": me, "last": 12345}),
        ]
        for expected, fields in cases:
            with fails(expected):
                conn.send(**fields)  # type: ignore[arg-type]
        with fails(errno.EINVAL):
            conn.send(me, b"not a request", sync=True)
        conn.acquire("com.example.me")
        with fails(errno.EREMCHG):
            conn.send(me + 1000, name="com.example.me")
        conn.send(me, b"both", name="com.example.me")
        conn.send(me, b"own id", src_id=me)
        assert [m.data for m in conn.inbox()] == [b"both", b"own id"]


def test_results_of_list_lie_one_behind_the_other(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as other:
        conn.acquire("com.example.a")
        conn.acquire("com.example.bcd")
        other.acquire("com.example.a", 4)
        records = conn.list(1 | 2 | 8)
        found = [(r.id, [p[8:-1] for t, p in r.items if t == ItemType.OWNED_NAME]) for r in records]
        assert found == [
            (conn.id, [b"com.example.a"]),
            (conn.id, [b"com.example.bcd"]),
            (other.id, [b"com.example.a"]),
        ]
        assert conn.list(0) == []
        assert [r.id for r in conn.list(1)] == [conn.id, other.id]


def test_connections_of_one_process_do_not_mix_their_pools(bus: Bus) -> None:
    connections = [Connection(bus.path, pool_size=16 * PAGE) for _ in range(8)]
    chance = random.Random(1)
    for _ in range(300):
        conn = chance.choice(connections)
        text = b"%d %d" % (conn.id, chance.randrange(1 << 30))
        chance.choice(connections).send(conn.id, text)
        assert conn.take().data == text
    for conn in connections:
        conn.close()
