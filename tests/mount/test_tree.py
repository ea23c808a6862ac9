# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of nodes: kdbus.fs(7)."""

import errno
import fcntl
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi.items import build_string
from kdbusfs.abi.numbers import Command, ItemType, MakeFlag
from mount.processes import Child, in_child
from mount.raw import Bus, Connection, File, Memory, fails, ioctl, outcome

pytestmark = pytest.mark.one_pool

USER = 4711
GROUP = 4712


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_root_is_a_directory_of_root_that_nobody_writes_to(mount: daemons.Mount) -> None:
    st = mount.path.stat()
    assert stat.S_ISDIR(st.st_mode)
    assert stat.S_IMODE(st.st_mode) == 0o555
    assert (st.st_uid, st.st_gid, st.st_size) == (0, 0, 0)
    assert st.st_nlink == 2


def test_control_is_a_regular_file_for_everybody(mount: daemons.Mount) -> None:
    st = (mount.path / "control").stat()
    assert stat.S_ISREG(st.st_mode)
    assert stat.S_IMODE(st.st_mode) == 0o666
    assert (st.st_uid, st.st_gid, st.st_size) == (0, 0, 0)


@pytest.mark.parametrize(
    ("flags", "directory", "endpoint"),
    [
        (0, 0o500, 0o600),
        (MakeFlag.ACCESS_GROUP, 0o550, 0o660),
        (MakeFlag.ACCESS_WORLD, 0o555, 0o666),
        (MakeFlag.ACCESS_GROUP | MakeFlag.ACCESS_WORLD, 0o555, 0o666),
    ],
)
def test_make_flags_are_the_modes(
    mount: daemons.Mount, flags: int, directory: int, endpoint: int
) -> None:
    with Bus(mount.path, flags=flags) as bus, File(bus.path) as owner:
        assert mode_of(bus.directory) == directory
        assert mode_of(bus.path) == endpoint
        owner.command(
            Command.ENDPOINT_MAKE,
            flags=flags,
            items=build_string(ItemType.MAKE_NAME, b"0-custom"),
        )
        assert mode_of(bus.directory / "0-custom") == endpoint
        assert bus.directory.stat().st_nlink == 2
        assert bus.path.stat().st_size == 0


def test_nodes_belong_to_the_effective_ids_of_their_maker(
    mount: daemons.Mount, root_fd: int
) -> None:
    def make() -> tuple[list[tuple[int, int]], list[str]]:
        os.fchdir(root_fd)
        with Bus(".", f"{USER}-mine") as bus, File(bus.path) as endpoint:
            item = build_string(ItemType.MAKE_NAME, f"{USER}-custom".encode())
            endpoint.command(Command.ENDPOINT_MAKE, items=item)
            nodes = [bus.directory, bus.path, bus.directory / f"{USER}-custom"]
            found = [node.stat() for node in nodes]
            return [(st.st_uid, st.st_gid) for st in found], sorted(os.listdir(bus.directory))

    owners, names = in_child(make, uid=USER, gid=GROUP)
    assert owners == [(USER, GROUP)] * 3
    assert names == [f"{USER}-custom", "bus"]


def test_names_must_start_with_the_effective_uid(mount: daemons.Mount, root_fd: int) -> None:
    def make(name: str) -> str:
        os.fchdir(root_fd)
        return outcome(lambda: Bus(".", name).close())

    for name, expected in (
        (f"{USER}-a", "0"),
        ("0-a", "EINVAL"),
        (f"{USER}a", "EINVAL"),
        (f"0{USER}-a", "EINVAL"),
        (f"{USER}-", "EINVAL"),
        (f"{USER}-" + 59 * "a", "ENAMETOOLONG"),
        (f"{USER}-" + 58 * "a", "0"),
    ):
        assert in_child(lambda name=name: make(name), uid=USER) == expected, name


def test_inode_numbers_stay_and_differ(mount: daemons.Mount, bus: Bus) -> None:
    nodes = [mount.path, mount.path / "control", bus.directory, bus.path]
    first = [node.stat().st_ino for node in nodes]
    assert len(set(first)) == 4
    with File(bus.path) as a, File(bus.path) as b:
        assert os.fstat(a.fd).st_ino == os.fstat(b.fd).st_ino == first[3]
        assert os.fstat(a.fd).st_dev == mount.path.stat().st_dev
        assert [node.stat().st_ino for node in nodes] == first
    listed = {entry.name: entry.inode() for entry in os.scandir(mount.path)}
    assert listed["control"] == first[1]
    assert listed[bus.name] == first[2]


