# SPDX-License-Identifier: LGPL-2.1-or-later
"""SEND: how a message is examined, what becomes of its descriptors, where it goes."""

from errno import (
    E2BIG,
    EADDRNOTAVAIL,
    EBADF,
    EBADMSG,
    ECOMM,
    EDESTADDRREQ,
    EDOM,
    EFAULT,
    EINVAL,
    EMEDIUMTYPE,
    EMFILE,
    EMLINK,
    EMSGSIZE,
    ENOBUFS,
    ENOTUNIQ,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    EREMCHG,
    ESRCH,
    ETXTBSY,
    EXFULL,
)
from typing import Any

import pytest

from abi_client.building import (
    BLOOM_SIZE,
    access,
    bloom,
    fds,
    item,
    mask,
    memfd,
    message,
    send_command,
    text,
    u64,
    vec,
)
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, fails
from kdbusfs.abi.numbers import (
    ID_ANY,
    Command,
    HelloFlag,
    ItemType,
    MsgFlag,
    NameFlag,
    PolicyAccess,
    PolicyType,
)

I = ItemType  # noqa: E741
A = "com.example.a"
EXPECT_REPLY, NO_AUTO_START, SIGNAL = MsgFlag
MIB = 1 << 20


def cancel_fd(fd: int) -> bytes:
    return item(I.CANCEL_FD, fd.to_bytes(4, "little", signed=True))


def dst_name(string: str) -> bytes:
    return text(I.DST_NAME, string)


# --- where the message lies


@pytest.mark.parametrize(
    ("shift", "size", "errno"),
    [(4, 64, EFAULT), (0, 63, EINVAL), (0, 32769, EMSGSIZE), (0, 72, EFAULT), (0, 64, 0)],
)
def test_a_message_is_read_as_a_command_is(bus: Bus, shift: int, size: int, errno: int) -> None:
    client = bus.hello()
    given = bytearray(message(client.id))
    given[:8] = u64(size)
    address = client.peer.put(bytes(shift) + given) + shift
    command = client.start(Command.SEND, client.peer.put(send_command(address)))
    assert command.error == errno


@pytest.mark.parametrize("address", [0, 8, 1 << 47])
@pytest.mark.also_mounted
def test_a_message_that_is_nowhere_is_a_fault(bus: Bus, address: int) -> None:
    client = bus.hello()
    with fails(EFAULT):
        client.ioctl(Command.SEND, send_command(address))


def test_a_message_may_be_longer_than_is_read_at_once(bus: Bus) -> None:
    client = bus.hello()
    data = client.peer.put(bytes(range(200)))
    client.send(client, *(vec(data + n, 1) for n in range(200)))
    assert client.recv().data == bytes(range(200))


@pytest.mark.also_mounted
def test_a_message_of_just_32_kib_is_sent(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, *[vec(0, 1)] * 1022)
    assert client.recv().size == 32768
    with fails(EMSGSIZE):
        client.send(client, *[vec(0, 1)] * 1023)


# --- the order of checks: each row fails by its own check, although later ones would fail as well

