# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients in containers: namespaces of their own, another root, the mount bound into it."""

from __future__ import annotations

import os
import subprocess
import threading
from errno import EBUSY, ENXIO, EOPNOTSUPP, EROFS
from itertools import pairwise
from pathlib import Path

import pytest

import daemons
import kdbus
from abi_client.building import Memfd
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    Command,
    ItemType,
    ListFlag,
    MakeFlag,
)
from kdbusfs.abi.structs import ID_CHANGE, U64
from mount.raw import PAGE, Bus, Connection, File, Mapping, fails, sealed_memfd
from privilege.conftest import NewPerson
from privilege.people import (
    CAP_IPC_OWNER,
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    Person,
    bind,
    mount,
)
from privilege.test_endpoints import Endpoint

OTHERS = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC
CONTAINERS = {
    "mount": CLONE_NEWNS,
    "mount-pid": CLONE_NEWNS | CLONE_NEWPID,
    "mount-user": CLONE_NEWNS | CLONE_NEWUSER,
    "mount-net": CLONE_NEWNS | CLONE_NEWNET,
    "mount-cgroup": CLONE_NEWNS | CLONE_NEWCGROUP,
    "all": CLONE_NEWNS | CLONE_NEWCGROUP | OTHERS,
}
ROOT_INSIDE = 200000
MAP = f"0 {ROOT_INSIDE} 65536"
"""Root of a container with a user namespace is nobody in particular outside."""


def enter(person: NewPerson, flags: int) -> Person:
    """Somebody in new namespaces, root in there."""
    if flags & CLONE_NEWUSER:
        return person(unshared=flags, uid_map=MAP, gid_map=MAP, inside=0)
    return person(unshared=flags)


def build_root(source: str, read_only: bool, chroot: bool) -> str:
    """In the container: a root directory with *source* bound into it, and nothing else; where
    that is then."""
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    # Of our own, since that of the test may not be walked. What is bound is found from the
    # working directory.
    mount("tmpfs", "/mnt", "tmpfs")
    os.mkdir("/mnt/kdbus")
    bind(source, "/mnt/kdbus", read_only)
    if not chroot:
        return "/mnt/kdbus"
    os.chroot("/mnt")
    os.chdir("/")
    return "/kdbus"


# --- every command


def tour(endpoint: str) -> list[str]:
    """Every command of a connection, between two of them; what was done."""
    done = []
    with Connection(endpoint, recv=ATTACH_ALL) as one, Connection(endpoint) as two:
        one.command(Command.UPDATE, items=build(ItemType.ATTACH_FLAGS_RECV, U64.pack(ATTACH_ALL)))
        done.append("UPDATE")
        one.match(build(ItemType.ID_REMOVE, ID_CHANGE.pack(two.id, 0)), cookie=3)
        one.match(cookie=4)
        one.unmatch(4)
        done.append("MATCH")
        ids = {info.id for info in one.list(ListFlag.UNIQUE)}
        assert {one.id, two.id} <= ids
        assert one.info(two.id).id == two.id
        assert one.creator_info().types[0] == ItemType.MAKE_NAME
        done.append("LIST, INFO")
        done += [_pass_descriptors(two, one), _call(one, two)]
        two.byebye()
        two.close()
        assert ItemType.ID_REMOVE in one.take().types
        done.append("BYEBYE")
    return done


def _pass_descriptors(sender: Connection, receiver: Connection) -> str:
    read, write = os.pipe()
    memfd = sealed_memfd(b"sealed")
    sender.send(receiver.id, b"with descriptors", Memfd(memfd, 6), fds=[read, write])
    message = receiver.take()
    assert (message.data, message.msg_return_flags) == (b"with descriptors", 0)
    assert {ItemType.CREDS, ItemType.PIDS, ItemType.TIMESTAMP} <= set(message.types)
    (inner_read, inner_write), (inner_memfd,) = message.fds, message.memfds
    os.write(inner_write, b"through")
    assert os.read(inner_read, 100) == b"through"
    assert os.pread(inner_memfd.fd, 100, 0) == b"sealed"
    message.close_fds()
    for fd in (read, write, memfd):
        os.close(fd)
    return "SEND, RECV, FREE, descriptors"


