# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy on a real bus with several users (kdbus.policy(7)).

The bus is root's; ALICE and BOB are strangers to it and to each other. What they may do is what
policy holders of root's say.
"""

from __future__ import annotations

import os
from errno import EEXIST, EINVAL, EPERM, ESRCH

import pytest

from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import Command, HelloFlag, ItemType, ListFlag, PolicyAccess, PolicyType
from kdbusfs.abi.structs import POLICY_ACCESS
from mount.raw import Bus, Connection, fails
from privilege.conftest import NewPerson
from privilege.people import CAP_IPC_OWNER, CLONE_NEWUSER, Remote

pytestmark = pytest.mark.one_pool

ALICE, BOB, CAROL = 1001, 1002, 1003
TEAM, CLUB = 2001, 2002
OWN, TALK, SEE = PolicyAccess.OWN, PolicyAccess.TALK, PolicyAccess.SEE
USER, GROUP, WORLD = PolicyType.USER, PolicyType.GROUP, PolicyType.WORLD
NAME = "com.example.service"

Line = tuple[int, int, int]
"""Type, access, id."""


def policy(name: str, *lines: Line) -> bytes:
    """The items of one policy entry."""
    items = build_string(ItemType.NAME, name.encode())
    for type_, access, id_ in lines:
        items += build(ItemType.POLICY_ACCESS, POLICY_ACCESS.pack(type_, access, id_))
    return items


def holder(bus: Bus, name: str, *lines: Line) -> Connection:
    """A policy holder; what it holds goes with it."""
    flags = HelloFlag.POLICY_HOLDER
    return Connection(bus.path, flags=flags, items=policy(name, *lines))


def path(bus: Bus) -> str:
    """The endpoint, as people in the mount's root see it."""
    return f"{bus.name}/bus"


def may_own(connection: Remote, name: str = NAME) -> bool:
    try:
        connection.acquire(name)
    except PermissionError:
        return False
    connection.release(name)
    return True


def may_talk(connection: Remote, to: Connection | Remote) -> bool:
    try:
        connection.send(to.id, b"hello")
    except PermissionError:
        return False
    to.take()
    return True


# --- OWN


def test_without_a_policy_a_stranger_owns_nothing_and_talks_to_nobody(
    bus: Bus, person: NewPerson
) -> None:
    alice = person(ALICE).connect(path(bus))
    with bus.connect() as service:
        service.acquire(NAME)
        assert not may_own(alice, "com.example.other")
        assert not may_talk(alice, service)
        with fails(EPERM):
            alice.send(name=NAME)


@pytest.mark.parametrize(
    ("line", "granted"),
    [
        ((USER, OWN, ALICE), True),
        ((USER, OWN, BOB), False),
        ((USER, TALK, ALICE), False),
        ((USER, SEE, ALICE), False),
        ((GROUP, OWN, TEAM), True),
        ((GROUP, OWN, CLUB), True),
        ((GROUP, OWN, ALICE), False),
        ((WORLD, OWN, 0), True),
        ((WORLD, TALK, 0), False),
    ],
)
def test_names_are_owned_by_whom_a_line_speaks_of(
    bus: Bus, person: NewPerson, line: Line, granted: bool
) -> None:
    # TEAM is her group, CLUB a supplementary one.
    alice = person(ALICE, TEAM, [CLUB]).connect(path(bus))
    with holder(bus, NAME, (USER, OWN, CAROL), line, (GROUP, SEE, 77)):
        assert may_own(alice) == granted
        assert not may_own(alice, NAME + ".more")


@pytest.mark.parametrize(
    ("line", "granted"),
    [
        ((USER, TALK, ALICE), True),
        ((USER, OWN, ALICE), True),
        ((USER, SEE, ALICE), False),
        ((GROUP, TALK, TEAM), True),
        ((GROUP, TALK, CLUB), True),
        ((GROUP, TALK, 77), False),
        ((WORLD, TALK, 0), True),
        ((WORLD, SEE, 0), False),
    ],
)
def test_talk_to_one_owned_name_opens_the_whole_connection(
    bus: Bus, person: NewPerson, line: Line, granted: bool
) -> None:
    alice = person(ALICE, TEAM, [CLUB]).connect(path(bus))
    with holder(bus, NAME, line), bus.connect() as service:
        assert not may_talk(alice, service)
        service.acquire("com.example.silent")
        service.acquire(NAME)
        assert may_talk(alice, service) == granted
        service.release(NAME)
        assert not may_talk(alice, service)


def test_wildcards_stand_for_exactly_one_element_and_an_exact_entry_hides_them(
    bus: Bus, person: NewPerson
) -> None:
    alice = person(ALICE).connect(path(bus))
    with holder(bus, "com.example.*", (USER, OWN, ALICE)):
        assert may_own(alice, "com.example.one")
        assert not may_own(alice, "com.example")
        assert not may_own(alice, "com.example.one.two")
        with holder(bus, "com.example.one"):
            assert not may_own(alice, "com.example.one")
            assert may_own(alice, "com.example.two")
        assert may_own(alice, "com.example.one")


