# SPDX-License-Identifier: LGPL-2.1-or-later
"""RECV: which message, what becomes of it, and its descriptors."""

from errno import EAGAIN, EINVAL, ENXIO

import pytest

from abi_client.building import fds, memfd, text, vec
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import (
    HelloFlag,
    ItemType,
    MsgFlag,
    RecvFlag,
    RecvReturnFlag,
)

I = ItemType  # noqa: E741
PEEK, DROP, USE_PRIORITY = RecvFlag
ACCEPT_FD = HelloFlag.ACCEPT_FD
INCOMPLETE_FDS = RecvReturnFlag.INCOMPLETE_FDS
DROPPED_MSGS = RecvReturnFlag.DROPPED_MSGS


@pytest.mark.also_mounted
def test_messages_come_in_the_order_of_sending(bus: Bus) -> None:
    client = bus.hello()
    for n, priority in enumerate((5, -5, 0, 5)):
        client.send(client, cookie=n, priority=priority)
    assert client.cookies() == [0, 1, 2, 3]
    with fails(EAGAIN):
        client.recv()


@pytest.mark.also_mounted
def test_priorities_are_ignored_unless_asked_for(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, priority=10)
    assert client.recv(priority=-10).priority == 10


@pytest.mark.also_mounted
def test_the_lowest_priority_value_comes_first_and_the_oldest_of_equals(bus: Bus) -> None:
    client = bus.hello()
    for cookie, priority in enumerate((3, 0, -2, 0, -2)):
        client.send(client, cookie=cookie, priority=priority)
    got = [client.recv(USE_PRIORITY, 0).cookie for _ in range(4)]
    assert got == [2, 4, 1, 3]
    with fails(EAGAIN):
        client.recv(USE_PRIORITY, 2)
    assert client.recv(USE_PRIORITY, 3).cookie == 0


@pytest.mark.also_mounted
def test_a_peeked_message_stays_and_keeps_its_offset(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, cookie=1)
    client.send(client, cookie=2, priority=-1)
    offsets = {client.recv(PEEK).offset for _ in range(3)}
    assert client.recv(PEEK | USE_PRIORITY).cookie == 2
    got = client.recv()
    assert (got.cookie, offsets) == (1, {got.offset})
    assert client.cookies() == [2]


@pytest.mark.also_mounted
def test_a_dropped_message_is_gone_with_its_slice(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, cookie=1)
    client.send(client, cookie=2)
    dropped = client.recv(DROP, free=False)
    assert (dropped.offset, dropped.raw) == (client.pool_size, b"")
    client.send(client, cookie=3)
    assert client.recv(PEEK).cookie == 2
    assert client.recv().offset == 64
    assert client.recv().offset == 0, "the room was free again"


@pytest.mark.also_mounted
def test_drop_wins_over_peek(bus: Bus) -> None:
    client = bus.hello()
    client.send(client)
    client.recv(DROP | PEEK, free=False)
    assert client.inbox() == []


@pytest.mark.also_mounted
def test_a_dropped_message_that_was_peeked_stays_readable_until_freed(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"seen")
    peeked = client.recv(PEEK, free=False)
    client.recv(DROP, free=False)
    client.free(peeked.offset)
    with fails(ENXIO):
        client.free(peeked.offset)


