# SPDX-License-Identifier: LGPL-2.1-or-later
"""Subordinate ids count as one user wherever something is shared out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from errno import EMFILE

import pytest

from bus.harness import fails
from kdbusfs.bus.principals import BLOCK, PRINCIPALS, Principals
from kdbusfs.bus.shares import Share
from kdbusfs.peer.closers import Closers
from kdbusfs.peer.stall import MAX_OF_ALL, MAX_OF_USER, Users
from kdbusfs.peer.tracer import Workers

FIRST = 100_000
ORDINARY = 1000
SECONDS = 20.0


@pytest.fixture
def subordinate() -> Iterator[range]:
    """The 65,536 uids that one user owns."""
    PRINCIPALS.replace([(FIRST, BLOCK)])
    yield range(FIRST, FIRST + BLOCK)
    PRINCIPALS.replace([])


@pytest.mark.parametrize(
    ("uid", "principal"),
    [
        *((uid, uid) for uid in (0, 1, 1000, 99_999, 165_536, 999_999, 1_196_608, 4294967294)),
        *((uid, 100_000) for uid in (100_000, 123_456, 165_535)),
        # A range of several containers: each is somebody else.
        *((uid, 1_000_000) for uid in (1_000_000, 1_065_535)),
        *((uid, 1_065_536) for uid in (1_065_536, 1_131_071)),
    ],
)
def test_whom_a_uid_counts_as(uid: int, principal: int) -> None:
    principals = Principals([(1_000_000, 3 * BLOCK), (100_000, BLOCK), (0, 5), (7000, 0)])
    assert principals.of(uid) == principal


def test_subordinate_ids_have_one_share_together(subordinate: range) -> None:
    share = Share("things", EMFILE, 12_000, 1 << 40)
    n = 0
    for uid in subordinate:
        try:
            share.charge(uid, 1)
        except Exception:
            break
        n += 1
    assert n == 3000
    for uid in subordinate[::4096]:
        with fails(EMFILE):
            share.charge(uid, 1)
    share.charge(ORDINARY, 2000)
    share.discharge(ORDINARY, 2000)
    for uid in subordinate[:n]:
        share.discharge(uid, 1)
    share.check_empty()


def test_subordinate_ids_stall_as_one_user(subordinate: range) -> None:
    """Each call that stalls has a thread of the daemon."""
    users = Users()
    n = 0
    for uid in subordinate:
        if users.has_its_share(uid):
            break
        users.begin(uid)
        n += 1
    assert n == MAX_OF_USER < MAX_OF_ALL
    assert all(users.has_its_share(uid) for uid in subordinate)
    assert not users.has_its_share(ORDINARY)
    for uid in subordinate[:n]:
        users.end(uid)
    assert not users


def test_subordinate_ids_are_traced_and_wait_as_one_user(subordinate: range) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def stick() -> None:
        begun.release()
        assert go_on.wait(SECONDS)

    workers = Workers(most=4, share=2, queue=3)
    taken = [workers.submit(uid, stick) for uid in subordinate[:2]]
    for _ in range(2):
        assert begun.acquire(timeout=SECONDS)
    taken += [workers.submit(uid, stick) for uid in subordinate[2:10]]
    assert taken == [True] * 5 + [False] * 5
    done = threading.Event()
    assert workers.submit(ORDINARY, done.set)
    assert done.wait(SECONDS)
    go_on.set()
    workers.close()


def test_files_of_subordinate_ids_wait_to_be_closed_as_one_users(subordinate: range) -> None:
    go_on = threading.Event()
    closers = Closers()
    for uid in subordinate[:100]:
        closers.submit(uid, lambda: go_on.wait(SECONDS) or None)
    assert closers.n_waiting(subordinate[-1]) > 90
    done = threading.Event()
    closers.submit(ORDINARY, done.set)
    assert done.wait(SECONDS)
    go_on.set()
