# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nodes and who may open them, and custom endpoints with their stricter view of a bus."""

from __future__ import annotations

import os
import select
import stat
from errno import (
    EACCES,
    EBADFD,
    ECONNRESET,
    EINVAL,
    ENOENT,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESHUTDOWN,
    ESRCH,
)

import pytest

import daemons
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    Command,
    HelloFlag,
    ItemType,
    ListFlag,
    MakeFlag,
    PolicyAccess,
    PolicyType,
)
from kdbusfs.abi.structs import ID_CHANGE
from mount.raw import Bus, Connection, File, fails, poll
from privilege.conftest import NewPerson
from privilege.people import CAP_IPC_OWNER
from privilege.test_policy import ALICE, BOB, CLUB, NAME, TEAM, may_own, may_talk, policy

pytestmark = pytest.mark.one_pool

OWN, TALK, SEE = PolicyAccess.OWN, PolicyAccess.TALK, PolicyAccess.SEE
USER, GROUP, WORLD = PolicyType.USER, PolicyType.GROUP, PolicyType.WORLD
GROUP_MAY, WORLD_MAY = MakeFlag.ACCESS_GROUP, MakeFlag.ACCESS_WORLD


class Endpoint(File):
    """A custom endpoint, for as long as this file is open."""

    def __init__(self, path: str, name: str, flags: int = 0) -> None:
        super().__init__(path)
        item = build_string(ItemType.MAKE_NAME, name.encode())
        try:
            self.command(Command.ENDPOINT_MAKE, items=item, flags=flags)
        except OSError:
            self.close()
            raise

    def update(self, *entries: bytes) -> None:
        self.command(Command.ENDPOINT_UPDATE, items=b"".join(entries))


def make_bus(name: str, flags: int = 0) -> Bus:
    """A bus of who calls, in the mount's root as working directory."""
    return Bus(".", name, flags=flags)


