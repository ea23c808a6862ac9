# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of nodes as the kernel sees it: pyfuse3's operations.

Every LOOKUP of an endpoint answers a nodeid that was never used before, and nothing is cached, so
that each open has an inode of its own, with a page cache and a backing file of its own. st_ino is
the node's, the same for all. Operations run in the main thread and only read the bus; what the
kernel has forgotten is forgotten in the router's thread, at once.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

import pyfuse3

from ..abi.items import Buffer
from ..bus.node import Node
from . import wire

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, InodeT, ReaddirToken, RequestContext, SetattrFields

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


class _Inode:
    """A nodeid the kernel knows, and how often it was told of it."""

    __slots__ = ("n_lookups", "node", "size", "time_ns")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.n_lookups = 0
        self.size = 0
        self.time_ns = time.time_ns()


class Tree(pyfuse3.Operations):
    """Looks up, lists and describes the nodes below *root*."""

    enable_writeback_cache = False

    def __init__(self, root: Node) -> None:
        super().__init__()
        self._inodes: dict[int, _Inode] = {pyfuse3.ROOT_INODE: _Inode(root)}
        self._stable: dict[Node, int] = {root: pyfuse3.ROOT_INODE}
        """The nodeids of directories and the control file, which have no pool."""
        self._last_nodeid = int(pyfuse3.ROOT_INODE)
        self._lock = threading.Lock()
        """Held while nodeids come and go: the router's thread forgets them, this one tells them."""

    # --- for the router's thread

    def node(self, nodeid: int) -> Node | None:
        """What *nodeid* stands for."""
        inode = self._inodes.get(nodeid)
        return inode.node if inode else None

    def nodeid(self, node: Node) -> int | None:
        """What the kernel knows a directory by, if it does."""
        return self._stable.get(node)

    def set_size(self, nodeid: int, size: int) -> None:
        """Let *nodeid* have a size: that of the pool in its page cache."""
        inode = self._inodes.get(nodeid)
        if inode is not None:
            inode.size = size

    def forget_one(self, nodeid: int, request: Buffer) -> None:
        """FORGET: the kernel has dropped an inode."""
        (n_lookups,) = wire.FORGET_IN.unpack_from(request, wire.IN_HEADER_SIZE)
        with self._lock:
            self._forget(nodeid, n_lookups)

    def forget_many(self, request: memoryview) -> None:
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
            if self._stable.get(inode.node) == nodeid:
                del self._stable[inode.node]

    # --- operations

    def _find(self, nodeid: int) -> _Inode:
        inode = self._inodes.get(nodeid)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return inode

    def _new_nodeid(self, node: Node) -> int:
        """The nodeid to tell for *node*: of an endpoint, a new one each time."""
        has_pool = stat.S_ISREG(node.mode) and node.name != "control"
        if not has_pool and node in self._stable:
            return self._stable[node]
        self._last_nodeid += 1
        self._inodes[self._last_nodeid] = _Inode(node)
        if not has_pool:
            self._stable[node] = self._last_nodeid
        return self._last_nodeid

    def _attributes(self, nodeid: int) -> pyfuse3.EntryAttributes:
        inode = self._find(nodeid)
        node = inode.node
        entry = pyfuse3.EntryAttributes()
        # pyfuse3 tells the kernel st_ino as nodeid; the router puts the node's own number in.
        entry.st_ino = nodeid
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_mode = node.mode
        entry.st_nlink = 2 if node.is_directory else 1
        entry.st_uid, entry.st_gid = node.uid, node.gid
        entry.st_size = inode.size
        entry.st_blksize = _PAGE_SIZE
        entry.st_blocks = 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.time_ns
        return entry

    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._find(parent_inode).node
        node = parent.children.get(name.decode(errors="replace")) if parent.alive else None
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        with self._lock:
            nodeid = self._new_nodeid(node)
            self._inodes[nodeid].n_lookups += 1
        return self._attributes(nodeid)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

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
        return self._attributes(inode)

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        directory = self._find(fh).node
        parent = directory.parent or directory
        if start_id < 1 and not self._list_dot(token, b".", directory, 1):
            return
        if start_id < 2 and not self._list_dot(token, b"..", parent, 2):
            return
        children = directory.children if directory.alive else {}
        # The inode number is the cursor: entries may come and go while the directory is read.
        for node in sorted(children.values(), key=lambda n: n.ino):
            cursor = node.ino + 2
            if cursor <= start_id:
                continue
            with self._lock:
                nodeid = self._new_nodeid(node)
                self._inodes[nodeid].n_lookups += 1
            if not pyfuse3.readdir_reply(
                token, node.name.encode(), self._attributes(nodeid), cursor
            ):
                with self._lock:
                    self._forget(nodeid, 1)
                return

    def _list_dot(self, token: ReaddirToken, name: bytes, node: Node, cursor: int) -> bool:
        """`.` or `..`, which the kernel does not look up, nor forgets."""
        entry = self._attributes(self._stable.get(node, pyfuse3.ROOT_INODE))
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
