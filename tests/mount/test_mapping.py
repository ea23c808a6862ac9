# SPDX-License-Identifier: LGPL-2.1-or-later
"""mmap(2) of a pool: kdbus.pool(7)."""

import errno
import mmap
import os
import random
import select
import signal
import socket
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi.items import build_string
from kdbusfs.abi.numbers import Command, HelloFlag, ItemType
from mount.processes import Child
from mount.raw import MIB, PAGE, Bus, Connection, File, Mapping, fails, libc


def test_the_pool_is_read_where_the_offsets_say(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"foobar")
        message = conn.recv()
        assert message.data == b"foobar"
        # The same bytes through a second mapping, and one of a single page.
        for mapping in (Mapping(conn.fd, conn.pool_size), Mapping(conn.fd, PAGE)):
            assert mapping.read(message.offset, message.slice_size) == message.raw
            mapping.unmap()


def test_any_page_aligned_part_can_be_mapped(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, bytes(3 * PAGE))
        conn.send(conn.id, b"second")
        first, second = conn.recv(), conn.recv()
        page = second.offset & -PAGE
        assert page > first.offset
        part = Mapping(conn.fd, 2 * PAGE, offset=page)
        assert part.read(second.offset - page, second.slice_size) == second.raw
        part.unmap()
        # An offset is not held against the pool's size: beyond it there is nothing to read.
        Mapping(conn.fd, PAGE, offset=8 * conn.pool_size).unmap()


def test_what_was_mapped_early_shows_what_comes_late(bus: Bus) -> None:
    with bus.connect() as conn:
        early = Mapping(conn.fd, conn.pool_size)
        assert early.read(0, conn.pool_size)[256:] == bytes(conn.pool_size - 256)
        for n in range(50):
            conn.send(conn.id, b"%d" % n * 1000)
            message = conn.recv()
            assert early.read(message.offset, message.slice_size) == message.raw
            assert message.data == b"%d" % n * 1000
            if n % 3:
                conn.free(message.offset)
        early.unmap()


@pytest.mark.parametrize("kind", ["ACTIVATOR", "POLICY_HOLDER", "MONITOR"])
def test_special_connections_map_their_pools_too(bus: Bus, kind: str) -> None:
    items = b"" if kind == "MONITOR" else build_string(ItemType.NAME, b"com.example.a")
    with bus.connect(flags=HelloFlag[kind], items=items) as conn:
        result = conn.command(Command.BUS_CREATOR_INFO, 0, 0, 0, 0)
        offset, size = result.u64(40), result.u64(48)
        assert bus.name.encode() in conn.pool.read(offset, size)


@pytest.mark.parametrize(
    ("access", "protection"),
    [(os.O_WRONLY, mmap.PROT_READ), (os.O_RDONLY, mmap.PROT_READ | mmap.PROT_WRITE)],
)
def test_a_mapping_takes_no_more_rights_than_the_file_was_opened_with(
    bus: Bus, access: int, protection: int
) -> None:
    fd = os.open(bus.path, access | os.O_CLOEXEC)
    with fails(errno.EACCES):
        Mapping(fd, PAGE, protection)
    os.close(fd)


def test_a_pool_may_be_mapped_executable(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"foobar")
        message = conn.recv()
        mapping = Mapping(conn.fd, conn.pool_size, mmap.PROT_READ | mmap.PROT_EXEC)
        assert mapping.read(message.offset, message.slice_size) == message.raw
        mapping.unmap()


def test_a_mapping_longer_than_the_pool_faults_behind_its_end(bus: Bus) -> None:
    def touch(page: int) -> int:
        def look(_: socket.socket) -> None:
            with bus.connect(pool_size=PAGE) as conn:
                # kdbus refused this with EFAULT; here the kernel does not ask.
                Mapping(conn.fd, 2 * PAGE).read(page * PAGE, 1)

        with Child(look) as child:
            return child.wait()

    assert [touch(page) for page in range(2)] == [0, -signal.SIGBUS]


