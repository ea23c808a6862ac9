# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which requests that wait are served."""

from hypothesis import given
from hypothesis import strategies as st

from kdbusfs.fuse.fair import FairQueue


def served(queue: FairQueue[str], cost: dict[int, int]) -> str:
    """Serve all that wait, each at the cost of its user; what was served, in order."""
    order = ""
    while queue:
        uid, request = queue.pop()
        order += request
        queue.charge(uid, cost[uid])
    return order


def queue_of(*requests: tuple[int, str]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for uid, request in requests:
        queue.push(uid, request)
    return queue


def test_users_are_served_in_turn_each_in_its_order() -> None:
    queue = queue_of((1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e"), (3, "f"))
    assert served(queue, {1: 1, 2: 1, 3: 1}) == "adfbec"


def test_who_costs_more_comes_later() -> None:
    queue = queue_of(*[(1, c) for c in "abc"], *[(2, c) for c in "stuvwxyz"])
    assert served(queue, {1: 5, 2: 1}) == "astuvwbxyzc"


def test_who_comes_new_has_saved_up_no_time() -> None:
    queue = queue_of(*[(1, c) for c in "aaaa"])
    for _ in range(2):
        queue.charge(queue.pop()[0], 10)
    for c in "bbb":
        queue.push(2, c)
    # Level with the user who is served: one goes ahead, and then it is in turn.
    assert served(queue, {1: 10, 2: 10}) == "babab"


def test_a_long_request_that_ends_late_is_charged_to_its_user() -> None:
    queue = queue_of((1, "a"), (1, "b"), (2, "c"), (2, "d"))
    assert queue.pop() == (1, "a")
    assert queue.pop() == (2, "c")
    queue.charge(2, 1)
    queue.charge(1, 100)
    assert [queue.pop()[1] for _ in range(2)] == ["d", "b"]
    assert not queue


def test_when_nobody_waits_all_is_forgotten() -> None:
    queue = queue_of((1, "a"), (2, "b"))
    queue.pop()
    queue.charge(1, 1_000_000)
    queue.pop()
    queue.charge(2, 1)
    queue.push(1, "c")
    queue.push(2, "d")
    assert served(queue, {1: 1, 2: 1}) == "cd"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20), st.booleans())))
def test_nothing_is_lost_and_no_user_is_overtaken_by_itself(
    steps: list[tuple[int, int, bool]],
) -> None:
    queue: FairQueue[int] = FairQueue()
    pushed: dict[int, list[int]] = {}
    popped: dict[int, list[int]] = {}

    def pop(cost: int) -> None:
        uid, request = queue.pop()
        popped.setdefault(uid, []).append(request)
        queue.charge(uid, cost)

    for n, (uid, cost, pops) in enumerate(steps):
        queue.push(uid, n)
        pushed.setdefault(uid, []).append(n)
        if pops:
            pop(cost)
    while queue:
        pop(1)
    assert popped == pushed
