# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two kinds of pool, without a kernel that serves them."""

from collections.abc import Iterator
from errno import EBUSY

import pytest

from bus.harness import fails
from kdbusfs.abi.errors import Stalled
from kdbusfs.fuse import wire
from kdbusfs.fuse.backing import CacheBacking, PassthroughBacking
from kdbusfs.peer.leftovers import Leftovers

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def passthrough(monkeypatch: pytest.MonkeyPatch) -> Iterator[PassthroughBacking]:
    monkeypatch.setattr(wire, "backing_open", lambda device, fd: 1)
    monkeypatch.setattr(wire, "backing_close", lambda device, backing_id: None)
    backing = PassthroughBacking(-1, 0, Leftovers())
    yield backing
    backing.close()


def test_a_file_that_is_mapped_is_never_cut(passthrough: PassthroughBacking) -> None:
    memory = passthrough.new_memory(MIB)
    memory.write(MIB - 4, b"data")
    for size in (PAGE, MIB, 2 * MIB):
        with fails(EBUSY):
            passthrough.new_memory(size)
    # Cut, this would be SIGBUS.
    assert memory.read(MIB - 4, 4) == b"data"
    memory.seal()
    assert memory.read(MIB - 4, 4) == b"data"


def test_a_file_whose_mapping_has_gone_can_have_another_size(
    passthrough: PassthroughBacking,
) -> None:
    for size in (MIB, PAGE, 2 * MIB):
        memory = passthrough.new_memory(size)
        memory.write(size - 4, b"data")
        memory.close(lambda: None)


class Pushes:
    """What comes of pushes into a page cache."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.stalls = 0

    def __call__(self, offset: int, data: object) -> None:
        self.made.append((offset, len(data)))  # type: ignore[arg-type]
        if self.stalls:
            self.stalls -= 1
            raise Stalled

    def take(self) -> list[tuple[int, int]]:
        made, self.made = self.made, []
        return made


def test_whole_pages_are_pushed_so_that_none_is_asked_for() -> None:
    pushes = Pushes()
    memory = CacheBacking(pushes, lambda size: None, True).new_memory(MIB)
    assert pushes.take() == [(MIB - PAGE, PAGE)]
    for offset, size, expected in (
        (0, 8, (0, PAGE)),
        (PAGE - 8, 16, (0, 2 * PAGE)),
        (PAGE, PAGE, (PAGE, PAGE)),
        (MIB - 8, 8, (MIB - PAGE, PAGE)),
    ):
        memory.publish(offset, size)
        assert pushes.take() == [expected]


def test_what_stalled_and_was_pushed_in_the_end_is_not_pushed_again() -> None:
    pushes = Pushes()
    memory = CacheBacking(pushes, lambda size: None, True).new_memory(MIB)
    pushes.take()
    pushes.stalls = 1
    with pytest.raises(Stalled):
        memory.publish(0, 8)
    memory.publish(0, 8)
    assert pushes.take() == [(0, PAGE)]
    # Once; and not if something else lies there by now.
    memory.publish(0, 8)
    assert pushes.take() == [(0, PAGE)]
    pushes.stalls = 1
    with pytest.raises(Stalled):
        memory.publish(0, 8)
    memory.write(0, b"other")
    memory.publish(0, 8)
    assert pushes.take() == [(0, PAGE), (0, PAGE)]
