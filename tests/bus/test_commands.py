# SPDX-License-Identifier: LGPL-2.1-or-later
"""UPDATE, FREE, CONN_INFO, BUS_CREATOR_INFO, LIST, MATCH_ADD and MATCH_REMOVE."""

import struct
from errno import (
    E2BIG,
    EBADSLT,
    EDOM,
    EEXIST,
    EINVAL,
    EMFILE,
    ENXIO,
    EPERM,
    ESRCH,
    EXFULL,
)

import pytest

from abi_client.building import BLOOM_SIZE, access, command, item, mask, name, text, u64
from bus.fakes import FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    AttachFlag,
    Command,
    ItemType,
    ListFlag,
    MatchFlag,
    NameFlag,
    PolicyAccess,
    PolicyType,
    RecvFlag,
)

I = ItemType  # noqa: E741
A, B = "com.example.a", "com.example.b"
OWN = access(PolicyType.WORLD, PolicyAccess.OWN)
SEE = access(PolicyType.WORLD, PolicyAccess.SEE)
TALK = access(PolicyType.WORLD, PolicyAccess.TALK)


def send_mask(value: int) -> bytes:
    return item(I.ATTACH_FLAGS_SEND, u64(value))


def recv_mask(value: int) -> bytes:
    return item(I.ATTACH_FLAGS_RECV, u64(value))


# --- UPDATE


def test_update_replaces_the_masks_it_is_given(bus: Bus) -> None:
    client = bus.hello(send=1, recv=2)
    client.update(recv_mask(4))
    assert (client.connection.attach_flags_send, client.connection.attach_flags_recv) == (1, 4)
    client.update(send_mask(8), recv_mask((1 << 64) - 1))
    assert (client.connection.attach_flags_send, client.connection.attach_flags_recv) == (
        8,
        ATTACH_ALL,
    )
    client.update()


def test_update_is_all_or_nothing(bus: Bus) -> None:
    client = bus.hello(send=1, recv=2)
    with fails(EINVAL):
        client.update(send_mask(8), recv_mask(1 << 20))
    assert (client.connection.attach_flags_send, client.connection.attach_flags_recv) == (1, 2)


@pytest.mark.parametrize(
    ("items", "errno"),
    [
        ((name(A), name(B)), E2BIG),
        ((name(A), OWN, name(A)), E2BIG),
        ((OWN, name(A)), EINVAL),
        ((OWN,), EINVAL),
        ((name("nodot"),), EINVAL),
        ((name("*"),), EINVAL),
        ((name(A), access(0, 1)), EINVAL),
        ((name(A), access(4, 1)), EINVAL),
        ((name(A), access(3, 3)), EINVAL),
        ((name(A), access(1, 1, 0xFFFFFFFF)), EINVAL),
        ((name(B), OWN), EEXIST),
    ],
)
def test_a_bad_policy_leaves_the_old_one(bus: Bus, items: tuple[bytes, ...], errno: int) -> None:
    bus.holder(B)
    holder = bus.holder("com.example.old", OWN)
    with fails(errno):
        holder.update(*items)
    bus.hello(peer=FakePeer(2000)).acquire("com.example.old")


def test_a_holder_may_change_to_another_name(bus: Bus) -> None:
    holder, stranger = bus.holder(A, OWN), bus.hello(peer=FakePeer(2000))
    holder.update(name("com.example.*"), OWN)
    stranger.acquire(A)
    holder.update(name(B))
    with fails(EPERM):
        stranger.acquire("com.example.c")
    bus.holder(A)


def test_messages_that_are_queued_keep_their_metadata(bus: Bus) -> None:
    client = bus.hello(recv=AttachFlag.TIMESTAMP)
    client.send(client)
    client.update(recv_mask(0))
    client.send(client)
    assert [m.types for m in client.inbox()] == [[I.TIMESTAMP], []]


# --- FREE


def test_only_slices_that_were_told_can_be_freed(bus: Bus) -> None:
    client = bus.hello()
    for offset in (0, 8, 1 << 19, client.pool_size - 8, client.pool_size + 1, (1 << 64) - 1):
        with fails(ENXIO):
            client.free(offset)
    client.send(client, data=bytes(100))
    with fails(ENXIO):
        client.free(0)
    got = client.recv(free=False)
    with fails(ENXIO):
        client.free(got.offset + 8)
    client.free(got.offset)
    with fails(ENXIO):
        client.free(got.offset)


def test_the_offset_of_an_empty_result_can_always_be_freed(bus: Bus) -> None:
    client = bus.hello()
    for _ in range(3):
        client.free(client.pool_size)


def test_freeing_a_peeked_message_does_not_lose_it(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, cookie=9)
    peeked = client.recv(RecvFlag.PEEK, free=False)
    client.free(peeked.offset)
    with fails(ENXIO):
        client.free(peeked.offset)
    assert client.recv(RecvFlag.PEEK).offset == peeked.offset
    got = client.recv()
    assert (got.offset, got.cookie) == (peeked.offset, 9)


