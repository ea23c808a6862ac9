# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on the daemon and, through it, on others (docs/security.md names them one by one).

ALICE is the attacker unless a test says otherwise. Most end with `alive`: a bystander's messages
and descriptors still arrive, in time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    EBUSY,
    EINVAL,
    EMEDIUMTYPE,
    EMFILE,
    ENOMEM,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    errorcode,
)
from pathlib import Path

import pytest

import daemons
from abi_client.building import Memfd
from kdbusfs import mount as mounting
from kdbusfs.abi.items import build
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    Command,
    ExtensionCommand,
    HelloFlag,
    ItemType,
    ListFlag,
    MakeFlag,
    MsgFlag,
)
from kdbusfs.abi.structs import CREDS, I32, PIDS, U64
from kdbusfs.peer.closers import CROWDED, MAX_THREADS, PER_USER
from kdbusfs.user_error import UserError
from mount.processes import fds_of
from mount.raw import (
    MIB,
    Bus,
    Connection,
    File,
    Mapping,
    Memory,
    fails,
    libc,
    make_message,
    monotonic_ns,
    outcome,
    sealed_memfd,
)
from privilege import hostile, uring
from privilege.conftest import NewPerson
from privilege.people import CLONE_NEWNS, CLONE_NEWUSER, Person, bind
from privilege.test_policy import ALICE, BOB, CAROL

SOON = 10.0
"""Seconds in which what is nobody else's business gets done."""


def path(bus: Bus) -> str:
    return f"{bus.name}/bus"


def alive(bus: Bus, person: NewPerson) -> bool:
    """Whether a bystander can do without delay what it always could."""
    return bool(person(CAROL).run(_bystand, path(bus)) < SOON)


def _bystand(endpoint: str) -> float:
    start = time.monotonic()
    with Connection(endpoint) as one, Connection(endpoint) as two:
        read, write = os.pipe()
        one.send(two.id, b"hello", fds=[write])
        os.close(write)
        message = two.take()
        assert message.data == b"hello"
        message.close_fds()
        # All copies of the pipe's end are closed: the daemon's, too.
        assert os.read(read, 1) == b""
        os.close(read)
    return time.monotonic() - start


def cancel_item(fd: int) -> bytes:
    return build(ItemType.CANCEL_FD, I32.pack(fd))


def try_to_cancel(connection: Connection, fd: int) -> str:
    """What a call with that cancel descriptor, which nobody will answer, ends with."""
    try:
        connection.call(connection.id, b"x", timeout=0.05, command_items=cancel_item(fd))
    except OSError as error:
        connection.inbox()
        return errorcode[error.errno or 0]
    return "answered"


def send_fds(connection: Connection, fds: list[int], **message: object) -> str:
    """What sending descriptors to oneself ends with; they are dropped again."""
    try:
        connection.send(connection.id, b"x", fds=fds, **message)
    except OSError as error:
        return errorcode[error.errno or 0]
    connection.drop()
    return "sent"


# --- descriptors that make the daemon ask somebody


def test_an_epoll_instance_that_watches_the_bus_is_no_cancel_descriptor(
    bus: Bus, person: NewPerson
) -> None:
    """To poll it is to poll the bus, whose answer the daemon would wait for itself."""
    assert person(ALICE).run(_cancel_by_epoll, path(bus)) == "EINVAL"
    assert alive(bus, person)


def _cancel_by_epoll(endpoint: str) -> str:
    with Connection(endpoint) as connection, select.epoll() as epoll:
        connection.send(connection.id, b"makes it readable")
        epoll.register(connection.fd, select.EPOLLIN)
        return try_to_cancel(connection, epoll.fileno())


def test_what_may_be_a_cancel_descriptor(bus: Bus, person: NewPerson) -> None:
    assert person(ALICE).run(_cancel_by_all_kinds, path(bus)) == {
        "eventfd": "ETIMEDOUT",
        "pipe": "ETIMEDOUT",
        "socket": "ETIMEDOUT",
        "timerfd or pidfd": "ETIMEDOUT",
        "udp socket": "ETIMEDOUT",
        "terminal": "EINVAL",
        "device": "EINVAL",
        "socket of another family": "EINVAL",
        "io_uring": "EINVAL",
        "the bus": "EINVAL",
        "control": "EINVAL",
        "memfd": "EINVAL",
        "directory": "EINVAL",
        "path": "EBADF",
        "closed": "EBADF",
        "negative": "EBADF",
    }
    assert alive(bus, person)


def _cancel_by_all_kinds(endpoint: str) -> dict[str, str]:
    ours, theirs = socket.socketpair()
    with Connection(endpoint) as connection, File("control") as control, ours, theirs:
        kinds = {
            "eventfd": os.eventfd(0),
            "pipe": os.pipe()[0],
            "socket": ours.fileno(),
            "timerfd or pidfd": os.pidfd_open(os.getpid()),
            "udp socket": socket.socket(type=socket.SOCK_DGRAM).detach(),
            "terminal": os.openpty()[1],
            "device": os.open("/dev/null", os.O_RDONLY),
            "socket of another family": _socket_of_another_family(),
            "io_uring": uring.set_up(),
            "the bus": connection.fd,
            "control": control.fd,
            "memfd": os.memfd_create("x"),
            "directory": os.open(".", os.O_RDONLY),
            "path": os.open(".", os.O_PATH),
            "closed": 999,
            "negative": -1,
        }
        return {kind: try_to_cancel(connection, fd) for kind, fd in kinds.items()}


