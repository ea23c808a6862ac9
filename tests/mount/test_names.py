# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names, matches and notifications, between processes: kdbus.name(7), kdbus.match(7)."""

import errno
import signal
import socket
from collections.abc import Callable

import pytest

from abi_client.building import BLOOM_SIZE, bloom
from abi_client.received import Received
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    HelloFlag,
    ItemType,
    ListFlag,
    MatchFlag,
    MsgFlag,
    NameFlag,
)
from kdbusfs.abi.structs import U64, U64x2
from mount.processes import Child
from mount.raw import Bus, Connection, fails

pytestmark = pytest.mark.one_pool

NAME = "com.example.name"
ANY_ID = (1 << 64) - 1
ALLOW, REPLACE, QUEUE = (*(NameFlag.ALLOW_REPLACEMENT, NameFlag.REPLACE_EXISTING, NameFlag.QUEUE),)
Change = tuple[str, int, int, int, int]
"""What, old id, old flags, new id, new flags."""


def watch_names(conn: Connection) -> None:
    for type_ in (ItemType.NAME_ADD, ItemType.NAME_REMOVE, ItemType.NAME_CHANGE):
        conn.match(build(type_, structs.NAME_CHANGE.pack(ANY_ID, 0, ANY_ID, 0)))


def changes(conn: Connection) -> list[Change]:
    found = []
    for message in conn.inbox():
        type_, payload = message.items[0]
        assert payload[structs.NAME_CHANGE.size :] == NAME.encode() + b"\0"
        old, old_flags, new, new_flags = structs.NAME_CHANGE.unpack_from(payload)
        found.append((ItemType(type_).name, old, old_flags, new, new_flags))
    return found


def test_a_name_comes_changes_hands_and_goes(bus: Bus) -> None:
    with bus.connect() as watcher, bus.connect() as a, bus.connect() as b:
        watch_names(watcher)
        assert a.acquire(NAME, ALLOW) == ALLOW | NameFlag.PRIMARY | NameFlag.ACQUIRED
        assert a.acquire(NAME, ALLOW) == ALLOW | NameFlag.PRIMARY
        assert changes(watcher) == [("NAME_ADD", 0, 0, a.id, 0x22)]
        with fails(errno.EEXIST):
            b.acquire(NAME)
        assert b.acquire(NAME, QUEUE) == QUEUE | NameFlag.IN_QUEUE | NameFlag.ACQUIRED
        assert b.acquire(NAME, QUEUE) == QUEUE | NameFlag.IN_QUEUE
        assert changes(watcher) == []
        assert b.acquire(NAME, REPLACE) == NameFlag.PRIMARY | NameFlag.ACQUIRED
        assert changes(watcher) == [("NAME_CHANGE", a.id, 0x22, b.id, 0x20)]
        with fails(errno.EADDRINUSE):
            a.release(NAME)
        b.release(NAME)
        assert changes(watcher) == [("NAME_REMOVE", b.id, 0x20, 0, 0)]
        with fails(errno.ESRCH):
            b.release(NAME)


def test_a_replaced_owner_that_queues_is_next(bus: Bus) -> None:
    with bus.connect() as a, bus.connect() as b, bus.connect() as c:
        a.acquire(NAME, ALLOW | QUEUE)
        c.acquire(NAME, QUEUE)
        b.acquire(NAME, REPLACE)
        b.release(NAME)
        assert a.info(name=NAME).id == a.id
        a.release(NAME)
        assert a.info(name=NAME).id == c.id


def test_the_name_of_a_killed_process_passes_to_the_next_in_queue(bus: Bus) -> None:
    def own(test: socket.socket) -> None:
        with bus.connect() as conn:
            conn.acquire(NAME)
            test.send(conn.id.to_bytes(8, "little"))
            signal.pause()

    with bus.connect() as heir, bus.connect() as watcher, Child(own) as owner:
        id_ = int.from_bytes(owner.socket.recv(8), "little")
        assert heir.acquire(NAME, QUEUE) & NameFlag.IN_QUEUE
        watch_names(watcher)
        owner.kill()
        watcher.wait()
        assert changes(watcher) == [("NAME_CHANGE", id_, 0x20, heir.id, 0x24)]
        watcher.send(0, b"to the heir", name=NAME)
        assert heir.take().data == b"to the heir"