@pytest.mark.also_mounted
def test_drop_goes_without_priority(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    client.match()
    client.send(client)
    client.broadcast(data=bytes(4096))
    with fails(EINVAL):
        client.recv(DROP | USE_PRIORITY)
    got = client.recv()
    assert (got.lost, got.return_flags) == (1, DROPPED_MSGS)


@pytest.mark.parametrize("flags", [0, PEEK, DROP])
@pytest.mark.also_mounted
def test_losses_are_told_once_whatever_the_flags(bus: Bus, flags: int) -> None:
    client = bus.hello(pool_size=4096)
    client.match()
    client.send(client)
    client.send(client)
    for _ in range(3):
        client.broadcast(data=bytes(4096))
    got = client.recv(flags, free=False)
    assert (got.lost, got.return_flags, got.msg_return_flags) == (3, DROPPED_MSGS, 0)
    got = client.recv(flags, free=False)
    assert (got.lost, got.return_flags) == (0, 0)


@pytest.mark.also_mounted
def test_messages_survive_their_sender(bus: Bus) -> None:
    client, sender = bus.hello(), bus.hello()
    sender.send(client, data=b"last words")
    sender.close()
    got = client.recv()
    assert (got.src_id, got.data) == (sender.id, b"last words")


@pytest.mark.also_mounted
def test_a_received_slice_stays_until_it_is_freed(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"one")
    one = client.recv(free=False)
    client.send(client, data=b"two")
    two = client.recv(free=False)
    assert one.offset != two.offset
    assert client.visible(one.offset, len(one.raw)) == one.raw


def test_nobody_sees_a_message_before_it_is_received(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"secret")
    assert not any(client.memory.visible[64:4096])
    assert client.recv().data == b"secret"


# --- descriptors


def files_of(client: Client, numbers: list[int]) -> list[FakeFile | None]:
    return [client.peer.files.get(n) for n in numbers]


def test_descriptors_are_installed_fds_first_then_memfds(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(flags=ACCEPT_FD)
    one, two, mem, other = FakeFile(), FakeFile(), FakeFile(size=8), FakeFile(size=16)
    numbers = [sender.peer.open(f) for f in (other, two, one, mem)]
    sender.send(client, memfd(numbers[3], 8), fds(numbers[2], numbers[1]), memfd(numbers[0], 16))
    got = client.recv()
    assert files_of(client, got.fds) == [one, two]
    assert files_of(client, got.memfd_numbers) == [mem, other]
    assert got.fds + got.memfd_numbers == [0, 1, 2, 3]
    assert got.msg_return_flags == 0
    assert got.types == [I.PAYLOAD_MEMFD, I.FDS, I.PAYLOAD_MEMFD]


def test_descriptors_go_to_who_calls_recv(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(flags=ACCEPT_FD)
    sender.send(client, fds(sender.peer.open(FakeFile())))
    child = FakePeer(1000)
    with client.used_by(child):
        assert client.recv().fds == [0]
    assert len(child.files) == 1
    assert not client.peer.files


@pytest.mark.parametrize("room", range(4))
def test_what_can_not_be_installed_is_minus_one(bus: Bus, room: int) -> None:
    sender, client = bus.hello(), bus.hello(flags=ACCEPT_FD)
    client.peer.n_files_max = room
    fd, mem = sender.peer.open(FakeFile()), sender.peer.open(FakeFile(size=8))
    sender.send(client, fds(fd, fd), memfd(mem, 8), data=b"anyway")
    got = client.recv()
    assert got.fds + got.memfd_numbers == [0, 1, 2][:room] + [-1] * (3 - room)
    assert got.msg_return_flags == (0 if room == 3 else INCOMPLETE_FDS)
    assert (got.return_flags, got.data) == (0, b"anyway")


def test_peek_installs_nothing(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(flags=ACCEPT_FD)
    sender.send(client, fds(sender.peer.open(FakeFile())))
    client.recv(PEEK)
    assert client.peer.files == {}
    got = client.recv()
    assert got.fds == [0]
    assert len(client.peer.files) == 1


def test_memfds_are_for_everyone(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello()
    sender.send(client, memfd(sender.peer.open(FakeFile(size=8)), 8))
    got = client.recv()
    assert (got.memfd_numbers, got.msg_return_flags) == ([0], 0)


@pytest.mark.parametrize("flags", [0, ACCEPT_FD])
def test_a_monitor_without_accept_fd_sees_minus_one(bus: Bus, flags: int) -> None:
    sender, client, monitor = bus.hello(), bus.hello(flags=ACCEPT_FD), bus.monitor(flags=flags)
    fd, mem = sender.peer.open(FakeFile()), sender.peer.open(FakeFile(size=8))
    sender.send(client, fds(fd), memfd(mem, 8))
    got = monitor.recv()
    assert got.fds == ([0] if flags else [-1])
    assert files_of(monitor, got.memfd_numbers)[0] is not None
    assert client.recv().fds == [0]


def test_a_disconnect_forgets_losses(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    client.match()
    client.broadcast(data=bytes(4096))
    client.byebye()
    assert client.connection.lost == 0


@pytest.mark.also_mounted
def test_an_activator_may_look_at_what_waits(bus: Bus) -> None:
    activator, client = bus.activator("com.example.a"), bus.hello()
    client.send("com.example.a", cookie=4)
    assert activator.recv(PEEK).cookie == 4
    assert activator.recv().cookie == 4


@pytest.mark.also_mounted
def test_a_received_message_holds_its_name(bus: Bus) -> None:
    client = bus.hello()
    client.acquire("com.example.a")
    client.send("com.example.a", vec(0, 3), flags=MsgFlag.NO_AUTO_START)
    got = client.recv()
    assert got.items[0] == (I.DST_NAME, b"com.example.a\0")
    assert got.raw[64:96] == text(I.DST_NAME, "com.example.a")