TOO_LATE = 1 << 40
"""An id nobody has: looked up only when all else is fine."""
CHECKS: list[tuple[str, dict[str, Any], list[bytes], int]] = [
    ("src_id of another", {"src_id": 77, "payload_type": 0}, [], EINVAL),
    ("payload_type of the kernel", {"payload_type": 0, "dst_id": ID_ANY}, [], EINVAL),
    ("broadcast, no signal", {"dst_id": ID_ANY, "timeout": 1}, [], EBADMSG),
    ("broadcast reply", {"dst_id": ID_ANY, "flags": SIGNAL, "timeout": 1}, [], ENOTUNIQ),
    ("request without deadline", {"flags": EXPECT_REPLY | SIGNAL}, [], EINVAL),
    ("request that is a signal", {"flags": EXPECT_REPLY | SIGNAL, "timeout": 1}, [], ENOTUNIQ),
    ("reply that is a signal", {"flags": SIGNAL, "timeout": 1}, [vec(1, 1 << 40)], EINVAL),
    ("big vec", {}, [vec(0, 2 * MIB + 1), fds(*range(17))], EMSGSIZE),
    ("vec outside", {}, [vec((1 << 64) - 8, 64), fds(*range(17))], EFAULT),
    ("memfd overflows", {}, [memfd(0, 16, (1 << 64) - 16), fds(*range(17))], EMSGSIZE),
    ("17 memfds", {}, [*[memfd(0, 16)] * 17, fds(*range(17))], E2BIG),
    ("17 fds", {}, [fds(*range(17)), dst_name("nodot")], EMFILE),
    ("odd filter", {}, [item(I.BLOOM_FILTER, bytes(BLOOM_SIZE + 7)), dst_name("x")], EFAULT),
    ("wrong filter", {}, [item(I.BLOOM_FILTER, bytes(BLOOM_SIZE)), dst_name("x")], EDOM),
    ("empty filter", {}, [item(I.BLOOM_FILTER, bytes(8)), dst_name("x")], EDOM),
    ("bad name", {"dst_id": ID_ANY, "flags": SIGNAL}, [dst_name("nodot")], EINVAL),
    ("wildcard", {}, [dst_name("com.example.*")], EINVAL),
    ("name and broadcast", {"dst_id": ID_ANY, "flags": SIGNAL}, [dst_name(A)], EBADMSG),
    ("negotiate item", {"flags": SIGNAL}, [item(I.NEGOTIATE)], EINVAL),
    ("signal without filter", {"flags": SIGNAL}, [], EBADMSG),
    ("filter without signal", {}, [bloom()], EBADMSG),
    ("no destination", {"dst_id": 0}, [fds(99)], EDESTADDRREQ),
    ("broadcast of fds", {"dst_id": ID_ANY, "flags": SIGNAL}, [bloom(), fds(99)], ENOTUNIQ),
    ("bad fd", {}, [fds(99)], EBADF),
    ("bad memfd", {}, [memfd(99, 8)], EBADF),
    ("nobody", {}, [], ENXIO),
]


@pytest.mark.parametrize(
    ("fields", "items", "errno"), [row[1:] for row in CHECKS], ids=[row[0] for row in CHECKS]
)
@pytest.mark.also_mounted
def test_a_message_is_examined_in_order(
    bus: Bus, fields: dict[str, Any], items: list[bytes], errno: int
) -> None:
    client = bus.hello()
    client.match()
    to, fields = fields.get("dst_id", TOO_LATE), {k: v for k, v in fields.items() if k != "dst_id"}
    with fails(errno):
        client.send(to, *items, **fields)
    assert client.inbox() == []


@pytest.mark.parametrize(
    ("flags", "timeout", "errno"), [(0, 0, EINVAL), (0, 5, EINVAL), (EXPECT_REPLY, 0, EINVAL)]
)
def test_a_synchronous_call_expects_a_reply(bus: Bus, flags: int, timeout: int, errno: int) -> None:
    client = bus.hello()
    assert client.call(client, flags=flags, timeout=timeout).error == errno


def test_a_vec_may_have_2_mib_each(bus: Bus) -> None:
    client, target = bus.hello(), bus.hello(pool_size=32 * MIB)
    big = client.peer.map(2 * MIB)
    client.send(target, vec(big, 2 * MIB), vec(big, 2 * MIB))
    assert target.recv().offsets == [(128, 2 * MIB), (128 + 2 * MIB, 2 * MIB)]


@pytest.mark.parametrize("src_id", [0, None])
@pytest.mark.also_mounted
def test_src_id_is_set_to_the_senders(bus: Bus, src_id: int | None) -> None:
    client = bus.hello()
    client.send(client, src_id=client.id if src_id is None else src_id)
    assert client.recv().src_id == client.id


@pytest.mark.parametrize("payload_type", [1, 0x4442757344427573, (1 << 64) - 1])
@pytest.mark.also_mounted
def test_any_payload_type_but_0_is_sent(bus: Bus, payload_type: int) -> None:
    client = bus.hello()
    client.send(client, payload_type=payload_type)
    assert client.recv().payload_type == payload_type


def test_the_senders_struct_is_not_modified(bus: Bus) -> None:
    client = bus.hello()
    given = message(client.id, vec(client.peer.put(b"data"), 4), vec(0, 8))
    address = client.peer.put(given)
    client.ioctl(Command.SEND, send_command(address))
    assert client.peer.read(address, len(given)) == given


def test_memory_is_read_when_the_message_is_sent(bus: Bus) -> None:
    client = bus.hello()
    data = client.peer.put(b"before")
    client.send(client, vec(data, 6))
    client.peer.write(data, b"after!")
    assert client.recv().data == b"before"


def test_unmapped_payload_is_a_fault_for_unicast(bus: Bus) -> None:
    client = bus.hello()
    with fails(EFAULT):
        client.send(client, vec(client.peer.put(b"four"), 5))
    assert client.inbox() == []
    client.send(client)