def test_pages_past_the_pools_end_raise_sigbus(bus: Bus) -> None:
    def touch(_: socket.socket) -> None:
        with bus.connect(pool_size=PAGE) as conn:
            mapping = Mapping(conn.fd, PAGE, offset=PAGE)
            mapping.read(0, 1)

    with Child(touch) as child:
        assert child.wait() == -signal.SIGBUS


@pytest.mark.parametrize("kind", ["control", "bus owner", "endpoint"])
def test_there_is_nothing_to_see_without_a_connection(
    mount: daemons.Mount, bus: Bus, kind: str
) -> None:
    with File(mount.path / "control") as control, File(bus.path) as endpoint:
        file = {"control": control, "bus owner": bus, "endpoint": endpoint}[kind]
        # The kernel does not ask: the mapping is of an empty file.
        mapping = Mapping(file.fd, PAGE)
        with Child(lambda _: mapping.read(0, 1)) as child:
            assert child.wait() == -signal.SIGBUS
        mapping.unmap()


def test_a_private_writable_mapping_changes_nobodys_pool(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"foobar")
        message = conn.recv()
        try:
            private = Mapping(
                *(conn.fd, conn.pool_size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE)
            )
        except PermissionError:
            return
        private.write(message.offset, b"\xff" * message.slice_size)
        assert conn.pool.read(message.offset, message.slice_size) == message.raw
        private.unmap()