# --- CONN_INFO


def test_info_by_id_and_by_name(bus: Bus) -> None:
    client, other = bus.hello(), bus.hello(text(I.CONN_DESCRIPTION, "me"), flags=1)
    other.acquire(A)
    for info in (client.info(other.id), client.info(0, name(A)), client.info(other.id, name(A))):
        assert (info.id, info.flags) == (other.id, 1)
        assert info.one(I.CONN_DESCRIPTION) == b"me\0"
        assert info.one(I.OWNED_NAME) == u64(0x20) + A.encode() + b"\0"


@pytest.mark.parametrize(
    ("id_", "items", "errno"),
    [
        (0, (), EINVAL),
        (99, (), ENXIO),
        (0, (name(B),), ESRCH),
        (99, (name(A),), ESRCH),
        (0, (name("not a name"),), ESRCH),
    ],
)
def test_info_about_nobody(bus: Bus, id_: int, items: tuple[bytes, ...], errno: int) -> None:
    client = bus.hello()
    client.acquire(A)
    with fails(errno):
        client.info(id_, *items)


def test_flags_are_looked_at_before_the_target(bus: Bus) -> None:
    with fails(EINVAL):
        bus.hello().info(99, kinds=1 << 20)


def test_an_activator_is_found_by_its_name_and_id(bus: Bus) -> None:
    activator, client = bus.activator(A), bus.hello()
    assert client.info(0, name(A)).id == activator.id
    assert client.info(activator.id).flags == 2


@pytest.mark.parametrize("kind", ["holder", "monitor"])
def test_info_finds_every_kind_of_connection_by_id(bus: Bus, kind: str) -> None:
    special = bus.holder(A) if kind == "holder" else bus.monitor()
    assert bus.hello().info(special.id).id == special.id


def test_info_with_nothing_to_tell_is_a_bare_struct(bus: Bus) -> None:
    client = bus.hello(send=0)
    assert client.info(client.id).size == 24
    assert client.info(client.id, kinds=0).items == []


