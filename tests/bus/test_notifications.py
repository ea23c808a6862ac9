# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of the bus itself: their bytes, their order, who pays."""

import struct

import pytest

from abi_client.building import u64
from abi_client.verbs import SECOND
from bus.fakes import FakePeer
from bus.harness import Bus, Client
from kdbusfs.abi.numbers import ID_ANY, HelloFlag, ItemType, NameFlag
from kdbusfs.abi.structs import align8

I = ItemType  # noqa: E741
A, B = "com.example.a", "com.example.b"


@pytest.fixture
def watcher(bus: Bus) -> Client:
    client = bus.hello()
    client.match()
    return client


def stamp(bus: Bus) -> bytes:
    clock = bus.domain.clock
    return u64(40, I.TIMESTAMP, bus.core._seqnum, clock.now, clock.now + clock.offset)


def header(size: int, flags: int, dst_id: int, cookie_reply: int = 0) -> bytes:
    return u64(size, flags, 0, dst_id, 0, 0, 0, cookie_reply)


def test_id_add_and_id_remove_to_the_byte(bus: Bus, watcher: Client) -> None:
    client = bus.hello(flags=HelloFlag.ACCEPT_FD)
    body = u64(32, I.ID_ADD, client.id, 1) + stamp(bus)
    assert watcher.recv().raw == header(136, 4, ID_ANY) + body
    client.close()
    body = u64(32, I.ID_REMOVE, client.id, 1) + stamp(bus)
    assert watcher.recv().raw == header(136, 4, ID_ANY) + body


@pytest.mark.parametrize("string", ["a.b", "com.a", "com.abc", "com.abcd", "com.abcde"])
def test_name_changes_to_the_byte(bus: Bus, watcher: Client, string: str) -> None:
    one, two = bus.hello(), bus.hello()
    watcher.inbox()
    n = 48 + len(string) + 1
    size = align8(64 + n) + 40

    def told(type_: int, *change: int) -> bytes:
        body = u64(n, type_, *change) + string.encode() + b"\0"
        return header(size, 4, ID_ANY) + body + bytes(-len(body) % 8) + stamp(bus)

    one.acquire(string, NameFlag.ALLOW_REPLACEMENT)
    assert watcher.recv().raw == told(I.NAME_ADD, 0, 0, one.id, 0x22)
    two.acquire(string, NameFlag.REPLACE_EXISTING)
    assert watcher.recv().raw == told(I.NAME_CHANGE, one.id, 0x22, two.id, 0x20)
    two.release(string)
    assert watcher.recv().raw == told(I.NAME_REMOVE, two.id, 0x20, 0, 0)


def test_reply_timeout_and_reply_dead_to_the_byte(bus: Bus) -> None:
    client, server = bus.hello(), bus.hello()
    client.request(server, cookie=77)
    bus.domain.advance(SECOND)
    body = u64(16, I.REPLY_TIMEOUT) + stamp(bus)
    assert client.recv().raw == header(120, 0, client.id, 77) + body
    client.request(server, cookie=78)
    server.close()
    got = client.recv()
    assert got.raw[:80] == header(120, 0, client.id, 78) + u64(16, I.REPLY_DEAD)
    assert got.types == [I.REPLY_DEAD, I.TIMESTAMP]
    assert len(got.raw) == 120


def test_reply_notifications_are_for_the_requester_and_monitors(bus: Bus, watcher: Client) -> None:
    client, server, monitor = bus.hello(), bus.hello(), bus.monitor()
    watcher.inbox()
    client.request(server, cookie=5)
    bus.domain.advance(SECOND)
    assert watcher.inbox() == []
    assert client.notifications() == [(I.REPLY_TIMEOUT, 5)]
    assert [m.types[0] for m in monitor.inbox() if not m.src_id] == [I.REPLY_TIMEOUT]


def test_nobody_hears_of_the_requests_of_one_who_is_gone(bus: Bus) -> None:
    client, server, monitor = bus.hello(), bus.hello(), bus.monitor()
    client.request(server, cookie=5)
    client.close()
    bus.domain.advance(SECOND)
    server.close()
    kinds = [m.types[0] for m in monitor.inbox() if not m.src_id]
    assert kinds == [I.ID_REMOVE, I.ID_REMOVE]


def test_a_disconnect_tells_names_then_dead_replies_then_the_id(bus: Bus) -> None:
    client, server, heir = bus.hello(), bus.hello(), bus.hello()
    client.match()
    server.acquire(B)
    server.acquire(A)
    heir.acquire(A, NameFlag.QUEUE)
    client.request(server, cookie=1)
    client.request(server, cookie=2)
    server.recv()
    client.inbox()
    server.close()
    assert [n[:2] for n in client.notifications()] == [
        (I.NAME_REMOVE, B),
        (I.NAME_CHANGE, A),
        (I.REPLY_DEAD, 1),
        (I.REPLY_DEAD, 2),
        (I.ID_REMOVE, server.id),
    ]


def test_nobody_hears_of_ones_own_coming_and_going(bus: Bus) -> None:
    client = bus.hello()
    client.match()
    assert client.inbox() == []
    client.byebye()
    assert not client.connection.queue


def test_a_hello_tells_the_id_before_the_name(bus: Bus, watcher: Client) -> None:
    bus.activator(A)
    assert [n[0] for n in watcher.notifications()] == [I.ID_ADD, I.NAME_ADD]


def test_all_kinds_but_monitors_are_announced(bus: Bus, watcher: Client) -> None:
    special = [bus.activator(A), bus.holder(B), bus.hello(), bus.monitor()]
    told = [n for n in watcher.notifications() if n[0] == I.ID_ADD]
    assert told == [(I.ID_ADD, c.id, f) for c, f in zip(special, (2, 4, 0), strict=False)]


def test_a_disconnected_connection_is_found_by_nobody(bus: Bus, watcher: Client) -> None:
    client = bus.hello()
    client.match()
    watcher.inbox()
    client.close()
    watcher.broadcast(cookie=1)
    assert [m.cookie for m in watcher.inbox()] == [0, 1]


# --- who pays


def test_notifications_are_charged_to_the_bus_not_to_a_user(bus: Bus) -> None:
    watcher = bus.hello(pool_size=1 << 20)
    watcher.match()
    for _ in range(128):
        bus.hello().close()
    watcher.send(watcher, cookie=5)
    bus.hello()
    accounts = {u.uid: a.messages for u, a in watcher.connection.quota.accounts.items()}
    assert accounts == {None: 256, 1000: 1}
    assert watcher.connection.lost == 1
    assert len(watcher.inbox()) == 257


def test_a_reply_notification_that_does_not_fit_is_lost_without_trace(bus: Bus) -> None:
    client, server = bus.hello(), bus.hello()
    client.match()
    for _ in range(128):
        bus.hello().close()
    client.request(server, cookie=5)
    bus.domain.advance(SECOND)
    assert len(client.inbox()) == 256
    assert client.lost() == 0


def test_sequence_numbers_are_one_for_each_notification(bus: Bus, watcher: Client) -> None:
    bus.activator(A).close()
    stamps = [struct.unpack("=QQQ", m.one(I.TIMESTAMP))[0] for m in watcher.inbox()]
    assert stamps == list(range(stamps[0], stamps[0] + 4))


def test_strangers_hear_of_ids_and_names(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(2000))
    stranger.match()
    bus.hello().acquire(A)
    assert [n[0] for n in stranger.notifications()] == [I.ID_ADD, I.NAME_ADD]
