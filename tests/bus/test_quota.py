# SPDX-License-Identifier: LGPL-2.1-or-later
"""Quota: how much each user may keep queued at a receiver, and when it is given back."""

from errno import EFAULT, EMFILE, ENOBUFS, EXFULL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_client.building import access, fds, memfd, name, vec
from abi_client.received import Received
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import HelloFlag, MsgFlag, PolicyAccess, PolicyType, RecvFlag
from kdbusfs.bus.quota import Quota, User

A = "com.example.a"
MIB = 1 << 20
TALK = access(PolicyType.WORLD, PolicyAccess.TALK)


@pytest.fixture
def receiver(bus: Bus) -> Client:
    """Open to everybody, with a pool of 16 MiB."""
    bus.holder(A, TALK)
    client = bus.hello(pool_size=16 * MIB, flags=HelloFlag.ACCEPT_FD)
    client.acquire(A)
    return client


def users(bus: Bus, n: int) -> list[Client]:
    return [bus.hello(peer=FakePeer(5000 + i)) for i in range(n)]


def queued(client: Client) -> int:
    return int(client.connection.quota.queued)


def fill(sender: Client, n: int) -> None:
    """Have *n* bytes queued, in slices of at most a MiB."""
    while n:
        size = min(n, MIB)
        sender.send(A, data=bytes(size - 128))
        n -= size


# --- the numbers


