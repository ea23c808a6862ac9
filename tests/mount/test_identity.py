# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who somebody is: metadata of real processes against /proc, and connections that pretend."""

import ctypes
import errno
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import daemons
from abi_client.received import Info, Received
from kdbusfs.abi import structs
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    AttachFlag,
    Command,
    HelloFlag,
    ItemType,
    MakeFlag,
    MsgFlag,
)
from kdbusfs.abi.structs import U64
from mount.processes import Child, in_child
from mount.raw import Bus, Connection, fails, libc, outcome

pytestmark = pytest.mark.one_pool

USER, GROUP, OTHERS = 4711, 4712, [4713, 4714, 70000]
PR_SET_NAME = 15
UNSET = 0xFFFFFFFF

# In the order in which they are to appear.
KINDS = {
    ItemType.CREDS: AttachFlag.CREDS,
    ItemType.PIDS: AttachFlag.PIDS,
    ItemType.AUXGROUPS: AttachFlag.AUXGROUPS,
    ItemType.TID_COMM: AttachFlag.TID_COMM,
    ItemType.PID_COMM: AttachFlag.PID_COMM,
    ItemType.EXE: AttachFlag.EXE,
    ItemType.CMDLINE: AttachFlag.CMDLINE,
    ItemType.CGROUP: AttachFlag.CGROUP,
    ItemType.CAPS: AttachFlag.CAPS,
    ItemType.SECLABEL: AttachFlag.SECLABEL,
    ItemType.AUDIT: AttachFlag.AUDIT,
    ItemType.OWNED_NAME: AttachFlag.NAMES,
    ItemType.CONN_DESCRIPTION: AttachFlag.CONN_DESCRIPTION,
    ItemType.TIMESTAMP: AttachFlag.TIMESTAMP,
}
PROCESS_KINDS = [*KINDS][:11]


def proc(name: str) -> bytes | None:
    """A file of /proc/self as a thread sees its own, or None if it can't be read."""
    try:
        return Path(f"/proc/thread-self/{name}").read_bytes()
    except OSError:
        return None


def status() -> dict[str, list[str]]:
    lines = (line.partition(":") for line in (proc("status") or b"").decode().splitlines())
    return {key: value.split() for key, _, value in lines}


def cgroup() -> bytes:
    """The path in the v1 hierarchy with the lowest number, or else in v2's."""
    lines = [line.split(b":", 2) for line in (proc("cgroup") or b"").splitlines()]
    numbered = sorted((int(n), path) for n, _, path in lines if n != b"0")
    return numbered[0][1] if numbered else next(path for n, _, path in lines if n == b"0")


def expected() -> dict[int, bytes]:
    """What this very thread's process items should hold, from /proc."""
    fields = status()
    last_cap = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    mask = (1 << last_cap + 1) - 1
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd")
    caps = b"".join(U64.pack(int(fields[name][0], 16) & mask) for name in sets)
    found = {
        ItemType.CREDS: structs.CREDS.pack(*map(int, fields["Uid"] + fields["Gid"])),
        ItemType.PIDS: structs.PIDS.pack(os.getpid(), int(fields["Pid"][0]), os.getppid()),
        ItemType.AUXGROUPS: b"".join(U64.pack(g) for g in sorted(map(int, fields["Groups"]))),
        ItemType.TID_COMM: (proc("comm") or b"")[:-1] + b"\0",
        ItemType.PID_COMM: Path("/proc/self/comm").read_bytes()[:-1] + b"\0",
        ItemType.EXE: os.readlink(b"/proc/self/exe") + b"\0",
        ItemType.CMDLINE: Path("/proc/self/cmdline").read_bytes().split(b"\0")[0] + b"\0",
        ItemType.CGROUP: cgroup() + b"\0",
        ItemType.CAPS: struct.pack("=I", last_cap) + caps,
    }
    label = proc("attr/current")
    if label:
        found[ItemType.SECLABEL] = label.rstrip(b"\n\0") + b"\0"
    session, login = proc("sessionid"), proc("loginuid")
    if session is not None and login is not None:
        found[ItemType.AUDIT] = struct.pack("=II", int(session), int(login))
    return {int(type_): payload for type_, payload in found.items()}


