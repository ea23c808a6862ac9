# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbusfs -d: each request and its answer as one line, in words."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

import daemons
from kdbusfs.abi.numbers import (
    AttachFlag,
    Command,
    HelloFlag,
    ListFlag,
    NameFlag,
    RecvFlag,
)
from mount.raw import Bus, File, Vec, fails


class Traced:
    """A mount whose daemon says all it does."""

    def __init__(self, mount: daemons.Mount) -> None:
        self.mount = mount

    @contextmanager
    def lines(self, name: str) -> Iterator[list[str]]:
        """The lines that begin with *name* and came while the block ran, filled in at its end."""
        before = len(self.mount.log.read_text().splitlines())
        found: list[str] = []
        yield found

        def are_there() -> bool:
            lines = self.mount.log.read_text().splitlines()[before:]
            texts = [re.sub(r"^.*?kdbusfs\.trace: ", "", line) for line in lines]
            found[:] = [text for text in texts if text.split(" ")[0] == name]
            return bool(found)

        daemons.wait_until(are_there, f"no line for {name}")


@pytest.fixture(scope="module", params=daemons.POOL_KINDS)
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traced]:
    directory = tmp_path_factory.mktemp("traced")
    with daemons.running(directory, request.param, "-d") as mount:
        yield Traced(mount)


@pytest.fixture
def bus(traced: Traced) -> Iterator[Bus]:
    with Bus(traced.mount.path) as bus:
        yield bus


def test_each_command_is_one_line_with_its_words(traced: Traced, bus: Bus) -> None:
    me = f"tid={os.getpid()} uid={os.getuid()}"
    with traced.lines("BUS_MAKE") as lines, Bus(traced.mount.path, flags=3):
        pass
    (line,) = lines
    assert me in line
    assert "flags=ACCESS_GROUP|ACCESS_WORLD" in line
    assert line.endswith(" = 0")

    with traced.lines("HELLO") as lines:
        conn = bus.connect(flags=HelloFlag.ACCEPT_FD)
    (line,) = lines
    assert me in line
    assert f"id={conn.id}" in line
    assert "flags=ACCEPT_FD" in line
    assert line.endswith(" = 0")

    with traced.lines("NAME_ACQUIRE") as lines:
        conn.acquire("com.example.a", NameFlag.ALLOW_REPLACEMENT | NameFlag.QUEUE)
    (line,) = lines
    assert "flags=ALLOW_REPLACEMENT|QUEUE" in line

    with traced.lines("LIST") as lines:
        conn.list(ListFlag.UNIQUE | ListFlag.NAMES)
    assert "flags=UNIQUE|NAMES" in lines[0]

    with traced.lines("SEND") as lines:
        conn.send(conn.id, b"x")
    assert len(lines) == 1
    with traced.lines("RECV") as lines:
        conn.recv(RecvFlag.PEEK)
        conn.drop()
    assert ["flags=PEEK" in lines[0], "flags=DROP" in lines[1], len(lines)] == [True, True, 2]

    for name, action in {
        "FREE": lambda: conn.free(conn.pool_size),
        "MATCH_ADD": lambda: conn.match(flags=1),
        "MATCH_REMOVE": lambda: conn.unmatch(),
        "NAME_RELEASE": lambda: conn.release("com.example.a"),
        "CONN_INFO": lambda: conn.info(conn.id),
        "BUS_CREATOR_INFO": lambda: conn.creator_info(AttachFlag.PIDS),
        "UPDATE": lambda: conn.command(Command.UPDATE),
        "BYEBYE": lambda: conn.byebye(),
    }.items():
        with traced.lines(name) as lines:
            action()
        assert len(lines) == 1, name
        assert lines[0].endswith(" = 0"), name
    conn.close()


def test_failures_have_the_name_of_their_errno(traced: Traced, bus: Bus) -> None:
    with bus.connect() as conn, File(bus.path) as unbound:
        for name, number, action in (
            ("RECV", errno.EAGAIN, conn.recv),
            ("FREE", errno.ENXIO, lambda: conn.free(8)),
            ("NAME_RELEASE", errno.ESRCH, lambda: conn.release("com.example.nobody")),
            ("MATCH_REMOVE", errno.EBADSLT, conn.unmatch),
            ("SEND", errno.EDESTADDRREQ, lambda: conn.send(0)),
            ("SEND", errno.EFAULT, lambda: conn.send(conn.id, Vec(8, 8))),
            ("BYEBYE", errno.EBADFD, lambda: unbound.command(Command.BYEBYE)),
            ("HELLO", errno.EINVAL, lambda: unbound.command(Command.HELLO, *[0] * 9)),
        ):
            with traced.lines(name) as lines, fails(number):
                action()
            (line,) = lines
            assert f" = {errno.errorcode[number]}" in line


def test_tree_requests_and_files_are_lines_too(traced: Traced, bus: Bus) -> None:
    with traced.lines("LOOKUP") as lines, suppress(FileNotFoundError):
        (traced.mount.path / "no-such-bus").stat()
    assert any("no-such-bus" in line and " = ENOENT" in line for line in lines)
    with traced.lines("OPEN") as opened, traced.lines("RELEASE") as released:
        File(bus.path).close()
    (line,) = opened
    assert "bus fh=" in line
    fh = re.findall(r"fh=\d+", line)
    assert [re.findall(r"fh=\d+", line) for line in released] == [fh]


def test_a_blocked_call_is_a_line_when_it_ends(traced: Traced, bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as target:
        with traced.lines("SEND") as lines, fails(errno.ETIMEDOUT):
            conn.call(target.id, timeout=0.01)
        (line,) = lines
        assert "flags=SYNC_REPLY" in line
        assert " = ETIMEDOUT" in line


def test_descriptors_and_negotiation_show(traced: Traced, bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, fds=[0])
        with traced.lines("RECV") as lines:
            conn.recv().close_fds()
        assert len(lines) == 1
        with traced.lines("LIST") as lines:
            conn.command(Command.LIST, 0, 0, flags=1 << 63)
        assert "NEGOTIATE" in lines[0]


def test_nothing_is_logged_unless_asked_for(mount: daemons.Mount) -> None:
    before = mount.log.read_text()
    with Bus(mount.path) as bus, bus.connect() as conn:
        conn.send(conn.id, b"x", flags=0)
        conn.take()
        with fails(errno.EAGAIN):
            conn.recv()
    assert mount.log.read_text() == before


def test_unknown_numbers_are_told_apart(traced: Traced, bus: Bus) -> None:
    with traced.lines("IOCTL") as lines, fails(errno.ENOTTY):
        bus.command(0x401895FF)
    assert "0x401895ff" in lines[0]
    assert " = ENOTTY" in lines[0]