def mode_and_owner(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


# --- modes and ownership


@pytest.mark.parametrize(
    ("flags", "directory", "file"),
    [
        (0, 0o500, 0o600),
        (GROUP_MAY, 0o550, 0o660),
        (WORLD_MAY, 0o555, 0o666),
        (GROUP_MAY | WORLD_MAY, 0o555, 0o666),
    ],
)
def test_nodes_belong_to_who_made_them(
    mount: daemons.Mount, person: NewPerson, flags: int, directory: int, file: int
) -> None:
    alice = person(ALICE, TEAM)
    alice.make(make_bus, f"{ALICE}-modes", flags)
    alice.make(Endpoint, f"{ALICE}-modes/bus", f"{ALICE}-extra", flags)
    for name, mode in (("", directory), ("/bus", file), (f"/{ALICE}-extra", file)):
        path = f"{mount.path}/{ALICE}-modes{name}"
        assert mode_and_owner(path) == (mode, ALICE, TEAM)


@pytest.mark.parametrize(
    ("flags", "who", "allowed"),
    [
        (0, (ALICE, ALICE, ()), True),
        (0, (BOB, TEAM, ()), False),
        (GROUP_MAY, (BOB, TEAM, ()), True),
        (GROUP_MAY, (BOB, BOB, (TEAM,)), True),
        (GROUP_MAY, (BOB, BOB, (CLUB,)), False),
        (WORLD_MAY, (BOB, BOB, ()), True),
    ],
)
def test_the_kernel_lets_in_whom_the_modes_let_in(
    mount: object,
    person: NewPerson,
    flags: int,
    who: tuple[int, int, tuple[int, ...]],
    allowed: bool,
) -> None:
    alice = person(ALICE, TEAM)
    name = f"{ALICE}-doors"
    alice.make(make_bus, name, flags)
    # The directory of this bus is open to all, its endpoint is the door.
    alice.make(make_bus, f"{ALICE}-open", WORLD_MAY)
    alice.make(Endpoint, f"{ALICE}-open/bus", f"{ALICE}-door", flags)
    visitor = person(*who)
    for path in (f"{name}/bus", f"{ALICE}-open/{ALICE}-door"):
        if allowed:
            visitor.connect(path).close()
        else:
            with fails(EACCES):
                visitor.open(path)
    if allowed:
        assert visitor.run(os.listdir, name) == ["bus"]
    else:
        with fails(EACCES):
            visitor.run(os.listdir, name)


def test_root_without_capabilities_is_a_user_like_others(mount: object, person: NewPerson) -> None:
    person(ALICE).make(make_bus, f"{ALICE}-closed")
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    with fails(EACCES):
        person(0, without=[1, 2]).open(f"{ALICE}-closed/bus")
    person().open(f"{ALICE}-closed/bus")


def test_chmod_is_for_the_owner_and_opens_the_node(mount: object, person: NewPerson) -> None:
    alice, bob = person(ALICE), person(BOB)
    alice.make(make_bus, f"{ALICE}-chmod", GROUP_MAY)
    with fails(EPERM):
        bob.run(os.chmod, f"{ALICE}-chmod", 0o777)
    with fails(EPERM):
        bob.run(os.chmod, "control", 0o600)
    with fails(EPERM):
        alice.run(os.chown, f"{ALICE}-chmod", BOB, BOB)
    with fails(EACCES):
        bob.open(f"{ALICE}-chmod/bus")
    alice.run(os.chmod, f"{ALICE}-chmod", 0o555)
    alice.run(os.chmod, f"{ALICE}-chmod/bus", 0o666)
    connection = bob.connect(f"{ALICE}-chmod/bus")
    # A stranger there all the same.
    assert not may_own(connection)


def test_a_name_starts_with_the_uid_of_who_makes_it(mount: object, person: NewPerson) -> None:
    alice = person(ALICE)
    for name in (f"{BOB}-bus", "0-bus", "bus", f"{ALICE}bus", f"+{ALICE}-bus"):
        with fails(EINVAL):
            alice.make(make_bus, name)


# --- custom endpoints


def test_endpoints_are_made_by_the_owner_on_the_default_endpoint(
    bus: Bus, person: NewPerson
) -> None:
    alice = person(ALICE)
    with fails(EPERM):
        alice.make(Endpoint, f"{bus.name}/bus", f"{ALICE}-mine")
    # On a bus of her own it needs no more than to be her.
    alice.make(make_bus, f"{ALICE}-own", WORLD_MAY)
    alice.make(Endpoint, f"{ALICE}-own/bus", f"{ALICE}-mine", WORLD_MAY)
    for path in (f"{ALICE}-own/{ALICE}-mine", f"{ALICE}-own/bus"):
        with fails(EPERM):
            person(BOB).make(Endpoint, path, f"{BOB}-more")
    # The privileged may, under their own uid; nobody may on a custom endpoint.
    person().make(Endpoint, f"{ALICE}-own/bus", "0-roots")
    with fails(EPERM):
        person(0, without=[CAP_IPC_OWNER]).make(Endpoint, f"{ALICE}-own/bus", "0-more")
    with fails(EPERM):
        alice.make(Endpoint, f"{ALICE}-own/{ALICE}-mine", f"{ALICE}-more")


def test_an_endpoint_grants_nothing_until_its_policy_does(bus: Bus, person: NewPerson) -> None:
    with Endpoint(str(bus.path), "0-custom", WORLD_MAY) as endpoint, bus.connect() as service:
        path = f"{bus.name}/0-custom"
        alice = person(ALICE).connect(path)
        roots = person().connect(path)
        service.acquire(NAME)
        for connection in (alice, roots):
            assert not may_talk(connection, service)
            assert not may_own(connection, "com.example.mine")
            with fails(ESRCH):
                connection.info(name=NAME)
            with fails(ENXIO):
                connection.info(service.id)
            with fails(ENXIO):
                connection.info(connection.id)
            assert connection.list(ListFlag.NAMES) == []
        # Connections without names are all listed, as in kdbus; one with a hidden name is not.
        ids = {info.id for info in alice.list(ListFlag.UNIQUE | ListFlag.NAMES)}
        assert {alice.id, roots.id} <= ids
        assert service.id not in ids
        # SEE is to be told of a name, TALK to send to it.
        endpoint.update(policy(NAME, (WORLD, SEE, 0)))
        assert alice.info(name=NAME).id == alice.info(service.id).id == service.id
        assert not may_talk(alice, service)
        endpoint.update(policy(NAME, (USER, TALK, ALICE), (USER, TALK, 0)))
        assert not may_talk(alice, service), "the bus's own policy has not agreed"
        assert not may_talk(roots, person(BOB).connect(f"{bus.name}/bus"))
        # The same user as the service's: the endpoint's policy is all there is to pass.
        assert may_talk(roots, service)


def test_names_need_the_endpoints_and_the_buss_consent(bus: Bus, person: NewPerson) -> None:
    held = bus.connect(
        flags=HelloFlag.POLICY_HOLDER, items=policy("com.example.*", (USER, OWN, ALICE))
    )
    with held, Endpoint(str(bus.path), "0-custom", WORLD_MAY) as endpoint:
        alice = person(ALICE).connect(f"{bus.name}/0-custom")
        assert not may_own(alice)
        endpoint.update(policy(NAME, (USER, OWN, ALICE)))
        assert may_own(alice)
        assert not may_own(alice, "com.example.other")
        endpoint.update(policy("com.example.*", (WORLD, OWN, 0)))
        assert may_own(alice, "com.example.other")
        bob = person(BOB).connect(f"{bus.name}/0-custom")
        assert not may_own(bob), "the bus's own policy says no"
        # Ownership of the bus is worth nothing here.
        roots = person().connect(f"{bus.name}/0-custom")
        assert not may_own(roots)


@pytest.mark.parametrize("flags", [HelloFlag.POLICY_HOLDER, HelloFlag.ACTIVATOR])
def test_nobody_is_an_owner_on_a_custom_endpoint(bus: Bus, flags: int) -> None:
    with Endpoint(str(bus.path), "0-custom"):
        path = bus.directory / "0-custom"
        with fails(EPERM):
            Connection(path, flags=flags, items=policy(NAME))
        with fails(EOPNOTSUPP):
            Connection(path, flags=HelloFlag.MONITOR)


def test_an_update_acts_at_once_and_is_all_or_nothing(bus: Bus, person: NewPerson) -> None:
    with Endpoint(str(bus.path), "0-custom", WORLD_MAY) as endpoint, bus.connect() as service:
        service.acquire(NAME)
        see = [
            person(*who).connect(f"{bus.name}/0-custom") for who in ((ALICE, TEAM, [CLUB]), (BOB,))
        ]

        def who_sees() -> list[bool]:
            return [bool(connection.list(ListFlag.NAMES)) for connection in see]

        for lines, expected in (
            ([(USER, SEE, ALICE)], [True, False]),
            ([(GROUP, SEE, CLUB)], [True, False]),
            ([(GROUP, TALK, TEAM)], [True, False]),
            ([(USER, OWN, BOB)], [False, True]),
            ([(WORLD, SEE, 0)], [True, True]),
            ([], [False, False]),
        ):
            endpoint.update(policy(NAME, *lines))
            assert who_sees() == expected
        endpoint.update(policy("com.example.*", (WORLD, SEE, 0)))
        with fails(EINVAL):
            endpoint.update(policy(NAME), policy("nodots", (WORLD, SEE, 0)))
        assert who_sees() == [True, True]
        endpoint.update()
        assert who_sees() == [False, False]


def test_notifications_of_names_are_for_those_who_see_them(bus: Bus, person: NewPerson) -> None:
    with Endpoint(str(bus.path), "0-custom", WORLD_MAY) as endpoint, bus.connect() as service:
        alice = person(ALICE).connect(f"{bus.name}/0-custom")
        change = bytes(32)
        alice.match(build(ItemType.NAME_ADD, b"\xff" * 8 + change[8:16] + b"\xff" * 8 + bytes(8)))
        alice.match(build(ItemType.ID_ADD, ID_CHANGE.pack((1 << 64) - 1, 0)))
        endpoint.update(policy("com.example.seen", (WORLD, SEE, 0)))
        service.acquire("com.example.hidden")
        service.acquire("com.example.seen")
        with bus.connect():
            told = [message.items[0] for message in alice.inbox()]
        assert [type_ for type_, _ in told] == [ItemType.NAME_ADD, ItemType.ID_ADD]
        assert b"com.example.seen\0" in told[0][1]


# --- the end of an endpoint


def test_an_endpoint_ends_with_its_owner(bus: Bus, person: NewPerson) -> None:
    owner, alice = person(), person(ALICE)
    endpoint = owner.make(Endpoint, f"{bus.name}/bus", "0-custom", WORLD_MAY)
    path = f"{bus.name}/0-custom"
    connection, opened = alice.connect(path), alice.open(path)
    other = alice.connect(f"{bus.name}/bus")
    heir = owner.fork(BOB)
    endpoint.close()
    assert not bus_has_ended(connection.person.run(_events, connection.get("fd"))), "a copy is left"
    heir.end()
    assert bus_has_ended(alice.run(_events, connection.get("fd")))
    with fails(ECONNRESET):
        connection.list(ListFlag.UNIQUE)
    with fails(ESHUTDOWN):
        opened.command(Command.HELLO)
    with fails(ENOENT):
        alice.open(path)
    # The bus itself goes on.
    assert other.list(ListFlag.UNIQUE)


def _events(fd: int) -> int:
    return poll(fd)


def bus_has_ended(events: int) -> bool:
    return bool(events & select.POLLHUP)


def test_an_endpoint_ends_with_its_bus_and_then_takes_no_update(
    mount: daemons.Mount, person: NewPerson
) -> None:
    with Bus(mount.path, flags=WORLD_MAY) as bus:
        endpoint = Endpoint(str(bus.path), "0-custom", WORLD_MAY)
        connection = person(ALICE).connect(f"{bus.name}/0-custom")
        with fails(EBADFD):
            endpoint.command(Command.BYEBYE)
    with fails(ESHUTDOWN):
        endpoint.update()
    with fails(ECONNRESET):
        connection.list(ListFlag.UNIQUE)
    endpoint.close()
