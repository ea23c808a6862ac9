# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listings of directories, without a kernel that asks for them."""

import random
import stat

import pyfuse3
import pytest
import trio

from kdbusfs.bus.node import Node
from kdbusfs.fuse.tree import Tree

N_NODES = 2000
PER_CALL = 20
"""About as many entries as fit into the buffer that readdir(3) asks with."""


class CountingNode(Node):
    """A node that counts how often anybody looks at the inode number of one."""

    n_looks = 0

    @property
    def ino(self) -> int:  # type: ignore[override]
        CountingNode.n_looks += 1
        return self._ino

    @ino.setter
    def ino(self, number: int) -> None:
        self._ino = number


@pytest.fixture
def root() -> Node:
    """A directory with files that were made in no order."""
    root = Node(1, "", stat.S_IFDIR | 0o555, None)
    numbers = list(range(3, 3 + N_NODES))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        root.link(CountingNode(number, f"node-{number}", stat.S_IFREG | 0o666, None))
    CountingNode.n_looks = 0
    return root


def listed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All of the root directory, read as readdir(3) does."""
    names: list[str] = []
    at, n_taken = 0, 0

    def take(token: object, name: bytes, attributes: object, next_id: int) -> bool:
        nonlocal at, n_taken
        if n_taken == PER_CALL:
            return False
        n_taken += 1
        at = next_id
        names.append(name.decode())
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", take)
    while True:
        n_taken = 0
        trio.run(tree.readdir, pyfuse3.ROOT_INODE, at, None)
        if not n_taken:
            return names


def test_a_listing_has_each_node_once(root: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    names = listed(Tree(root), monkeypatch)
    assert names == [".", "..", *(f"node-{n}" for n in range(3, 3 + N_NODES))]


def test_a_listing_costs_what_it_lists(root: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of the directory for each buffer that is filled."""
    listed(Tree(root), monkeypatch)
    assert CountingNode.n_looks < 10 * N_NODES