def process_items(found: Received | Info) -> dict[int, bytes]:
    items = [(t, p) for t, p in found.items if t in PROCESS_KINDS]
    assert len(items) == len(dict(items)), "an item came twice"
    if ItemType.AUXGROUPS in dict(items):
        # A set: its order says nothing.
        groups = sorted(U64.iter_unpack(dict(items)[ItemType.AUXGROUPS]))
        items = [
            (t, b"".join(U64.pack(*g) for g in groups) if t == ItemType.AUXGROUPS else p)
            for t, p in items
        ]
    return {int(t): p for t, p in items}


@dataclass
class Known:
    """A forked sender that looks like nobody else, and what /proc says of it."""

    id: int
    items: dict[int, bytes]


def known_sender(
    bus: Bus, root_fd: int, to: int, *, uid: int = USER, thread: bool = False
) -> "Child[Known]":
    """Sends one message to *to* and stays until it is told to go."""

    def send(test: socket.socket) -> Known:
        libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"known process"), 0, 0, 0)
        os.fchdir(root_fd)
        with Connection(
            f"{bus.name}/bus", items=build_string(ItemType.CONN_DESCRIPTION, b"known-sender")
        ) as conn:
            if uid == 0:
                conn.acquire("com.example.known.b")
            known: list[Known] = []

            def work() -> None:
                if thread:
                    libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"known thread"), 0, 0, 0)
                conn.send(to, b"who am I?")
                known.append(Known(conn.id, expected()))

            if thread:
                worker = threading.Thread(target=work)
                worker.start()
                worker.join()
            else:
                work()
            test.send(b"ready")
            test.recv(2)
            return known[0]

    return Child(send, uid=uid, gid=GROUP, groups=OTHERS)


def test_all_kinds_of_metadata_are_what_proc_says(
    mount: daemons.Mount, bus: Bus, root_fd: int
) -> None:
    # TALK between different users takes a name and a policy, or being the owner.
    with (
        bus.connect(recv=ATTACH_ALL) as receiver,
        known_sender(bus, root_fd, receiver.id, uid=0) as child,
    ):
        child.hear()
        before = time.monotonic_ns(), time.time_ns()
        message = receiver.take()
        child.say()
        known = child.result()
    assert message.data == b"who am I?"
    assert process_items(message) == known.items
    creds = structs.CREDS.unpack(message.one(ItemType.CREDS))
    assert creds == (0,) * 4 + (GROUP,) * 4
    assert message.one(ItemType.TID_COMM) == message.one(ItemType.PID_COMM) == b"known process\0"
    assert message.one(ItemType.EXE) == os.fsencode(os.path.realpath(sys.executable)) + b"\0"
    assert message.one(ItemType.CONN_DESCRIPTION) == b"known-sender\0"
    assert message.one(ItemType.OWNED_NAME) == U64.pack(0x20) + b"com.example.known.b\0"
    seqnum, monotonic, realtime = structs.TIMESTAMP.unpack(message.one(ItemType.TIMESTAMP))
    assert seqnum > 0
    assert before[0] - 10**10 < monotonic <= before[0]
    assert before[1] - 10**10 < realtime <= before[1] + 10**6
    # In this order, and after the message's own items.
    order = [t for t in message.types if t in KINDS]
    assert order == [t for t in KINDS if t in order]
    assert message.types[0] == ItemType.PAYLOAD_OFF
    assert set(KINDS) - set(order) <= {ItemType.SECLABEL, ItemType.AUDIT}


def test_an_ordinary_users_metadata_is_its_own(mount: daemons.Mount, root_fd: int) -> None:
    def own(test: socket.socket) -> tuple[dict[int, bytes], dict[int, bytes], bytes]:
        os.fchdir(root_fd)
        with Bus(".", f"{USER}-identity") as bus, bus.connect(recv=ATTACH_ALL) as conn:
            conn.send(conn.id, b"to myself")
            message = conn.take()
            return process_items(message), expected(), message.data

    with Child(own, uid=USER, gid=GROUP, groups=OTHERS) as child:
        found, wanted, payload = child.result()
    assert payload == b"to myself"
    assert found == wanted
    assert sorted(U64.iter_unpack(found[ItemType.AUXGROUPS])) == [(g,) for g in OTHERS]
    assert structs.CREDS.unpack(found[ItemType.CREDS]) == (USER,) * 4 + (GROUP,) * 4