def test_unmapped_payload_is_a_loss_for_broadcasts(bus: Bus) -> None:
    client, other, deaf = bus.hello(), bus.hello(), bus.hello()
    client.match()
    other.match()
    client.broadcast(vec(8, 5))
    assert [c.lost() for c in (client, other, deaf)] == [1, 1, 0]


def test_a_broadcast_that_nobody_hears_reads_no_payload(bus: Bus) -> None:
    client = bus.hello()
    client.broadcast(vec(8, 5))
    assert client.lost() == 0


@pytest.mark.also_mounted
def test_fields_are_delivered_as_sent(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, cookie=(1 << 64) - 1, priority=-(1 << 63), flags=NO_AUTO_START)
    got = client.recv()
    assert (got.cookie, got.priority, got.flags) == ((1 << 64) - 1, -(1 << 63), NO_AUTO_START)
    client.request(client, cookie=0, timeout=2_000_000_000)
    assert client.recv().timeout_ns == 2_000_000_000


# --- the cancel descriptor


@pytest.mark.parametrize(
    ("file", "errno"),
    [
        (None, EBADF),
        (FakeFile(path=True), EBADF),
        (FakeFile(pollable=False), EINVAL),
        (FakeFile(), 0),
        (FakeFile(readable=True), 0),
    ],
)
def test_the_cancel_descriptor_is_checked_for_asynchronous_sends_too(
    bus: Bus, file: FakeFile | None, errno: int
) -> None:
    client = bus.hello()
    fd = client.peer.open(file) if file else 99
    if errno:
        with fails(errno):
            client.send(client, payload_type=0, command_items=(cancel_fd(fd),))
    else:
        client.send(client, command_items=(cancel_fd(fd),))


# --- descriptors

FDS_CASES = [
    (None, EBADF),
    (FakeFile(), 0),
    (FakeFile(path=True), 0),
    (FakeFile(path=True, holds_files=True), 0),
    (FakeFile(holds_files=True), EOPNOTSUPP),
]
MEMFD_CASES = [
    (None, EBADF),
    (FakeFile(path=True), EBADF),
    (FakeFile(), EMEDIUMTYPE),
    (FakeFile(size=64, sealed=False), ETXTBSY),
    (FakeFile(size=63), EFAULT),
    (FakeFile(size=64), 0),
    (FakeFile(size=100), 0),
]


@pytest.mark.parametrize(("file", "errno"), FDS_CASES)
def test_which_files_may_be_sent(bus: Bus, file: FakeFile | None, errno: int) -> None:
    client = bus.hello(flags=HelloFlag.ACCEPT_FD)
    fd = client.peer.open(file) if file else 99
    if errno:
        with fails(errno):
            client.send(client, fds(fd))
        assert client.inbox() == []
    else:
        client.send(client, fds(fd))
        (number,) = client.recv().fds
        assert client.peer.files[number] is file


@pytest.mark.parametrize(("file", "errno"), MEMFD_CASES)
def test_which_memfds_may_be_sent(bus: Bus, file: FakeFile | None, errno: int) -> None:
    client = bus.hello()
    fd = client.peer.open(file) if file else 99
    if errno:
        with fails(errno):
            client.send(client, memfd(fd, 48, 16))
        assert client.inbox() == []
    else:
        client.send(client, memfd(fd, 48, 16))
        (number,) = client.recv().memfd_numbers
        assert client.peer.files[number] is file


@pytest.mark.also_mounted
def test_a_negative_descriptor_is_not_open(bus: Bus) -> None:
    client = bus.hello(flags=HelloFlag.ACCEPT_FD)
    with fails(EBADF):
        client.send(client, fds(-1))


def test_descriptors_are_resolved_before_anything_is_looked_up(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(2000))
    for items, errno in (((fds(99),), EBADF), ((memfd(stranger.peer.open(FakeFile()), 8),),
                                               EMEDIUMTYPE)):  # fmt: skip
        for to in (TOO_LATE, A, bus.hello()):
            with fails(errno):
                stranger.send(to, *items)


def test_descriptors_need_a_receiver_that_accepts_them(bus: Bus) -> None:
    client, target = bus.hello(flags=HelloFlag.ACCEPT_FD), bus.hello()
    fd = client.peer.open(FakeFile())
    with fails(ECOMM):
        client.send(target, fds(fd))
    client.send(target, fds())
    client.send(target, memfd(client.peer.open(FakeFile(size=8)), 8))
    assert [m.types for m in target.inbox()] == [[I.FDS], [I.PAYLOAD_MEMFD]]