def _call(caller: Connection, callee: Connection) -> str:
    def answer() -> None:
        request = callee.take()
        callee.reply(request, b"pong")

    thread = threading.Thread(target=answer)
    thread.start()
    reply = caller.call(callee.id, b"ping", cookie=77)
    thread.join()
    assert reply.data == b"pong"
    caller.free(reply.offset)
    return "synchronous SEND"


EVERY_COMMAND = [
    *("UPDATE", "MATCH", "LIST, INFO", "SEND, RECV, FREE, descriptors", "synchronous SEND"),
    "BYEBYE",
]


def tour_of_nodes(root: str, uid: int) -> list[str]:
    """Make a bus, an endpoint and names; *uid* is ours in the domain's user namespace."""
    name = f"{uid}-inner"
    with Bus(root, name) as bus, Endpoint(str(bus.path), name) as endpoint:
        endpoint.update(build_string(ItemType.NAME, b"com.example.a"))
        with bus.connect() as connection:
            connection.acquire("com.example.a")
            connection.release("com.example.a")
        return sorted(os.listdir(bus.directory))


def tour_by_library(endpoint: str) -> bool:
    """Messages and descriptors through libkdbus."""
    with kdbus.Connection(endpoint) as one, kdbus.Connection(endpoint) as two:
        assert one.has_fd_socket
        read, write = os.pipe()
        one.send(kdbus.Message(b"hello", dst_id=two.id, fds=[read, write]))
        with two.recv(10) as message:
            assert message.payload() == b"hello"
            inner_read, inner_write = message.fds
            assert inner_read is not None
            assert inner_write is not None
            os.write(inner_write.fileno(), b"through")
            assert os.read(inner_read.fileno(), 100) == b"through"
        os.close(read)
        os.close(write)
        return True


def open_for_reading() -> None:
    """From here on nodes are opened read-only: a mount that is so refuses more."""
    File.access = os.O_RDONLY


@pytest.mark.parametrize("chroot", [False, True], ids=["", "chroot"])
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("flags", CONTAINERS.values(), ids=CONTAINERS)
def test_every_command_works_in_a_container_with_the_mount(
    bus: Bus, person: NewPerson, flags: int, read_only: bool, chroot: bool
) -> None:
    inmate = enter(person, flags)
    there = inmate.run(build_root, ".", read_only, chroot)
    endpoint = f"{there}/{bus.name}/bus"
    if read_only:
        with fails(EROFS):
            inmate.open(endpoint)
        inmate.run(open_for_reading)
    assert inmate.run(tour, endpoint) == EVERY_COMMAND
    uid = ROOT_INSIDE if flags & CLONE_NEWUSER else 0
    assert inmate.run(tour_of_nodes, there, uid) == [f"{uid}-inner", "bus"]
    assert inmate.run(tour_by_library, endpoint)


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("flags", CONTAINERS.values(), ids=CONTAINERS)
def test_every_command_works_in_a_container_with_one_buss_directory(
    bus: Bus, person: NewPerson, flags: int, read_only: bool
) -> None:
    inmate = enter(person, flags)
    there = inmate.run(build_root, bus.name, read_only, True)
    if read_only:
        inmate.run(open_for_reading)
    assert inmate.run(os.listdir, there) == ["bus"]
    assert inmate.run(tour, f"{there}/bus") == EVERY_COMMAND
    assert inmate.run(tour_by_library, f"{there}/bus")


@pytest.mark.parametrize("flags", CONTAINERS.values(), ids=CONTAINERS)
def test_descriptors_pass_between_a_container_and_outside(
    bus: Bus, person: NewPerson, flags: int
) -> None:
    inmate = enter(person, flags)
    there = inmate.run(build_root, ".", False, True)
    inner = inmate.connect(f"{there}/{bus.name}/bus")
    with bus.connect() as outer:
        # Outwards: the inmate may not talk to root, but it may answer.
        read, write = os.pipe()
        outer.request(inner.id, b"take this", fds=[read], cookie=5)
        os.close(read)
        request = inner.take()
        assert request.msg_return_flags == 0
        os.write(write, b"from outside")
        assert inmate.run(os.read, request.fds[0], 100) == b"from outside"
        os.close(write)
        inner_read, inner_write = inmate.run(os.pipe)
        inner.reply(request, b"and you this", fds=[inner_read])
        reply = outer.take()
        inmate.run(os.write, inner_write, b"from inside")
        assert os.read(reply.fds[0], 100) == b"from inside"
        reply.close_fds()