def test_what_has_gone_leaves_no_name_and_no_number(mount: daemons.Mount) -> None:
    """Numbers are free again when the kernel has dropped the names."""
    with Bus(mount.path) as first:
        before = max(first.directory.stat().st_ino, first.path.stat().st_ino)
    stands = 0
    for i in range(500):
        with Bus(mount.path) as bus, bus.connect():
            names = os.listdir(bus.directory), os.listdir(mount.path)
            assert bus.name in names[1]
            if i == 250:
                stands = os.open(bus.directory, os.O_PATH | os.O_DIRECTORY)

    def number() -> int:
        with Bus(mount.path) as bus:
            return max(bus.directory.stat().st_ino, bus.path.stat().st_ino)

    daemons.wait_until(lambda: number() <= before + 8, f"{number()} was {before}")
    assert os.fstat(stands).st_mode
    os.close(stands)


def test_the_names_of_endpoints_go_with_them(mount: daemons.Mount, bus: Bus) -> None:
    def number() -> int:
        with File(bus.path) as owner:
            item = build_string(ItemType.MAKE_NAME, b"0-custom")
            owner.command(Command.ENDPOINT_MAKE, items=item)
            return (bus.directory / "0-custom").stat().st_ino

    before = number()
    for _ in range(100):
        number()
    daemons.wait_until(lambda: number() <= before + 8, f"{number()} was {before}")


def test_hundreds_may_ask_at_a_time(mount: daemons.Mount, bus: Bus) -> None:
    """More than fit into the socket between the daemon's two halves."""
    n_threads, rounds = 600, 3
    paths = [mount.path / "control", bus.path, bus.directory, mount.path / "none"]
    answers: list[int] = []

    def ask(i: int) -> None:
        for k in range(rounds):
            path = paths[(i + k) % len(paths)]
            answers.append(len(os.listdir(mount.path)) if i % 7 == 0 else path.exists())

    stack = threading.stack_size(1 << 18)
    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    threading.stack_size(stack)
    daemons.wait_until(lambda: len(answers) == n_threads * rounds, "somebody got no answer")
    for thread in threads:
        thread.join()
    assert answers.count(0) == sum(
        paths[(i + k) % 4].name == "none" for i in range(n_threads) for k in range(rounds) if i % 7
    )


def test_directories_list_their_nodes_with_types(mount: daemons.Mount, bus: Bus) -> None:
    entries = {entry.name: entry for entry in os.scandir(mount.path)}
    assert entries["control"].is_file(follow_symlinks=False)
    assert entries[bus.name].is_dir(follow_symlinks=False)
    assert [entry.name for entry in os.scandir(bus.directory)] == ["bus"]


def test_a_listing_holds_dot_and_dot_dot(mount: daemons.Mount, bus: Bus, programs: Path) -> None:
    output = subprocess.check_output([programs / "readdir", bus.directory], text=True)
    found = {name: (int(ino), kind) for name, ino, kind in map(str.split, output.splitlines())}
    assert found == {
        ".": (bus.directory.stat().st_ino, "dir"),
        "..": (mount.path.stat().st_ino, "dir"),
        "bus": (bus.path.stat().st_ino, "reg"),
    }


def test_many_buses_are_all_listed(mount: daemons.Mount, root_fd: int) -> None:
    def make(uid: int) -> Child[None]:
        def buses(test: socket.socket) -> None:
            os.fchdir(root_fd)
            made = [Bus(".", f"{uid}-{'x' * 50}-{n}") for n in range(16)]
            test.send(b"ready")
            test.recv(1)
            for bus in made:
                bus.close()

        return Child(buses, uid=uid)

    children = [make(USER + n) for n in range(8)]
    for child in children:
        child.hear()
    names = os.listdir(mount.path)
    assert len(names) == len(set(names))
    assert {n for n in names if "xxx" in n} == {
        f"{USER + u}-{'x' * 50}-{n}" for u in range(8) for n in range(16)
    }
    for child in children:
        child.say(b"x")
        child.result()
    assert not [n for n in os.listdir(mount.path) if "xxx" in n]


