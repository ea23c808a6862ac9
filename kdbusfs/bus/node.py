# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of a domain (kdbus.fs(7)): control file, bus directories, endpoint files.

Nodes come and go with what they stand for. Only the thread that runs the bus changes them; the
thread that answers lookups just reads.
"""

from __future__ import annotations

import stat
from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from ..abi.numbers import MakeFlag

if TYPE_CHECKING:
    from .bus import Bus
    from .domain import Domain
    from .endpoint import Endpoint

    Subject: TypeAlias = Domain | Bus | Endpoint


def _item_ino(item: tuple[str, Node]) -> int:
    return item[1].ino


def access_mode(flags: int, owner: int) -> int:
    """Permission bits *owner* gives to the owner, extended as MAKE_ACCESS_GROUP and _WORLD say."""
    mode = owner
    if flags & (MakeFlag.ACCESS_GROUP | MakeFlag.ACCESS_WORLD):
        mode |= owner >> 3
    if flags & MakeFlag.ACCESS_WORLD:
        mode |= owner >> 6
    return mode


class Node:
    """A directory or file. *subject* is what it stands for: domain, bus or endpoint;
    None once that has gone."""

    __slots__ = (
        "ino",
        "name",
        "mode",
        "uid",
        "gid",
        "parent",
        "children",
        "subject",
        "alive",
        "on_unlink",
        "__weakref__",
    )

    def __init__(
        self,
        ino: int,
        name: str,
        mode: int,
        subject: Subject | None,
        uid: int = 0,
        gid: int = 0,
        parent: Node | None = None,
    ) -> None:
        self.ino = ino
        self.name = name
        self.mode = mode
        """As st_mode has it: type and permissions."""
        self.uid = uid
        self.gid = gid
        self.parent = parent
        self.children: dict[str, Node] = {}
        """By name, in order of their inode numbers, after one of which a listing goes on."""
        self.subject = subject
        self.alive = True
        self.on_unlink: Callable[[Node], None] | None = None
        """Of the root: told of each node below it that is gone."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def link(self, child: Node) -> None:
        child.parent = self
        # Replaced, not changed, so that a reader in another thread sees one state or the other.
        items = list(self.children.items())
        items.insert(bisect(items, child.ino, key=_item_ino), (child.name, child))
        self.children = dict(items)

    def unlink(self, child: Node) -> None:
        child.alive = False
        # What it stood for refers to it; a ring would keep both for a long time.
        child.subject = None
        self.children = {n: c for n, c in self.children.items() if c is not child}
        top = self
        while top.parent is not None:
            top = top.parent
        if top.on_unlink is not None:
            top.on_unlink(child)