def _socket_of_another_family() -> int:
    """Of those that the kernel may have been built without, the first it has."""
    kinds = [(socket.AF_VSOCK, socket.SOCK_STREAM), (socket.AF_ALG, socket.SOCK_SEQPACKET)]
    for family, kind in kinds[:-1]:
        with contextlib.suppress(OSError):
            return socket.socket(family, kind).detach()
    return socket.socket(*kinds[-1]).detach()


@pytest.fixture(params=[True, False], ids=["allow_other", "private"])
def dead_file(request: pytest.FixtureRequest, person: NewPerson) -> Iterator[Person]:
    """ALICE, with a file open (`get("fd")`) whose server has stopped answering."""
    keeper = person(unshared=CLONE_NEWNS)
    keeper.run(_make_private)
    device = keeper.run(hostile.mount_it, ALICE, request.param)
    server = keeper.fork()
    server.start("run", hostile.serve, [device])
    keeper.run(os.close, device)
    yield keeper.fork(ALICE)
    server.end()


def _make_private() -> None:
    bind("/tmp", "/tmp")


def test_a_file_whose_server_is_dead_is_no_cancel_descriptor(
    bus: Bus, person: NewPerson, dead_file: Person
) -> None:
    file = dead_file.run(os.open, hostile.FILE, os.O_RDONLY)
    connection = dead_file.connect(path(bus))
    assert dead_file.run(try_to_cancel, connection, file) == "EINVAL"
    assert alive(bus, person)
    assert dead_file.run(_cancel_by_epoll_of, connection, file) == "EINVAL"
    assert alive(bus, person)


def _cancel_by_epoll_of(connection: Connection, file: int) -> str:
    epoll = select.epoll()
    # To register it is to poll it, which is the attacker's own to wait for: so let a thread.
    thread = threading.Thread(target=epoll.register, args=(file, select.EPOLLIN), daemon=True)
    thread.start()
    return try_to_cancel(connection, epoll.fileno())


def test_a_file_whose_server_is_dead_can_be_passed_and_holds_up_nobody(
    mount: daemons.Mount, bus: Bus, person: NewPerson, dead_file: Person
) -> None:
    file = dead_file.run(os.open, hostile.FILE, os.O_RDONLY)
    connection = dead_file.connect(path(bus))
    assert dead_file.run(send_fds, connection, [file] * 16) == "sent"
    with fails(EMEDIUMTYPE):
        connection.send(connection.id, Memfd(file, 10))
    assert alive(bus, person)
    # More of them than the daemon is willing to wait for.
    results = {dead_file.run(send_fds, connection, [file] * 16) for _ in range(150)}
    assert results == {"sent", "EMFILE"}
    assert fds_of(mount.pid) < 2400
    assert alive(bus, person)


