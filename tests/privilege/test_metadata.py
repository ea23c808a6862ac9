# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata across user and PID namespaces and root directories (kdbus.item(7))."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest

import daemons
from abi_client.received import Info, Received
from kdbusfs.abi.items import build
from kdbusfs.abi.numbers import ATTACH_ALL, AttachFlag, Command, ItemType, MakeFlag
from kdbusfs.abi.structs import AUDIT, CREDS, PIDS, U32, U64
from mount.raw import Bus, Connection, fails
from privilege.conftest import NewPerson
from privilege.people import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    Person,
    Remote,
    bind,
)
from privilege.test_policy import ALICE, BOB, CLUB, TEAM

pytestmark = pytest.mark.one_pool

NOBODY = 65534
"""What an id is shown as that the receiver's user namespace has no name for."""
UNSET = 0xFFFFFFFF
NAMESPACES = CLONE_NEWUSER | CLONE_NEWPID
VISIBLE = {
    ItemType.TID_COMM,
    ItemType.PID_COMM,
    ItemType.EXE,
    ItemType.CMDLINE,
    ItemType.CGROUP,
    ItemType.CAPS,
    ItemType.AUDIT,
}
"""The kinds that need the sender to be visible in the receiver's /proc, on any machine."""


def creds(told: Received | Info) -> tuple[int, ...]:
    return CREDS.unpack(told.one(ItemType.CREDS))


def pids(told: Received | Info) -> tuple[int, ...]:
    return PIDS.unpack(told.one(ItemType.PIDS))


def groups(told: Received | Info) -> list[int]:
    return [gid for (gid,) in U64.iter_unpack(told.one(ItemType.AUXGROUPS))]


def caps(told: Received | Info) -> tuple[int, ...]:
    """Inheritable, permitted, effective, bounding."""
    payload = told.one(ItemType.CAPS)
    (last,) = U32.unpack_from(payload)
    assert last == int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return tuple(U64.unpack_from(payload, 4 + 8 * i)[0] for i in range(4))