def test_info_is_refused_when_the_pool_is_full(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    with fails(EXFULL):
        while True:
            client.info(client.id, kinds=0, free=False)
    with fails(EXFULL):
        client.creator_info()
    with fails(EXFULL):
        client.list(ListFlag.UNIQUE)
    assert client.entries(0) == []


def test_results_may_take_the_whole_pool(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    seen = set()
    with fails(EXFULL):
        while True:
            seen.add(client.info(client.id, kinds=0, free=False).offset)
    assert seen == set(range(0, 4096 - 16, 24))


# --- BUS_CREATOR_INFO


def test_creator_info_tells_name_and_flags_of_the_bus_first(bus: Bus) -> None:
    info = bus.hello().creator_info()
    assert (info.id, info.flags) == (bus.core.id, 0)
    assert info.items == [(I.MAKE_NAME, b"1000-test\0")]


def test_creator_info_tells_what_the_creator_allowed(bus: Bus) -> None:
    every = bus.domain.make_bus("every", send_mask((1 << 64) - 1), uid=1001)
    client = every.hello()
    process = [I(0x1000 + n) for n in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    assert client.creator_info().types == [I.MAKE_NAME, *process]
    some = AttachFlag.CREDS | AttachFlag.TID_COMM | AttachFlag.TIMESTAMP
    assert client.creator_info(some).types == [I.MAKE_NAME, I.CREDS, I.TID_COMM]
    few = bus.domain.make_bus("few", send_mask(AttachFlag.PIDS)).hello()
    assert few.creator_info().types == [I.MAKE_NAME, I.PIDS]
    assert few.creator_info(AttachFlag.CREDS).types == [I.MAKE_NAME]


def test_creator_info_is_frozen_and_ignores_the_id(bus: Bus) -> None:
    made = bus.domain.make_bus("made", send_mask(AttachFlag.TID_COMM))
    made.owner.metadata.tid_comm = b"changed"
    client = made.hello()
    info = client.info(12345, code=Command.BUS_CREATOR_INFO)
    assert info.one(I.TID_COMM) == b"thread\0"


# --- LIST

UNIQUE, NAMES, ACTIVATORS, QUEUED = ListFlag
ENTRY = tuple[int, int, str | None, int]


@pytest.fixture
def crowd(bus: Bus) -> dict[str, Client]:
    """An implementer of A before its activator, B's activator in charge, one who queues for A
    and owns C, one without names, a holder, a monitor."""
    crowd = {
        "a": bus.activator(A),
        "b": bus.activator(B),
        "owner": bus.hello(flags=1),
        "queued": bus.hello(),
        "plain": bus.hello(),
        "holder": bus.holder("com.example.held"),
        "monitor": bus.monitor(),
    }
    crowd["owner"].acquire(A, NameFlag.ALLOW_REPLACEMENT)
    crowd["queued"].acquire(A, NameFlag.QUEUE)
    crowd["queued"].acquire("com.example.c")
    return crowd


def test_list_gives_what_is_asked_for(crowd: dict[str, Client]) -> None:
    ids = {who: client.id for who, client in crowd.items()}
    a_activator = (ids["a"], 2, A, 0x18)
    b_activator = (ids["b"], 2, B, 0x30)
    owner = (ids["owner"], 1, A, 0x22)
    queued = (ids["queued"], 0, A, 0x0C)
    c_owner = (ids["queued"], 0, "com.example.c", 0x20)

    def unnamed(*who: str) -> list[ENTRY]:
        flags = {"a": 2, "b": 2, "owner": 1, "holder": 4}
        return [(ids[w], flags.get(w, 0), None, 0) for w in who]

    client = crowd["plain"]
    assert client.entries(0) == []
    assert client.entries(NAMES) == [owner, c_owner]
    assert client.entries(QUEUED) == [queued]
    assert client.entries(ACTIVATORS) == [a_activator, b_activator]
    assert client.entries(NAMES | QUEUED) == [owner, queued, c_owner]
    everyone = unnamed("a", "b", "owner", "queued", "plain", "holder")
    assert client.entries(UNIQUE) == everyone
    nameless = unnamed("plain", "holder")
    assert client.entries(UNIQUE | NAMES) == [
        *unnamed("a", "b"), owner, c_owner, *nameless,
    ]  # fmt: skip
    assert client.entries(UNIQUE | NAMES | ACTIVATORS | QUEUED) == [
        a_activator, b_activator, owner, queued, c_owner, *nameless,
    ]  # fmt: skip


def test_an_empty_list_has_the_dummy_offset(bus: Bus) -> None:
    client = bus.hello()
    result = client.ioctl(Command.LIST, command(fields=u64(7, 7)))
    assert struct.unpack_from("=QQ", result, 24) == (client.pool_size, 0)


def test_hidden_names_are_left_out_but_count_as_names(bus: Bus) -> None:
    bus.endpoint("1000-custom", name(B), SEE)
    client = bus.hello()
    client.acquire(A)
    other = bus.hello()
    other.acquire(B)
    guest = Client(bus, endpoint="1000-custom")
    assert guest.entries(NAMES | UNIQUE) == [(other.id, 0, B, 0x20), (guest.id, 0, None, 0)]
    assert [entry[0] for entry in guest.entries(UNIQUE)] == [client.id, other.id, guest.id]


# --- MATCH_ADD, MATCH_REMOVE


@pytest.mark.parametrize(
    ("rule", "errno"),
    [
        (item(I.BLOOM_MASK), EDOM),
        (item(I.BLOOM_MASK, bytes(BLOOM_SIZE - 1)), EDOM),
        (item(I.BLOOM_MASK, bytes(BLOOM_SIZE + 8)), EDOM),
        (mask([], [], []), 0),
        (name("nodot"), EINVAL),
        (name("com.example.*"), EINVAL),
        (name(A), 0),
        (item(I.NAME_ADD, bytes(32) + b"not a name\0"), 0),
        (item(I.NAME_ADD, bytes(32) + b"\0"), 0),
    ],
)
def test_what_a_rule_may_hold(bus: Bus, rule: bytes, errno: int) -> None:
    client = bus.hello()
    if errno:
        with fails(errno):
            client.match(rule)
        with fails(EBADSLT):
            client.unmatch()
    else:
        client.match(rule)
        client.unmatch()


def test_cookies_may_repeat_and_go_together(bus: Bus) -> None:
    client = bus.hello()
    for _ in range(3):
        client.match(cookie=5)
    client.match(cookie=6)
    client.unmatch(5)
    with fails(EBADSLT):
        client.unmatch(5)
    assert [m.cookie for m in client.connection.matches] == [6]


def test_matches_are_found_by_their_own_connection_only(bus: Bus) -> None:
    bus.hello().match(cookie=5)
    with fails(EBADSLT):
        bus.hello().unmatch(5)


def test_replace_takes_the_place_of_all_with_its_cookie(bus: Bus) -> None:
    client = bus.hello()
    client.match(cookie=5, flags=MatchFlag.REPLACE)
    client.match(mask([1]), cookie=5)
    client.match(item(I.ID, u64(99)), cookie=5, flags=MatchFlag.REPLACE)
    client.broadcast()
    assert client.inbox() == []
    client.unmatch(5)
    with fails(EBADSLT):
        client.unmatch(5)


def test_a_connection_has_at_most_256_matches(bus: Bus) -> None:
    client = bus.hello()
    for cookie in range(256):
        client.match(cookie=cookie)
    with fails(EMFILE):
        client.match(cookie=256)
    client.match(cookie=7, flags=MatchFlag.REPLACE)
    client.unmatch(7)
    client.match(cookie=256)


def test_a_bad_rule_does_not_replace(bus: Bus) -> None:
    client = bus.hello()
    client.match(cookie=5)
    with fails(EDOM):
        client.match(item(I.BLOOM_MASK), cookie=5, flags=MatchFlag.REPLACE)
    client.unmatch(5)