def test_many_users_whose_files_are_never_closed_have_a_bound_together(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    """As somebody with many subordinate uids has them."""
    n_before = n_threads(mount.pid)
    keeper = person(unshared=CLONE_NEWNS)
    keeper.run(_make_private)
    device = keeper.run(hostile.mount_it, 0, True)
    server = keeper.fork()
    server.start("run", hostile.serve, [device])
    keeper.run(os.close, device)
    file = keeper.run(os.open, hostile.FILE, os.O_RDONLY)
    keeper.run(_send_as_others, path(bus), file)
    daemons.wait_until(
        lambda: n_threads(mount.pid) >= n_before + MAX_THREADS - 16, "not all threads are used"
    )
    assert n_threads(mount.pid) <= n_before + MAX_THREADS + 16
    assert alive(bus, person)
    with bus.connect() as other, open("/etc/passwd") as ordinary:
        start = time.monotonic()
        other.send(other.id, fds=[ordinary.fileno()])
        other.take().close_fds()
        assert time.monotonic() - start < SOON
    server.end()
    # Its file system is gone, and so all can be closed.
    daemons.wait_until(lambda: n_threads(mount.pid) <= n_before + 16, "threads are left")


def n_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _send_as_others(endpoint: str, file: int) -> None:
    """As many users as it takes to have all threads that close: four each, then one each."""
    connections = []
    for uid in range(5000, 5000 + CROWDED // PER_USER + MAX_THREADS - CROWDED + 20):
        os.setresuid(uid, uid, 0)
        connections.append(_small_connection(endpoint))
        connections[-1].send(connections[-1].id, fds=[file] * 8)
        os.setresuid(0, 0, 0)
    for connection in connections:
        connection.close()


def test_a_root_directory_whose_server_is_dead_holds_up_nobody(bus: Bus, person: NewPerson) -> None:
    """The daemon compares root directories to know whom to tell EXE."""
    keeper = person(unshared=CLONE_NEWNS)
    keeper.run(_make_private)
    device = keeper.run(hostile.mount_it, 0, True)
    server = keeper.fork()
    server.start("run", hostile.serve, [device])
    keeper.run(os.close, device)
    prisoner = keeper.fork()
    opened = prisoner.open(path(bus))
    prisoner.run(os.chroot, hostile.DIRECTORY)
    prisoner.run(os.open, "/file", os.O_RDONLY)
    receiver = prisoner.make(_hello_on, opened.get("fd"))
    receiver.send(receiver.id, b"who am I?")
    assert ItemType.EXE in receiver.take().types
    assert alive(bus, person)
    server.end()


def _hello_on(fd: int) -> Connection:
    connection = Connection.__new__(Connection)
    connection.fd, connection.pool_size = fd, 1 << 16
    connection.hello(1, ATTACH_ALL, ATTACH_ALL, 1 << 16, b"")
    return connection


def test_a_root_directory_with_a_path_longer_than_any_buffer(bus: Bus, person: NewPerson) -> None:
    """The daemon can't tell it from others then, and tells no EXE; the message arrives."""
    maps = {"uid_map": f"0 {ALICE} 1", "gid_map": f"0 {ALICE} 1"}
    alice = person(ALICE, unshared=CLONE_NEWUSER, **maps)
    receiver = alice.connect(path(bus), recv=ATTACH_ALL)
    sender = alice.connect(path(bus))
    opened = alice.open(path(bus))
    top = tempfile.mkdtemp()
    try:
        os.chmod(top, 0o777)
        alice.run(_go_deep, top)
        sender.send(receiver.id, b"from below")
        message = receiver.take()
        assert message.data == b"from below"
        assert ItemType.EXE not in message.types
        assert ItemType.PIDS in message.types
        # One that says HELLO from there is no less a connection.
        inside = alice.make(_hello_on, opened.get("fd"))
        inside.send(receiver.id, b"too")
        assert receiver.take().data == b"too"
    finally:
        alice.end()
        subprocess.run(["rm", "-r", top], check=True)


def _go_deep(top: str) -> None:
    os.chdir(top)
    for _ in range(22):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chroot(".")


def test_a_socket_that_lingers_holds_up_nobody(bus: Bus, person: NewPerson) -> None:
    """Closed last by the daemon, with data that its peer never takes."""
    alice = person(ALICE)
    assert alice.run(_send_lingering, path(bus)) == "sent"
    assert alive(bus, person)


def _send_lingering(endpoint: str) -> str:
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind((b"127.0.0.1", 0))
    listener.listen()
    ours = socket.socket(socket.AF_INET)
    ours.connect(listener.getsockname())
    theirs, _ = listener.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    with Connection(endpoint) as connection:
        connection.send(connection.id, b"x", fds=[ours.fileno()])
        # No copy is left but the one in the message: neither here nor with the test.
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, ours.detach())
        connection.drop()
    theirs.detach()
    return "sent"


# --- files of kdbusfs itself, and sockets


def test_nodes_and_unix_sockets_are_not_passed(bus: Bus, person: NewPerson) -> None:
    results = person(ALICE).run(_pass_own_kind, path(bus))
    assert set(results.values()) == {"ENOTSUP"}
    assert alive(bus, person)


def _pass_own_kind(endpoint: str) -> dict[str, str]:
    pair = socket.socketpair()
    with Connection(endpoint) as connection, File(endpoint) as unbound, File("control") as control:
        kinds = {
            "itself": connection.fd,
            "unbound": unbound.fd,
            "control": control.fd,
            "unix socket": pair[0].fileno(),
        }
        results = {kind: send_fds(connection, [fd]) for kind, fd in kinds.items()}
        with fails(EMEDIUMTYPE):
            connection.send(connection.id, Memfd(connection.fd, 8))
    for end in pair:
        end.close()
    return results


def test_a_path_descriptor_of_an_endpoint_opens_no_door(mount: object, person: NewPerson) -> None:
    """O_PATH descriptors may be passed; to make more of one takes the rights of who tries."""
    alice, bob = person(ALICE), person(BOB)
    alice.make(_bus, f"{ALICE}-open", MakeFlag.ACCESS_WORLD)
    alice.make(_bus, f"{ALICE}-shut", 0)
    receiver = bob.connect(f"{ALICE}-open/bus")
    sender = person().connect(f"{ALICE}-open/bus")
    door = sender.person.run(os.open, f"{ALICE}-shut/bus", os.O_PATH)
    with fails(EBADF):
        sender.person.run(fcntl.ioctl, door, Command.BYEBYE)
    sender.send(receiver.id, b"a door", fds=[door])
    (got,) = receiver.take().fds
    with fails(EACCES):
        bob.open(f"/proc/self/fd/{got}")


def _bus(name: str, flags: int) -> Bus:
    return Bus(".", name, flags=flags)


def test_descriptors_go_to_the_caller_who_receives_not_to_who_said_hello(
    bus: Bus, person: NewPerson
) -> None:
    opener = person()
    connection = opener.connect(path(bus))
    heir = opener.fork(BOB)
    read, write = os.pipe()
    with bus.connect() as sender:
        sender.send(connection.id, b"for who asks", fds=[read])
    before = opener.run(fds_of)
    message = connection.held_by(heir).take()
    os.write(write, b"hello")
    assert heir.run(os.read, message.fds[0], 10) == b"hello"
    assert opener.run(fds_of) == before
    os.close(read)
    os.close(write)


def test_the_socket_for_descriptors_has_to_lead_back_to_its_user(
    bus: Bus, person: NewPerson
) -> None:
    """Whoever listened there would take root's word for what the daemon sends (SO_PASSCRED)."""
    name = f"\0kdbusfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen()
        results = person(ALICE).run(_offer_sockets, path(bus), name)
    assert results == {
        "a pair": "0",
        "a stream pair": "EINVAL",
        "a datagram pair": "EINVAL",
        "root's listener": "EINVAL",
        "no socket": "EINVAL",
        "TCP": "EINVAL",
        "the bus": "EINVAL",
        "closed": "EBADF",
    }
    assert alive(bus, person)


def _offer_sockets(endpoint: str, name: str) -> dict[str, str]:
    kinds = {
        "a pair": socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach(),
        "a stream pair": socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)[0].detach(),
        "a datagram pair": socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].detach(),
        "no socket": os.eventfd(0),
        "TCP": socket.socket(socket.AF_INET).detach(),
        "closed": 999,
    }
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.connect(name)
    kinds["root's listener"] = ours.detach()
    results = {}
    with Connection(endpoint) as connection:
        kinds["the bus"] = connection.fd
        for kind, fd in kinds.items():
            try:
                connection.command(ExtensionCommand.FD_SOCKET, fd)
            except OSError as error:
                results[kind] = errorcode[error.errno or 0]
            else:
                results[kind] = "0"
    return results