# --- domains


def test_a_second_mount_is_an_independent_domain(
    mount: daemons.Mount, bus: Bus, tmp_path: Path
) -> None:
    with (
        daemons.running(tmp_path, mount.pool) as other,
        Bus(other.path, bus.name, flags=MakeFlag.ACCESS_WORLD) as twin,
        twin.connect() as there,
        bus.connect() as here,
    ):
        # Ids start anew, and mean nothing on the other side.
        assert there.id == 2
        assert there.id128 != here.id128
        assert here.id not in {info.id for info in there.list(ListFlag.UNIQUE)}
        there.acquire("com.example.same")
        here.acquire("com.example.same")
        with fails(ENXIO):
            there.send(here.id + 1000, b"lost")
        # Nodes of one can't be passed over the other.
        for fd in (here.fd, bus.fd):
            with fails(EOPNOTSUPP):
                there.send(there.id, b"a node", fds=[fd])


def test_nodes_are_known_where_the_daemon_does_not_see_its_mount_any_more(
    mount: daemons.Mount, tmp_path: Path
) -> None:
    """A container keeps what was unmounted outside; a node passed there would live for ever."""
    with (
        daemons.running(tmp_path, mount.pool) as other,
        Bus(other.path, flags=MakeFlag.ACCESS_WORLD) as bus,
        Person(other.path, unshared=CLONE_NEWNS) as inmate,
    ):
        there = inmate.run(build_root, ".", False, True)
        subprocess.run(["umount", "--lazy", other.path], check=True)
        connection = inmate.connect(f"{there}/{bus.name}/bus")
        with fails(EOPNOTSUPP):
            connection.send(connection.id, b"a node", fds=[connection.get("fd")])


# --- an endpoint as a single file


@pytest.fixture
def single(bus: Bus, person: NewPerson, tmp_path: Path) -> tuple[Person, str]:
    """A container with nothing but an endpoint, bound as a file."""
    inmate = person(unshared=CLONE_NEWNS)
    target = tmp_path / "endpoint"
    target.touch()
    inmate.run(bind, str(bus.path), str(target))
    return inmate, str(target)


def n_warnings(mount: daemons.Mount) -> int:
    return mount.log.read_text().count("second open of one inode")


def build_file(source: str) -> str:
    """In the container: *source* bound as a file, where everybody may walk."""
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", "/mnt", "tmpfs")
    Path("/mnt/endpoint").touch()
    mount(source, "/mnt/endpoint", flags=MS_BIND)
    return "/mnt/endpoint"


@pytest.mark.parametrize("uid", [None, 1000], ids=["root", "user"])
def test_connections_of_one_user_share_an_endpoint_bound_as_a_file(
    mount: daemons.Mount, bus: Bus, person: NewPerson, uid: int | None
) -> None:
    """Each has slices of its own, and the end of one leaves the other as it is."""
    inmate, before = person(unshared=CLONE_NEWNS), n_warnings(mount)
    there = inmate.run(build_file, str(bus.path))
    user = inmate if uid is None else inmate.fork(uid)
    assert user.run(talk_on_one_inode, there)
    assert user.run(tour_alone, there)
    assert user.run(tour, there) == EVERY_COMMAND
    assert n_warnings(mount) == before


def talk_on_one_inode(path: str) -> bool:
    with Connection(path) as first, Connection(path, pool_size=16 * PAGE) as second:
        kept = []
        for n in range(40):
            for sender, to in ((first, second), (second, first)):
                sender.send(to.id, b"%d to %d, %d" % (sender.id, to.id, n))
                kept.append((to, to.recv()))
                assert kept[-1][1].data == b"%d to %d, %d" % (sender.id, to.id, n)
        spans = sorted((m.offset, m.offset + m.slice_size) for _, m in kept)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(m.offset + m.slice_size <= to.pool_size for to, m in kept)
        for to, m in kept:
            assert to.pool.read(m.offset, m.slice_size) == m.raw
            # What is told to one is not the other's to free.
            with fails(ENXIO):
                (second if to is first else first).free(m.offset)
        first.close()
        for m in [m for to, m in kept if to is second]:
            assert second.pool.read(m.offset, m.slice_size) == m.raw
            second.free(m.offset)
        second.send(second.id, b"x" * 5000)
        assert second.take().data == b"x" * 5000
        with Connection(path) as third:
            third.send(second.id, b"from a third")
            assert second.take().data == b"from a third"
    return True


