# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a message lies in its receiver's pool, to the byte."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_client.building import bloom, fds, item, memfd, message, send_command, text, u64, vec
from bus.fakes import FakeFile
from bus.harness import Bus, FakeDomain
from kdbusfs.abi.numbers import OFFSET_NONE, AttachFlag, Command, ItemType, PayloadType
from kdbusfs.abi.structs import align8

I = ItemType  # noqa: E741


def off(offset: int, size: int) -> bytes:
    return item(I.PAYLOAD_OFF, u64(size, offset))


def test_an_empty_message_is_a_bare_header(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, cookie=7)
    assert client.recv().raw == u64(64, 0, 0, client.id, client.id, PayloadType.DBUS, 7, 0)


def test_the_worked_example(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello()
    data = bytes(n * 7 % 251 for n in range(131088))
    at = sender.peer.put(data)
    sender.send(
        client,
        vec(at, 131075),
        vec(0, 5),
        vec(at + 131075, 13),
        memfd(sender.peer.open(FakeFile(size=16)), 16),
    )
    got = client.recv()
    assert got.size == 200
    assert got.offsets == [(200, 131075), (OFFSET_NONE, 5), (131280, 13)]
    assert len(got.raw) == 131296
    assert got.raw[200 : 200 + 131093] == data[:131075] + bytes(5) + data[131075:]
    assert got.raw[200 + 131093 :] == bytes(3)


def test_a_small_message_to_the_byte(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, vec(client.peer.put(b"hello"), 5), priority=-2, cookie=3)
    assert client.recv().raw == (
        u64(96, 0, -2, client.id, client.id, PayloadType.DBUS, 3, 0) + off(96, 5) + b"hello\0\0\0"
    )


def test_pieces_are_packed_and_filler_keeps_their_alignment(bus: Bus) -> None:
    client = bus.hello()
    at = client.peer.put(b"abcdefgh")
    mem = client.peer.open(FakeFile(size=100))
    client.send(client, vec(at, 3), memfd(mem, 13), vec(at + 3, 2), vec(0, 9), vec(at + 5, 1))
    got = client.recv()
    body = got.size
    assert got.offsets == [(body, 3), (body + 8, 2), (OFFSET_NONE, 9), (body + 11, 1)]
    assert got.raw[body:] == b"abc" + bytes(5) + b"de" + bytes(1) + b"f" + bytes(4)


def test_offsets_are_relative_to_the_message(bus: Bus) -> None:
    client = bus.hello()
    for n in range(3):
        client.send(client, data=b"%d" % n)
    held = [client.recv(free=False) for _ in range(3)]
    assert [m.offset for m in held] == [0, 104, 208]
    assert [m.offsets for m in held] == [[(96, 1)]] * 3
    assert [m.data for m in held] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("padded", [True, False])
def test_size_leaves_out_the_padding_of_the_last_item(bus: Bus, n: int, padded: bool) -> None:
    client = bus.hello()
    string = "c." + "x" * n
    client.acquire(string)
    given = message(0, text(I.DST_NAME, string))
    unpadded = 64 + 16 + len(string) + 1
    if not padded:
        given = u64(unpadded) + given[8:unpadded]
    with client.peer.holding(given) as address:
        client.ioctl(Command.SEND, send_command(address))
    got = client.recv()
    assert got.size == unpadded
    assert len(got.raw) == align8(unpadded)
    assert got.raw[got.size :] == bytes(align8(unpadded) - unpadded)


@pytest.mark.parametrize("n", range(1, 9))
def test_size_leaves_out_the_padding_of_the_last_metadata(bus: Bus, n: int) -> None:
    sender = bus.hello(text(I.CONN_DESCRIPTION, "d" * n))
    client = bus.hello(recv=AttachFlag.CONN_DESCRIPTION)
    sender.send(client, fds(), data=b"data")
    got = client.recv()
    users = 64 + 16 + 32
    assert got.size == users + 16 + n + 1
    assert got.offsets == [(align8(got.size), 4)]
    assert got.raw[got.size : align8(got.size)] == bytes(align8(got.size) - got.size)
    assert got.raw[align8(got.size) :] == b"data" + bytes(4)


def test_padding_between_items_is_kept_and_the_last_is_zeroed(bus: Bus) -> None:
    client = bus.hello()
    client.acquire("c.d")
    inner = item(I.DST_NAME, b"c.d\0", pad=b"\xee")
    numbers = item(I.FDS, b"", pad=b"\xee")
    client.send(0, inner, numbers)
    assert client.recv().raw[64:] == inner + numbers
    client.send(0, numbers, inner)
    assert client.recv().raw[64:] == numbers + inner[:20] + bytes(4)


def test_filters_and_names_are_delivered(bus: Bus) -> None:
    client = bus.hello()
    client.match()
    client.broadcast(filter_=bloom([1, 77], generation=9))
    assert client.recv().raw[64:] == bloom([1, 77], generation=9)


def test_dst_id_is_told_as_sent(bus: Bus) -> None:
    client = bus.hello()
    client.acquire("c.d")
    client.match()
    client.send("c.d")
    client.send("c.d", dst_id=client.id)
    client.broadcast()
    assert [m.dst_id for m in client.inbox()] == [0, client.id, (1 << 64) - 1]


def test_offsets_differ_between_receivers_with_different_metadata(bus: Bus) -> None:
    sender = bus.hello(text(I.CONN_DESCRIPTION, "me"))
    bare, curious = bus.hello(), bus.hello(recv=AttachFlag.CONN_DESCRIPTION)
    again, monitor = bus.hello(), bus.monitor(recv=AttachFlag.CONN_DESCRIPTION)
    for client in (bare, curious, again):
        client.match()
    sender.broadcast(data=b"same")
    got = [c.recv() for c in (bare, curious, again, monitor)]
    assert [m.data for m in got] == [b"same"] * 4
    assert got[0].raw == got[2].raw
    assert got[1].raw == got[3].raw
    assert got[1].offsets[0][0] - got[0].offsets[0][0] == 24


def test_reused_memory_shows_nothing_of_what_was_there(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"\xff" * 4000)
    client.recv()
    mem = client.peer.open(FakeFile(size=100))
    client.send(client, memfd(mem, 7), vec(0, 3), data=b"x")
    got = client.recv()
    body = align8(got.size)
    assert got.raw[body:] == bytes(10) + b"x" + bytes(5)


# --- any message

pieces = st.lists(
    st.tuples(st.sampled_from(["data", "null", "memfd"]), st.integers(1, 40)), max_size=8
)


@given(pieces, st.integers(0, 3))
def test_any_payload_keeps_its_bytes_and_its_alignment(
    parts: list[tuple[str, int]], description: int
) -> None:
    domain = FakeDomain()
    bus = domain.make_bus()
    what = [text(I.CONN_DESCRIPTION, "d" * description)] if description else []
    client = bus.hello(*what, recv=AttachFlag.CONN_DESCRIPTION)
    mem = client.peer.open(FakeFile(size=100))
    items, stream, expected = [], 0, []
    for n, (kind, size) in enumerate(parts):
        if kind == "memfd":
            items.append(memfd(mem, size))
        elif kind == "null":
            items.append(vec(0, size))
            expected.append((None, size))
        else:
            content = bytes([n + 1]) * size
            items.append(vec(client.peer.put(content), size))
            expected.append((stream, content))
        stream += size
    client.send(client, *items)
    got = client.recv()
    body = align8(got.size)
    assert len(got.raw) % 8 == 0
    for (offset, size), (position, content) in zip(got.offsets, expected, strict=True):
        if position is None:
            assert (offset, size) == (OFFSET_NONE, content)
        else:
            assert (offset - body) % 8 == position % 8
            assert got.raw[offset : offset + size] == content
    sizes = [size for offset, size in got.offsets if offset != OFFSET_NONE]
    filler = sum(size % 8 for kind, size in parts if kind != "data")
    assert len(got.raw) == align8(body + sum(sizes) + filler)
    assert struct.unpack_from("=Q", got.raw)[0] <= body
    domain.end()