def test_two_holders_of_one_name_are_one_too_many(bus: Bus) -> None:
    with holder(bus, NAME), holder(bus, "com.example.*"):
        with fails(EEXIST):
            holder(bus, NAME)
        with fails(EEXIST):
            holder(bus, "com.example.*")
    holder(bus, NAME).close()


def test_an_update_of_the_policy_acts_at_once(bus: Bus, person: NewPerson) -> None:
    alice, bob = (person(uid).connect(path(bus)) for uid in (ALICE, BOB))
    with holder(bus, NAME, (USER, OWN, ALICE)) as held, bus.connect() as service:
        assert (may_own(alice), may_own(bob)) == (True, False)
        held.command(Command.UPDATE, items=policy(NAME, (USER, OWN, BOB)))
        assert (may_own(alice), may_own(bob)) == (False, True)
        service.acquire(NAME)
        assert (may_talk(alice, service), may_talk(bob, service)) == (False, True)
        # Another name: what was said of the old one is no more.
        held.command(Command.UPDATE, items=policy("com.example.new", (WORLD, OWN, 0)))
        assert (may_talk(bob, service), may_own(alice, "com.example.new")) == (False, True)
        # One that fails changes nothing.
        with fails(EINVAL):
            held.command(Command.UPDATE, items=policy(NAME, (7, OWN, ALICE)))
        assert may_own(alice, "com.example.new")


def test_policy_ends_with_the_last_descriptor_of_its_holder(bus: Bus, person: NewPerson) -> None:
    root, alice = person(), person(ALICE).connect(path(bus))
    items = policy(NAME, (USER, OWN, ALICE))
    held = root.connect(path(bus), flags=HelloFlag.POLICY_HOLDER, items=items)
    child = root.fork(BOB)
    held.close()
    assert may_own(alice), "the child has a copy"
    child.end()
    assert not may_own(alice)


def test_policy_ends_when_its_holder_is_killed(bus: Bus, person: NewPerson) -> None:
    root, alice = person(), person(ALICE).connect(path(bus))
    items = policy(NAME, (USER, OWN, ALICE))
    root.connect(path(bus), flags=HelloFlag.POLICY_HOLDER, items=items)
    assert may_own(alice)
    root.end()
    assert not may_own(alice)


def test_special_connections_are_for_owners(bus: Bus, person: NewPerson) -> None:
    alice = person(ALICE)
    name = build_string(ItemType.NAME, NAME.encode())
    for flags, items in (
        (HelloFlag.POLICY_HOLDER, name),
        (HelloFlag.ACTIVATOR, name),
        (HelloFlag.MONITOR, b""),
    ):
        with fails(EPERM):
            alice.connect(path(bus), flags=flags, items=items)


# --- the same user, and signals


def test_peers_of_one_user_always_talk(bus: Bus, person: NewPerson) -> None:
    one, two, bob = (person(uid).connect(path(bus)) for uid in (ALICE, ALICE, BOB))
    assert may_talk(one, two)
    assert may_talk(two, one)
    assert not may_talk(bob, one)


def test_a_broadcast_reaches_those_who_may_talk_to_its_sender(bus: Bus, person: NewPerson) -> None:
    alice, same, bob = (person(uid).connect(path(bus)) for uid in (ALICE, ALICE, BOB))
    with bus.connect() as root:
        for receiver in (alice, same, bob, root):
            receiver.match()
        alice.broadcast(b"news")
        assert [len(r.inbox()) for r in (alice, same, bob, root)] == [1, 1, 0, 1]
        # Now bob may talk to alice's name.
        with holder(bus, NAME, (USER, OWN, ALICE), (USER, TALK, BOB)):
            alice.acquire(NAME)
            bob.inbox()
            alice.broadcast(b"news")
            assert len(bob.inbox()) == 1


def test_names_are_seen_by_everybody_on_the_default_endpoint(bus: Bus, person: NewPerson) -> None:
    alice = person(ALICE).connect(path(bus))
    with bus.connect() as service:
        service.acquire(NAME)
        assert alice.info(name=NAME).id == service.id
        assert service.id in {info.id for info in alice.list(ListFlag.NAMES)}
        with fails(ESRCH):
            alice.info(name="com.example.nobody")


# --- whose credentials, and when (kdbus.connection(7))


def test_a_descriptor_keeps_the_rights_of_who_opened_it(bus: Bus, person: NewPerson) -> None:
    """Owner is who opened the file, not who says HELLO or makes the call."""
    root = person()
    opened = root.open(path(bus))
    alice = root.fork(ALICE)
    connection = alice.make(_hello_on, opened.held_by(alice).get("fd"))
    assert may_own(connection)
    with bus.connect() as service:
        assert may_talk(connection, service)
    # Opened by her, it is a stranger's.
    assert not may_own(alice.connect(path(bus)))