def test_16_fds_and_16_memfds_fit_into_a_message(bus: Bus) -> None:
    client = bus.hello(flags=HelloFlag.ACCEPT_FD)
    numbers = [client.peer.open(FakeFile()) for _ in range(16)]
    big = client.peer.open(FakeFile(size=64))
    client.send(client, fds(*numbers), *[memfd(big, 64)] * 16)
    got = client.recv()
    files = client.peer.files
    assert [files[n] for n in got.fds] == [files[n] for n in numbers]
    assert [files[n] for n in got.memfd_numbers] == [files[big]] * 16


# --- finding the destination


def test_an_id_names_an_ordinary_connection(bus: Bus) -> None:
    client = bus.hello()
    for other in (bus.activator(A), bus.holder("com.example.b"), bus.monitor()):
        with fails(ENXIO):
            client.send(other)
    gone = bus.hello()
    gone.close()
    with fails(ENXIO):
        client.send(gone)


def test_nobody_who_may_not_talk_learns_which_ids_exist_among_special_ones(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(2000))
    with fails(ENXIO):
        stranger.send(bus.activator(A))
    with fails(EPERM):
        stranger.send(A)
    with fails(EPERM):
        stranger.send(bus.hello())


@pytest.mark.also_mounted
def test_a_name_stands_for_its_owner(bus: Bus) -> None:
    client, owner = bus.hello(), bus.hello()
    with fails(ESRCH):
        client.send(A)
    owner.acquire(A)
    client.send(A, cookie=1)
    client.send(A, dst_id=owner.id, cookie=2)
    with fails(EREMCHG):
        client.send(A, dst_id=client.id)
    with fails(EREMCHG):
        client.send(A, dst_id=12345)
    with fails(ESRCH):
        client.send("com.example.b", dst_id=owner.id)
    assert [(m.cookie, m.dst_id) for m in owner.inbox()] == [(1, 0), (2, owner.id)]


@pytest.mark.also_mounted
def test_a_name_stands_for_its_activator_unless_no_auto_start(bus: Bus) -> None:
    activator, client = bus.activator(A), bus.hello()
    client.send(A)
    client.send(A, dst_id=activator.id)
    with fails(EADDRNOTAVAIL):
        client.send(A, flags=NO_AUTO_START)
    assert len(activator.inbox()) == 2
    owner = bus.hello()
    owner.acquire(A)
    client.send(A, flags=NO_AUTO_START)
    assert len(owner.inbox()) == 1


@pytest.mark.also_mounted
def test_those_who_queue_for_a_name_are_not_meant_by_it(bus: Bus) -> None:
    owner, queued = bus.hello(), bus.hello()
    owner.acquire(A)
    queued.acquire(A, NameFlag.QUEUE)
    queued.send(A)
    assert (len(owner.inbox()), len(queued.inbox())) == (1, 0)


# --- unicast


@pytest.mark.also_mounted
def test_a_message_arrives_once_in_order(bus: Bus) -> None:
    one, two, target = bus.hello(), bus.hello(), bus.hello()
    for n in range(10):
        (one if n % 3 else two).send(target, cookie=n)
    assert target.cookies() == list(range(10))


def test_policy_is_asked_before_the_request_is_counted(bus: Bus) -> None:
    stranger, monitor = bus.hello(peer=FakePeer(2000)), bus.monitor()
    with fails(EPERM):
        stranger.request(bus.hello())
    assert stranger.connection.n_requests == 0
    assert not [m for m in monitor.inbox() if m.src_id]


def test_monitors_get_their_copy_even_if_the_destination_does_not(bus: Bus) -> None:
    client, target = bus.hello(), bus.hello(pool_size=4096)
    monitor = bus.monitor()
    with fails(ENOBUFS):
        client.send(target, data=bytes(4096))
    fd = client.peer.open(FakeFile())
    with fails(ECOMM):
        client.send(target, fds(fd))
    assert [len(m.raw) for m in monitor.inbox()] == [64 + 32 + 4096, 64 + 24]


@pytest.mark.also_mounted
def test_monitors_get_no_copy_of_a_request_too_many(bus: Bus) -> None:
    client, target = bus.hello(), bus.hello()
    for n in range(128):
        client.request(target, cookie=n + 1)
    monitor = bus.monitor()
    with fails(EMLINK):
        client.request(target, cookie=200)
    assert monitor.inbox() == []