def test_the_first_pool_on_an_inode_is_the_largest(single: tuple[Person, str]) -> None:
    inmate, path = single
    assert inmate.run(ask_for_more, path)


def ask_for_more(path: str) -> bool:
    with Connection(path, pool_size=4 * PAGE) as first:
        with fails(EBUSY):
            Connection(path, pool_size=8 * PAGE)
        with Connection(path, pool_size=4 * PAGE) as second:
            second.send(first.id, b"still there")
            return first.take().data == b"still there"


def test_the_pool_of_an_inode_stays_while_any_of_its_files_is_open(
    single: tuple[Person, str],
) -> None:
    inmate, path = single
    assert inmate.run(say_hello_late, path)


def say_hello_late(path: str) -> bool:
    with File(path) as late:
        Connection(path).close()
        with Connection(f"/proc/self/fd/{late.fd}", pool_size=4 * PAGE) as connection:
            connection.send(connection.id, b"y" * 100)
            return connection.take().data == b"y" * 100


def test_others_get_no_connection_on_an_inode_that_is_open(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    """They would see what is in its pool."""
    inmate, before = person(unshared=CLONE_NEWNS), n_warnings(mount)
    there = inmate.run(build_file, str(bus.path))
    # Before it has anything that they would inherit.
    others = [
        inmate.fork(1000),
        inmate.fork(0, groups=[4711]),
        inmate.fork(without=[CAP_IPC_OWNER]),
    ]
    first = inmate.connect(there)
    for other in others:
        with fails(EBUSY):
            other.open(there)
    # One line says it; more of them would be a way to fill the log.
    assert n_warnings(mount) == before + 1
    # The one that is open is unharmed, and afterwards it is another's turn.
    assert first.list(ListFlag.UNIQUE)
    first.close()
    assert others[0].run(tour_alone, there)


def tour_alone(path: str) -> bool:
    with Connection(path) as connection:
        connection.send(connection.id, b"to myself")
        return connection.take().data == b"to myself"


def test_a_file_that_is_opened_again_shows_nothing_of_the_pool_before(
    single: tuple[Person, str],
) -> None:
    inmate, path = single
    assert inmate.run(leave_a_secret, path)
    assert inmate.run(read_all, path).count(b"secret") == 0


def leave_a_secret(path: str) -> bool:
    with Connection(path) as connection:
        for size in (8, 5000, 100000):
            connection.send(connection.id, b"secret" * (size // 6))
        while connection.inbox():
            pass
        return b"secret" in connection.pool.read(0, connection.pool_size)


def read_all(path: str) -> bytes:
    with Connection(path) as connection:
        return connection.pool.read(0, connection.pool_size).rstrip(b"\0")


def test_a_mapping_that_outlives_its_file_shows_nothing_of_the_next_pool(
    bus: Bus, person: NewPerson
) -> None:
    inmate = person(unshared=CLONE_NEWNS)
    path = inmate.run(build_file, str(bus.path))
    other = inmate.fork(1000)
    keeper = inmate.make(map_and_close, path)
    try:
        successor = other.connect(path)
    except OSError as error:
        # Where the mapping keeps the file open, the next one has to wait for it.
        assert error.errno == EBUSY  # noqa: PT017
        keeper.unmap()
        successor = other.connect(path)
    else:
        successor.send(successor.id, b"secret" * 1000)
        assert b"secret" not in keeper.read(0, 1 << 16)
    assert successor.list(ListFlag.UNIQUE)


def map_and_close(path: str) -> Mapping:
    connection = Connection(path)
    pool = connection.pool
    connection._pool = None
    connection.close()
    return pool