def _hello_on(fd: int, **options: int | bytes) -> Connection:
    """A connection on a file that is open already."""
    connection = Connection.__new__(Connection)
    connection.fd = fd
    connection.pool_size = 1 << 16
    defaults: dict[str, int | bytes] = {"flags": 1, "send": 0, "recv": 0, "items": b""}
    connection.hello(pool_size=1 << 16, **(defaults | options))  # type: ignore[arg-type]
    return connection


def test_talk_and_own_are_judged_by_who_makes_the_call(bus: Bus, person: NewPerson) -> None:
    # A process that may change its ids, but opened the bus as nobody in particular.
    start = person(0)
    start.run(_set_effective, CAROL)
    connection = start.connect(path(bus))
    start.run(_set_effective, 0)
    heirs = {
        "alice": start.fork(ALICE),
        "bob": start.fork(BOB),
        "bob in the club": start.fork(BOB, BOB, [CLUB]),
        "bob with the team's gid": start.fork(BOB, TEAM),
    }
    with (
        holder(bus, NAME, (USER, OWN, ALICE), (GROUP, OWN, CLUB), (GROUP, OWN, TEAM)),
        holder(bus, "com.example.other", (USER, TALK, ALICE), (GROUP, TALK, CLUB)),
        bus.connect() as service,
    ):
        service.acquire("com.example.other")
        owns = {who: may_own(connection.held_by(heir)) for who, heir in heirs.items()}
        talks = {who: may_talk(connection.held_by(heir), service) for who, heir in heirs.items()}
    assert owns == {
        "alice": True,
        "bob": False,
        "bob in the club": True,
        "bob with the team's gid": True,
    }
    assert talks == {
        "alice": True,
        "bob": False,
        "bob in the club": True,
        "bob with the team's gid": False,
    }


def _set_effective(uid: int) -> None:
    os.seteuid(uid)


def test_talk_counts_the_callers_effective_uid_and_the_targets_real_one(
    bus: Bus, person: NewPerson
) -> None:
    mixed = person()
    mixed.run(_set_effective, ALICE)
    target = mixed.connect(path(bus))
    alice, root = person(ALICE).connect(path(bus)), person(0, without=[CAP_IPC_OWNER])
    # The target's real uid is root's: alice is not the same user, whatever it opened as.
    assert not may_talk(alice, target)
    # But with its effective uid it may talk to her.
    assert may_talk(target, alice)
    assert may_talk(root.connect(path(bus)), target)


# --- privileged: CAP_IPC_OWNER at open()


def test_privilege_is_the_capability_at_open_not_uid_0(mount: object, person: NewPerson) -> None:
    alice = person(ALICE)
    made = alice.make(_world_bus, f"{ALICE}-hers")
    there = f"{ALICE}-hers/bus"
    privileged, plain = person(), person(0, without=[CAP_IPC_OWNER])
    name = build_string(ItemType.NAME, NAME.encode())
    privileged.connect(there, flags=HelloFlag.POLICY_HOLDER, items=name).close()
    with fails(EPERM):
        plain.connect(there, flags=HelloFlag.POLICY_HOLDER, items=name)
    assert may_own(privileged.connect(there))
    assert not may_own(plain.connect(there))
    # Opened before it was dropped, it counts; HELLO may come later.
    opened = privileged.open(there)
    heir = privileged.fork(BOB)
    assert may_own(heir.make(_hello_on, opened.held_by(heir).get("fd")))
    made.close()


def _world_bus(name: str) -> Bus:
    return Bus(".", name, flags=2)


def test_root_of_a_user_namespace_is_not_privileged(bus: Bus, person: NewPerson) -> None:
    nobody = person(
        ALICE, unshared=CLONE_NEWUSER, uid_map=f"0 {ALICE} 1", gid_map=f"0 {ALICE} 1", inside=0
    )
    name = build_string(ItemType.NAME, NAME.encode())
    with fails(EPERM):
        nobody.connect(path(bus), flags=HelloFlag.POLICY_HOLDER, items=name)
    assert not may_own(nobody.connect(path(bus)))
    # Policies speak of who it is in the first user namespace.
    with holder(bus, NAME, (USER, OWN, ALICE)):
        assert may_own(nobody.connect(path(bus)))
    with holder(bus, NAME, (USER, OWN, 0)):
        assert not may_own(nobody.connect(path(bus)))


def test_ids_in_policies_are_those_of_the_callers_namespace(
    mount: object, person: NewPerson
) -> None:
    """A bus inside of a user namespace whose 1 is BOB."""
    maps = f"0 {ALICE} 1\n1 {BOB} 1"
    inner = person(ALICE, unshared=CLONE_NEWUSER, uid_map=maps, gid_map=maps, inside=0)
    inner.make(_world_bus, f"{ALICE}-inner")
    there, flags = f"{ALICE}-inner/bus", HelloFlag.POLICY_HOLDER
    bob, carol = (person(uid).connect(there) for uid in (BOB, CAROL))
    inner.connect(there, flags=flags, items=policy(NAME, (USER, OWN, 1)))
    assert (may_own(bob), may_own(carol)) == (True, False)
    with fails(EINVAL):
        inner.connect(there, flags=flags, items=policy("com.example.b", (USER, OWN, CAROL)))
