# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's table of open files: a share for each user, and something left for all others."""

from __future__ import annotations

from errno import EBADF, EMFILE, ENFILE, ENOMEM

import pytest

from bus.harness import fails
from kdbusfs.peer.fd_table import MOST, RESERVE, FdTable, check_exhausted

SIZE = 20_000
ROOM = SIZE - RESERVE
USERS = ROOM - ROOM // 4


def fill(table: FdTable, uid: int) -> int:
    """How many more *uid* can have."""
    for n in range(SIZE + 1):
        try:
            table.charge(uid)
        except Exception:
            with fails(EMFILE):
                table.charge(uid)
            return n
    raise AssertionError("no end")


def test_a_user_may_have_a_third_of_what_others_leave() -> None:
    table = FdTable(SIZE)
    assert fill(table, 1000) == pytest.approx(USERS / 3, abs=1)
    assert fill(table, 2000) == pytest.approx(USERS * 2 / 9, abs=1)
    assert fill(table, 1000) == 0


def test_many_users_leave_a_quarter_to_root_and_the_reserve_to_nobody() -> None:
    table = FdTable(SIZE)
    assert sum(fill(table, uid) for uid in range(1, 300)) <= USERS
    assert fill(table, 0) >= ROOM // 4
    assert sum(table.taken(uid) for uid in range(300)) == ROOM


def test_in_a_large_table_a_user_has_a_fixed_share() -> None:
    table = FdTable(1 << 20)
    for _ in range(MOST):
        table.charge(1000)
    with fails(EMFILE):
        table.charge(1000)
    table.charge(2000)


def test_what_is_given_back_can_be_taken_again() -> None:
    table = FdTable(SIZE)
    n = fill(table, 1000)
    table.discharge(1000)
    assert fill(table, 1000) == 1
    for _ in range(n):
        table.discharge(1000)
    assert table.taken(1000) == 0
    assert fill(table, 2000) == n


def test_a_small_table_leaves_half_of_it() -> None:
    table = FdTable(64)
    assert fill(table, 0) == 32


@pytest.mark.parametrize(("ours", "theirs"), [(EMFILE, ENFILE), (ENFILE, ENFILE), (ENOMEM, ENOMEM)])
def test_what_the_daemon_is_short_of_is_no_fault_of_the_caller(ours: int, theirs: int) -> None:
    with fails(theirs):
        check_exhausted(ours)
    check_exhausted(EBADF)
    check_exhausted(None)