def test_an_o_path_descriptor_is_no_socket(bus: Bus, person: NewPerson) -> None:
    alice = person(ALICE)
    with fails(EBADF):
        alice.run(_offer_path_of_socket, alice.connect(path(bus)))
    assert alive(bus, person)


def _offer_path_of_socket(connection: Connection) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        door = os.open(f"/proc/self/fd/{ours.fileno()}", os.O_PATH)
        try:
            connection.command(ExtensionCommand.FD_SOCKET, door)
        finally:
            os.close(door)


def test_sockets_of_all_families_pass(bus: Bus, person: NewPerson) -> None:
    """Some have no name to be asked for (AF_ALG), which is no reason for a fault."""
    results = person(ALICE).run(_pass_sockets, path(bus))
    assert results.pop("AF_UNIX") == "ENOTSUP"
    assert results
    assert set(results.values()) == {"sent"}


def _pass_sockets(endpoint: str) -> dict[str, str]:
    results = {}
    with Connection(endpoint) as connection:
        for family in socket.AddressFamily:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                try:
                    ours = socket.socket(family, kind)
                except OSError:
                    continue
                results[family.name] = send_fds(connection, [ours.fileno()])
                ours.close()
                break
    return results


@pytest.mark.parametrize("n_empty", [0, 5])
def test_a_connection_in_the_queue_of_its_own_socket_ends(
    bus: Bus, person: NewPerson, n_empty: int
) -> None:
    """Nobody but the daemon has that socket any more, and so nobody else could empty it."""
    alice = person(ALICE)
    victim = alice.connect(path(bus))
    alice.run(_queue_connection_at_its_socket, victim, n_empty)
    id_ = victim.id
    alice.end()
    with bus.connect() as watcher, fails(ENXIO):
        watcher.info(id_)