def test_a_client_that_scribbles_over_its_pool_hurts_only_itself(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as other:
        # Where the kernel can't refuse it, nothing may depend on what is written.
        try:
            mapping = Mapping(conn.fd, conn.pool_size, mmap.PROT_READ | mmap.PROT_WRITE)
        except PermissionError:
            return
        for n in range(5):
            conn.send(conn.id, b"%d" % n)
            other.send(conn.id, b"other")
        mapping.write(0, b"\xff" * conn.pool_size)
        for _ in range(10):
            offset = conn.recv_raw().u64(40)
            conn.free(offset)
        with fails(errno.EAGAIN):
            conn.recv()
        conn.send(conn.id, b"fresh")
        assert conn.take().data == b"fresh"
        mapping.unmap()


def test_a_pool_can_neither_be_cut_nor_punched(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"foobar")
        message = conn.recv()
        for attempt in (
            lambda: os.ftruncate(conn.fd, 0),
            lambda: os.posix_fallocate(conn.fd, 0, 2 * conn.pool_size),
        ):
            try:
                attempt()
            except OSError:
                pass
        assert conn.pool.read(message.offset, message.slice_size) == message.raw
        conn.send(conn.id, b"again")
        assert conn.take().data == b"again"


def test_a_mapping_outlives_the_bus_and_the_descriptor(mount: daemons.Mount) -> None:
    bus = Bus(mount.path)
    conn = bus.connect()
    conn.send(conn.id, b"x" * 100_000)
    message = conn.recv()
    mapping = Mapping(conn.fd, conn.pool_size)
    assert mapping.read(message.offset, message.slice_size) == message.raw
    bus.close()
    with fails(errno.ECONNRESET):
        conn.recv()
    assert mapping.read(message.offset, message.slice_size) == message.raw
    # A dead connection can still be mapped.
    late = Mapping(conn.fd, conn.pool_size)
    assert late.read(message.offset, message.slice_size) == message.raw
    conn.close()
    for left in (mapping, late):
        assert left.read(message.offset, message.slice_size) == message.raw
        left.unmap()


def test_pages_never_touched_before_the_end_can_be_read_after_it(mount: daemons.Mount) -> None:
    bus = Bus(mount.path)
    conn = bus.connect()
    conn.send(conn.id, b"x" * 100_000)
    result = conn.recv_raw()
    offset, size = result.u64(40), result.u64(48)
    mapping = Mapping(conn.fd, conn.pool_size)
    bus.close()
    conn.close()
    content = mapping.read(offset, size)
    assert content.count(b"x") >= 100_000
    mapping.unmap()


def test_a_mapping_does_not_keep_the_connection(mount: daemons.Mount, bus: Bus) -> None:
    with bus.connect() as watcher:
        conn = bus.connect()
        mapping = Mapping(conn.fd, conn.pool_size)
        conn.close()
        if mount.pool == "cache":
            # Here a mapping is of the file itself and keeps it open (docs/conformance.md).
            watcher.send(conn.id, b"anybody?")
            mapping.unmap()
        with fails(errno.ENXIO):
            watcher.send(conn.id, b"anybody?")
        if mount.pool != "cache":
            mapping.unmap()


def test_a_mapping_of_what_is_no_connection_keeps_it(mount: daemons.Mount) -> None:
    # kdbus let nobody map it; here the kernel does not ask (docs/conformance.md).
    bus = Bus(mount.path)
    mapping = Mapping(bus.fd, PAGE)
    bus.close()
    assert bus.name in os.listdir(mount.path)
    mapping.unmap()
    assert bus.name not in os.listdir(mount.path)


def test_two_connections_never_share_a_pool(bus: Bus) -> None:
    connections = [bus.connect(pool_size=16 * PAGE) for _ in range(20)]
    for n, conn in enumerate(connections):
        conn.send(conn.id, b"pool %d" % n)
    for n, conn in enumerate(connections):
        assert conn.recv().data == b"pool %d" % n
    for conn in connections:
        conn.close()


def test_a_pools_size_may_be_anything_in_whole_pages(bus: Bus) -> None:
    for size in (PAGE, 16 * MIB, 1 << 32):
        with bus.connect(pool_size=size) as conn:
            payload = b"x" * min(size // 12, MIB)
            conn.send(conn.id, payload)
            assert conn.take().data == payload
    for size in (0, 1, PAGE - 1, PAGE + 1, 2 * PAGE + 8):
        with fails(errno.EINVAL):
            bus.connect(pool_size=size)
    for size in (1 << 63, (1 << 64) - PAGE):
        with pytest.raises(OSError, match=r".") as caught:
            bus.connect(pool_size=size)
        assert caught.value.errno in (errno.ENOMEM, errno.EINVAL)


def test_a_mapping_is_inherited_by_fork(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.send(conn.id, b"before")
        message = conn.recv()
        assert message.data == b"before"

        def look(test: socket.socket) -> bytes:
            test.send(b"ready")
            test.recv(2)
            return conn.recv().data

        with Child(look) as child:
            child.hear()
            conn.send(conn.id, b"after the fork")
            child.say()
            assert child.result() == b"after the fork"


def test_an_untouched_pool_costs_no_memory(mount: daemons.Mount, bus: Bus) -> None:
    def resident() -> int:
        fields = Path(f"/proc/{mount.pid}/smaps_rollup").read_text().split("Rss:")[1]
        return int(fields.split()[0])

    Connection(bus.path, pool_size=64 * MIB).close()
    before = resident()
    connections = [bus.connect(pool_size=64 * MIB) for _ in range(20)]
    assert resident() - before < 20 * 64
    for conn in connections:
        conn.close()


def test_pages_that_are_dropped_and_faulted_in_again_are_as_they_were(bus: Bus) -> None:
    chance = random.Random(11)

    def touch(test: socket.socket) -> None:
        """Drop the pool's pages and fault them in again, many times."""
        for _ in range(60):
            os.posix_fadvise(conn.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            libc.madvise(conn.pool.address, conn.pool_size, mmap.MADV_DONTNEED)
            for page in range(0, conn.pool_size, PAGE):
                conn.pool.read(page, 1)
        test.send(b"done")

    with bus.connect() as conn, bus.connect() as sender:
        assert conn.pool
        with Child(touch) as child:
            held = []
            while not select.select([child.socket], [], [], 0)[0]:
                data = chance.randbytes(chance.choice([10, 5000, 70_000]))
                sender.send(conn.id, data)
                message = conn.recv()
                assert message.data == data
                held.append(message)
                if len(held) > 5:
                    old = held.pop(chance.randrange(len(held)))
                    assert conn.pool.read(old.offset, old.slice_size) == old.raw
                    conn.free(old.offset)
            child.result()
            for message in held:
                os.posix_fadvise(conn.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                assert conn.pool.read(message.offset, message.slice_size) == message.raw
