# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy: what a database answers, what is decided, and when."""

from dataclasses import replace
from errno import EEXIST, EINVAL, ENXIO, EPERM, ESRCH

import pytest

from abi_client.building import access, name
from bus.fakes import HOME_USERS, FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import ItemType, ListFlag, NameFlag, PolicyAccess, PolicyType
from kdbusfs.bus.metadata import UserNamespace
from kdbusfs.bus.policy import Entries, Line, PolicyDatabase, policy_size
from kdbusfs.bus.shares import Budget

I = ItemType  # noqa: E741
A, B = "com.example.a", "com.example.b"
USER, GROUP, WORLD = PolicyType
SEE, TALK, OWN = PolicyAccess
STRANGER = 2000


MEMORY = Budget().memory


def store(database: PolicyDatabase, owner: str, entries: Entries) -> None:
    MEMORY.charge(0, policy_size(entries))
    database.replace(owner, 0, entries)


def world(level: int) -> bytes:
    return access(WORLD, level)


# --- queries

WHO = FakePeer(5, 6, groups=frozenset({7, 8})).who


@pytest.mark.parametrize(
    ("entries", "asked", "answer"),
    [
        ({}, "a.b", -1),
        ({"a.b": [(WORLD, TALK, 0)]}, "a.b", 1),
        ({"a.b": [(WORLD, TALK, 0)]}, "a.c", -1),
        ({"a.b": [(WORLD, TALK, 0)]}, "a.b.c", -1),
        ({"a.b": []}, "a.b", -1),
        ({"a.*": [(WORLD, OWN, 0)]}, "a.b", 2),
        ({"a.*": [(WORLD, OWN, 0)]}, "a.b.c", -1),
        ({"a.*": [(WORLD, OWN, 0)]}, "b.a", -1),
        ({"a.b.*": [(WORLD, OWN, 0)]}, "a.b", -1),
        ({"a.*": [(WORLD, OWN, 0)], "a.b": []}, "a.b", -1),
        ({"a.*": [(WORLD, OWN, 0)], "a.b": [(WORLD, SEE, 0)]}, "a.b", 0),
        ({"a.*": [(WORLD, OWN, 0)], "a.b": [(USER, OWN, 99)]}, "a.b", -1),
        ({"a.b": [(USER, SEE, 5), (USER, OWN, 99)]}, "a.b", 0),
        ({"a.b": [(USER, SEE, 6)]}, "a.b", -1),
        ({"a.b": [(GROUP, TALK, 6)]}, "a.b", 1),
        ({"a.b": [(GROUP, TALK, 8)]}, "a.b", 1),
        ({"a.b": [(GROUP, TALK, 5)]}, "a.b", -1),
        ({"a.b": [(WORLD, SEE, 0), (GROUP, OWN, 7), (USER, TALK, 5)]}, "a.b", 2),
    ],
)
def test_the_best_line_of_the_closest_entry_answers(
    entries: dict[str, list[tuple[int, int, int]]], asked: str, answer: int
) -> None:
    database = PolicyDatabase(MEMORY)
    lines = {n.encode(): [Line(*line) for line in found] for n, found in entries.items()}
    store(database, "owner", lines)
    assert database.query(WHO, asked.encode()) == answer


def test_users_and_groups_are_judged_by_their_effective_ids() -> None:
    database = PolicyDatabase(MEMORY)
    store(database, "owner", {b"a.b": [Line(USER, OWN, 5), Line(GROUP, TALK, 6)]})
    assert database.query(replace(WHO, euid=1), b"a.b") == TALK
    assert database.query(replace(WHO, egid=1), b"a.b") == OWN
    assert database.query(replace(WHO, euid=1, egid=1, groups=frozenset()), b"a.b") == -1
    assert database.query(replace(WHO, uid=1, gid=1), b"a.b") == OWN


def test_a_set_of_entries_is_replaced_as_a_whole() -> None:
    database = PolicyDatabase(MEMORY)
    store(database, "one", {b"a.a": [], b"a.*": []})
    store(database, "two", {b"b.b": []})
    with fails(EEXIST):
        database.check_owner("two", {b"c.c": [], b"a.a": []})
    assert sorted(database.names()) == [b"a.*", b"a.a", b"b.b"]
    store(database, "one", {b"a.a": []})
    store(database, "two", {b"a.*": []})
    database.remove("one")
    assert database.names() == [b"a.*"]


