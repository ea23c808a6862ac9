# SPDX-License-Identifier: LGPL-2.1-or-later
"""How those who poll a file are woken."""

import os
import threading

import pytest

import daemons
from bus.fakes import FakeClock
from kdbusfs.bus.domain import Domain
from kdbusfs.fuse import files as files_module
from kdbusfs.fuse.backing import Backing
from kdbusfs.fuse.device import Device
from kdbusfs.fuse.files import OpenFile, OpenFiles
from kdbusfs.fuse.tree import Tree
from kdbusfs.peer.namespaces import OWN_USER


class Clock:
    """Each look at it takes *step* nanoseconds."""

    def __init__(self) -> None:
        self.now = self.step = 0

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def _no_backing(nodeid: int, uid: int) -> Backing:
    raise AssertionError("no endpoint is opened here")


def test_those_who_take_long_to_wake_are_woken_by_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file may be polled under thousands of numbers; as soon as it is not, all is as before."""
    clock, threads = Clock(), []
    monkeypatch.setattr(files_module, "monotonic_ns", clock)
    name = threading.current_thread
    monkeypatch.setattr(os, "write", lambda *_: threads.append(name().name))
    domain = Domain(FakeClock(), OWN_USER)
    files = OpenFiles(Device(-1), domain, Tree(domain.root), _no_backing, lambda *_: None)
    file, own = OpenFile(1, 1), threading.current_thread().name

    def wake() -> str:
        n = file.n_slow_wakes + 1 if clock.step > 1_000_000 else 0
        file.poll_wanted = True
        files._wake(file)
        daemons.wait_until(lambda: file.n_slow_wakes == n, "the account of it")
        return threads[-1]

    assert [wake() for _ in range(3)] == [own] * 3
    clock.step = 5_000_000
    assert [wake() for _ in range(4)] == [own, own, "kdbusfs-close", "kdbusfs-close"]
    clock.step = 1
    assert wake() == "kdbusfs-close"
    assert wake() == own
