# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing what takes time: in turn, bounded, and nobody pays for others."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

import daemons
from kdbusfs.peer import closers as module
from kdbusfs.peer.closers import LIMIT, PER_USER, Closers

ALICE, BOB, CAROL = 1000, 2000, 3000


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What files that are slow to close wait for."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def closers(monkeypatch: pytest.MonkeyPatch) -> Closers:
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.01)
    return Closers()


def soon(condition: Callable[[], bool], what: str) -> None:
    daemons.wait_until(condition, what)


def answer(closers: Closers, caller: int, *files: tuple[int, Callable[[], object]]) -> list[float]:
    """What a call of *caller* does that lets go of (user, close) *files*: the time it took to be
    answered, as soon as it is."""
    closers.collect(caller)
    for uid, close in files:
        closers.submit(uid, close)  # type: ignore[arg-type]
    closing = closers.collected()
    answered: list[float] = []
    start = time.monotonic()
    if closing is None:
        answered.append(0.0)
    else:
        closing.when_done(lambda: answered.append(time.monotonic() - start))
    return answered


def test_a_call_is_answered_when_its_files_are_closed(
    closers: Closers, gate: threading.Event
) -> None:
    closed: list[int] = []
    answered = answer(closers, ALICE, (ALICE, gate.wait), (ALICE, lambda: closed.append(1)))
    soon(lambda: closed == [1], "the other file is not closed")
    assert answered == []
    gate.set()
    soon(lambda: len(answered) == 1, "no answer")


def test_nothing_to_close_is_nothing_to_wait_for(closers: Closers) -> None:
    assert answer(closers, ALICE) == [0.0]


def test_a_call_waits_no_longer_than_the_limit(closers: Closers, gate: threading.Event) -> None:
    answered = answer(closers, ALICE, (ALICE, gate.wait))
    soon(lambda: bool(answered), "no answer")
    assert answered[0] >= LIMIT * 0.9
    gate.set()
    soon(lambda: not closers.n_waiting(ALICE), "not closed")
    assert len(answered) == 1


def test_others_wait_once_for_somebody_slow(closers: Closers, gate: threading.Event) -> None:
    first = answer(closers, BOB, (ALICE, gate.wait))
    soon(lambda: bool(first), "no answer")
    assert answer(closers, BOB, (ALICE, gate.wait)) == [0.0]
    # Its own calls wait as before, and those about other people's files.
    assert answer(closers, ALICE, (ALICE, gate.wait)) == []
    assert answer(closers, BOB, (CAROL, gate.wait)) == []


def test_nobody_waits_for_what_can_not_begin(closers: Closers, gate: threading.Event) -> None:
    answers = [answer(closers, ALICE, (ALICE, gate.wait)) for _ in range(PER_USER)]
    soon(lambda: all(answers), "no answer")
    assert answer(closers, ALICE, (ALICE, gate.wait)) == [0.0]
    assert answer(closers, BOB, (BOB, gate.wait)) == []


def test_what_one_thread_lets_go_of_is_no_business_of_another(
    closers: Closers, gate: threading.Event
) -> None:
    closers.collect(ALICE)
    other = threading.Thread(target=closers.submit, args=(ALICE, gate.wait))
    other.start()
    other.join()
    assert closers.collected() is None


def test_what_nobody_waits_for_is_not_left_for_the_next_call(
    closers: Closers, gate: threading.Event
) -> None:
    closers.submit(ALICE, gate.wait)  # type: ignore[arg-type]
    assert answer(closers, BOB) == [0.0]


def test_a_user_has_few_threads_and_others_go_on(closers: Closers, gate: threading.Event) -> None:
    at_work: Counter[int] = Counter()

    def be_slow() -> None:
        at_work[ALICE] += 1
        gate.wait()

    for _ in range(50):
        closers.submit(ALICE, be_slow)
    soon(lambda: at_work[ALICE] == PER_USER, "not all of its threads are used")
    closed: list[int] = []
    closers.submit(BOB, lambda: closed.append(BOB))
    soon(lambda: closed == [BOB], "another user's file is not closed")
    assert at_work[ALICE] == PER_USER
    assert closers.n_waiting(ALICE) == 50 - PER_USER
    gate.set()
    soon(lambda: at_work[ALICE] == 50, "some are never closed")


def test_one_slow_file_does_not_delay_the_same_users_next(
    closers: Closers, gate: threading.Event
) -> None:
    closers.submit(ALICE, gate.wait)  # type: ignore[arg-type]
    closed: list[int] = []
    for _ in range(100):
        closers.submit(ALICE, lambda: closed.append(1))
    soon(lambda: len(closed) == 100, "they wait for the slow one")


