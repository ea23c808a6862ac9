# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers whose memory does not fault in: they may wait, but nobody else does."""

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import daemons
from mount.raw import MIB, PAGE, Bus, Connection, Mapping, Vec

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_ZEROPAGE = 0xC020AA04
_MISSING = 1


class Trap:
    """Pages that fault for as long as nobody resolves them (userfaultfd(2))."""

    def __init__(self, n_pages: int) -> None:
        self.memory = Mapping.anonymous(n_pages * PAGE)
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        fcntl.ioctl(self.fd, _UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
        where = struct.pack("=QQQQ", self.memory.address, self.memory.size, _MISSING, 0)
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, where)

    def spring(self) -> None:
        """Resolve all of them, with zeros."""
        where = struct.pack("=QQQq", self.memory.address, self.memory.size, 0, 0)
        fcntl.ioctl(self.fd, _UFFDIO_ZEROPAGE, where)


@contextmanager
def trap(n_pages: int = 1) -> Iterator[Trap]:
    trap = Trap(n_pages)
    try:
        yield trap
    finally:
        os.close(trap.fd)


class Sender(threading.Thread):
    """Sends what lies in a trap, and keeps what came of it."""

    def __init__(self, connection: Connection, dst_id: int, trap: Trap) -> None:
        super().__init__(daemon=True)
        self.result: int | None = None
        self._connection = connection
        self._dst_id = dst_id
        self._part = Vec(trap.memory.address, trap.memory.size)
        self.start()

    def run(self) -> None:
        try:
            self._connection.send(self._dst_id, self._part, cookie=99)
            self.result = 0
        except OSError as error:
            self.result = error.errno

    def end(self) -> int | None:
        self.join(daemons.DEADLINE_SECONDS)
        assert not self.is_alive()
        return self.result


def exchange(sender: Connection, receiver: Connection, rounds: int = 20) -> None:
    for cookie in range(1, rounds + 1):
        sender.send(receiver.id, b"%d" % cookie, cookie=cookie)
        message = receiver.take()
        assert message.data == b"%d" % cookie


def test_others_go_on_while_a_payload_does_not_fault_in(bus: Bus) -> None:
    with bus.connect() as slow, bus.connect() as target, bus.connect() as other, trap() as pages:
        stuck = Sender(slow, target.id, pages)
        exchange(other, other)
        assert stuck.is_alive()
        pages.spring()
        assert stuck.end() == 0
        assert target.take().data == bytes(PAGE)
        exchange(other, target)


def test_many_stuck_callers_do_not_add_up(bus: Bus) -> None:
    with trap() as pages, bus.connect() as sender, bus.connect() as receiver:
        slow = [bus.connect() for _ in range(5)]
        stuck = [Sender(connection, receiver.id, pages) for connection in slow]
        exchange(sender, receiver)
        assert all(thread.is_alive() for thread in stuck)
        pages.spring()
        assert [thread.end() for thread in stuck] == [0] * 5
        assert sorted(receiver.take().data for _ in stuck) == [bytes(PAGE)] * 5
        for connection in slow:
            connection.close()


def test_each_part_of_a_payload_may_take_its_time(bus: Bus) -> None:
    with bus.connect() as slow, bus.connect() as target, trap() as first, trap() as second:
        parts = [Vec(t.memory.address, t.memory.size) for t in (first, second)]
        results: list[int | None] = []

        def send() -> None:
            try:
                slow.send(target.id, *parts)
                results.append(0)
            except OSError as error:
                results.append(error.errno)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        with bus.connect() as other:
            exchange(other, other)
            first.spring()
            exchange(other, other)
            daemons.wait_until(lambda: _is_faulting(second), "a fault in the second part")
            exchange(other, other)
        second.spring()
        thread.join(daemons.DEADLINE_SECONDS)
        assert results == [0]
        assert target.take().data == bytes(2 * PAGE)
        exchange(slow, target)


def _is_faulting(trap: Trap) -> bool:
    """Whether somebody waits for a page of it."""
    try:
        return bool(os.read(trap.fd, 32))
    except BlockingIOError:
        return False


def test_the_target_may_go_while_its_message_faults(bus: Bus) -> None:
    with bus.connect() as slow, trap() as pages, bus.connect() as other:
        target = bus.connect()
        stuck = Sender(slow, target.id, pages)
        daemons.wait_until(lambda: _is_faulting(pages), "a fault")
        exchange(other, other)
        target.close()
        # The router has seen the end of the target when it answers the next call.
        exchange(other, other)
        pages.spring()
        assert stuck.end() == errno.ENXIO
        exchange(other, slow)


def test_a_pool_that_was_never_touched_can_be_sent_from(bus: Bus) -> None:
    with bus.connect(pool_size=MIB) as sender, bus.connect(pool_size=4 * MIB) as receiver:
        sender.send(receiver.id, Vec(sender.pool.address + MIB // 2, 100_000))
        message = receiver.take()
        assert message.data == bytes(100_000)
        exchange(sender, receiver)