def test_the_order_of_refusals_at_delivery(bus: Bus) -> None:
    client = bus.hello()
    small = bus.hello(pool_size=4096)
    fd = client.peer.open(FakeFile())
    with fails(ECOMM):
        client.send(small, fds(fd), data=bytes(4096))
    takes = bus.hello(pool_size=1 << 14, flags=HelloFlag.ACCEPT_FD)
    with fails(ENOBUFS):
        client.send(takes, fds(fd, *[fd] * 15), data=bytes(1 << 14))
    client.send(takes, fds(*[fd] * 16))
    with fails(EMFILE):
        client.send(takes, fds(fd), vec(8, 8))
    full = bus.hello(pool_size=4096)
    with fails(EXFULL):
        while True:
            full.info(full.id, kinds=0, free=False)
    with fails(EXFULL):
        client.send(full, vec(8, 8))


# --- unicast signals


def test_a_unicast_signal_needs_a_match_and_the_right_of_its_receiver_to_talk(bus: Bus) -> None:
    sender, target, stranger = bus.hello(), bus.hello(), bus.hello(peer=FakePeer(2000))
    monitor = bus.monitor()
    sender.signal(target)
    assert target.inbox() == []
    target.match(mask([]))
    sender.signal(target, cookie=2)
    stranger.match(mask([]))
    sender.signal(stranger, cookie=3)
    assert target.cookies() == [2]
    assert stranger.inbox() == [], "the stranger may not talk to the sender"
    stranger.signal(target, cookie=4)
    assert target.cookies() == [4], "nor needs the sender be allowed to talk"
    assert [m.cookie for m in monitor.inbox()] == [1, 2, 3, 4]


def test_a_unicast_signal_that_can_not_be_queued_is_dropped_in_silence(bus: Bus) -> None:
    sender, target = bus.hello(), bus.hello(pool_size=4096)
    target.match()
    sender.signal(target, data=bytes(4096))
    sender.signal(target, vec(8, 8))
    sender.signal(target, fds(sender.peer.open(FakeFile())))
    assert target.inbox() == []
    assert target.lost() == 0
    with fails(ENXIO):
        sender.signal(12345)
    with fails(ESRCH):
        sender.signal(A)


# --- broadcasts


def test_a_broadcast_reaches_whoever_matches_and_may_talk_to_its_sender(bus: Bus) -> None:
    sender, friend, deaf = bus.hello(), bus.hello(), bus.hello()
    stranger = bus.hello(peer=FakePeer(2000))
    for client in (sender, friend, stranger):
        client.match()
    sender.broadcast(cookie=1)
    stranger.broadcast(cookie=2)
    assert sender.cookies() == [1, 2], "the sender is a receiver too, and an owner hears all"
    assert friend.cookies() == [1, 2]
    assert deaf.cookies() == []
    assert stranger.cookies() == [2]


def test_the_right_to_hear_may_come_from_a_name_of_the_sender(bus: Bus) -> None:
    sender, stranger = bus.hello(), bus.hello(peer=FakePeer(2000))
    stranger.match()
    bus.holder(A, access(PolicyType.WORLD, PolicyAccess.TALK))
    sender.broadcast(cookie=1)
    sender.acquire(A)
    sender.broadcast(cookie=2)
    assert [m.cookie for m in stranger.inbox() if m.src_id] == [2]


def test_the_right_to_hear_is_that_of_who_opened(bus: Bus) -> None:
    sender = bus.hello(peer=FakePeer(3000))
    stranger = bus.hello(peer=FakePeer(2000))
    stranger.match()
    with stranger.used_by(FakePeer(3000)):
        sender.broadcast()
        assert stranger.inbox() == []


def test_activators_and_holders_hear_no_broadcast_and_every_copy_is_counted(bus: Bus) -> None:
    client, small = bus.hello(), bus.hello(pool_size=4096)
    special = [bus.activator(A), bus.holder("com.example.b")]
    client.match()
    small.match()
    client.broadcast(data=bytes(2000))
    assert len(client.inbox()) == 1
    assert small.lost() == 1
    assert all(not s.connection.queue for s in special)


def test_memfds_are_broadcast_to_each_their_own(bus: Bus) -> None:
    sender, one, two = bus.hello(), bus.hello(), bus.hello()
    for client in (one, two):
        client.match()
    file = FakeFile(size=8)
    sender.broadcast(memfd(sender.peer.open(file), 8))
    for client in (one, two):
        (number,) = client.recv().memfd_numbers
        assert client.peer.files == {number: file}