def test_threads_are_bounded_for_all_users_together(
    closers: Closers, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_THREADS", 12)
    monkeypatch.setattr(module, "CROWDED", 8)
    at_work: Counter[int] = Counter()
    for uid in range(100):
        for _ in range(10):

            def be_slow(uid: int = uid) -> None:
                at_work[uid] += 1
                gate.wait()

            closers.submit(uid, be_slow)
    soon(lambda: sum(at_work.values()) == 12, "not all threads are used")
    assert closers._n_threads == 12
    gate.set()
    soon(lambda: sum(at_work.values()) == 1000, "some are never closed")


def test_when_it_is_crowded_a_user_has_one_thread(
    closers: Closers, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CROWDED", 3)
    at_work: Counter[int] = Counter()

    def be_slow(uid: int) -> None:
        at_work[uid] += 1
        gate.wait()

    for uid in (1, 2, 3):
        closers.submit(uid, lambda uid=uid: be_slow(uid))  # type: ignore[misc]
    soon(lambda: sum(at_work.values()) == 3, "not at work")
    for _ in range(3):
        closers.submit(4, lambda: be_slow(4))
    soon(lambda: at_work[4] == 1, "the fourth has none")
    assert closers.n_waiting(4) == 2
    gate.set()
    soon(lambda: at_work[4] == 3, "some are never closed")


def test_a_thread_that_can_not_be_started_loses_nothing(
    closers: Closers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    closed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        answered = answer(closers, ALICE, (ALICE, lambda: closed.append(1)))
        # Nobody would see to it that the wait ends.
        assert len(answered) == 1
    closers.submit(BOB, lambda: closed.append(2))
    soon(lambda: sorted(closed) == [1, 2], "lost")


def test_the_last_thread_stays(closers: Closers, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    for n in range(5):
        closers.submit(n, lambda n=n: closed.append(n))  # type: ignore[misc]
    soon(lambda: len(closed) == 5 and closers._n_threads == 1, "idle threads do not end")
    monkeypatch.setattr(threading.Thread, "start", None)
    closers.submit(ALICE, lambda: closed.append(5))
    soon(lambda: 5 in closed, "nobody is left")


def test_what_a_close_reports_ends_no_thread(closers: Closers) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    answered = answer(closers, ALICE, *[(ALICE, fail)] * 20)
    soon(lambda: len(answered) == 1, "no answer")


def lingering_socket() -> socket.socket:
    """One whose last close takes ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        stuck.append(listener.accept()[0])
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 10))
    sender.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    return sender


stuck: list[socket.socket] = []
"""The other ends of those, which read nothing."""


def test_what_is_quick_is_closed_when_it_returns_without_a_thread(closers: Closers) -> None:
    for _ in range(20):
        a, b = socket.socketpair()
        fd, closed = a.detach(), list[int]()
        closers.collect(ALICE)
        closers.close(ALICE, fd, lambda closed=closed: closed.append(1))  # type: ignore[misc]
        closing = closers.collected()
        if closing is not None:
            # The machine was busy.
            closing.wait()
        assert closed == [1]
        assert b.recv(1) == b""
        b.close()


def test_nobody_waits_for_a_socket_that_lingers(closers: Closers) -> None:
    sockets = [lingering_socket() for _ in range(3)]
    closed: list[int] = []
    answers = []
    start = time.monotonic()
    for sender in sockets:
        closers.collect(ALICE)
        closers.close(ALICE, sender.detach(), lambda: closed.append(1))
        closing = closers.collected()
        assert closing is not None
        closing.when_done(lambda: answers.append(time.monotonic() - start))
    assert time.monotonic() - start < LIMIT
    assert not closed
    # Somebody else's, meanwhile.
    a, b = socket.socketpair()
    closers.close(BOB, a.detach(), lambda: closed.append(2))
    assert b.recv(1) == b""
    soon(lambda: 2 in closed, "not closed")
    soon(lambda: len(answers) == 3, "no answers")
    assert 1 not in closed
    while stuck:
        # What was sent is lost: nothing is left to linger for.
        end = stuck.pop()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        end.close()
    soon(lambda: closed.count(1) == 3, "not closed in the end")
    b.close()


def test_a_user_takes_no_more_than_one_of_the_threads_in_c(closers: Closers) -> None:
    """However many of its files are stuck, a second user's has one."""
    for _ in range(5):
        closers.close(ALICE, lingering_socket().detach(), lambda: None)
    assert closers._in_lanes == {ALICE}
    closers.close(BOB, lingering_socket().detach(), lambda: None)
    assert closers._in_lanes == {ALICE, BOB}
    while stuck:
        end = stuck.pop()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        end.close()
    soon(lambda: not closers._in_lanes, "not joined")
