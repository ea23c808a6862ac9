# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata: which items, in which order, gathered when, and told in whose terms."""

import struct
from errno import EINVAL, ENXIO, EPERM

import pytest

from abi_client.building import item, text, u64
from bus.fakes import ALL_CAPABILITIES, HOME_PIDS, HOME_USERS, LAST_CAPABILITY, FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import ATTACH_ALL, AttachFlag, ItemType, NameFlag
from kdbusfs.bus.metadata import PROCESS, Capabilities, PidNamespace, UserNamespace

I, F = ItemType, AttachFlag  # noqa: E741
A, B = "com.example.a", "com.example.b"
PROCESS_ITEMS = [I(0x1000 + n) for n in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
UNSET = 0xFFFFFFFF


def described(string: str = "me") -> bytes:
    return text(I.CONN_DESCRIPTION, string)


# --- which items


def test_all_items_in_their_order(bus: Bus) -> None:
    sender, client = bus.hello(described()), bus.hello(recv=ATTACH_ALL)
    sender.acquire(B)
    sender.acquire(A)
    sender.send(client)
    assert client.recv().types == [
        *PROCESS_ITEMS, I.OWNED_NAME, I.OWNED_NAME, I.CONN_DESCRIPTION, I.TIMESTAMP,
    ]  # fmt: skip


@pytest.mark.parametrize("flag", AttachFlag)
def test_each_flag_stands_for_one_kind(bus: Bus, flag: AttachFlag) -> None:
    sender, client = bus.hello(described()), bus.hello(recv=flag)
    sender.acquire(A)
    sender.send(client)
    assert client.recv().types == [0x1000 + flag.bit_length() - 1]


@pytest.mark.parametrize("send", [0, ATTACH_ALL])
def test_on_messages_the_receivers_mask_alone_decides(bus: Bus, send: int) -> None:
    sender, client = bus.hello(described(), send=send), bus.hello(recv=ATTACH_ALL)
    sender.acquire(A)
    sender.send(client)
    every = [*PROCESS_ITEMS, I.OWNED_NAME, I.CONN_DESCRIPTION, I.TIMESTAMP]
    assert client.recv().types == every


@pytest.mark.parametrize("flag", AttachFlag)
def test_in_info_the_targets_mask_decides_too_and_there_is_no_timestamp(
    bus: Bus, flag: AttachFlag
) -> None:
    target, client = bus.hello(described(), send=flag), bus.hello()
    target.acquire(A)
    wanted = [] if flag is F.TIMESTAMP else [0x1000 + flag.bit_length() - 1]
    assert client.info(target.id).types == wanted
    assert client.info(target.id, kinds=ATTACH_ALL & ~flag).types == []


@pytest.mark.parametrize("recv", [0, ATTACH_ALL])
def test_notifications_have_a_timestamp_and_nothing_else(bus: Bus, recv: int) -> None:
    client = bus.hello(recv=recv)
    client.match()
    bus.hello()
    assert client.recv().types == [I.ID_ADD, I.TIMESTAMP]


def test_what_does_not_exist_is_left_out(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(recv=ATTACH_ALL)
    metadata = sender.peer.metadata
    metadata.exe = metadata.cmdline = metadata.cgroup = metadata.seclabel = metadata.audit = None
    sender.send(client)
    assert client.recv().types == [
        I.CREDS, I.PIDS, I.AUXGROUPS, I.TID_COMM, I.PID_COMM, I.CAPS, I.TIMESTAMP,
    ]  # fmt: skip


# --- what is in them


def test_what_the_items_hold(bus: Bus) -> None:
    peer = FakePeer(1000, 100, groups=frozenset({3, 1, 2}), ipc_owner=True)
    peer.become(euid=1001, egid=101)
    sender, client = bus.hello(described("it-is-I"), peer=peer), bus.hello(recv=ATTACH_ALL)
    sender.send(client)
    got = client.recv()
    assert got.numbers(I.CREDS) == (1000, 1001, 1000, 1001, 100, 101, 100, 101)
    assert got.numbers(I.PIDS) == (peer.tid, peer.tid, 1)
    assert got.numbers(I.AUXGROUPS) == (1, 2, 3)
    assert got.one(I.TID_COMM) == b"thread\0"
    assert got.one(I.PID_COMM) == b"process\0"
    assert got.one(I.EXE) == b"/usr/bin/fake\0"
    assert got.one(I.CMDLINE) == b"fake\0"
    assert got.one(I.CGROUP) == b"/fake\0"
    assert got.one(I.SECLABEL) == b"unconfined\0"
    assert got.one(I.AUDIT) == struct.pack("=II", 7, 1000)
    assert got.one(I.CONN_DESCRIPTION) == b"it-is-I\0"
    caps = struct.unpack("=I8I", got.one(I.CAPS))
    low, high = ALL_CAPABILITIES & UNSET, ALL_CAPABILITIES >> 32
    assert caps == (LAST_CAPABILITY, 0, 0, 1 << 15, 0, 1 << 15, 0, low, high)


def test_no_groups_are_an_empty_item(bus: Bus) -> None:
    client = bus.hello(recv=F.AUXGROUPS)
    client.send(client)
    got = client.recv()
    assert got.items == [(I.AUXGROUPS, b"")]
    assert got.size == 80


def test_owned_names_come_in_order_of_acquisition_and_queued_ones_do_not(bus: Bus) -> None:
    owner, sender, client = bus.hello(), bus.hello(), bus.hello(recv=F.NAMES)
    owner.acquire("com.example.taken")
    for string in (B, A):
        sender.acquire(string, NameFlag.QUEUE)
    sender.acquire("com.example.taken", NameFlag.QUEUE)
    sender.send(client)
    flags = u64(NameFlag.QUEUE | NameFlag.PRIMARY)
    expected = [flags + n.encode() + b"\0" for n in (B, A)]
    assert client.recv().all(I.OWNED_NAME) == expected
    sender.release(B)
    sender.send(client)
    assert client.recv().all(I.OWNED_NAME) == expected[1:]


def test_timestamps_count_the_messages_of_the_bus(bus: Bus) -> None:
    client = bus.hello(recv=F.TIMESTAMP)
    first = bus.core._seqnum
    clock = bus.domain.clock
    client.send(client)
    stamp = (first + 1, clock.now, clock.now + clock.offset)
    bus.domain.advance(1000)
    assert client.recv().numbers(I.TIMESTAMP) == stamp, "taken at delivery, not at RECV"
    with fails(ENXIO):
        client.send(12345)
    client.broadcast()
    with fails(EINVAL):
        client.send(client, payload_type=0)
    client.send(client)
    assert client.recv().numbers(I.TIMESTAMP)[:2] == (first + 4, clock.now)


def test_all_copies_of_a_message_have_one_timestamp(bus: Bus) -> None:
    sender, monitor = bus.hello(), bus.monitor(recv=F.TIMESTAMP)
    clients = [bus.hello(recv=F.TIMESTAMP) for _ in range(3)]
    for client in clients:
        client.match()
    monitor.inbox()
    bus.domain.clock.tick = 1
    sender.broadcast()
    stamps = {c.recv().numbers(I.TIMESTAMP) for c in (monitor, *clients)}
    assert len(stamps) == 1


# --- when it is gathered


def test_nothing_is_gathered_that_nobody_asks_for(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(recv=F.TIMESTAMP | F.NAMES | F.CONN_DESCRIPTION)
    sender.peer.gathered.clear()
    sender.send(client)
    sender.broadcast()
    assert not sender.peer.gathered


def test_each_kind_is_gathered_once_for_all_receivers(bus: Bus) -> None:
    sender = bus.hello()
    masks = [0, F.CREDS, F.CREDS | F.EXE, F.EXE, ATTACH_ALL & ~F.CMDLINE]
    clients = [bus.hello(recv=m) for m in masks]
    for client in clients:
        client.match()
    sender.peer.gathered.clear()
    sender.broadcast()
    assert set(sender.peer.gathered.values()) == {1}
    assert sum(sender.peer.gathered) == PROCESS & ~F.CMDLINE
    for client, wanted in zip(clients, masks, strict=True):
        told = sum(1 << t - 0x1000 for t in client.recv().types[1:])
        assert told == wanted & ~(F.NAMES | F.CONN_DESCRIPTION)


def test_messages_tell_of_who_sends_and_info_of_who_said_hello(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(recv=F.PIDS | F.TID_COMM)
    greeter, child = sender.peer, FakePeer(1000)
    child.metadata.tid_comm = b"child"
    with sender.used_by(child):
        sender.send(client)
    got = client.recv()
    assert got.one(I.TID_COMM) == b"child\0"
    assert got.numbers(I.PIDS) == (child.tid, child.tid, 1)
    greeter.metadata.tid_comm = b"renamed"
    info = client.info(sender.id)
    assert info.one(I.TID_COMM) == b"thread\0", "frozen at HELLO"
    assert info.numbers(I.PIDS) == (greeter.tid, greeter.tid, 1)


# --- in whose terms: user namespaces

INNER = UserNamespace(2, HOME_USERS, 1000, ((0, 1000, 1),), ((0, 2000, 2),))
"""Made by uid 1000; its uid 0 is 1000, its gids 0 and 1 are 2000 and 2001."""
SIBLING = UserNamespace(3, HOME_USERS, 5)
DEEP = UserNamespace(4, INNER, 1000, ((0, 1000, 1),), ())


def receiver(bus: Bus, users: UserNamespace = HOME_USERS, **options: int) -> Client:
    return bus.hello(peer=FakePeer(1000, user_namespace=users), recv=ATTACH_ALL, **options)


def test_ids_are_told_as_the_receivers_user_namespace_has_them(bus: Bus) -> None:
    client = receiver(bus, INNER)
    peer = FakePeer(1000, 2001, groups=frozenset({2000, 7}), ipc_owner=True).become(euid=5)
    peer.metadata.audit = (3, 1000)
    bus.hello(peer=peer).send(client)
    got = client.recv()
    assert got.numbers(I.CREDS) == (0, 65534, 0, 65534, 1, 1, 1, 1)
    assert sorted(got.numbers(I.AUXGROUPS)) == [0, 65534]
    assert got.one(I.AUDIT) == struct.pack("=II", 3, 0)


@pytest.mark.parametrize(("login", "told"), [(7, UNSET), (UNSET, UNSET), (1000, 0)])
def test_a_login_uid_that_does_not_map_is_unset(bus: Bus, login: int, told: int) -> None:
    client, sender = receiver(bus, INNER), bus.hello()
    sender.peer.metadata.audit = (3, login)
    sender.send(client)
    assert client.recv().one(I.AUDIT) == struct.pack("=II", 3, told)


@pytest.mark.parametrize(
    ("own", "euid", "reader", "told"),
    [
        (HOME_USERS, 1000, HOME_USERS, "verbatim"),
        (INNER, 1000, INNER, "verbatim"),
        (HOME_USERS, 5, INNER, "verbatim"),
        (HOME_USERS, 1000, INNER, "full"),
        (HOME_USERS, 1000, DEEP, "full"),
        (INNER, 1000, DEEP, "full"),
        (HOME_USERS, 5, SIBLING, "full"),
        (INNER, 1000, HOME_USERS, "none"),
        (INNER, 1000, SIBLING, "none"),
        (DEEP, 1000, INNER, "none"),
    ],
)
def test_capabilities_are_told_as_they_reach_into_the_receivers_namespace(
    bus: Bus, own: UserNamespace, euid: int, reader: UserNamespace, told: str
) -> None:
    client = receiver(bus, reader)
    peer = FakePeer(1000, user_namespace=own, ipc_owner=True).become(euid=euid)
    peer.metadata.caps = Capabilities(LAST_CAPABILITY, 1, 2, 3, 4)
    bus.hello(peer=peer).send(client)
    sets = struct.unpack("=I4Q", client.recv().one(I.CAPS))
    full = ALL_CAPABILITIES
    expected = {"verbatim": (1, 2, 3, 4), "full": (0, full, full, full), "none": (0, 0, 0, 0)}
    assert sets == (LAST_CAPABILITY, *expected[told])


# --- PID namespaces

CHILD, OTHER = PidNamespace((1, 2)), PidNamespace((1, 3))
GRANDCHILD = PidNamespace((1, 2, 4))


@pytest.mark.parametrize(
    ("home", "numbers", "reader", "told"),
    [
        (HOME_PIDS, ((50,), (51,), (1,)), HOME_PIDS, (50, 51, 1)),
        (CHILD, ((50, 5), (51, 6), (40,)), HOME_PIDS, (50, 51, 40)),
        (CHILD, ((50, 5), (51, 6), (40,)), CHILD, (5, 6, 0)),
        (CHILD, ((50, 5), (51, 6), (40, 1)), OTHER, (0, 0, 0)),
        (HOME_PIDS, ((50,), (51,), (1,)), CHILD, (0, 0, 0)),
        (GRANDCHILD, ((50, 5, 1), (50, 5, 1), (40, 4)), CHILD, (5, 5, 4)),
        (CHILD, ((50, 5), (51, 6), (40, 1)), GRANDCHILD, (0, 0, 0)),
    ],
)
def test_pids_are_told_as_the_receivers_pid_namespace_has_them(
    bus: Bus,
    home: PidNamespace,
    numbers: tuple[tuple[int, ...], ...],
    reader: PidNamespace,
    told: tuple[int, ...],
) -> None:
    listener = FakePeer(1000)
    listener.pids = reader
    client = bus.hello(peer=listener, recv=F.PIDS)
    sender = bus.hello()
    sender.peer.pids, sender.peer.metadata.pids = home, numbers
    sender.send(client)
    assert client.recv().numbers(I.PIDS) == told


@pytest.mark.parametrize("send", [0, F.TID_COMM | F.CAPS, ATTACH_ALL])
def test_across_pid_namespaces_the_senders_mask_counts(bus: Bus, send: int) -> None:
    listener = FakePeer(1000)
    listener.pids = CHILD
    client = bus.hello(peer=listener, recv=ATTACH_ALL)
    sender = bus.hello(described(), send=send)
    sender.send(client)
    implicit = F.CREDS | F.PIDS | F.AUXGROUPS | F.CONN_DESCRIPTION | F.TIMESTAMP
    told = sum(1 << t - 0x1000 for t in client.recv().types)
    assert told == (send | implicit) & ~F.NAMES


def test_one_message_is_told_to_each_in_its_own_terms(bus: Bus) -> None:
    listener = FakePeer(1000)
    listener.pids = CHILD
    inside, outside = bus.hello(peer=listener, recv=F.PIDS), bus.hello(recv=F.PIDS)
    for client in (inside, outside):
        client.match()
    sender = bus.hello()
    for client in (inside, outside):
        client.inbox()
    sender.broadcast()
    assert inside.recv().numbers(I.PIDS) == (0, 0, 0)
    assert outside.recv().numbers(I.PIDS) == (sender.peer.tid, sender.peer.tid, 1)


# --- a /proc that hides processes


@pytest.mark.parametrize(
    ("egid", "told"),
    [(1000, [I.CREDS, I.PIDS, I.TIMESTAMP]), (77, [I.CREDS, I.PIDS, I.TID_COMM, I.TIMESTAMP])],
)
def test_where_proc_hides_processes_the_senders_mask_counts(
    bus: Bus, egid: int, told: list[int]
) -> None:
    hidden = PidNamespace((1,), hidepid_group=77)
    listener = FakePeer(1000, egid)
    listener.pids = hidden
    client = bus.hello(peer=listener, recv=F.CREDS | F.PIDS | F.TID_COMM | F.TIMESTAMP)
    sender = bus.hello(send=0)
    sender.peer.pids = hidden
    sender.send(client)
    assert client.recv().types == told
    with sender.used_by(listener):
        sender.send(client)
    assert I.TID_COMM in client.recv().types, "one's own thread is never hidden"


# --- the executable


def test_the_executable_is_told_within_one_root_only(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello(recv=F.EXE)
    sender.send(client)
    sender.peer.root_directory = "/elsewhere"
    sender.send(client)
    assert [m.types for m in client.inbox()] == [[I.EXE], []]


def test_in_info_the_root_is_that_of_who_asks(bus: Bus) -> None:
    target, client = bus.hello(), bus.hello()
    assert client.info(target.id, kinds=F.EXE).types == [I.EXE]
    stranger = FakePeer(1000)
    stranger.root_directory = "/elsewhere"
    with client.used_by(stranger):
        assert client.info(target.id, kinds=F.EXE).types == []


# --- faked credentials

CREDS = item(I.CREDS, u64(*range(10, 18)))
PIDS = item(I.PIDS, u64(21, 22, 0))
SECLABEL = text(I.SECLABEL, "fake-label")


def faker(bus: Bus, *claims: bytes, users: UserNamespace = HOME_USERS) -> Client:
    peer = FakePeer(1000, user_namespace=users)
    peer.processes = {21: (21,), 22: (22,)}
    return bus.hello(*claims, described(), peer=peer)


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ((CREDS,), [I.CREDS]),
        ((PIDS,), [I.PIDS]),
        ((SECLABEL,), [I.SECLABEL]),
        ((SECLABEL, PIDS, CREDS), [I.CREDS, I.PIDS, I.SECLABEL]),
    ],
)
def test_info_shows_the_claims_only(bus: Bus, claims: tuple[bytes, ...], told: list[int]) -> None:
    liar = faker(bus, *claims)
    liar.acquire(A)
    info = bus.hello().info(liar.id)
    assert info.types == [*told, I.OWNED_NAME, I.CONN_DESCRIPTION]


def test_claims_are_shown_as_made(bus: Bus) -> None:
    info = bus.hello().info(faker(bus, CREDS, PIDS, SECLABEL).id)
    assert info.numbers(I.CREDS) == tuple(range(10, 18))
    assert info.numbers(I.PIDS) == (21, 22, 0)
    assert info.one(I.SECLABEL) == b"fake-label\0"


def test_messages_of_a_faker_have_no_process_items(bus: Bus) -> None:
    liar, client = faker(bus, SECLABEL), bus.hello(recv=ATTACH_ALL)
    liar.acquire(A)
    liar.peer.gathered.clear()
    liar.send(client)
    assert client.recv().types == [I.OWNED_NAME, I.CONN_DESCRIPTION, I.TIMESTAMP]
    assert not liar.peer.gathered


def test_claims_do_not_change_policy(bus: Bus) -> None:
    liar = bus.hello(item(I.CREDS, u64(*[2000] * 8)), peer=FakePeer(1000, ipc_owner=True))
    stranger = bus.hello(peer=FakePeer(2000))
    with fails(EPERM):
        stranger.send(liar)
    liar.send(stranger)


@pytest.mark.parametrize("value", [UNSET, (1 << 64) - 1, 1 << 32 | UNSET, 99])
def test_claimed_ids_are_those_of_the_callers_user_namespace(bus: Bus, value: int) -> None:
    inner = UserNamespace(2, HOME_USERS, 1000, ((0, 5000, 9),), ((0, 6000, 9),))
    claim = item(I.CREDS, u64(1, value, 2, 3, 4, 5, 6, 7))
    if value == UNSET:
        info = bus.hello().info(faker(bus, claim, users=inner).id)
        assert info.numbers(I.CREDS) == (5001, UNSET, 5002, 5003, 6004, 6005, 6006, 6007)
    else:
        with fails(EINVAL):
            faker(bus, claim, users=inner)


def test_claimed_ids_have_32_bits(bus: Bus) -> None:
    claim = item(I.CREDS, u64(*[7 << 32 | 5] * 8))
    assert bus.hello().info(faker(bus, claim).id).numbers(I.CREDS) == (5,) * 8


def test_unset_claims_are_told_unset_everywhere(bus: Bus) -> None:
    liar = faker(bus, item(I.CREDS, u64(UNSET, *[1000] * 3, UNSET, *[7] * 3)))
    info = receiver(bus, INNER).info(liar.id)
    assert info.numbers(I.CREDS) == (UNSET, 0, 0, 0, UNSET, 65534, 65534, 65534)


@pytest.mark.parametrize("pids", [(1, 21, 21), (21, 1, 21), (21, 21, 1), (1 << 32, 0, 0)])
def test_claimed_processes_must_exist(bus: Bus, pids: tuple[int, ...]) -> None:
    with fails(EINVAL):
        faker(bus, item(I.PIDS, u64(*pids)))
