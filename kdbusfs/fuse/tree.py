# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of nodes as the kernel sees it: pyfuse3's operations.

Every LOOKUP of an endpoint answers a nodeid that was never used before, so that each open has an
inode of its own, with a page cache and a backing file of its own. st_ino is the node's, the same
for all. The kernel keeps no name, so that a node is gone at once when what it stands for is.

LOOKUP and GETATTR, which every open brings along, the router answers with what `entry` and
`attributes` give it, and what the kernel has forgotten is forgotten there, too. All that is rare is
pyfuse3's: those operations run in the main thread, and but for modes and owners only read the bus.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

import pyfuse3

from ..abi.errors import CommandError
from ..abi.items import Buffer
from ..bus.node import Node
from ..bus.shares import Share
from . import wire
from .wire import Ids

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, InodeT, ReaddirToken, RequestContext, SetattrFields

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_YEAR = 365 * 24 * 3600
_CONTROL = "control"
_ino = attrgetter("ino")
_NODEIDS = 1 << 18
_MOST_NODEIDS = 1 << 14
"""Of a user: as many as it may have open, and as many bound or held by O_PATH descriptors."""


class _Inode:
    """A nodeid the kernel knows, and how often it was told of it."""

    __slots__ = ("has_pool", "n_lookups", "node", "size", "time_ns", "uid")

    def __init__(self, node: Node, has_pool: bool) -> None:
        self.node = node
        self.has_pool = has_pool
        self.n_lookups = 0
        self.size = 0
        self.time_ns = time.time_ns()
        self.uid: int | None = None
        """Whose lookup it was made for, if that user is charged for it."""


def _has_pool(node: Node) -> bool:
    """Whether each open of *node* has a pool of its own: that of an endpoint."""
    return stat.S_ISREG(node.mode) and node.name != _CONTROL


def _time_to_keep(inode: _Inode) -> tuple[int, int]:
    """How long the kernel may believe its attributes, in seconds and nanoseconds. Those of
    directories and of the control file change by way of the kernel alone. An endpoint has several
    inodes, so its own are for the open that asked: the kernel's next tick ends that."""
    return (0, 1) if inode.has_pool else (_YEAR, 0)


def _stat(inode: _Inode) -> tuple[int, ...]:
    """The fields of struct fuse_attr."""
    node = inode.node
    seconds, nanoseconds = divmod(inode.time_ns, 10**9)
    times = (seconds,) * 3 + (nanoseconds,) * 3
    n_links = 2 if node.is_directory else 1
    return node.ino, inode.size, 0, *times, node.mode, n_links, node.uid, node.gid, 0, _PAGE_SIZE, 0


