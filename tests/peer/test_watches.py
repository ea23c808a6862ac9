# SPDX-License-Identifier: LGPL-2.1-or-later
"""What calls wait for beside the device: a number is not the same as the file behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from kdbusfs.fuse.watches import Watches


@pytest.fixture
def watches() -> Iterator[Watches]:
    watches = Watches()
    yield watches
    watches.close()


def test_a_watch_calls_back_while_its_file_is_readable(watches: Watches) -> None:
    seen: list[str] = []
    fd = os.eventfd(0)
    unwatch = watches.watch(fd, lambda: seen.append("a"))
    assert unwatch is not None
    watches.dispatch()
    assert seen == []
    os.eventfd_write(fd, 1)
    watches.dispatch()
    assert seen == ["a"]
    unwatch()
    watches.dispatch()
    assert seen == ["a"]
    assert watches.fd == -1
    os.close(fd)


def test_one_file_may_be_watched_under_many_numbers(watches: Watches) -> None:
    seen: list[int] = []
    first = os.eventfd(0)
    fds = [first, os.dup(first), os.dup(first)]
    ends = [watches.watch(fd, lambda fd=fd: seen.append(fd)) for fd in fds]  # type: ignore[misc]
    os.eventfd_write(first, 1)
    watches.dispatch()
    assert sorted(seen) == sorted(fds)
    for end in ends:
        assert end is not None
        end()
    for fd in fds:
        os.close(fd)


def test_a_number_that_is_used_again_is_not_what_was_readable(watches: Watches) -> None:
    """The first callback ends the other watch, whose number goes to another file at once."""
    seen: list[str] = []
    ends: dict[int, Callable[[], None]] = {}
    fds = [os.eventfd(1), os.eventfd(1)]

    def reuse(mine: int) -> None:
        (other,) = set(fds) - {mine}
        ends.pop(other)()
        os.close(other)
        assert os.dup2(os.eventfd(0, os.EFD_CLOEXEC), other) == other
        end = watches.watch(other, lambda: seen.append("the wrong one"))
        assert end is not None
        ends[other] = end
        seen.append("once")

    for fd in fds:
        end = watches.watch(fd, lambda fd=fd: reuse(fd))  # type: ignore[misc]
        assert end is not None
        ends[fd] = end
    watches.dispatch()
    assert seen == ["once"]
    for end in ends.values():
        end()
    for fd in fds:
        os.close(fd)


def test_a_watch_that_ends_late_leaves_the_next_one_of_its_number(watches: Watches) -> None:
    seen: list[str] = []
    fd = os.eventfd(0)
    first = watches.watch(fd, lambda: seen.append("first"))
    assert first is not None
    first()
    second = watches.watch(fd, lambda: seen.append("second"))
    first()
    os.eventfd_write(fd, 1)
    watches.dispatch()
    assert seen == ["second"]
    assert second is not None
    second()
    os.close(fd)


def test_what_can_not_be_polled_is_not_watched(watches: Watches) -> None:
    with open("/etc/passwd") as file:
        assert watches.watch(file.fileno(), lambda: None) is None