def test_messages_follow_a_name_to_its_implementer_and_back(bus: Bus) -> None:
    items = build_string(ItemType.NAME, NAME.encode())

    def implement(test: socket.socket) -> list[bytes]:
        with bus.connect() as conn:
            assert conn.acquire(NAME) & NameFlag.ACQUIRED
            first = [m.data for m in conn.inbox()]
            test.send(b"ready")
            signal.pause()
            return first

    with (
        bus.connect(flags=HelloFlag.ACTIVATOR, items=items) as activator,
        bus.connect() as sender,
    ):
        sender.send(0, b"wakes the activator", name=NAME)
        activator.wait()
        with fails(errno.EADDRNOTAVAIL):
            sender.send(0, name=NAME, flags=MsgFlag.NO_AUTO_START)
        with fails(errno.ENXIO):
            sender.send(activator.id)
        with Child(implement) as service:
            service.hear()
            with fails(errno.EAGAIN):
                activator.recv()
            sender.send(0, b"unread when it dies", name=NAME)
            service.kill()
        assert activator.take().data == b"unread when it dies"


def test_a_migrated_message_is_the_same_in_another_pool(bus: Bus) -> None:
    items = build_string(ItemType.NAME, NAME.encode())
    with (
        bus.connect(flags=HelloFlag.ACTIVATOR, items=items, recv=0x3FFF) as activator,
        bus.connect() as sender,
    ):
        sender.request(0, b"x" * 5000, name=NAME, cookie=77)
        peeked = activator.recv(1)
        with bus.connect() as service:
            service.send(service.id, b"shifts the offset")
            service.acquire(NAME)
            service.take()
            moved = service.take()
            assert moved.raw == peeked.raw
            assert moved.data == b"x" * 5000
            service.reply(moved, b"answered by another one")
        assert sender.take().data == b"answered by another one"


def test_list_tells_who_has_what(bus: Bus) -> None:
    items = build_string(ItemType.NAME, b"com.example.activated")
    with (
        bus.connect() as a,
        bus.connect() as b,
        bus.connect(flags=HelloFlag.ACTIVATOR, items=items) as activator,
        bus.connect(flags=HelloFlag.MONITOR) as monitor,
    ):
        a.acquire(NAME)
        b.acquire(NAME, QUEUE)

        def names(flags: int) -> list[tuple[int, bytes, int]]:
            found = []
            for record in monitor.list(flags):
                for _, payload in record.items or [(0, U64.pack(0) + b"\0")]:
                    (name_flags,) = U64.unpack_from(payload)
                    found.append((record.id, payload[8:-1], name_flags))
            return found

        owned = (a.id, NAME.encode(), 0x20)
        queued = (b.id, NAME.encode(), 0xC)
        activated = (activator.id, b"com.example.activated", 0x30)
        assert names(ListFlag.NAMES) == [owned]
        assert names(ListFlag.QUEUED) == [queued]
        assert names(ListFlag.ACTIVATORS) == [activated]
        assert names(ListFlag.UNIQUE) == [(c.id, b"", 0) for c in (a, b, activator)]
        everything = ListFlag.NAMES | ListFlag.QUEUED | ListFlag.ACTIVATORS | ListFlag.UNIQUE
        assert names(everything) == [owned, queued, activated]


# --- matches


def rule(type_: int, payload: bytes) -> bytes:
    return build(type_, payload)