class Tree(pyfuse3.Operations):
    """Looks up, lists and describes the nodes below *root*."""

    enable_writeback_cache = False

    def __init__(self, root: Node) -> None:
        super().__init__()
        self._inodes: dict[int, _Inode] = {pyfuse3.ROOT_INODE: _Inode(root, False)}
        self._nodeids: dict[Node, set[int]] = {root: {pyfuse3.ROOT_INODE}}
        """What the kernel knows each node by: one nodeid for directories and the control file,
        which have no pool, one for each open of an endpoint."""
        self._shares = Share("nodeids", errno.EMFILE, _NODEIDS, _MOST_NODEIDS)
        """Those of endpoints that somebody has looked up: an O_PATH descriptor keeps one, and tells
        us of no open."""
        self._last_nodeid = int(pyfuse3.ROOT_INODE)
        self._lock = threading.Lock()
        """Held while nodeids come and go: the router's thread tells and forgets them, and a listing
        in this one tells some, too."""
        self.on_change: Callable[[int], None] | None = None
        """Told of a nodeid whose attributes have changed by way of another one of the same node."""

    # --- for the router's thread

    def node(self, nodeid: int) -> Node | None:
        """What *nodeid* stands for."""
        inode = self._inodes.get(nodeid)
        return inode.node if inode else None

    def nodeid(self, node: Node) -> int | None:
        """What the kernel knows a directory by, if it does."""
        with self._lock:
            return next(iter(self._nodeids.get(node, ())), None)

    def entry(self, parent: int, name: bytes, uid: int) -> bytes:
        """The answer to LOOKUP of *name* in the directory *parent* by user *uid*; FUSEError."""
        directory = self._find(parent).node
        node = directory.children.get(name.decode(errors="replace")) if directory.alive else None
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        with self._lock:
            if _has_pool(node):
                try:
                    self._shares.charge(uid, 1)
                except CommandError as error:
                    raise pyfuse3.FUSEError(error.errno) from None
            nodeid, inode = self._tell(node)
            if inode.has_pool:
                inode.uid = uid
        seconds, nanoseconds = _time_to_keep(inode)
        return wire.ENTRY_OUT.pack(nodeid, 0, 0, seconds, 0, nanoseconds, *_stat(inode))

    def attributes(self, nodeid: int) -> bytes:
        """The answer to GETATTR; FUSEError."""
        inode = self._find(nodeid)
        return wire.ATTR_OUT.pack(*_time_to_keep(inode), *_stat(inode))

    def set_size(self, nodeid: int, size: int) -> None:
        """Let *nodeid* have a size: that of the pool in its page cache."""
        inode = self._inodes.get(nodeid)
        if inode is not None:
            inode.size = size

    def forget_one(self, opcode: int, unique: int, nodeid: int, ids: Ids, request: Buffer) -> None:
        """FORGET: the kernel has dropped an inode."""
        (n_lookups,) = wire.FORGET_IN.unpack_from(request, wire.IN_HEADER_SIZE)
        with self._lock:
            self._forget(nodeid, n_lookups)

    def forget_many(
        self, opcode: int, unique: int, nodeid: int, ids: Ids, request: memoryview
    ) -> None:
        """BATCH_FORGET."""
        at = wire.IN_HEADER_SIZE + wire.BATCH_FORGET_IN.size
        with self._lock:
            for nodeid, n_lookups in wire.FORGET_ONE.iter_unpack(request[at:]):
                self._forget(nodeid, n_lookups)

    def _forget(self, nodeid: int, n_lookups: int) -> None:
        inode = self._inodes.get(nodeid)
        if inode is None or nodeid == pyfuse3.ROOT_INODE:
            return
        inode.n_lookups -= n_lookups
        if inode.n_lookups <= 0:
            del self._inodes[nodeid]
            if inode.uid is not None:
                self._shares.discharge(inode.uid, 1)
            nodeids = self._nodeids[inode.node]
            nodeids.discard(nodeid)
            if not nodeids:
                del self._nodeids[inode.node]

    # --- operations

    def _find(self, nodeid: int) -> _Inode:
        inode = self._inodes.get(nodeid)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return inode

    def _tell(self, node: Node) -> tuple[int, _Inode]:
        """The nodeid to tell for *node*, once more: of an endpoint, a new one each time."""
        nodeids = self._nodeids.setdefault(node, set())
        has_pool = _has_pool(node)
        if has_pool or not nodeids:
            self._last_nodeid += 1
            nodeid = self._last_nodeid
            nodeids.add(nodeid)
            inode = self._inodes[nodeid] = _Inode(node, has_pool)
        else:
            (nodeid,) = nodeids
            inode = self._inodes[nodeid]
        inode.n_lookups += 1
        return nodeid, inode

    def _attributes(self, nodeid: int) -> pyfuse3.EntryAttributes:
        inode = self._find(nodeid)
        node = inode.node
        entry = pyfuse3.EntryAttributes()
        # pyfuse3 tells the kernel st_ino as nodeid; the router puts the node's own number in.
        entry.st_ino = nodeid
        entry.generation = 0
        entry.entry_timeout = 0
        entry.attr_timeout = 0 if inode.has_pool else _YEAR
        entry.st_mode = node.mode
        entry.st_nlink = 2 if node.is_directory else 1
        entry.st_uid, entry.st_gid = node.uid, node.gid
        entry.st_size = inode.size
        entry.st_blksize = _PAGE_SIZE
        entry.st_blocks = 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.time_ns
        return entry

    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """chmod and chown hold for as long as the node does; sizes and times stay as they are.
        The kernel has checked the caller's rights."""
        node = self._find(inode).node
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        self._tell_others(node, inode)
        return self._attributes(inode)

    def _tell_others(self, node: Node, changed: int) -> None:
        """Before chmod(2) and the like return, the kernel believes nothing else of the node."""
        with self._lock:
            nodeids = self._nodeids.get(node, set()) - {changed}
        for nodeid in nodeids:
            if self.on_change is not None:
                self.on_change(nodeid)

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        directory = self._find(fh).node
        parent = directory.parent or directory
        if start_id < 1 and not self._list_dot(token, b".", directory, 1):
            return
        if start_id < 2 and not self._list_dot(token, b"..", parent, 2):
            return
        children = list(directory.children.values()) if directory.alive else []
        # The inode number is the cursor: entries may come and go while the directory is read.
        for at in range(bisect_right(children, start_id - 2, key=_ino), len(children)):
            node = children[at]
            cursor = node.ino + 2
            with self._lock:
                nodeid, _ = self._tell(node)
            if not pyfuse3.readdir_reply(
                token, node.name.encode(), self._attributes(nodeid), cursor
            ):
                with self._lock:
                    self._forget(nodeid, 1)
                return

    def _list_dot(self, token: ReaddirToken, name: bytes, node: Node, cursor: int) -> bool:
        """`.` or `..`, which the kernel does not look up, nor forgets."""
        nodeid = self.nodeid(node)
        entry = self._attributes(pyfuse3.ROOT_INODE if nodeid is None else nodeid)
        return bool(pyfuse3.readdir_reply(token, name, entry, cursor))

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _PAGE_SIZE
        data.f_namemax = 255
        return data

    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        return True

    # --- nodes come and go with what they stand for, and in no other way

    async def create(
        self,
        parent_inode: InodeT,
        name: bytes,
        mode: int,
        flags: int,
        ctx: RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        raise pyfuse3.FUSEError(errno.EACCES)

    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        raise pyfuse3.FUSEError(errno.EPERM)

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)