def test_the_thread_and_its_process_are_told_apart(bus: Bus, root_fd: int) -> None:
    with (
        bus.connect(recv=ATTACH_ALL) as receiver,
        known_sender(bus, root_fd, receiver.id, uid=0, thread=True) as child,
    ):
        child.hear()
        message = receiver.take()
        child.say()
        known = child.result()
    assert process_items(message) == known.items
    pid, tid, ppid = structs.PIDS.unpack(message.one(ItemType.PIDS))
    assert (pid, ppid) == (child.pid, os.getpid())
    assert tid != pid
    assert message.one(ItemType.TID_COMM) == b"known thread\0"
    assert message.one(ItemType.PID_COMM) == b"known process\0"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_only_what_the_receiver_asks_for_is_attached(bus: Bus, kind: AttachFlag) -> None:
    description = build_string(ItemType.CONN_DESCRIPTION, b"described")
    (type_,) = [t for t, flag in KINDS.items() if flag == kind]
    with bus.connect(items=description, send=0) as sender, bus.connect(recv=kind) as receiver:
        sender.acquire("com.example.sender")
        sender.send(receiver.id, b"x")
        message = receiver.take()
    rest = [t for t in message.types if t != ItemType.PAYLOAD_OFF]
    if type_ in (ItemType.SECLABEL, ItemType.AUDIT):
        assert rest in ([], [type_])
    else:
        assert rest == [type_]


def test_metadata_is_of_whoever_sends_not_of_who_said_hello(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect(recv=ATTACH_ALL) as receiver:

        def send() -> dict[int, bytes]:
            sender.send(receiver.id, b"from the child")
            return expected()

        wanted = in_child(send)
        message = receiver.take()
        assert process_items(message) == wanted
        assert structs.PIDS.unpack(message.one(ItemType.PIDS))[2] == os.getpid()
        # CONN_INFO still tells of the one who said hello.
        info = receiver.info(sender.id)
        assert structs.PIDS.unpack(info.one(ItemType.PIDS))[0] == os.getpid()


def test_metadata_is_as_it_was_when_it_was_sent(bus: Bus) -> None:
    with bus.connect(recv=ATTACH_ALL) as conn:

        def send() -> int:
            libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"first name"), 0, 0, 0)
            conn.send(conn.id)
            libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"second name"), 0, 0, 0)
            conn.send(conn.id)
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(USER, 0, USER)
            conn.send(conn.id)
            return os.getpid()

        pid = in_child(send)
        messages = conn.inbox()
    names = [m.one(ItemType.TID_COMM) for m in messages]
    assert names == [b"first name\0", b"second name\0", b"second name\0"]
    creds = [structs.CREDS.unpack(m.one(ItemType.CREDS)) for m in messages]
    assert creds[0][:4] == (0, 0, 0, 0)
    assert creds[2] == (USER, 0, USER, 0, GROUP, GROUP, GROUP, GROUP)
    # By now the sender is dead.
    assert {structs.PIDS.unpack(m.one(ItemType.PIDS))[0] for m in messages} == {pid}