# --- OWN


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        (world(OWN), True),
        (world(TALK), False),
        (world(SEE), False),
        (access(USER, OWN, STRANGER), True),
        (access(USER, OWN, 1), False),
        (access(GROUP, OWN, STRANGER), True),
        (access(GROUP, OWN, 77), True),
        (access(GROUP, OWN, 1), False),
        (b"", False),
    ],
)
def test_owning_takes_a_policy(bus: Bus, line: bytes, allowed: bool) -> None:
    stranger = bus.hello(peer=FakePeer(STRANGER, groups=frozenset({77})))
    bus.holder(A, access(USER, SEE, 9), line, access(GROUP, SEE, 9))
    if allowed:
        stranger.acquire(A)
    else:
        with fails(EPERM):
            stranger.acquire(A)


def test_the_owner_of_the_bus_may_own_anything(bus: Bus) -> None:
    bus.holder(A, access(USER, SEE, 1))
    bus.hello(peer=FakePeer(1000)).acquire(A)
    bus.hello(peer=FakePeer(0, ipc_owner=True)).acquire(B)
    with fails(EPERM):
        bus.hello(peer=FakePeer(0)).acquire("com.example.c")


def test_owning_asks_who_calls(bus: Bus) -> None:
    bus.holder(A, access(USER, OWN, 3000))
    client = bus.hello(peer=FakePeer(STRANGER))
    with fails(EPERM):
        client.acquire(A)
    with client.used_by(FakePeer(3000)):
        client.acquire(A)
    client.release(A)


# --- TALK


@pytest.mark.parametrize(
    ("line", "allowed"),
    [(world(TALK), True), (world(OWN), True), (world(SEE), False), (b"", False)],
)
def test_talking_across_users_takes_a_policy_for_a_name_of_the_target(
    bus: Bus, line: bytes, allowed: bool
) -> None:
    stranger, target = bus.hello(peer=FakePeer(STRANGER)), bus.hello()
    bus.holder(A, line)
    with fails(EPERM):
        stranger.send(target)
    target.acquire(A)
    if allowed:
        stranger.send(target)
        stranger.send(A)
        target.acquire(B)
        stranger.send(B)
    else:
        for to in (target, A):
            with fails(EPERM):
                stranger.send(to)


def test_talking_to_one_who_only_queues_for_the_name_is_not_allowed(bus: Bus) -> None:
    stranger, owner, queued = bus.hello(peer=FakePeer(STRANGER)), bus.hello(), bus.hello()
    bus.holder(A, world(TALK))
    owner.acquire(A)
    queued.acquire(A, NameFlag.QUEUE)
    with fails(EPERM):
        stranger.send(queued)
    owner.release(A)
    stranger.send(queued)


def test_peers_of_one_user_always_talk_on_the_default_endpoint(bus: Bus) -> None:
    one, two = bus.hello(peer=FakePeer(STRANGER)), bus.hello(peer=FakePeer(STRANGER))
    one.send(two)
    two.send(two)


@pytest.mark.parametrize(("fsuid", "euid"), [(1000, STRANGER), (STRANGER, 1000), (7, 1000)])
def test_filesystem_uid_or_effective_uid_of_the_target_may_talk(
    bus: Bus, fsuid: int, euid: int
) -> None:
    # kdbus looked at the effective uid alone (docs/conformance.md).
    class Caller(FakePeer):
        uid = property(lambda self: fsuid)  # type: ignore[assignment]

    target, stranger = bus.hello(), bus.hello(peer=FakePeer(STRANGER))
    with stranger.used_by(Caller(euid)):
        stranger.send(target)
    with fails(EPERM):
        stranger.send(target)


def test_an_activators_own_policy_counts_while_it_owns(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(STRANGER))
    bus.activator(A, world(TALK))
    stranger.send(A)
    bus.activator(B)
    with fails(EPERM):
        stranger.send(B)


# --- changes act at once


def test_policy_acts_at_once_and_goes_with_its_holder(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(STRANGER))
    holder = bus.holder(A, world(OWN))
    stranger.acquire(A)
    stranger.release(A)
    holder.update(name(A), world(TALK))
    with fails(EPERM):
        stranger.acquire(A)
    holder.update(name(A), world(OWN))
    holder.close()
    with fails(EPERM):
        stranger.acquire(A)
    assert bus.core.policy.names() == []


def test_an_entry_without_lines_denies(bus: Bus) -> None:
    bus.holder("com.example.*", world(OWN))
    stranger = bus.hello(peer=FakePeer(STRANGER))
    stranger.acquire(A)
    stranger.release(A)
    bus.holder(A)
    with fails(EPERM):
        stranger.acquire(A)