def test_nodes_appear_and_vanish_at_once(mount: daemons.Mount) -> None:
    name = "0-comes-and-goes"
    for _ in range(20):
        assert not (mount.path / name).exists()
        assert name not in os.listdir(mount.path)
        with Bus(mount.path, name) as bus:
            assert bus.path.exists()
            assert name in os.listdir(mount.path)
            with File(bus.path) as owner:
                custom = build_string(ItemType.MAKE_NAME, b"0-custom")
                assert not (bus.directory / "0-custom").exists()
                owner.command(Command.ENDPOINT_MAKE, items=custom)
                assert (bus.directory / "0-custom").exists()
            assert not (bus.directory / "0-custom").exists()
            assert os.listdir(bus.directory) == ["bus"]


def test_a_dead_bus_is_gone_from_inside_too(mount: daemons.Mount) -> None:
    def look() -> list[str]:
        with Bus(mount.path) as bus:
            os.chdir(bus.directory)
            os.stat("bus")
        assert os.listdir(".") == []
        return [
            outcome(lambda: os.stat("bus")),
            outcome(lambda: os.open("bus", os.O_RDWR)),
            outcome(lambda: os.stat(bus.directory)),
            outcome(lambda: os.stat("nothing")),
        ]

    assert in_child(look) == ["ENOENT"] * 4


def test_a_bus_can_be_made_anew_under_the_name_of_a_dead_one(mount: daemons.Mount) -> None:
    with Bus(mount.path, "0-again") as first, File(first.path) as stale:
        ids = first.connect()
        with fails(errno.EEXIST):
            Bus(mount.path, "0-again")
        first.close()
        with Bus(mount.path, "0-again") as second, second.connect() as connection:
            assert connection.id128 != ids.id128
            with fails(errno.ESHUTDOWN):
                stale.command(Command.HELLO, *[0] * 9)
            with fails(errno.ECONNRESET):
                ids.byebye()
        ids.close()


@pytest.mark.parametrize("uid", [0, USER])
def test_nodes_come_and_go_through_ioctls_only(
    mount: daemons.Mount, bus: Bus, root_fd: int, uid: int
) -> None:
    def attempt() -> dict[str, str]:
        os.fchdir(root_fd)
        functions: dict[str, Callable[[], object]] = {
            "mkdir": lambda: os.mkdir("new"),
            "mkdir in a bus": lambda: os.mkdir(f"{bus.name}/new"),
            "create": lambda: os.open("new", os.O_CREAT | os.O_RDWR, 0o600),
            "create in a bus": lambda: os.open(f"{bus.name}/new", os.O_CREAT | os.O_RDWR, 0o600),
            "unlink": lambda: os.unlink("control"),
            "unlink an endpoint": lambda: os.unlink(f"{bus.name}/bus"),
            "rmdir": lambda: os.rmdir(bus.name),
            "rename": lambda: os.rename("control", "other"),
            "rename a bus": lambda: os.rename(bus.name, "other"),
            "link": lambda: os.link("control", "other"),
            "symlink": lambda: os.symlink("control", "other"),
            "mknod": lambda: os.mknod("new", stat.S_IFREG | 0o600),
        }
        return {name: outcome(function) for name, function in functions.items()}

    before = sorted(os.listdir(mount.path))
    found = in_child(attempt, uid=uid)
    expected = dict.fromkeys(found, "EPERM" if uid == 0 else "EACCES")
    expected["create"] = expected["create in a bus"] = "EACCES"
    assert found == expected
    assert sorted(os.listdir(mount.path)) == before


def access(root_fd: int, bus: Bus, uid: int, gid: int, groups: tuple[int, ...] = ()) -> str:
    """What becomes of a HELLO by that user."""

    def hello() -> str:
        return outcome(lambda: Connection(f"{bus.name}/bus", dir_fd=root_fd).close())

    return in_child(hello, uid=uid, gid=gid, groups=groups)


def test_mode_bits_decide_who_may_connect(mount: daemons.Mount, root_fd: int) -> None:
    with Bus(mount.path) as private:
        assert access(root_fd, private, USER, USER) == "EACCES"
        # The group of root's buses, but no group access.
        assert access(root_fd, private, USER, 0) == "EACCES"
    with Bus(mount.path, flags=MakeFlag.ACCESS_GROUP) as group:
        assert access(root_fd, group, USER, USER) == "EACCES"
        assert access(root_fd, group, USER, 0) == "0"
        assert access(root_fd, group, USER, USER, (0,)) == "0"
    with Bus(mount.path, flags=MakeFlag.ACCESS_WORLD) as world:
        assert access(root_fd, world, USER, USER) == "0"


