# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that is somebody's until nobody has it mapped any more."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from kdbusfs.peer.leftovers import Leftovers


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    leftovers = Leftovers()
    yield leftovers
    leftovers.close()


@pytest.mark.parametrize("last", ["mapping", "descriptor"])
def test_a_file_is_gone_with_the_last_that_refers_to_it(leftovers: Leftovers, last: str) -> None:
    gone: list[int] = []
    fd = os.memfd_create("pool")
    os.ftruncate(fd, mmap.PAGESIZE)
    mapping = mmap.mmap(fd, mmap.PAGESIZE)
    # The mapping has a duplicate of its own.
    number = leftovers.watch(fd)
    leftovers.when_gone(number, lambda: gone.append(1))
    ends = [mapping.close, lambda: os.close(fd)]
    for end in ends if last == "descriptor" else reversed(ends):
        leftovers.collect()
        assert gone == []
        end()
    leftovers.collect()
    assert gone == [1]
    leftovers.collect()
    assert gone == [1]


def test_what_went_before_somebody_asked_is_gone(leftovers: Leftovers) -> None:
    fd = os.memfd_create("pool")
    number = leftovers.watch(fd)
    os.close(fd)
    leftovers.collect()
    gone: list[int] = []
    leftovers.when_gone(number, lambda: gone.append(1))
    assert gone == [1]


def test_what_can_not_be_watched_counts_as_gone(leftovers: Leftovers) -> None:
    number = leftovers.watch(999_999)
    assert number == -1
    gone: list[int] = []
    leftovers.when_gone(number, lambda: gone.append(1))
    assert gone == [1]


def test_nobody_is_charged_for_ever_for_what_the_kernel_could_not_tell(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    fds = [os.memfd_create("closed"), os.memfd_create("in use")]
    closed, in_use = (leftovers.watch(fd) for fd in fds)
    leftovers.when_gone(closed, lambda: gone.append("closed"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda fd, size: struct.pack("=iIII", -1, 0x4000, 0, 0))
        leftovers.collect()
    assert gone == ["closed"]
    leftovers.when_gone(in_use, lambda: gone.append("in use"))
    for fd in fds:
        os.close(fd)
    leftovers.collect()
    assert gone == ["closed", "in use"]