def test_names_are_those_owned_at_the_time_in_order(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect(recv=AttachFlag.NAMES) as receiver:
        receiver.acquire("com.example.taken")
        for name in ("com.example.b", "com.example.a", "com.example.c"):
            sender.acquire(name)
        sender.acquire("com.example.taken", 4)
        sender.send(receiver.id)
        sender.release("com.example.a")
        sender.send(receiver.id)
        first, second = receiver.inbox()
    owned = [[p[8:-1] for p in m.all(ItemType.OWNED_NAME)] for m in (first, second)]
    assert owned == [
        [b"com.example.b", b"com.example.a", b"com.example.c"],
        [b"com.example.b", b"com.example.c"],
    ]


def test_copies_of_one_message_tell_the_same_but_only_what_was_asked(bus: Bus) -> None:
    masks = [ATTACH_ALL, AttachFlag.TIMESTAMP, AttachFlag.PIDS | AttachFlag.TIMESTAMP, 0]
    receivers = [bus.connect(recv=int(mask)) for mask in masks]
    for conn in receivers:
        conn.match()
    receivers[0].broadcast(b"to all")
    copies = [conn.take() for conn in receivers]
    assert len({c.one(ItemType.TIMESTAMP) for c in copies[:3]}) == 1
    assert len({c.one(ItemType.PIDS) for c in (copies[0], copies[2])}) == 1
    assert copies[3].types == [ItemType.BLOOM_FILTER, ItemType.PAYLOAD_OFF]
    for conn in receivers:
        conn.close()


def test_update_changes_what_is_attached_from_then_on(bus: Bus) -> None:
    def mask(type_: int, value: int) -> bytes:
        return build(type_, U64.pack(value))

    with bus.connect(recv=AttachFlag.TIMESTAMP) as conn:
        conn.send(conn.id)
        conn.command(Command.UPDATE, items=mask(ItemType.ATTACH_FLAGS_RECV, AttachFlag.PIDS))
        conn.send(conn.id)
        assert [m.types for m in conn.inbox()] == [[ItemType.TIMESTAMP], [ItemType.PIDS]]
        with fails(errno.EINVAL):
            conn.command(Command.UPDATE, items=mask(ItemType.ATTACH_FLAGS_RECV, ATTACH_ALL + 1))
        conn.command(Command.UPDATE, items=mask(ItemType.ATTACH_FLAGS_SEND, 0))
        assert conn.info(conn.id).items == []


# --- CONN_INFO, BUS_CREATOR_INFO


def test_info_is_of_the_process_at_hello_and_stays(bus: Bus, root_fd: int) -> None:
    def hello(test: socket.socket) -> tuple[int, dict[int, bytes]]:
        os.fchdir(root_fd)
        libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"at hello"), 0, 0, 0)
        items = build_string(ItemType.CONN_DESCRIPTION, b"described")
        with Connection(f"{bus.name}/bus", flags=HelloFlag.ACCEPT_FD, items=items) as conn:
            wanted = expected()
            libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"afterwards"), 0, 0, 0)
            test.send(conn.id.to_bytes(8, "little"))
            test.recv(2)
            return conn.id, wanted

    with bus.connect() as conn:
        with Child(hello, uid=USER, gid=GROUP, groups=OTHERS) as child:
            id_ = int.from_bytes(child.socket.recv(8), "little")
            info = conn.info(id_)
            child.say()
            _, wanted = child.result()
        assert (info.id, info.flags) == (id_, HelloFlag.ACCEPT_FD)
        assert process_items(info) == wanted
        assert info.one(ItemType.CONN_DESCRIPTION) == b"described\0"
        assert ItemType.TIMESTAMP not in info.types
        assert [t for t in info.types if t in KINDS] == [t for t in KINDS if t in info.types]
        with fails(errno.ENXIO):
            conn.info(id_)


def test_info_shows_no_more_than_its_subject_allows(bus: Bus) -> None:
    with bus.connect(send=AttachFlag.PIDS | AttachFlag.EXE) as shy, bus.connect() as conn:
        assert conn.info(shy.id).types == [ItemType.PIDS, ItemType.EXE]
        assert conn.info(shy.id, kinds=AttachFlag.PIDS | AttachFlag.CREDS).types == [ItemType.PIDS]
        assert conn.info(shy.id, kinds=0).types == []
        assert conn.info(shy.id, kinds=(1 << 64) - 1).types == [ItemType.PIDS, ItemType.EXE]
        with fails(errno.EINVAL):
            conn.info(shy.id, kinds=ATTACH_ALL + 1)