def test_shares_of_the_first_second_and_third_user(bus: Bus, receiver: Client) -> None:
    for user, share in zip(users(bus, 3), (2796202, 1864135, 1242757), strict=True):
        fill(user, share // 8 * 8)
        with fails(ENOBUFS):
            user.send(A)


@pytest.mark.parametrize(("taken", "share"), [(0, 2796202), (2796202, 1864135), (4660337, 1242757)])
def test_a_share_is_a_third_of_what_others_left_of_half_the_pool(taken: int, share: int) -> None:
    quota = Quota(16 * MIB)
    others = [User(n) for n in range(10)]
    for other in others:
        part = min(taken, (quota.half - quota.queued) // 3)
        if part:
            quota.charge(other, part, 0)
            taken -= part
    me = User(99)
    for size, errno in ((share + 1, ENOBUFS), (share, 0)):
        if errno:
            with fails(errno):
                quota.charge(me, size, 0)
        else:
            quota.charge(me, size, 0)


def test_one_message_of_2_mib_fits_and_a_second_does_not(bus: Bus, receiver: Client) -> None:
    (user,) = users(bus, 1)
    big = user.peer.map(2 * MIB)
    user.send(A, vec(big, 2 * MIB))
    with fails(ENOBUFS):
        user.send(A, vec(big, 2 * MIB))
    receiver.recv()
    user.send(A, vec(big, 2 * MIB))


def test_256_messages_of_a_user_fit_at_once(bus: Bus, receiver: Client) -> None:
    bus.domain.check = lambda: None  # type: ignore[method-assign]
    one, two = users(bus, 2)
    for _ in range(256):
        one.send(A)
    with fails(ENOBUFS):
        one.send(A)
    two.send(A)
    receiver.recv()
    one.send(A)


def test_connections_of_one_user_share(bus: Bus, receiver: Client) -> None:
    one, same = (bus.hello(peer=FakePeer(5000)) for _ in range(2))
    fill(one, 2 * MIB)
    with fails(ENOBUFS):
        same.send(A, data=bytes(MIB))
    with fails(ENOBUFS):
        one.send(A, data=bytes(MIB))


def test_whoever_opened_pays_whatever_uid_is_effective(bus: Bus, receiver: Client) -> None:
    one = bus.hello(peer=FakePeer(5000))
    other = bus.hello(peer=FakePeer(6000).become(euid=5000))
    fill(one, 2 * MIB)
    other.send(A, data=bytes(MIB))


def test_connections_of_a_custom_endpoint_share_one_account(bus: Bus, receiver: Client) -> None:
    bus.endpoint("1000-custom", name(A), TALK)
    one = Client(bus, endpoint="1000-custom", peer=FakePeer(5000))
    two = Client(bus, endpoint="1000-custom", peer=FakePeer(6000))
    fill(one, 2 * MIB)
    with fails(ENOBUFS):
        two.send(A, data=bytes(MIB))
    bus.hello(peer=FakePeer(5000)).send(A, data=bytes(MIB))


def test_16_descriptors_of_a_user_may_be_queued(bus: Bus, receiver: Client) -> None:
    one, two = users(bus, 2)
    for user in (one, two):
        fd = user.peer.open(FakeFile())
        user.send(A, fds(*[fd] * 10))
        with fails(EMFILE):
            user.send(A, fds(*[fd] * 7))
        user.send(A, fds(*[fd] * 6))
        with fails(EMFILE):
            user.send(A, fds(fd))
        user.send(A, memfd(user.peer.open(FakeFile(size=8)), 8))
    receiver.recv()
    one.send(A, fds(0))


# --- when it is given back

ENDS = {
    "recv": lambda c: c.recv(free=False),
    "drop": lambda c: c.recv(RecvFlag.DROP, free=False),
    "disconnect": lambda c: c.close(),
    "migration": lambda c: c.release("com.example.b"),
}


@pytest.mark.parametrize("end", ENDS)
def test_quota_is_given_back_when_a_message_leaves_the_queue(
    bus: Bus, receiver: Client, end: str
) -> None:
    receiver.release(A)
    bus.special(HelloFlag.ACTIVATOR, name("com.example.b"))
    receiver.acquire("com.example.b")
    bus.hello().send("com.example.b", data=bytes(1000))
    assert queued(receiver) == 64 + 32 + 32 + 1000
    ENDS[end](receiver)
    assert queued(receiver) == 0


def test_peeking_and_freeing_give_nothing_back(bus: Bus, receiver: Client) -> None:
    bus.hello().send(A)
    charged = queued(receiver)
    peeked: Received = receiver.recv(RecvFlag.PEEK, free=False)
    assert queued(receiver) == charged
    receiver.free(peeked.offset)
    assert queued(receiver) == charged


@pytest.mark.parametrize("errno", [EXFULL, EFAULT])
def test_what_could_not_be_queued_is_not_charged(bus: Bus, errno: int) -> None:
    client, sender = bus.hello(pool_size=4096), bus.hello()
    if errno == EXFULL:
        with fails(EXFULL):
            while True:
                client.info(client.id, kinds=0, free=False)
    for _ in range(300):
        with fails(errno):
            sender.send(client, vec(8, 8))
    assert queued(client) == 0
    assert not client.connection.quota.accounts


def test_slices_that_were_received_take_room_but_no_quota(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    with fails(EXFULL):
        while True:
            client.send(client, data=bytes(500))
            client.recv(free=False)
    assert queued(client) == 0


def test_results_of_commands_are_not_counted(bus: Bus, receiver: Client) -> None:
    receiver.info(receiver.id, free=False)
    assert queued(receiver) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40).map(lambda n: n * 8), st.integers(0, 9)),
        max_size=60,
    ),
    st.data(),
)
def test_no_user_ever_has_more_than_its_share(
    charges: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    quota = Quota(1024)
    people = [User(n) for n in range(4)]
    held: list[tuple[User, int, int]] = []
    for who, size, n_fds in charges:
        user = people[who]
        mine = [h for h in held if h[0] is user]
        total = sum(h[1] for h in held)
        share = (512 - total + sum(h[1] for h in mine)) // 3
        if total > 512 or sum(h[1] for h in mine) + size > share:
            expected = ENOBUFS
        elif sum(h[2] for h in mine) + n_fds > 16:
            expected = EMFILE
        else:
            expected = 0
        if expected:
            with fails(expected):
                quota.charge(user, size, n_fds)
        else:
            quota.charge(user, size, n_fds)
            held.append((user, size, n_fds))
        if held and data.draw(st.booleans()):
            quota.discharge(*held.pop(data.draw(st.integers(0, len(held) - 1))))
        assert quota.queued == sum(h[1] for h in held)
    for charge in held:
        quota.discharge(*charge)
    assert not quota.accounts
    assert quota.queued == 0


def test_signals_to_a_full_receiver_are_dropped_or_counted(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(pool_size=4096)
    client.match()
    sender.signal(client, data=bytes(2000))
    assert client.connection.lost == 0
    sender.broadcast(data=bytes(2000))
    assert client.connection.lost == 1
    with fails(ENOBUFS):
        sender.send(client, data=bytes(2000), flags=MsgFlag.NO_AUTO_START)
