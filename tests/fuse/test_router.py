# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the router does with requests that come faster than it can serve them. A socket pair stands
in for the device: one message is one request or one reply."""

import os
import socket
from collections.abc import Iterator
from struct import pack

import pytest

from bus.fakes import FakeClock
from kdbusfs.bus.domain import Domain
from kdbusfs.bus.quota import User
from kdbusfs.fuse import wire
from kdbusfs.fuse.relay import tree_pair
from kdbusfs.fuse.router import Router
from kdbusfs.fuse.tree import Tree
from kdbusfs.fuse.wire import Opcode
from kdbusfs.peer.namespaces import OWN_USER


def request(opcode: Opcode, unique: int, uid: int, body: bytes) -> bytes:
    size = wire.IN_HEADER_SIZE + len(body)
    return wire.IN_HEADER.pack(size, opcode, unique, 1, uid, uid, os.getpid(), 0, 0) + body


def poll(unique: int, uid: int) -> bytes:
    """Of a file that nobody has open: EBADF."""
    return request(Opcode.POLL, unique, uid, wire.POLL_IN.pack(4711, 0, 0, 0))


def release(unique: int) -> bytes:
    return request(Opcode.RELEASE, unique, 0, wire.RELEASE_IN.pack(4711, 0, 0, 0))


def interrupt(unique: int) -> bytes:
    return request(Opcode.INTERRUPT, unique | 1, 0, wire.INTERRUPT_IN.pack(unique))


class Bench:
    """A router whose device is a socket of ours."""

    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.domain = Domain(FakeClock(), OWN_USER)
        self._pair = tree_pair()
        self._device = device
        self.router = Router(
            device.fileno(),
            self.domain,
            Tree(self.domain.root),
            self._pair[0],
            pool="cache",
            spin_us=0,
            trace=None,
        )

    def take_in(self, *requests: bytes) -> None:
        self.router._take_in(memoryview(b"".join(requests)))

    def serve_all(self) -> None:
        while self.router._queue:
            self.router._serve()

    def answered(self) -> list[int]:
        """The uniques of what has been answered since the last call, in order."""
        uniques = []
        while True:
            try:
                uniques.append(wire.OUT_HEADER.unpack_from(self.kernel.recv(4096))[2])
            except BlockingIOError:
                return uniques

    def close(self) -> None:
        for end in (self.kernel, self._device, *self._pair):
            end.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_users_are_served_in_turn(bench: Bench) -> None:
    bench.take_in(*[poll(2 * i, 1) for i in range(1, 6)], poll(20, 2), poll(22, 2))
    assert not bench.answered()
    bench.serve_all()
    order = bench.answered()
    assert order[:2] == [2, 20]
    assert order.index(22) < len(order) - 1
    assert [u for u in order if u < 20] == [2, 4, 6, 8, 10]


def test_a_close_waits_for_nobody(bench: Bench) -> None:
    bench.take_in(poll(2, 1), poll(4, 1), release(6), poll(8, 1))
    assert bench.answered() == [6]
    bench.serve_all()
    assert bench.answered() == [2, 4, 8]


def test_an_interrupt_of_what_is_queued_is_told_when_its_turn_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is handled: it may stall, and its caller be killed."""
    expected: list[tuple[int, list[int]]] = []
    seen: list[tuple[int, list[int]]] = []
    handles = type(bench.router._handles)

    def expect(_: object, unique: int) -> None:
        expected.append((unique, bench.answered()))

    def look(_: object, request: bytes) -> None:
        seen.append((wire.interrupted(request), bench.answered()))

    monkeypatch.setattr(handles, "expect_interrupted", expect)
    monkeypatch.setattr(handles, "interrupt", look)
    bench.take_in(poll(2, 1), poll(4, 1), interrupt(4))
    assert not expected
    bench.serve_all()
    assert expected == [(4, [2])]
    assert bench.answered() == [4]
    # One for what has been answered meanwhile, or never was, is for the handles to judge.
    assert not seen
    bench.take_in(interrupt(2), poll(6, 1))
    assert seen == [(2, [])]


def test_what_is_no_command_takes_no_memory_to_wait(bench: Bench) -> None:
    body = pack("=QIIQII", 4711, 0, 0xC0FF7700, 0, 16000, 0) + bytes(16000)
    bench.take_in(poll(2, 1), request(Opcode.IOCTL, 4, 1, body))
    assert bench.answered() == [4]


def test_a_piece_of_work_at_a_time(bench: Bench) -> None:
    done: list[str] = []

    def work(name: str, n_steps: int) -> Iterator[None]:
        for i in range(n_steps):
            done.append(f"{name}{i}")
            yield

    bench.domain.work.add(User(1), work("a", 3))
    bench.domain.work.add(User(2), work("b", 1))
    while bench.domain.work:
        bench.router._work()
    assert done == ["a0", "b0", "a1", "a2"]