def test_open_flags_do_not_matter_for_ioctls(bus: Bus) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_NONBLOCK):
        fd = os.open(bus.path, flags)
        file = Connection.__new__(Connection)
        file.fd, file.pool_size = fd, 4096
        file.hello(0, 0, 0, 4096, b"")
        assert file.id > 0
        os.close(fd)


def test_read_and_write_are_no_operations_of_these_files(mount: daemons.Mount, bus: Bus) -> None:
    with File(mount.path / "control") as control, File(bus.path) as unbound, bus.connect() as conn:
        for file in (control, bus, unbound, conn):
            with fails(errno.EINVAL):
                os.read(file.fd, 10)
            with fails(errno.EINVAL):
                os.pread(file.fd, 10, 4096)
            with fails(errno.EINVAL):
                os.write(file.fd, b"x")
            with fails(errno.EINVAL):
                os.pwrite(file.fd, b"x", 0)
            assert os.lseek(file.fd, 0, os.SEEK_SET) == 0


@pytest.mark.parametrize("where", [".", "bus"])
def test_ioctls_on_a_directory_are_enotty(mount: daemons.Mount, bus: Bus, where: str) -> None:
    # Files are open all the while, whose commands a directory must not run.
    path = mount.path if where == "." else bus.directory
    with bus.connect() as conn:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for code in (Command.BYEBYE, Command.HELLO, Command.BUS_MAKE, Command.FREE):
            argument = (24).to_bytes(8, "little") + bytes(200)
            with fails(errno.ENOTTY):
                fcntl.ioctl(fd, code, bytearray(argument.ljust(2048, b"\0")))
        os.close(fd)
        conn.byebye()


def test_numbers_that_are_no_command_are_enotty_on_every_handle(
    mount: daemons.Mount, bus: Bus
) -> None:
    # The kernel fetches what the number promises before anybody is asked: an argument must exist.
    argument = Memory(4096)
    with File(mount.path / "control") as control, File(bus.path) as unbound, bus.connect() as conn:
        for file in (control, bus, unbound, conn):
            for code in (0x9500, 0x401895FF, Command.BYEBYE | 0x80000000, 0x40089582, 0x5401):
                with fails(errno.ENOTTY):
                    ioctl(file.fd, code, argument.address)


def test_chmod_and_chown_hold_for_the_nodes_life(mount: daemons.Mount, root_fd: int) -> None:
    with Bus(mount.path) as bus:
        os.chmod(bus.directory, 0o555)
        os.chmod(bus.path, 0o666)
        assert mode_of(bus.path) == 0o666
        assert access(root_fd, bus, USER, USER) == "0"


def test_a_changed_mode_is_known_at_once_wherever_the_endpoint_is_held(bus: Bus) -> None:
    """Each holder has an inode of its own, and the kernel knows a mode for each."""
    holders = [os.open(bus.path, os.O_PATH) for _ in range(3)]
    for i in range(200):
        mode = 0o600 | i & 0o77
        assert [stat.S_IMODE(os.fstat(fd).st_mode) for fd in holders]
        os.chmod(bus.path, mode)
        assert [stat.S_IMODE(os.fstat(fd).st_mode) for fd in holders] == [mode] * 3
    for fd in holders:
        os.close(fd)


def test_nodes_have_no_extended_attributes(mount: daemons.Mount, bus: Bus) -> None:
    for path in (mount.path, mount.path / "control", bus.directory, bus.path):
        for attempt in (
            lambda path: os.getxattr(path, "user.colour"),
            lambda path: os.setxattr(path, "user.colour", b"red"),
            lambda path: os.setxattr(path, "system.posix_acl_access", b"\2\0\0\0"),
        ):
            with fails(errno.EOPNOTSUPP):
                attempt(path)


def test_the_file_system_says_what_it_is(mount: daemons.Mount) -> None:
    st = os.statvfs(mount.path)
    assert st.f_bsize == os.sysconf("SC_PAGE_SIZE")
    assert st.f_namemax == 255
