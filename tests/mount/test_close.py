# SPDX-License-Identifier: LGPL-2.1-or-later
"""close(2), the death of processes, and what others see of it."""

import errno
import os
import signal
import socket

import pytest

import daemons
from abi_client.received import Received
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import Command, ItemType, ListFlag, NameFlag
from kdbusfs.abi.structs import U64x2
from mount.processes import Child
from mount.raw import Bus, Connection, File, fails, poll

ANY_ID = (1 << 64) - 1
ID_ADDS = build(ItemType.ID_ADD, U64x2.pack(ANY_ID, 0))
ID_REMOVES = build(ItemType.ID_REMOVE, U64x2.pack(ANY_ID, 0))


def names_rule(type_: int) -> bytes:
    return build(type_, structs.NAME_CHANGE.pack(ANY_ID, 0, ANY_ID, 0))


def match_notifications(conn: Connection) -> None:
    """Have it told of everything."""
    conn.match(ID_ADDS)
    conn.match(ID_REMOVES)
    for type_ in (ItemType.NAME_ADD, ItemType.NAME_REMOVE, ItemType.NAME_CHANGE):
        conn.match(names_rule(type_))


def told(messages: list[Received]) -> list[tuple[str, int, int, str]]:
    """Notifications in words: what, old id, new id (or the id), name."""
    found = []
    for message in messages:
        type_, payload = message.items[0]
        assert message.src_id == 0
        old, new, name = 0, 0, ""
        if type_ in (ItemType.ID_ADD, ItemType.ID_REMOVE):
            old, _ = U64x2.unpack(payload)
        elif type_ in (ItemType.NAME_ADD, ItemType.NAME_REMOVE, ItemType.NAME_CHANGE):
            old, _, new, _ = structs.NAME_CHANGE.unpack_from(payload)
            name = payload[structs.NAME_CHANGE.size : -1].decode()
        found.append((ItemType(type_).name, old, new, name))
    return found


def is_alive(watcher: Connection, id_: int) -> bool:
    return id_ in {record.id for record in watcher.list(ListFlag.UNIQUE)}


def test_only_the_last_close_disconnects(bus: Bus) -> None:
    with bus.connect() as watcher:
        conn = bus.connect()
        copies = [os.dup(conn.fd) for _ in range(3)]
        conn.close()
        for copy in copies:
            assert is_alive(watcher, conn.id)
            os.close(copy)
        assert not is_alive(watcher, conn.id)


def test_a_duplicate_works_as_the_first_did(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"foobar")
        copy = os.dup(conn.fd)
        os.close(conn.fd)
        conn.fd = copy
        assert conn.take().data == b"foobar"


def test_a_fork_keeps_the_connection(bus: Bus) -> None:
    with bus.connect() as watcher:
        conn = bus.connect()

        def hold(test: socket.socket) -> None:
            test.send(b"ready")
            test.recv(2)
            conn.send(conn.id, b"from the child")
            assert conn.take().data == b"from the child"

        with Child(hold) as child:
            child.hear()
            conn.close()
            assert is_alive(watcher, conn.id)
            child.say()
            child.result()
        assert not is_alive(watcher, conn.id)


def test_a_killed_process_is_disconnected(bus: Bus) -> None:
    def hold(test: socket.socket) -> None:
        conn = bus.connect()
        test.send(conn.id.to_bytes(8, "little"))
        signal.pause()

    with bus.connect() as watcher:
        match_notifications(watcher)
        with Child(hold) as child:
            id_ = int.from_bytes(child.socket.recv(8), "little")
            child.kill()
            assert told([watcher.take(), watcher.take()]) == [
                ("ID_ADD", id_, 0, ""),
                ("ID_REMOVE", id_, 0, ""),
            ]


def test_exec_closes_what_is_not_inherited(bus: Bus) -> None:
    def run(test: socket.socket) -> None:
        conn = bus.connect()
        test.set_inheritable(True)
        test.send(conn.id.to_bytes(8, "little"))
        test.recv(2)
        os.dup2(test.fileno(), 0)
        os.execv("/bin/cat", ["cat"])

    with bus.connect() as watcher, Child(run) as child:
        id_ = int.from_bytes(child.socket.recv(8), "little")
        assert is_alive(watcher, id_)
        child.say()
        daemons.wait_until(lambda: not is_alive(watcher, id_), "exec did not disconnect")


