# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is traced when: `Workers` of kdbusfs/peer/tracer.py."""

import threading
from collections.abc import Iterator

import pytest

from kdbusfs.peer.tracer import Workers

SECONDS = 20.0
ALICE, BOB, CAROL = 1001, 1002, 1003


class Stuck:
    """Jobs that do not end before they are told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self) -> None:
        self.begun.release()
        assert self.go_on.wait(SECONDS)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.go_on.set()


def test_a_user_who_takes_all_leaves_room_for_others(stuck: Stuck) -> None:
    workers = Workers(most=4, share=2, queue=10)
    for _ in range(8):
        assert workers.submit(ALICE, stuck)
    for _ in range(2):
        assert stuck.begun.acquire(timeout=SECONDS)
    done = threading.Event()
    assert workers.submit(BOB, done.set)
    assert done.wait(SECONDS)
    assert not stuck.begun.acquire(blocking=False)
    stuck.go_on.set()
    workers.close()
    for _ in range(6):
        assert stuck.begun.acquire(blocking=False)


def test_too_many_that_wait_are_refused_and_only_of_that_user(stuck: Stuck) -> None:
    workers = Workers(most=4, share=1, queue=3)
    assert workers.submit(ALICE, stuck)
    assert stuck.begun.acquire(timeout=SECONDS)
    assert [workers.submit(ALICE, stuck) for _ in range(5)] == [True] * 3 + [False] * 2
    done = threading.Event()
    assert workers.submit(BOB, done.set)
    assert done.wait(SECONDS)
    stuck.go_on.set()
    workers.close()


def test_users_take_turns_when_all_are_busy(stuck: Stuck) -> None:
    workers = Workers(most=1, share=1, queue=10)
    assert workers.submit(CAROL, stuck)
    assert stuck.begun.acquire(timeout=SECONDS)
    seen: list[str] = []
    for n in range(3):
        assert workers.submit(ALICE, lambda n=n: seen.append(f"alice {n}"))
    assert workers.submit(BOB, lambda: seen.append("bob"))
    stuck.go_on.set()
    workers.close()
    assert seen == ["alice 0", "bob", "alice 1", "alice 2"]


def test_a_job_that_fails_costs_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(most=1, share=1, queue=10)

    def fail() -> None:
        raise OSError("no")

    done = threading.Event()
    assert workers.submit(ALICE, fail)
    assert workers.submit(ALICE, done.set)
    assert done.wait(SECONDS)
    workers.close()
    assert "a caller could not be traced" in caplog.text


def test_without_a_thread_nobody_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(most=1, share=1, queue=10)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not workers.submit(ALICE, lambda: None)
    done = threading.Event()
    assert workers.submit(ALICE, done.set)
    assert done.wait(SECONDS)
    workers.close()
