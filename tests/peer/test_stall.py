# SPDX-License-Identifier: LGPL-2.1-or-later
"""The threads that run the bus, and how one goes on when another stalls."""

import os
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest

import daemons
from kdbusfs.abi.errors import Stalled
from kdbusfs.native import ffi, lib
from kdbusfs.peer.stall import (
    MAX_OF_ALL,
    MAX_OF_USER,
    TURN,
    Crew,
    Users,
    Worker,
    fail,
    has_left,
    leave,
)
from mount.processes import Child
from mount.test_slow_memory import Trap, _is_faulting

OWNER = 7


class Bench:
    """A crew whose work is jobs that are handed to it. To be made in a process of its own, since
    there is one watch for each."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.done: list[str] = []
        self.crew = Crew(self._work, lambda: OWNER, lambda: None)
        self.crew.start()

    def _work(self) -> None:
        while not self.crew.is_overtaken():
            TURN.release()
            job = self.jobs.get()
            TURN.acquire()
            if job is None:
                self.crew.close()
                return
            try:
                job()
            except Stalled:
                self.done.append("undone")

    def say(self, word: str) -> None:
        self.jobs.put(lambda: self.done.append(word))

    def read(self, trap: Trap, word: str) -> None:
        """A job that reads from *trap*."""

        def job() -> None:
            data = ffi.new("char[8]")
            error = lib.kdbusfs_vm_read(os.getpid(), trap.memory.address, data, 8)
            if error < 0:
                fail(error)
            self.done.append(word)

        self.jobs.put(job)

    def store(self, trap: Trap, word: str) -> None:
        """A job that stores results in *trap*."""

        def job() -> None:
            address = trap.memory.address
            if lib.kdbusfs_vm_store(os.getpid(), address, b"12345678", 8) > 0:
                assert not has_left()
                leave()
                self.done.append(f"{word} late" if has_left() else "has the turn")
            else:
                self.done.append(word)

        self.jobs.put(job)

    def wait(self, *words: str) -> None:
        daemons.wait_until(lambda: self.done == list(words), f"{words}, not {self.done}")

    def has_spare(self) -> bool:
        return self.crew._spare is not None


def workers() -> int:
    return sum(isinstance(thread, Worker) for thread in threading.enumerate())


def alone(test: Callable[[], None]) -> None:
    def run(_: socket.socket) -> None:
        test()

    with Child(run) as child:
        child.result()


def test_another_goes_on_and_what_stalled_is_undone_later() -> None:
    def test() -> None:
        bench, trap = Bench(), Trap(1)
        daemons.wait_until(bench.has_spare, "a spare")
        bench.read(trap, "read")
        daemons.wait_until(lambda: _is_faulting(trap), "a fault")
        bench.say("others")
        bench.wait("others")
        assert bench.crew.users.has_its_share(OWNER) is False
        assert bool(bench.crew.users)
        trap.spring()
        # In its turn, which is between two jobs.
        bench.wait("others", "undone")
        daemons.wait_until(lambda: not bench.crew.users, "the end of the stall")
        daemons.wait_until(lambda: workers() == 2, "the end of the thread that stalled")
        bench.read(trap, "read")
        bench.wait("others", "undone", "read")

    alone(test)


def test_what_is_stored_late_is_stored_and_the_turn_left_alone() -> None:
    def test() -> None:
        bench, trap = Bench(), Trap(1)
        daemons.wait_until(bench.has_spare, "a spare")
        bench.store(trap, "stored")
        daemons.wait_until(lambda: _is_faulting(trap), "a fault")
        bench.say("others")
        bench.wait("others")
        trap.spring()
        bench.wait("others", "stored late")
        assert trap.memory.read(0, 8) == b"12345678"
        bench.say("again")
        bench.wait("others", "stored late", "again")

    alone(test)


def test_nobody_is_overtaken_while_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def test() -> None:
        bench, first, second, third = Bench(), Trap(1), Trap(1), Trap(1)
        daemons.wait_until(bench.has_spare, "a spare")
        start = Worker.start
        refused = []

        def refuse(self: Worker) -> None:
            refused.append(self)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(Worker, "start", refuse)
        bench.read(first, "first")
        bench.say("a")
        bench.wait("a")
        bench.read(second, "second")
        daemons.wait_until(lambda: _is_faulting(second), "a fault")
        n = len(refused)
        bench.say("b")
        daemons.wait_until(lambda: len(refused) > n + 3, "the watch to look for a thread")
        assert bench.done == ["a"]
        # It ends by itself, and is not undone.
        second.spring()
        bench.wait("a", "second", "b")
        # When there are threads again, all is as before.
        monkeypatch.setattr(Worker, "start", start)
        bench.read(third, "third")
        daemons.wait_until(lambda: _is_faulting(third), "a fault")
        bench.say("c")
        bench.wait("a", "second", "b", "c")
        first.spring()
        bench.wait("a", "second", "b", "c", "undone")
        third.spring()
        bench.wait("a", "second", "b", "c", "undone", "undone")

    alone(test)


def test_the_last_one_ends_all_but_those_that_stall() -> None:
    def test() -> None:
        bench, trap = Bench(), Trap(1)
        daemons.wait_until(bench.has_spare, "a spare")
        bench.read(trap, "read")
        bench.say("others")
        bench.wait("others")
        bench.jobs.put(None)
        daemons.wait_until(lambda: workers() == 1, "the end of the others")
        trap.spring()
        # The bus is closed to it for good.
        assert not TURN.acquire(blocking=False)
        assert bench.done == ["others"]

    alone(test)


def test_a_share_of_stalls_for_each_user_and_for_all() -> None:
    users = Users()
    assert not users
    for _ in range(MAX_OF_USER):
        assert not users.has_its_share(1)
        users.begin(1)
    assert users.has_its_share(1)
    assert not users.has_its_share(2)
    users.end(1)
    assert not users.has_its_share(1)
    for uid in range(2, 2 + MAX_OF_ALL):
        users.begin(uid)
    # Only who has none yet gets one.
    assert users.has_its_share(1)
    assert users.has_its_share(2)
    assert not users.has_its_share(1000)
    for uid in range(2, 2 + MAX_OF_ALL):
        users.end(uid)
    assert not users.has_its_share(2)