def test_a_disconnect_is_told_in_order(bus: Bus) -> None:
    with bus.connect() as watcher, bus.connect() as heir:
        gone = bus.connect()
        gone.acquire("com.example.first")
        gone.acquire("com.example.second")
        gone.acquire("com.example.third")
        assert heir.acquire("com.example.second", NameFlag.QUEUE) & NameFlag.IN_QUEUE
        watcher.request(gone.id, b"read", cookie=1)
        watcher.request(gone.id, b"unread", cookie=2)
        gone.recv()
        match_notifications(watcher)
        gone.close()
        messages = watcher.inbox()
        assert told(messages) == [
            ("NAME_REMOVE", gone.id, 0, "com.example.first"),
            ("NAME_CHANGE", gone.id, heir.id, "com.example.second"),
            ("NAME_REMOVE", gone.id, 0, "com.example.third"),
            # Both requests, then the connection itself.
            ("REPLY_DEAD", 0, 0, ""),
            ("REPLY_DEAD", 0, 0, ""),
            ("ID_REMOVE", gone.id, 0, ""),
        ]
        assert sorted(message.cookie_reply for message in messages[3:5]) == [1, 2]


def test_everything_a_close_causes_is_there_when_it_returns(bus: Bus) -> None:
    with bus.connect() as watcher:
        match_notifications(watcher)
        for _ in range(100):
            conn = bus.connect()
            conn.close()
            assert told(watcher.inbox()) == [
                ("ID_ADD", conn.id, 0, ""),
                ("ID_REMOVE", conn.id, 0, ""),
            ]


def test_the_end_of_an_endpoint_disconnects_in_order_of_hello(bus: Bus) -> None:
    with bus.connect() as watcher:
        owner = File(bus.path)
        item = build_string(ItemType.MAKE_NAME, b"0-custom")
        owner.command(Command.ENDPOINT_MAKE, items=item)
        connections = [Connection(bus.directory / "0-custom") for _ in range(5)]
        match_notifications(watcher)
        owner.close()
        assert told(watcher.inbox()) == [("ID_REMOVE", c.id, 0, "") for c in connections]
        for conn in connections:
            with fails(errno.ECONNRESET):
                conn.free(0)
            conn.close()


def test_the_end_of_the_bus_ends_all(mount: daemons.Mount) -> None:
    bus = Bus(mount.path)
    unbound = File(bus.path)
    owner = File(bus.path)
    custom = build_string(ItemType.MAKE_NAME, b"0-custom")
    owner.command(Command.ENDPOINT_MAKE, items=custom)
    below = File(bus.directory / "0-custom")
    conn = bus.connect()
    bus.close()
    for file in (unbound, below):
        with fails(errno.ESHUTDOWN):
            file.command(Command.HELLO, *[0] * 9)
    with fails(errno.ESHUTDOWN):
        owner.command(Command.ENDPOINT_UPDATE)
    for command in (Command.BYEBYE, Command.ENDPOINT_UPDATE):
        with fails(errno.ECONNRESET):
            conn.command(command)
    for file in (unbound, owner, below, conn):
        file.close()


def test_byebye_waits_for_nobody_and_leaves_a_handle(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as other:
        conn.send(conn.id, b"unread")
        with fails(errno.EBUSY):
            conn.byebye()
        other.send(conn.id, b"still reachable")
        assert len(conn.inbox()) == 2
        conn.byebye()
        with fails(errno.ECONNRESET):
            conn.byebye()
        with fails(errno.ECONNRESET):
            conn.free(0)
        with fails(errno.EBADFD):
            conn.command(Command.HELLO, *[0] * 9)
        with fails(errno.ENXIO):
            other.send(conn.id)


def test_a_bus_owned_by_a_killed_process_dies(mount: daemons.Mount) -> None:
    def own(test: socket.socket) -> None:
        bus = Bus(mount.path, "0-owned-by-a-child")
        test.send(b"ready")
        signal.pause()
        bus.close()

    with Child(own) as child:
        child.hear()
        conn = Connection(mount.path / "0-owned-by-a-child" / "bus")
        child.kill()
        assert poll(conn, daemons.DEADLINE_SECONDS) & 0x10
        assert "0-owned-by-a-child" not in os.listdir(mount.path)
        conn.close()


@pytest.mark.parametrize("limit", [16])
def test_a_user_may_have_so_many_buses(mount: daemons.Mount, root_fd: int, limit: int) -> None:
    def make(_: socket.socket) -> str:
        os.fchdir(root_fd)
        buses = [Bus(".", f"4711-{n}") for n in range(limit)]
        with fails(errno.EMFILE):
            Bus(".", "4711-one-more")
        buses.pop().close()
        Bus(".", "4711-again").close()
        return "fine"

    # And again: a dead user's buses are no longer counted.
    for _ in range(2):
        with Child(make, uid=4711) as child:
            assert child.result() == "fine"
