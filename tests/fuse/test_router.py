# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the router does with requests that come faster than it can serve them. A socket pair stands
in for the device: one message is one request or one reply."""

import errno
import os
import socket
from collections.abc import Iterator
from struct import pack
from types import SimpleNamespace

import pytest

from bus.fakes import FakeClock
from kdbusfs.bus.domain import Domain
from kdbusfs.bus.quota import User
from kdbusfs.fuse import router as router_module
from kdbusfs.fuse import wire
from kdbusfs.fuse.relay import tree_pair
from kdbusfs.fuse.router import Router, Row
from kdbusfs.fuse.tree import Tree
from kdbusfs.fuse.wire import Opcode
from kdbusfs.native import ffi
from kdbusfs.peer.namespaces import OWN_USER
from kdbusfs.peer.stall import TURN


def request(opcode: Opcode, unique: int, uid: int, body: bytes) -> bytes:
    size = wire.IN_HEADER_SIZE + len(body)
    return wire.IN_HEADER.pack(size, opcode, unique, 1, uid, uid, os.getpid(), 0, 0) + body


def poll(unique: int, uid: int) -> bytes:
    """Of a file that nobody has open: EBADF."""
    return request(Opcode.POLL, unique, uid, wire.POLL_IN.pack(4711, 0, 0, 0))


def lookup(unique: int, uid: int, name: bytes) -> bytes:
    return request(Opcode.LOOKUP, unique, uid, name + b"\0")


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

    def errors(self) -> dict[int, int]:
        """The same with the errno of each."""
        errors: dict[int, int] = {}
        while True:
            try:
                _, error, unique = wire.OUT_HEADER.unpack_from(self.kernel.recv(4096))
            except BlockingIOError:
                return errors
            errors[unique] = -error

    def loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the router's thread does until no more is to be done; then the mount is gone."""
        device = SimpleNamespace(kdbusfs_next=lambda *_: -errno.ENODEV)
        monkeypatch.setattr(router_module, "lib", device)
        with TURN:
            self.router._loop()

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


def test_names_are_looked_up_in_turn_without_pyfuse3(bench: Bench) -> None:
    """Which does not run here."""
    bench.take_in(lookup(2, 1, b"control"), lookup(4, 1, b"none"), lookup(6, 2, b"control"))
    assert not bench.answered()
    bench.serve_all()
    bench.router._device.write_pending()
    replies = [bench.kernel.recv(4096) for _ in range(3)]
    heads = [wire.OUT_HEADER.unpack_from(reply) for reply in replies]
    assert [(error, unique) for _, error, unique in heads] == [(0, 2), (0, 6), (-errno.ENOENT, 4)]
    first, second = (
        wire.ENTRY_OUT.unpack_from(reply, wire.OUT_HEADER_SIZE) for reply in replies[:2]
    )
    assert first == second
    # Its name is not kept, its attributes are.
    assert first[2] == 0 < first[3]


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

    def expect(_: object, unique: int) -> None:
        expected.append((unique, bench.answered()))

    def look(opcode: int, unique: int, nodeid: int, ids: wire.Ids, request: memoryview) -> None:
        seen.append((wire.interrupted(request), bench.answered()))

    monkeypatch.setattr(type(bench.router._interrupts), "expect", expect)
    monkeypatch.setitem(bench.router._rows, Opcode.INTERRUPT, Row(look))
    bench.take_in(poll(2, 1), poll(4, 1), interrupt(4))
    assert not expected
    bench.serve_all()
    assert expected == [(4, [2])]
    assert bench.answered() == [4]
    # One for what has been answered meanwhile, or never was, is for `Interrupts` to tell apart.
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


def test_who_was_overtaken_in_a_request_leaves_all_else_to_its_successor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no turn any more (`peer.stall.leave`), and the other is at work."""
    router, looked = bench.router, []
    router._watches.keep_waking()
    monkeypatch.setattr(router_module, "_LOOK_EVERY", 1)
    monkeypatch.setattr(router._watches, "dispatch", lambda: looked.append(1))
    overtaken = Row(lambda *_: setattr(router._crew, "current", "another"), 0)
    monkeypatch.setitem(router._rows, Opcode.RELEASE, overtaken)

    def next_request(fd: int, reply: bytes, n_reply: int, events: int, to: object, *_: int) -> int:
        one = release(2)
        ffi.memmove(to, one, len(one))
        return len(one)

    monkeypatch.setattr(router_module, "lib", SimpleNamespace(kdbusfs_next=next_request))
    with TURN:
        router._loop()
    assert not looked


def test_a_call_that_can_not_be_finished_is_not_the_end_of_the_mount(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is it one for those that are finished after it."""
    calls = bench.router._calls
    # What no call is can't be finished.
    calls.completed += ["first", "second"]  # type: ignore[list-item]
    bench.loop(monkeypatch)
    assert not calls.completed
    assert len(caplog.records) == 2


def test_a_request_that_can_not_start_anew_is_eio(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def again(_: object, request: memoryview) -> None:
        raise OSError(errno.EMFILE, "of nobody's making")

    monkeypatch.setattr(type(bench.router._calls), "again", again)
    for unique in (2, 4):
        bench.router._backlog.append(poll(unique, 1))
    bench.loop(monkeypatch)
    assert bench.errors() == {2: errno.EIO, 4: errno.EIO}
    assert len(caplog.records) == 2


def test_an_event_that_fails_does_not_keep_the_others_from_being_looked_at(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def look(name: str) -> None:
        seen.append(name)
        raise RuntimeError(name)

    monkeypatch.setattr(type(bench.domain), "expire", lambda _: look("deadlines"))
    interrupts = type(bench.router._interrupts)
    monkeypatch.setattr(interrupts, "look_for_killed", lambda _: look("killed"))
    for _ in range(2):
        readable = os.eventfd(1)
        bench.router._watches.watch(readable, lambda: look("cancel"))
    bench.router._look_around()
    assert seen == ["cancel", "cancel", "deadlines", "killed"]