def _queue_connection_at_its_socket(connection: Connection, n_empty: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Packets without data look like the end of all.
    for _ in range(n_empty):
        ours.send(b"")
    socket.send_fds(ours, [b"" if n_empty else b"x"], [connection.fd])
    connection.command(ExtensionCommand.FD_SOCKET, theirs.fileno())
    with pytest.raises(BrokenPipeError):
        socket.send_fds(ours, [b"x"], [connection.fd])
    theirs.close()
    _kept.append(ours)


_kept: list[object] = []


def test_an_io_uring_is_not_passed(bus: Bus, person: NewPerson) -> None:
    """It could have a connection among its files, in whose own queue it then lies for ever."""
    assert person(ALICE).run(_pass_ring, path(bus)) == ["ENOTSUP", "ENOTSUP", "EMEDIUMTYPE"]
    assert alive(bus, person)


def _pass_ring(endpoint: str) -> list[str]:
    ring = uring.set_up()
    with Connection(endpoint) as connection:
        results = [send_fds(connection, [ring]), send_fds(connection, [0, ring, 0])]
        results.append(outcome(lambda: connection.send(connection.id, Memfd(ring, 8))))
        with fails(EAGAIN):
            connection.recv()
    os.close(ring)
    return results


# --- more than one's share


@pytest.mark.parametrize("size", [1 << 62, 1 << 47, 1 << 46, 1 << 40, (1 << 64) - 4096])
def test_a_huge_pool_is_refused(bus: Bus, person: NewPerson, size: int) -> None:
    alice = person(ALICE)
    with fails(ENOMEM):
        alice.connect(path(bus), pool_size=size)
    assert alive(bus, person)


def test_pools_take_no_memory_until_they_are_filled(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    alice = person(ALICE)
    before = _memory(mount.pid)
    for _ in range(50):
        alice.connect(path(bus), pool_size=1 << 30)
    assert _memory(mount.pid) - before < 64 << 20
    assert alive(bus, person)


def _memory(pid: int) -> int:
    """Bytes resident (statm in proc(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_one_user_can_have_no_more_than_its_share_of_everything(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    before = fds_of(mount.pid)
    alice = person(ALICE)
    counts = alice.run(_take_all, path(bus))
    assert counts == {"buses": (16, EMFILE), "connections": (1024, EMFILE), "files": (3072, EMFILE)}
    # Others are not concerned, nor is root.
    person(BOB).open(path(bus))
    assert alive(bus, person)
    alice.end()
    daemons.wait_until(lambda: fds_of(mount.pid) <= before + 8, "descriptors are left")
    person(ALICE).open(path(bus))


def test_pools_that_are_closed_and_still_mapped_count(bus: Bus, person: NewPerson) -> None:
    """Their memory is there as long as they are mapped: by closing them nobody gets more."""
    alice = person(ALICE)
    assert alice.run(_map_and_close, path(bus)) == (1024, EMFILE)
    assert alive(bus, person)
    alice.run(_unmap_all)
    alice.connect(path(bus))


_mapped: list[Mapping] = []


def _map_and_close(endpoint: str) -> tuple[int, int]:
    n = 0
    try:
        while True:
            connection = _small_connection(endpoint)
            _mapped.append(Mapping(connection.fd, connection.pool_size))
            os.close(connection.fd)
            connection.fd = -1
            n += 1
    except OSError as error:
        return n, error.errno or 0


def _unmap_all() -> None:
    for mapping in _mapped:
        mapping.unmap()


def test_nobody_opens_control_without_end(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    """Each takes memory of the daemon, though no descriptor."""
    before = fds_of(mount.pid)
    alice = person(ALICE)
    assert alice.run(_open_control) == (8192, EMFILE)
    assert fds_of(mount.pid) <= before + 8
    person(BOB).open("control")
    assert alive(bus, person)
    alice.end()
    person(ALICE).open("control")


def test_nobody_holds_nodeids_without_end(bus: Bus, person: NewPerson) -> None:
    """The daemon is told of no open: only of the lookup that came before."""
    alice = person(ALICE)
    assert alice.run(_open_paths, path(bus)) == (16384, EMFILE)
    person(BOB).open(path(bus))
    assert alive(bus, person)
    alice.end()
    daemons.wait_until(lambda: person(ALICE).run(_opens, path(bus)), "nodeids are left")


def _open_paths(endpoint: str) -> tuple[int, int]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    n = 0
    try:
        while True:
            os.open(endpoint, os.O_PATH)
            n += 1
    except OSError as error:
        return n, error.errno or 0


def _opens(endpoint: str) -> bool:
    try:
        os.close(os.open(endpoint, os.O_RDWR))
    except OSError:
        return False
    return True


def _open_control() -> tuple[int, int]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    n = 0
    try:
        while True:
            os.open("control", os.O_RDWR)
            n += 1
    except OSError as error:
        return n, error.errno or 0


def test_queued_memfds_are_a_share_of_the_daemons_table(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    """No quota of kdbus counts them; what one user can't have more of is still there for others."""
    limit = int(re.findall(r"Max open files +(\d+)", _limits(mount.pid))[0])
    if limit > 100_000:
        pytest.skip(f"filling a share of {limit} open files takes too long")
    before = fds_of(mount.pid)
    alice = person(ALICE)
    assert alice.run(_queue_memfds, path(bus), limit) == EMFILE
    n_taken = fds_of(mount.pid) - before
    assert limit // 5 < n_taken < limit // 2
    # Root and others go on, and so do its own messages without descriptors.
    assert alive(bus, person)
    with bus.connect(recv=ATTACH_ALL) as root:
        root.send(root.id, b"x", fds=[0])
        message = root.take()
        assert {ItemType.CREDS, ItemType.PIDS, ItemType.CGROUP} <= set(message.types)
        message.close_fds()
    one = alice.connect(path(bus))
    one.send(one.id, b"x")
    alice.end()
    daemons.wait_until(lambda: fds_of(mount.pid) <= before + 8, "descriptors are left")


def _limits(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def _queue_memfds(endpoint: str, limit: int) -> int:
    """The errno with which it ends to send memfds to more and more connections."""
    memfd = Memfd(sealed_memfd(b"x"), 1)
    with Connection(endpoint) as sender:
        for _ in range(limit // 4096 + 1):
            receiver = Connection(endpoint, pool_size=4 * MIB)
            _kept_connections.append(receiver)
            try:
                for _ in range(256):
                    sender.send(receiver.id, *[memfd] * 16)
            except OSError as error:
                return error.errno or 0
    return 0


_kept_connections: list[Connection] = []


def test_attributes_and_space_can_not_be_asked_for(bus: Bus, person: NewPerson) -> None:
    """lsattr(1) and others make the kernel open the file a second time, which is not logged."""
    results = person(ALICE).run(_ask_for_attributes, path(bus))
    assert set(results) == {"control", "unbound", "connection"}
    assert all(found == ["ENOTTY", "ENOTSUP"] for found in results.values())
    assert alive(bus, person)


def _ask_for_attributes(endpoint: str) -> dict[str, list[str]]:
    get_flags = 0x80086601
    results = {}
    with File("control") as control, File(endpoint) as unbound, Connection(endpoint) as connection:
        for name, file in (("control", control), ("unbound", unbound), ("connection", connection)):
            results[name] = [
                outcome(lambda file=file: fcntl.ioctl(file.fd, get_flags, bytes(8))),  # type: ignore[misc]
                _fallocate(file.fd),
            ]
    return results


def _fallocate(fd: int) -> str:
    result = libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(4096))
    return errorcode[ctypes.get_errno()] if result < 0 else "0"


def _take_all(endpoint: str) -> dict[str, tuple[int, int]]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept: list[File] = []

    def count(make: object) -> tuple[int, int]:
        n = len(kept)
        try:
            while True:
                kept.append(make(len(kept)))  # type: ignore[operator]
        except OSError as error:
            return len(kept) - n, error.errno or 0

    return {
        "buses": count(lambda n: Bus(".", f"{ALICE}-{n}")),
        "connections": count(lambda n: _small_connection(endpoint)),
        "files": count(lambda n: File(endpoint)),
    }


def _small_connection(endpoint: str) -> Connection:
    """One whose file is closed again if it can't be a connection."""
    return Connection(endpoint, pool_size=4096)


# --- setuid programs, faked identities


def test_a_setuid_program_says_nothing_on_an_inherited_connection(
    bus: Bus, person: NewPerson, tmp_path: Path
) -> None:
    """What it prints goes to write(2), which is no way to send; neither is its input a message."""
    root = person()
    program = root.run(_setuid_cat, str(tmp_path))
    alice = root.fork(ALICE)
    assert f"Uid:\t{ALICE}\t0\t0\t0" in alice.run(_cat_itself, program)
    with bus.connect() as receiver:
        status, errors = alice.run(_cat_between_connections, path(bus), program)
        assert (status, receiver.inbox()) == (1, [])
    assert "Invalid argument" in errors
    assert alive(bus, person)


def _setuid_cat(directory: str) -> int:
    """An open setuid-root program, to be run by /proc/self/fd: nobody else can walk there."""
    target = shutil.copy("/bin/cat", directory)
    os.chmod(target, 0o4755)
    return os.open(target, os.O_PATH)


def _cat(program: int, *words: str, **files: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cat", *words],
        executable=f"/proc/self/fd/{program}",
        pass_fds=[program],
        text=True,
        check=False,
        **files,  # type: ignore[call-overload]
    )


def _cat_itself(program: int) -> str:
    return _cat(program, "/proc/self/status", stdout=subprocess.PIPE).stdout


def _cat_between_connections(endpoint: str, program: int) -> tuple[int, str]:
    with Connection(endpoint) as connection:
        connection.send(connection.id, b"input")
        reading = _cat(program, stdin=connection.fd, stderr=subprocess.PIPE)
        writing = _cat(program, "/proc/self/status", stdout=connection.fd, stderr=subprocess.PIPE)
        assert reading.returncode == writing.returncode
        return writing.returncode, reading.stderr + writing.stderr


def test_metadata_follows_the_credentials_at_send_not_at_hello(bus: Bus, person: NewPerson) -> None:
    """As with a setuid program that sends on what it inherited: it is told as it is by then."""
    alice = person(ALICE)
    connection = alice.connect(path(bus), send=ATTACH_ALL)
    pidfd = os.pidfd_open(alice.pid)
    taken = ctypes.CDLL(None).syscall(438, pidfd, connection.get("fd"), 0)
    os.close(pidfd)
    sender = Connection.__new__(Connection)
    sender.fd, sender.pool_size, sender._pool = taken, connection.get("pool_size"), None
    receiver = person(0).connect(path(bus), recv=ATTACH_ALL)
    sender.send(receiver.id, b"root speaks")
    told = receiver.take()
    assert CREDS.unpack(told.one(ItemType.CREDS))[:4] == (0, 0, 0, 0)
    assert PIDS.unpack(told.one(ItemType.PIDS))[0] == os.getpid()
    sender.close()


@pytest.mark.parametrize(
    "name", ["a\nUid:\t0\t0\t0\t0", "x\nGroups:\t0", "\nNSpid:\t1\n", "a\\nUid:\t0", "\xff\n\r"]
)
def test_a_process_can_not_lie_by_its_name(bus: Bus, person: NewPerson, name: str) -> None:
    """/proc/<tid>/status has it in front of all that counts."""
    alice = person(ALICE, ALICE, [BOB])
    raw = name.encode("latin-1")[:15]
    alice.run(_rename, raw)
    sender = alice.connect(path(bus))
    receiver = person(ALICE).connect(path(bus), recv=ATTACH_ALL)
    sender.send(receiver.id, b"who am I?")
    told = receiver.take()
    assert CREDS.unpack(told.one(ItemType.CREDS)) == (ALICE,) * 8
    assert told.one(ItemType.AUXGROUPS) == U64.pack(BOB)
    assert PIDS.unpack(told.one(ItemType.PIDS))[0] == alice.pid
    assert told.one(ItemType.TID_COMM) == raw + b"\0"


def _rename(name: bytes) -> None:
    assert ctypes.CDLL(None).prctl(15, ctypes.c_char_p(name), 0, 0, 0) == 0


def test_an_argument_area_of_all_memory_is_not_read(bus: Bus, person: NewPerson) -> None:
    """PR_SET_MM lets a process say where its arguments are (prctl(2))."""
    alice = person(ALICE)
    alice.run(_claim_arguments, 256 << 20)
    sender = alice.connect(path(bus))
    receiver = person(ALICE).connect(path(bus), recv=ATTACH_ALL)
    start = time.monotonic()
    for _ in range(20):
        sender.send(receiver.id, b"x")
        assert len(receiver.take().one(ItemType.CMDLINE)) <= 32769
    assert time.monotonic() - start < SOON


def _claim_arguments(size: int) -> None:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 65
    memory_start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    (start_code, end_code, start_stack) = (int(fields[i - 3]) for i in (26, 27, 28))
    (start_data, end_data, start_brk) = (int(fields[i - 3]) for i in (45, 46, 47))
    env = int(fields[50 - 3]), int(fields[51 - 3])
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    layout = struct.pack(
        "=11QQIi",
        *(start_code, end_code, start_data, end_data, start_brk, libc.sbrk(0), start_stack),
        *(memory_start, memory_start + size, *env, 0, 0, -1),
    )
    buffer = ctypes.create_string_buffer(layout, len(layout))
    assert libc.prctl(35, 14, buffer, ctypes.c_ulong(len(layout)), 0) == 0, "no PR_SET_MM_MAP"
    _kept.append(memory)


def test_who_opens_with_borrowed_credentials_is_who_it_borrowed_them_from(
    bus: Bus, person: NewPerson
) -> None:
    """/proc tells of root, which made the call; the open itself was made as ALICE."""
    root = person()
    ring = root.run(uring.set_up)
    identity = root.fork(ALICE).run(uring.register_personality, ring)
    opened = root.run(uring.open_as, ring, identity, path(bus))
    owns = root.run(_may_hold_policy, opened)
    assert (identity > 0, owns) == (True, False)
    # The same by root itself, to see that it is not the ring that makes the difference.
    own = root.run(uring.register_personality, ring)
    assert root.run(_may_hold_policy, root.run(uring.open_as, ring, own, path(bus)))
    assert alive(bus, person)


def _may_hold_policy(fd: int) -> bool:
    connection = Connection.__new__(Connection)
    connection.fd, connection.pool_size = fd, 1 << 16
    name = build(ItemType.NAME, b"com.example.service\0")
    try:
        connection.hello(HelloFlag.POLICY_HOLDER, 0, 0, 1 << 16, name)
    except PermissionError:
        return False
    except OSError as error:
        # A policy holder is one by now; that it can't FREE is what `hello` trips over.
        return error.errno == EOPNOTSUPP
    return True


def test_strangers_fake_nothing(bus: Bus, person: NewPerson) -> None:
    alice = person(ALICE)
    fakes = (
        build(ItemType.CREDS, CREDS.pack(*[0] * 8)),
        build(ItemType.PIDS, PIDS.pack(1, 1, 1)),
        build(ItemType.SECLABEL, b"unconfined\0"),
    )
    for fake in fakes:
        with fails(EPERM):
            alice.connect(path(bus), items=fake)
    sender = alice.connect(path(bus))
    with fails(EINVAL):
        sender.send(sender.id, b"x", src_id=sender.id + 1)
    with fails(EINVAL):
        sender.send(sender.id, b"x", payload_type=0)


# --- /proc/self and the single inode


def test_reopening_a_connection_makes_no_second_one_of_it(bus: Bus, person: NewPerson) -> None:
    alice = person(ALICE)
    connection = alice.connect(path(bus))
    again = f"/proc/{alice.pid}/fd/{connection.get('fd')}"
    with fails(EBUSY):
        person().open(again)
    with fails(EACCES):
        person(BOB).open(again)
    # Its own user gets a connection of its own.
    other = alice.connect(again)
    assert other.get("id") != connection.get("id")
    other.close()
    assert connection.list(ListFlag.UNIQUE)


# --- races and ends


def test_a_message_that_changes_while_it_is_read_is_one_or_the_other(
    bus: Bus, person: NewPerson
) -> None:
    outcomes = person(ALICE).run(_send_while_changing, path(bus), 3000)
    assert outcomes <= {"sent", "EINVAL", "EFAULT", "EMSGSIZE", "EBADMSG"}
    assert "sent" in outcomes
    assert alive(bus, person)


def _send_while_changing(endpoint: str, n: int) -> set[str]:
    outcomes = set()
    with Connection(endpoint) as connection:
        content, kept = make_message(connection.id, (b"payload " * 4, b"more"))
        message = Memory(content)
        done = threading.Event()
        sizes = [len(content), 64, 1 << 40, len(content) - 8, 24, 0]

        def scribble() -> None:
            # The message's size, and that of its first item.
            while not done.is_set():
                for size in sizes:
                    ctypes.memmove(message.address, U64.pack(size), 8)
                    ctypes.memmove(message.address + 64, U64.pack(size & 63), 8)
                ctypes.memmove(message.address, content, 80)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for _ in range(n):
                try:
                    connection.command(Command.SEND, message.address, 0, 0, 0)
                except OSError as error:
                    outcomes.add(errorcode[error.errno or 0])
                else:
                    outcomes.add("sent")
                    received = connection.take()
                    assert received.size <= received.slice_size
                    assert received.data in (b"payload " * 4 + b"more", b"more", b"", content)
        finally:
            done.set()
            thread.join()
        del kept
    return outcomes


def test_callers_that_die_in_their_calls_leave_nothing(
    mount: daemons.Mount, bus: Bus, person: NewPerson
) -> None:
    alive(bus, person)
    before = fds_of(mount.pid)
    for i in range(30):
        victim = person(ALICE)
        connection = victim.connect(path(bus))
        victim.start("run", _wait_for_ever, [connection.key])
        if i % 2:
            daemons.wait_until(lambda pid=victim.pid: _in_ioctl(pid), "not in its call")  # type: ignore[misc]
        os.kill(victim.pid, signal.SIGKILL)
        victim.end()
    daemons.wait_until(lambda: fds_of(mount.pid) <= before + 4, "descriptors are left")
    with bus.connect() as root:
        assert {info.id for info in root.list(ListFlag.UNIQUE)} == {root.id}
    assert alive(bus, person)


def _wait_for_ever(connection: Connection) -> None:
    connection.send(
        *(connection.id, b"x"),
        sync=True,
        flags=MsgFlag.EXPECT_REPLY,
        last=monotonic_ns(1000),
    )


def _in_ioctl(pid: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("16", "29")


def test_a_thread_is_known_when_its_process_has_lost_the_first_one(
    bus: Bus, person: NewPerson
) -> None:
    """The first thread is gone; its entry in /proc has no executable and no arguments."""
    alice = person(ALICE)
    receiver = person(ALICE).connect(path(bus), recv=ATTACH_ALL)
    alice.start("run", _outlive_first_thread, [path(bus), receiver.id])
    told = receiver.take()
    assert CREDS.unpack(told.one(ItemType.CREDS)) == (ALICE,) * 8
    assert PIDS.unpack(told.one(ItemType.PIDS))[0] == alice.pid
    assert told.one(ItemType.EXE) == os.readlink("/proc/self/exe").encode() + b"\0"
    assert told.one(ItemType.CMDLINE)


def _outlive_first_thread(endpoint: str, to: int) -> None:
    connection = Connection(endpoint)
    first = os.getpid()

    def send() -> None:
        def is_gone() -> bool:
            text = Path(f"/proc/{first}/task/{first}/stat").read_text()
            return text.rpartition(")")[2].split()[0] == "Z"

        daemons.wait_until(is_gone, "the first thread lives")
        connection.send(to, b"alone")

    threading.Thread(target=send).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)


# --- outside of the daemon's PID namespace


def test_who_is_outside_of_the_daemons_pid_namespace_is_refused(tmp_path: Path) -> None:
    """It can't be looked at in /proc, nor can its memory be found."""
    daemons.need_mounting()
    target = tmp_path / "kdbus"
    target.mkdir()
    log = tmp_path / "log"
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=slave"]
    script = f"mount --bind {target} {target}; exec {daemons.KDBUSFS} -f --pool=cache {target}"
    with log.open("wb") as stderr:
        daemon = subprocess.Popen(
            [*command, "sh", "-c", script], stdin=subprocess.DEVNULL, stderr=stderr
        )
    try:
        inner = int(daemons.wait_until(lambda: _child_of(daemon.pid), "no daemon"))
        root = Path(f"/proc/{inner}/root{target}")
        daemons.wait_until(lambda: "control" in os.listdir(root), "kdbusfs never mounted")
        with fails(EPERM):
            File(root / "control")
        os.kill(inner, signal.SIGTERM)
        assert daemon.wait(daemons.DEADLINE_SECONDS) == 0
    finally:
        daemon.kill()
        daemon.wait()
    text = log.read_text()
    assert not [fault for fault in daemons.FAULTS if fault in text], text


def _child_of(pid: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return children[0] if children else ""


# --- where it is mounted


def test_a_mount_point_that_became_a_symlink_is_refused(tmp_path: Path) -> None:
    """Between the check of the path and the mount somebody puts a link to another place there."""
    daemons.need_mounting()
    (tmp_path / "real" / "kdbus").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "last").symlink_to("kdbus")
    for path in (tmp_path / "real" / "last", tmp_path / "link" / "kdbus"):
        with pytest.raises(UserError), mounting.FuseMount(path):
            pytest.fail("mounted")
    assert not daemons.mounted_at(tmp_path / "real" / "kdbus")