def test_info_finds_by_id_by_name_or_by_both(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as named:
        named.acquire("com.example.named")
        assert conn.info(named.id).id == named.id
        assert conn.info(name="com.example.named").id == named.id
        assert conn.info(named.id, name="com.example.named").id == named.id
        for number, id_, name in (
            (errno.ESRCH, conn.id, "com.example.named"),
            (errno.ESRCH, 0, "com.example.nobody"),
            (errno.ENXIO, 1 << 40, None),
            (errno.EINVAL, 0, None),
        ):
            with fails(number):
                conn.info(id_, name=name)


def test_creator_info_is_of_who_made_the_bus(mount: daemons.Mount, root_fd: int) -> None:
    def make(test: socket.socket) -> dict[int, bytes]:
        os.fchdir(root_fd)
        mask = int(AttachFlag.CREDS | AttachFlag.PIDS | AttachFlag.EXE | AttachFlag.CAPS)
        with Bus(".", f"{USER}-creator", flags=MakeFlag.ACCESS_WORLD, attach=mask):
            test.send(b"ready")
            test.recv(2)
            return expected()

    with Child(make, uid=USER, gid=GROUP) as child:
        child.hear()
        with Connection(mount.path / f"{USER}-creator" / "bus") as conn:
            info, some = conn.creator_info(), conn.creator_info(AttachFlag.PIDS)
            child.say()
            wanted = child.result()
    assert info.one(ItemType.MAKE_NAME) == f"{USER}-creator\0".encode()
    assert info.flags == MakeFlag.ACCESS_WORLD
    shown = (ItemType.CREDS, ItemType.PIDS, ItemType.EXE, ItemType.CAPS)
    assert process_items(info) == {int(t): wanted[t] for t in shown}
    assert some.types == [ItemType.MAKE_NAME, ItemType.PIDS]


# --- pretending


def fake(creds: tuple[int, ...] | None, pids: tuple[int, ...] | None, label: bytes | None) -> bytes:
    items = b""
    if creds:
        items += build(ItemType.CREDS, structs.CREDS.pack(*creds))
    if pids:
        items += build(ItemType.PIDS, structs.PIDS.pack(*pids))
    if label:
        items += build_string(ItemType.SECLABEL, label)
    return items


def test_a_pretender_shows_what_it_claims_and_nothing_else(bus: Bus) -> None:
    creds = (1, 2, 3, 4, 5, 6, 7, 8)
    pids = (os.getpid(), 1, 0)
    items = fake(creds, pids, b"a label")
    items += build_string(ItemType.CONN_DESCRIPTION, b"a-fake")
    with bus.connect(items=items) as pretender, bus.connect(recv=ATTACH_ALL) as conn:
        info = conn.info(pretender.id)
        assert info.types == [
            *(ItemType.CREDS, ItemType.PIDS, ItemType.SECLABEL, ItemType.CONN_DESCRIPTION),
        ]
        assert structs.CREDS.unpack(info.one(ItemType.CREDS)) == creds
        assert structs.PIDS.unpack(info.one(ItemType.PIDS)) == pids
        assert info.one(ItemType.SECLABEL) == b"a label\0"
        # Its messages carry no process at all, neither the real nor the claimed one.
        pretender.acquire("com.example.fake")
        pretender.send(conn.id)
        assert conn.take().types == [
            *(ItemType.OWNED_NAME, ItemType.CONN_DESCRIPTION, ItemType.TIMESTAMP),
        ]


def test_claims_are_checked(bus: Bus) -> None:
    with fails(errno.EINVAL):
        bus.connect(items=fake(None, (1 << 30, 0, 0), None))
    with fails(errno.EINVAL):
        bus.connect(items=build(ItemType.PIDS, bytes(16)))
    with bus.connect(items=fake((UNSET,) * 8, None, None)) as conn:
        info = conn.info(conn.id)
        assert structs.CREDS.unpack(info.one(ItemType.CREDS)) == (UNSET,) * 8


def test_only_the_buss_owner_may_pretend(bus: Bus, root_fd: int) -> None:
    for items, expected_ in (
        (fake((0,) * 8, None, None), "EPERM"),
        (fake(None, (1, 1, 0), None), "EPERM"),
        (fake(None, None, b"label"), "EPERM"),
        (b"", "0"),
    ):

        def hello(items: bytes = items) -> str:
            path = f"{bus.name}/bus"
            return outcome(lambda: Connection(path, items=items, dir_fd=root_fd).close())

        assert in_child(hello, uid=USER) == expected_


def test_notifications_carry_a_timestamp_and_nothing_else(bus: Bus) -> None:
    with bus.connect(recv=ATTACH_ALL) as asking, bus.connect(recv=0) as not_asking:
        for conn in (asking, not_asking):
            conn.match()
        with bus.connect():
            pass
        for conn in (asking, not_asking):
            added, removed = conn.inbox()
            assert added.types == [ItemType.ID_ADD, ItemType.TIMESTAMP]
            assert removed.types == [ItemType.ID_REMOVE, ItemType.TIMESTAMP]
            assert (added.flags, added.src_id, added.cookie) == (MsgFlag.SIGNAL, 0, 0)
            assert (added.size, added.payload_type, added.priority) == (136, 0, 0)
