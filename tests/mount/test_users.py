# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several real users on one bus: quota, policy, and what the rights at open() are worth."""

import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest

import daemons
from abi_client.building import bloom
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    Command,
    HelloFlag,
    ItemType,
    MakeFlag,
    MsgFlag,
    NameFlag,
    PolicyAccess,
    PolicyType,
)
from mount.processes import Child, become
from mount.raw import MIB, Bus, Connection, fails, outcome, succeeds

pytestmark = pytest.mark.one_pool

ALICE, BOB, CAROL = 4711, 4712, 4713
SERVICE = "com.example.service"


def policy(name: str, *lines: tuple[int, int, int]) -> bytes:
    """NAME and POLICY_ACCESS items: (type, access, id)."""
    items = build_string(ItemType.NAME, name.encode())
    for type_, access, id_ in lines:
        items += build(ItemType.POLICY_ACCESS, structs.POLICY_ACCESS.pack(type_, access, id_))
    return items


WORLD_MAY_TALK = policy(SERVICE, (PolicyType.WORLD, PolicyAccess.TALK, 0))


class User:
    """Connections of another user, opened while somebody was that user; this process uses them.

    Quota and ownership go by the credentials at open(); what counts at call time is the test's
    own user, root, who owns the bus but is not what the connection was opened as.
    """

    def __init__(self, root_fd: int, bus: Bus, uid: int) -> None:
        self.uid = uid

        def open_(test: socket.socket) -> None:
            fds = [os.open(f"{bus.name}/bus", os.O_RDWR, dir_fd=root_fd) for _ in range(4)]
            socket.send_fds(test, [b"fds"], fds)
            test.recv(2)

        with Child(open_, uid=uid) as child:
            _, self._fds, _, _ = socket.recv_fds(child.socket, 10, 8)
            child.say()
            child.result()

    def connect(self, pool_size: int = MIB) -> Connection:
        conn = Connection.__new__(Connection)
        conn.fd, conn.pool_size = self._fds.pop(), pool_size
        conn.hello(HelloFlag.ACCEPT_FD, (1 << 14) - 1, 0, pool_size, b"")
        return conn

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def holder(bus: Bus) -> Iterator[Connection]:
    """Lets everybody talk to whoever owns SERVICE."""
    with bus.connect(flags=HelloFlag.POLICY_HOLDER, items=WORLD_MAY_TALK) as holder:
        yield holder


@pytest.fixture
def service(bus: Bus, holder: Connection) -> Iterator[Connection]:
    with bus.connect(pool_size=16 * MIB) as conn:
        conn.acquire(SERVICE)
        yield conn


def flood(root_fd: int, bus: Bus, size: int) -> int:
    """Send messages of *size* bytes to the service until it says ENOBUFS; how many went."""
    with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
        payload = bytes(size)
        n = 0
        while succeeds(lambda: conn.send(0, payload, name=SERVICE), errno.ENOBUFS):
            n += 1
        # Nor from another connection of the same user.
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as other, fails(errno.ENOBUFS):
            other.send(0, payload, name=SERVICE)
        return n


def say_one(root_fd: int, bus: Bus, text: bytes) -> str:
    with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
        return outcome(lambda: conn.send(0, text, name=SERVICE))


@pytest.mark.parametrize(("size", "most"), [(8, 256), (500_000, 5)])
def test_a_user_who_floods_keeps_nobody_else_out(
    bus: Bus, root_fd: int, service: Connection, size: int, most: int
) -> None:
    with Child(lambda _: flood(root_fd, bus, size), uid=ALICE) as alice:
        assert alice.result() == most
    for uid in (BOB, CAROL):
        with Child(lambda _: say_one(root_fd, bus, b"let me in"), uid=uid) as child:
            assert child.result() == "0"
    # What the flooder left behind is still there, and so is the others' mail, in order.
    messages = service.inbox()
    assert [m.data for m in messages[most:]] == [b"let me in"] * 2
    assert len(messages) == most + 2
    # Room that was given back can be used again.
    with Child(lambda _: flood(root_fd, bus, size), uid=ALICE) as alice:
        assert alice.result() == most