def own_caps(pid: int) -> tuple[int, ...]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines if line.startswith("Cap"))
    return tuple(int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd"))


def path(bus: Bus) -> str:
    return f"{bus.name}/bus"


def tell(sender: Remote | Connection, receiver: Remote | Connection) -> Received:
    """A message from one to the other, who may talk to each other."""
    sender.send(receiver.id, b"who am I?")
    received = receiver.take()
    assert isinstance(received, Received)
    return received


def test_without_namespaces_everything_is_as_proc_has_it(bus: Bus, person: NewPerson) -> None:
    # Root, so that it may talk to root; with a gid and groups to be seen.
    sender = person(0, TEAM, [CLUB, 7])
    with bus.connect(recv=ATTACH_ALL) as receiver:
        told = tell(sender.connect(path(bus)), receiver)
    assert creds(told) == (0, 0, 0, 0, TEAM, TEAM, TEAM, TEAM)
    assert pids(told) == (sender.pid, sender.pid, os.getpid())
    assert sorted(groups(told)) == [7, CLUB]
    assert caps(told) == own_caps(sender.pid)
    assert told.one(ItemType.EXE) == os.readlink("/proc/self/exe").encode() + b"\0"
    session = int(Path("/proc/self/sessionid").read_text())
    login = int(Path("/proc/self/loginuid").read_text())
    assert AUDIT.unpack(told.one(ItemType.AUDIT)) == (session, login)


def test_no_groups_are_told_as_an_empty_item(bus: Bus, person: NewPerson) -> None:
    with bus.connect(recv=AttachFlag.AUXGROUPS) as receiver:
        assert groups(tell(person(0, TEAM).connect(path(bus)), receiver)) == []


def test_ids_are_told_as_the_receivers_namespace_calls_them(bus: Bus, person: NewPerson) -> None:
    maps = f"0 {ALICE} 1\n500 0 1\n600 {TEAM} 2"
    receiver = person(ALICE, unshared=CLONE_NEWUSER, uid_map=maps, gid_map=maps, inside=0).connect(
        path(bus), recv=ATTACH_ALL
    )
    told = tell(person(0, TEAM, [3003, TEAM + 1, ALICE]).connect(path(bus)), receiver)
    assert creds(told) == (500,) * 4 + (600,) * 4
    assert sorted(groups(told)) == [0, 601, NOBODY]
    told = tell(person(0, 3003).connect(path(bus)), receiver)
    assert creds(told) == (500,) * 4 + (NOBODY,) * 4


def test_ids_without_a_map_are_nobodys(bus: Bus, person: NewPerson) -> None:
    receiver = person(0, unshared=NAMESPACES).connect(path(bus), recv=ATTACH_ALL)
    told = tell(person(0, TEAM, [CLUB]).connect(path(bus)), receiver)
    assert creds(told) == (NOBODY,) * 8
    assert groups(told) == [NOBODY]
    assert pids(told) == (0, 0, 0)
    _, login = (
        AUDIT.unpack(told.one(ItemType.AUDIT)) if ItemType.AUDIT in told.types else (0, UNSET)
    )
    assert login == UNSET


def test_a_map_counts_that_is_written_after_the_bus_was_opened(bus: Bus, person: NewPerson) -> None:
    inner = person(0, unshared=CLONE_NEWUSER)
    receiver, sender = inner.connect(path(bus), recv=ATTACH_ALL), person(0).connect(path(bus))
    assert creds(tell(sender, receiver)) == (NOBODY,) * 8
    Path(f"/proc/{inner.pid}/uid_map").write_text("300 0 1")
    assert creds(tell(sender, receiver)) == (300,) * 4 + (NOBODY,) * 4
    inner.write_maps("", "400 0 1")
    assert creds(tell(sender, receiver)) == (300,) * 4 + (400,) * 4


def test_a_namespace_without_processes_still_has_its_ids(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    """Its last process opens the bus, hands the connection to another, and ends."""
    inner = person(0, unshared=CLONE_NEWUSER, uid_map="70 0 1", gid_map="80 0 1")
    connection = inner.connect(path(bus), recv=ATTACH_ALL)
    pidfd = os.pidfd_open(inner.pid)
    ours = _adopt(pidfd, connection)
    os.close(pidfd)
    inner.end()
    sender = person(0).connect(path(bus))
    # Others that come and go, and might be given its number.
    for _ in range(20):
        person(0, unshared=CLONE_NEWUSER, uid_map="1 0 1", gid_map="1 0 1").connect(
            path(bus)
        ).person.end()
    told = tell(sender, ours)
    assert creds(told) == (70,) * 4 + (80,) * 4
    ours.close()


def _adopt(pidfd: int, remote: Remote) -> Connection:
    """The same connection under a number of the test's."""
    libc = ctypes.CDLL(None, use_errno=True)
    connection = Connection.__new__(Connection)
    connection.fd = libc.syscall(438, pidfd, remote.get("fd"), 0)
    assert connection.fd >= 0
    connection.id, connection.pool_size = remote.id, remote.get("pool_size")
    connection._pool = None
    return connection


# --- PID namespaces


def test_an_inner_process_is_seen_from_outside_by_its_outer_numbers(
    bus: Bus, person: NewPerson
) -> None:
    inner = person(0, unshared=CLONE_NEWPID)
    child = inner.fork()
    with bus.connect(recv=ATTACH_ALL) as receiver:
        told = tell(child.connect(path(bus)), receiver)
        assert pids(told) == (child.pid, child.pid, inner.pid)
        assert child.run(os.getpid) == 2
        assert set(told.types) | {ItemType.EXE} >= VISIBLE


def test_numbers_are_translated_downwards_level_by_level(bus: Bus, person: NewPerson) -> None:
    outer = person(0, unshared=CLONE_NEWPID)
    middle = outer.fork()
    inner = middle.fork(unshared=CLONE_NEWPID)
    innermost = inner.fork()
    connections = {
        who: people.connect(path(bus), recv=ATTACH_ALL)
        for who, people in (("outer", outer), ("inner", inner), ("innermost", innermost))
    }
    # Upwards: numbers in the outer namespace; downwards: nothing.
    told = tell(connections["innermost"], connections["outer"])
    inner_in_outer = told_pid_of(inner, 1)
    assert pids(told)[0] == told_pid_of(innermost, 1)
    assert pids(told)[2] == inner_in_outer
    told = tell(connections["outer"], connections["inner"])
    assert pids(told) == (0, 0, 0)
    # Among themselves: their own numbers; the parent of process 1 is not there.
    assert pids(tell(connections["innermost"], connections["inner"])) == (2, 2, 1)
    assert pids(tell(connections["inner"], connections["innermost"])) == (1, 1, 0)


def told_pid_of(person: Person, level: int) -> int:
    """A process's number at a level, as our own /proc has it."""
    for line in Path(f"/proc/{person.pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[1 + level])
    raise AssertionError("no NSpid")


def test_siblings_namespaces_do_not_see_each_other(bus: Bus, person: NewPerson) -> None:
    one, two = (person(0, unshared=CLONE_NEWPID).connect(path(bus), recv=ATTACH_ALL) for _ in "12")
    assert pids(tell(one, two)) == (0, 0, 0)


@pytest.mark.parametrize("send", [0, int(AttachFlag.TID_COMM | AttachFlag.CAPS)])
def test_who_is_not_in_the_receivers_proc_decides_what_to_tell(
    bus: Bus, person: NewPerson, send: int
) -> None:
    receiver = person(0, unshared=CLONE_NEWPID).connect(path(bus), recv=ATTACH_ALL)
    told = tell(person(0).connect(path(bus), send=send), receiver)
    kept = {ItemType.TID_COMM, ItemType.CAPS} if send else set()
    assert set(told.types) & (VISIBLE | {ItemType.SECLABEL}) == kept
    assert {ItemType.CREDS, ItemType.PIDS, ItemType.AUXGROUPS} <= set(told.types)


def test_inside_of_one_namespace_nothing_can_be_withheld(bus: Bus, person: NewPerson) -> None:
    inner = person(0, unshared=CLONE_NEWPID)
    receiver = inner.connect(path(bus), recv=ATTACH_ALL)
    told = tell(inner.fork().connect(path(bus), send=0), receiver)
    assert set(told.types) >= VISIBLE
    assert pids(told) == (2, 2, 1)


def test_a_thread_is_told_apart_from_its_process(bus: Bus, person: NewPerson) -> None:
    sender = person(0)
    connection = sender.connect(path(bus))
    with bus.connect(recv=ATTACH_ALL) as receiver:
        tid = sender.run(_send_in_thread, connection, receiver.id)
        told = receiver.take()
        assert pids(told) == (sender.pid, tid, os.getpid())
        assert told.one(ItemType.TID_COMM) == b"helper\0"
        assert told.one(ItemType.PID_COMM) != b"helper\0"
        assert told.one(ItemType.CMDLINE)


def _send_in_thread(connection: Connection, to: int) -> int:
    tids: list[int] = []

    def send() -> None:
        Path("/proc/thread-self/comm").write_text("helper")
        tids.append(threading.get_native_id())
        connection.send(to, b"from a thread")

    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    return tids[0]


def test_the_connection_is_the_process_that_said_hello(bus: Bus, person: NewPerson) -> None:
    """CONN_INFO tells of HELLO; a message of the thread that sends it."""
    first = person(0, TEAM)
    connection = first.connect(path(bus), send=ATTACH_ALL)
    heir = first.fork(BOB, BOB)
    with bus.connect(recv=ATTACH_ALL) as receiver:
        told = tell(connection.held_by(heir), receiver)
        assert (creds(told)[0], pids(told)[0]) == (BOB, heir.pid)
        known = receiver.info(connection.id)
        assert (creds(known)[0], pids(known)[0]) == (0, first.pid)


def test_who_is_asked_about_is_translated_for_who_asks(bus: Bus, person: NewPerson) -> None:
    with bus.connect(send=ATTACH_ALL) as target:
        inner = person(0, unshared=NAMESPACES, uid_map="9 0 1", gid_map="9 0 1", inside=9).connect(
            path(bus)
        )
        for info in (inner.info(target.id), inner.creator_info()):
            assert creds(info) == (9,) * 8
            assert pids(info) == (0, 0, 0)
            assert ItemType.CAPS in info.types


# --- capabilities


def test_capabilities_are_what_they_are_worth_to_the_receiver(bus: Bus, person: NewPerson) -> None:
    full = (1 << (int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1)) - 1
    root = person(0)
    sender = root.connect(path(bus), send=ATTACH_ALL)

    def seen_by(receiver: Remote) -> tuple[int, ...]:
        return caps(tell(sender, receiver))

    # In the same user namespace: as they are.
    assert seen_by(person(0).connect(path(bus), recv=ATTACH_ALL)) == own_caps(root.pid)
    # Further down, in one that the sender's user made: all but the inheritable ones.
    made_by_root = person(0, unshared=CLONE_NEWUSER, uid_map="0 0 1", gid_map="0 0 1")
    assert seen_by(made_by_root.connect(path(bus), recv=ATTACH_ALL)) == (0, full, full, full)
    # In one that somebody else made: as they are.
    made_by_alice = person(
        ALICE, unshared=CLONE_NEWUSER, uid_map=f"0 {ALICE} 1", gid_map=f"0 {ALICE} 1", inside=0
    )
    receiver = made_by_alice.connect(path(bus), recv=ATTACH_ALL)
    assert seen_by(receiver) == own_caps(root.pid)


def test_capabilities_over_an_inner_namespace_are_worth_nothing_outside(
    bus: Bus, person: NewPerson
) -> None:
    inner = person(0, unshared=CLONE_NEWUSER, uid_map="0 0 1", gid_map="0 0 1", inside=0)
    sibling = person(0, unshared=CLONE_NEWUSER, uid_map="0 0 1", gid_map="0 0 1", inside=0)
    connection = inner.connect(path(bus), send=ATTACH_ALL)
    assert own_caps(inner.pid)[2]
    with bus.connect(recv=ATTACH_ALL) as outside:
        assert caps(tell(connection, outside)) == (0, 0, 0, 0)
    receiver = sibling.connect(path(bus), recv=ATTACH_ALL)
    assert caps(tell(connection, receiver)) == (0, 0, 0, 0)
    # Two levels down the owner of the level between is who counts.
    below = inner.fork(unshared=CLONE_NEWUSER, uid_map="0 0 1", gid_map="0 0 1")
    told = tell(connection, below.connect(path(bus), recv=ATTACH_ALL))
    assert caps(told)[0] == 0
    assert caps(told)[1] == caps(told)[2] == caps(told)[3] != 0


# --- EXE and the root directory


def test_exe_is_told_to_those_with_the_same_root_directory(
    mount: daemons.Mount, bus: Bus, person: NewPerson, tmp_path: Path
) -> None:
    sender = person(0).connect(path(bus), send=ATTACH_ALL)
    same = person(0).connect(path(bus), recv=ATTACH_ALL)
    assert ItemType.EXE in tell(sender, same).types
    for people in (
        person(0, unshared=CLONE_NEWNS),
        changed_root(person(0, unshared=CLONE_NEWNS), mount.path, tmp_path / "one"),
        changed_root(person(0), None, tmp_path / "two"),
    ):
        other = people.connect(path(bus), recv=ATTACH_ALL, send=ATTACH_ALL)
        told = tell(sender, other)
        assert ItemType.EXE not in told.types
        assert {ItemType.CMDLINE, ItemType.TID_COMM} <= set(told.types)
        assert ItemType.EXE not in tell(other, same).types
        # Two of them are at home with each other.
        fellow = people.fork().connect(path(bus), send=ATTACH_ALL)
        assert ItemType.EXE in tell(fellow, other).types


def changed_root(person: Person, source: Path | None, root: Path) -> Person:
    """Give *person* another root directory, with the mount in it if *source* is given; the
    working directory stays the mount's root."""
    (root / "kdbus").mkdir(parents=True)
    if source is not None:
        person.run(bind, str(source), str(root / "kdbus"))
    person.run(_chroot, str(root), "kdbus" if source is not None else "")
    return person


def _chroot(root: str, directory: str) -> None:
    os.chroot(root)
    if directory:
        os.chdir(f"/{directory}")


# --- masks


@pytest.mark.parametrize("wanted", [0, *map(int, AttachFlag), ATTACH_ALL])
def test_the_receivers_mask_decides_what_messages_tell(
    bus: Bus, person: NewPerson, wanted: int
) -> None:
    sender = person(0).connect(path(bus), send=0)
    with bus.connect(recv=wanted) as receiver:
        told = set(tell(sender, receiver).types) - {ItemType.PAYLOAD_OFF}
    kinds = {0x1000 + bit for bit in range(14) if wanted >> bit & 1}
    missing = {ItemType.OWNED_NAME, ItemType.CONN_DESCRIPTION, ItemType.SECLABEL}
    assert told - {ItemType.SECLABEL} == kinds - missing


def test_the_targets_mask_decides_what_questions_tell(bus: Bus) -> None:
    shown = AttachFlag.CREDS | AttachFlag.PIDS
    with bus.connect(send=shown) as target, bus.connect() as asking:
        assert asking.info(target.id).types == [ItemType.CREDS, ItemType.PIDS]
        assert asking.info(target.id, kinds=AttachFlag.PIDS | AttachFlag.EXE).types == [
            ItemType.PIDS
        ]
        target.command(
            Command.UPDATE, items=build(ItemType.ATTACH_FLAGS_SEND, U64.pack(AttachFlag.EXE))
        )
        assert asking.info(target.id).types == [ItemType.EXE]


@pytest.mark.parametrize("mask", [0, int(AttachFlag.CREDS), ATTACH_ALL])
def test_the_buss_mask_decides_what_is_told_of_its_maker(mount: daemons.Mount, mask: int) -> None:
    with Bus(mount.path, attach=mask) as bus, bus.connect() as asking:
        types = asking.creator_info().types
    assert types[0] == ItemType.MAKE_NAME
    assert (ItemType.CREDS in types) == bool(mask)
    assert (ItemType.PIDS in types) == (mask == ATTACH_ALL)


# --- faked credentials


def test_the_owner_of_a_bus_may_fake_and_ids_are_its_own_namespaces(
    mount: object, person: NewPerson
) -> None:
    maps = f"0 {ALICE} 1\n1 {BOB} 1"
    inner = person(ALICE, unshared=NAMESPACES, uid_map=maps, gid_map=maps, inside=0)
    inner.make(_world_bus, f"{ALICE}-fakes")
    there = f"{ALICE}-fakes/bus"
    child = inner.fork()
    items = fake((1,) * 8, (1, 2, 0))
    faked = inner.connect(there, items=items, send=ATTACH_ALL)
    # Seen from outside they are what they stand for.
    asking = person(0).connect(there, recv=ATTACH_ALL)
    known = asking.info(faked.id)
    assert set(known.types) == {ItemType.CREDS, ItemType.PIDS}
    assert creds(known) == (BOB,) * 8
    assert pids(known) == (inner.pid, child.pid, 0)
    # Its messages say nothing of the process at all.
    assert set(tell(faked, inner.connect(there, recv=ATTACH_ALL)).types) <= {
        ItemType.PAYLOAD_OFF,
        ItemType.TIMESTAMP,
    }
    for wrong in (fake((7,) * 8, None), fake(None, (77, 0, 0))):
        with fails(EINVAL):
            inner.connect(there, items=wrong)


def fake(ids: Sequence[int] | None, numbers: Sequence[int] | None) -> bytes:
    items = build(ItemType.CREDS, CREDS.pack(*ids)) if ids else b""
    return items + (build(ItemType.PIDS, PIDS.pack(*numbers)) if numbers else b"")


def _world_bus(name: str) -> Bus:
    return Bus(".", name, flags=MakeFlag.ACCESS_WORLD)


# --- hidepid


@pytest.fixture
def hiding(tmp_path: Path) -> Iterator[Path]:
    """A domain served by a daemon whose /proc hides processes from all but the group CLUB."""
    daemons.need_mounting()
    (tmp_path / "kdbus").mkdir()
    namespace = daemons.MountNamespace("private")
    path = namespace.path(str(tmp_path / "kdbus"))
    enter = ["nsenter", f"--mount=/proc/{namespace.pid}/ns/mnt"]
    command = [*enter, daemons.KDBUSFS, "--foreground", "--pool=cache", str(tmp_path / "kdbus")]
    try:
        namespace.do(f"mount -t proc -o hidepid=2,gid={CLUB} proc /proc")
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            daemons.wait_until(lambda: "control" in os.listdir(path), "kdbusfs never mounted")
            yield path
        finally:
            daemon.terminate()
            assert daemon.wait(daemons.DEADLINE_SECONDS) == 0
    finally:
        namespace.end()


def test_what_proc_hides_from_a_receiver_is_not_told_to_it(hiding: Path) -> None:
    with Bus(hiding, flags=MakeFlag.ACCESS_WORLD) as bus, ExitStack() as stack:

        def connect(*who: Any) -> Remote:
            person = stack.enter_context(Person(hiding, *who))
            return person.connect(path(bus), send=0, recv=ATTACH_ALL)

        sender, alice = connect(0), connect(ALICE)
        member, in_group = connect(ALICE, CLUB), connect(ALICE, ALICE, [CLUB])
        assert not VISIBLE & set(tell(sender, alice).types)
        assert not VISIBLE & set(tell(sender, in_group).types), "its egid counts"
        assert set(tell(sender, member).types) >= VISIBLE
        # Everybody sees itself, and its fellows as proc has it: not.
        assert set(tell(alice, alice).types) >= VISIBLE
        assert not VISIBLE & set(tell(member, alice).types)