def test_names_and_wildcards_do_not_collide(bus: Bus) -> None:
    for string in (A, "com.example.*", "com.*"):
        bus.holder(string)
        with fails(EEXIST):
            bus.holder(string)


@pytest.mark.parametrize(
    ("line", "errno"),
    [
        (access(USER, TALK, 10), 0),
        (access(USER, TALK, 20), EINVAL),
        (access(GROUP, TALK, 30), 0),
        (access(GROUP, TALK, 10), EINVAL),
        (access(WORLD, TALK, 20), 0),
    ],
)
def test_ids_in_a_policy_are_those_of_the_callers_user_namespace(
    bus: Bus, line: bytes, errno: int
) -> None:
    inner = UserNamespace(2, HOME_USERS, 1000, ((10, 5000, 1),), ((30, 6000, 1),))
    holder = bus.holder(A)
    with holder.used_by(FakePeer(1000, user_namespace=inner)):
        if errno:
            with fails(errno):
                holder.update(name(A), line)
        else:
            holder.update(name(A), line)
            bus.hello().acquire(A)
            bus.hello(peer=FakePeer(5000, 6000)).send(A)


# --- custom endpoints


@pytest.fixture
def guest(bus: Bus) -> Client:
    """Of the bus's owner's user, on an endpoint with a policy for A and B: TALK and SEE."""
    bus.endpoint("1000-custom", name(A), world(TALK), name(B), world(SEE))
    return Client(bus, endpoint="1000-custom")


def test_a_custom_endpoint_needs_explicit_talk_even_within_one_user(
    bus: Bus, guest: Client
) -> None:
    target = bus.hello()
    with fails(EPERM):
        guest.send(target)
    with fails(EPERM):
        guest.send(guest)
    target.acquire(B)
    with fails(EPERM):
        guest.send(B)
    target.acquire(A)
    guest.send(target)
    target.send(guest)


def test_a_custom_endpoint_asks_for_the_bus_as_well(bus: Bus, guest: Client) -> None:
    target = bus.hello(peer=FakePeer(STRANGER))
    bus.holder(A, access(USER, OWN, STRANGER))
    target.acquire(A)
    with fails(EPERM):
        guest.send(A)
    bus.holder("com.example.c", world(TALK))
    own = bus.hello()
    own.acquire("com.example.c")
    with fails(EPERM):
        guest.send("com.example.c")


def test_names_that_may_not_be_seen_do_not_exist_for_information(bus: Bus, guest: Client) -> None:
    client = bus.hello()
    client.acquire("com.example.hidden")
    with fails(ESRCH):
        guest.info(0, name("com.example.hidden"))
    for target in (client, guest):
        with fails(ENXIO):
            guest.info(target.id)
    client.acquire(B)
    assert guest.info(client.id).id == client.id
    assert guest.info(0, name(B)).id == client.id
    assert [e[2] for e in guest.entries(ListFlag.NAMES)] == [B]
    assert client.info(guest.id).id == guest.id


def test_owning_on_a_custom_endpoint_passes_both_databases(bus: Bus, guest: Client) -> None:
    with fails(EPERM):
        guest.acquire(A)
    bus.endpoint("1000-other", name(A), world(OWN))
    other = Client(bus, endpoint="1000-other")
    with fails(EPERM):
        other.acquire(A)
    bus.holder(A, access(USER, OWN, 1000))
    other.acquire(A)


def test_own_broadcasts_need_the_right_to_talk_to_oneself(bus: Bus, guest: Client) -> None:
    guest.match()
    guest.broadcast()
    assert guest.inbox() == []


def test_see_is_asked_of_who_calls(bus: Bus) -> None:
    bus.endpoint("1000-custom", name(A), access(USER, SEE, STRANGER))
    guest, client = Client(bus, endpoint="1000-custom"), bus.hello()
    client.acquire(A)
    with fails(ESRCH):
        guest.info(0, name(A))
    with guest.used_by(FakePeer(STRANGER)):
        assert guest.info(0, name(A)).id == client.id
        assert [e[2] for e in guest.entries(ListFlag.NAMES)] == [A]


def test_mail_to_an_endpoint_is_judged_by_the_senders_endpoint(bus: Bus, guest: Client) -> None:
    bus.hello().send(guest)
    with fails(EPERM):
        bus.hello(peer=FakePeer(STRANGER)).send(guest)
    assert len(guest.inbox()) == 1