def test_users_share_the_room_as_documented(bus: Bus, root_fd: int, service: Connection) -> None:
    """Half the pool, a third of what is left of it for each."""

    def fill(_: socket.socket) -> int:
        n = 0
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            payload = bytes(8192 - 64 - 32 - 40)
            while succeeds(lambda: conn.send(0, payload, name=SERVICE), errno.ENOBUFS):
                n += 1
        return n

    sent = []
    for uid in (ALICE, BOB):
        with Child(fill, uid=uid) as child:
            sent.append(child.result())
    # 256 messages is the other limit, and comes first with messages of 8 KiB.
    assert sent == [256, 256]
    service.inbox()
    for uid, limit in ((ALICE, 2796202), (BOB, 1864135), (CAROL, 1242757)):
        size = 65536
        with Child(lambda _, size=size: flood(root_fd, bus, size), uid=uid) as child:
            name_item = 16 + len(SERVICE) + 1
            message = -(-(64 + 32 + name_item) // 8) * 8 + size
            n = child.result()
            room = 8388608 - sum(m * message for m in sent[2:])
            assert n == room // 3 // message
            assert abs(room // 3 - limit) < 3 * message
            sent.append(n)


def test_a_flood_of_descriptors_keeps_nobody_elses_out(
    bus: Bus, root_fd: int, service: Connection
) -> None:
    def pour(_: socket.socket) -> int:
        n = 0
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            while succeeds(lambda: conn.send(0, name=SERVICE, fds=[0, 1, 2]), errno.EMFILE):
                n += 1
        return n

    for uid in (ALICE, BOB):
        with Child(pour, uid=uid) as child:
            assert child.result() == 5
    for message in service.inbox():
        message.close_fds()


def test_the_kernels_notifications_have_room_of_their_own(
    bus: Bus, root_fd: int, service: Connection
) -> None:
    service.match(build(ItemType.ID_ADD, structs.U64x2.pack((1 << 64) - 1, 0)))
    with Child(lambda _: flood(root_fd, bus, 8), uid=ALICE) as alice:
        assert alice.result() > 200
    service.inbox()
    with bus.connect() as conn:
        (added,) = service.inbox()
        assert structs.U64x2.unpack(added.one(ItemType.ID_ADD)) == (conn.id, 1)


# --- who may talk to whom


def test_users_who_share_no_name_may_not_talk(bus: Bus, root_fd: int) -> None:
    def wait(test: socket.socket) -> list[bytes]:
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            test.send(conn.id.to_bytes(8, "little"))
            test.recv(2)
            return [m.data for m in conn.inbox()]

    def talk(to: int) -> str:
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            return outcome(lambda: conn.send(to, b"hello from %d" % os.getuid()))

    with Child(wait, uid=ALICE) as alice:
        to = int.from_bytes(alice.socket.recv(8), "little")
        found = {}
        for uid in (ALICE, BOB, 0):
            with Child(lambda _: talk(to), uid=uid) as child:
                found[uid] = child.result()
        # The same user, and the owner of the bus.
        assert found == {ALICE: "0", BOB: "EPERM", 0: "0"}
        alice.say()
        assert alice.result() == [b"hello from 4711", b"hello from 0"]


def test_policy_decides_who_may_own_a_name(bus: Bus, root_fd: int) -> None:
    entry = policy(SERVICE, (PolicyType.USER, PolicyAccess.OWN, ALICE))

    def acquire(_: socket.socket) -> str:
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            return outcome(lambda: conn.acquire(SERVICE))

    def try_both() -> list[str]:
        found = []
        for uid in (ALICE, BOB):
            with Child(acquire, uid=uid) as child:
                found.append(child.result())
        return found

    assert try_both() == ["EPERM", "EPERM"]
    with bus.connect(flags=HelloFlag.POLICY_HOLDER, items=entry) as holder:
        assert try_both() == ["0", "EPERM"]
        swapped = policy(SERVICE, (PolicyType.USER, PolicyAccess.OWN, BOB))
        holder.command(Command.UPDATE, items=swapped)
        assert try_both() == ["EPERM", "0"]
    assert try_both() == ["EPERM", "EPERM"]


def test_the_senders_rights_are_those_of_the_caller_now(bus: Bus, root_fd: int) -> None:
    """A descriptor opened by one user and used by another."""
    alice = User(root_fd, bus, ALICE)
    with alice.connect() as conn, alice.connect() as friend, bus.connect() as target:

        def as_bob(_: socket.socket) -> str:
            become(BOB, BOB)
            return outcome(lambda: conn.send(friend.id, b"?"))

        def as_alice(_: socket.socket) -> str:
            become(ALICE, ALICE)
            conn.send(friend.id, b"!")
            with fails(errno.EPERM):
                conn.send(target.id)
            return "sent"

        with Child(as_bob) as bob:
            assert bob.result() == "EPERM"
        with Child(as_alice) as child:
            assert child.result() == "sent"
        assert [m.data for m in friend.inbox()] == [b"!"]
    alice.close()


def test_rights_of_the_owner_are_those_at_open(bus: Bus, root_fd: int) -> None:
    def own(_: socket.socket) -> str:
        path = f"{bus.name}/bus"
        with Connection(path, dir_fd=root_fd) as conn, Connection(path, dir_fd=root_fd) as target:
            become(ALICE, ALICE)
            # Opened as root: it may do what the owner of the bus may.
            assert conn.acquire(SERVICE) & NameFlag.ACQUIRED
            conn.send(target.id, b"as the owner")
            assert target.take().data == b"as the owner"
        return "fine"

    with Child(own) as child:
        assert child.result() == "fine"


@pytest.mark.parametrize("flags", [HelloFlag.ACTIVATOR, HelloFlag.POLICY_HOLDER, HelloFlag.MONITOR])
def test_special_connections_are_for_the_buss_owner(bus: Bus, root_fd: int, flags: int) -> None:
    items = policy(SERVICE) if flags != HelloFlag.MONITOR else b""

    def hello(_: socket.socket) -> str:
        path = f"{bus.name}/bus"
        return outcome(lambda: Connection(path, dir_fd=root_fd, flags=flags, items=items).close())

    found = {}
    for uid in (0, ALICE):
        with Child(hello, uid=uid) as child:
            found[uid] = child.result()
    assert found[ALICE] == "EPERM"
    assert found[0] == "0"


def test_broadcasts_reach_those_who_may_talk_to_their_sender(bus: Bus, root_fd: int) -> None:
    def listen(test: socket.socket) -> list[bytes]:
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            conn.match()
            test.send(b"ready")
            test.recv(2)
            return [m.data for m in conn.inbox() if m.src_id]

    def shout(_: socket.socket) -> None:
        with Connection(f"{bus.name}/bus", dir_fd=root_fd) as conn:
            conn.send((1 << 64) - 1, b"by %d" % os.getuid(), flags=MsgFlag.SIGNAL, items=bloom())

    listeners = {uid: Child(listen, uid=uid) for uid in (0, ALICE, BOB)}
    for child in listeners.values():
        child.hear()
    for uid in (ALICE, BOB, 0):
        with Child(shout, uid=uid) as child:
            child.result()
    for child in listeners.values():
        child.say()
    heard = {uid: child.result() for uid, child in listeners.items()}
    assert heard == {
        0: [b"by 4711", b"by 4712", b"by 0"],
        ALICE: [b"by 4711"],
        BOB: [b"by 4712"],
    }


def test_a_user_may_have_so_many_connections(mount: daemons.Mount, root_fd: int) -> None:
    def connect(test: socket.socket) -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        with Bus(mount.path, flags=MakeFlag.ACCESS_WORLD) as bus:
            become(ALICE, ALICE)
            path = f"{bus.name}/bus"
            connections = [Connection(path, dir_fd=root_fd, pool_size=4096) for _ in range(1024)]
            with fails(errno.EMFILE):
                Connection(path, dir_fd=root_fd, pool_size=4096)
            # A disconnected one counts until it is closed.
            connections[0].byebye()
            with fails(errno.EMFILE):
                Connection(path, dir_fd=root_fd, pool_size=4096)
            connections[0].close()
            Connection(path, dir_fd=root_fd, pool_size=4096).close()
        return "fine"

    with Child(connect) as child:
        assert child.result() == "fine"