def heard(conn: Connection) -> list[bytes]:
    return [message.data for message in conn.inbox()]


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda a, _: rule(ItemType.ID, U64.pack(a.id)), True),
        (lambda a, _: rule(ItemType.ID, U64.pack(a.id + 1000)), False),
        (lambda a, _: rule(ItemType.ID, U64.pack(ANY_ID)), True),
        (lambda a, _: rule(ItemType.DST_ID, U64.pack(ANY_ID)), True),
        (lambda a, b: rule(ItemType.DST_ID, U64.pack(b.id)), False),
        (lambda a, _: build_string(ItemType.NAME, NAME.encode()), True),
        (lambda a, _: build_string(ItemType.NAME, b"com.example.other"), False),
        (lambda a, _: rule(ItemType.BLOOM_MASK, bytes(BLOOM_SIZE)), True),
        (lambda a, _: rule(ItemType.BLOOM_MASK, b"\x03" + bytes(BLOOM_SIZE - 1)), True),
        (lambda a, _: rule(ItemType.BLOOM_MASK, b"\x04" + bytes(BLOOM_SIZE - 1)), False),
        (lambda a, _: rule(ItemType.ID_ADD, U64x2.pack(ANY_ID, 0)), False),
        (lambda a, _: b"", True),
    ],
)
def test_each_rule_passes_what_it_should(
    bus: Bus, make: Callable[[Connection, Connection], bytes], passes: bool
) -> None:
    with bus.connect() as sender, bus.connect() as receiver:
        sender.acquire(NAME)
        receiver.match(make(sender, receiver))
        signal_ = bloom(b"\x0b" + bytes(BLOOM_SIZE - 1))
        sender.send(ANY_ID, b"signal", flags=MsgFlag.SIGNAL, items=signal_)
        assert heard(receiver) == ([b"signal"] if passes else [])


def test_a_match_needs_all_its_rules_and_a_connection_one_match(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect() as receiver:
        mine = rule(ItemType.ID, U64.pack(sender.id))
        others = rule(ItemType.ID, U64.pack(sender.id + 1000))
        receiver.match(mine, others, cookie=1)
        sender.broadcast(b"1")
        assert heard(receiver) == []
        receiver.match(mine, cookie=2)
        receiver.match(cookie=3)
        sender.broadcast(b"2")
        assert heard(receiver) == [b"2"], "once, however many matches pass it"
        receiver.match(others, cookie=3, flags=MatchFlag.REPLACE)
        receiver.unmatch(2)
        sender.broadcast(b"3")
        assert heard(receiver) == []
        with fails(errno.EBADSLT):
            receiver.unmatch(2)


def test_generations_choose_the_mask(bus: Bus) -> None:
    first, second = b"\x01" + bytes(BLOOM_SIZE - 1), b"\x02" + bytes(BLOOM_SIZE - 1)
    with bus.connect() as sender, bus.connect() as receiver:
        receiver.match(rule(ItemType.BLOOM_MASK, first + second))
        for generation, data, passes in (
            *((0, first, True), (0, second, False), (1, first, False)),
            *((1, second, True), (7, second, True), (7, first, False)),
        ):
            signal_ = bloom(data, generation)
            sender.send(ANY_ID, b"x", flags=MsgFlag.SIGNAL, items=signal_)
            assert bool(heard(receiver)) == passes, (generation, data[:1])


def test_a_signal_to_one_needs_a_match_and_is_else_dropped_silently(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, b"1", flags=MsgFlag.SIGNAL, items=bloom())
        receiver.match()
        sender.send(receiver.id, b"2", flags=MsgFlag.SIGNAL, items=bloom())
        assert heard(receiver) == [b"2"]


def test_monitors_see_everything_and_nobody_sees_them(bus: Bus) -> None:
    with bus.connect() as a, bus.connect() as b:
        b.match(rule(ItemType.ID_ADD, U64x2.pack(ANY_ID, 0)))
        with bus.connect(flags=HelloFlag.MONITOR) as monitor:
            assert b.inbox() == []
            a.send(b.id, b"unicast")
            a.send(b.id, b"dropped", flags=MsgFlag.SIGNAL, items=bloom())
            a.broadcast(b"broadcast")
            a.acquire(NAME)
            seen: list[Received] = monitor.inbox()
            assert [m.data for m in seen[:3]] == [b"unicast", b"dropped", b"broadcast"]
            assert [m.types[0] for m in seen[3:]] == [ItemType.NAME_ADD]
            with fails(errno.ENXIO):
                a.send(monitor.id)
            with fails(errno.EOPNOTSUPP):
                monitor.send(a.id)
