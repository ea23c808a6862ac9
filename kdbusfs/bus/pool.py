# SPDX-License-Identifier: LGPL-2.1-or-later
"""A receiver's pool (kdbus.pool(7)): which slices of it are in use.

The pool is cut into slices whose sizes and offsets are multiples of 8; together they always
cover it without a gap. A slice in use has two holds: the *kernel* one, while the bus needs it
(a message that waits in the queue), and the *user* one, from the moment its offset was told to
user space until FREE. It is free again when both are gone, and merges with free neighbours, so
no two free slices ever touch.

Allocation is best fit: the smallest free slice that is big enough, the lowest of equals, taken
from its front. A fresh pool hands out offset 0 first. Only these records say what is where:
the client may scribble over its own pool, and nothing here reads it.

An inode has one memory, so several connections on it (`Inode`) have their slices in one `Arena`:
no two have a byte in common, each pool has a size of its own, and nothing told to its client
lies beyond that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from errno import EBUSY, ENXIO, EXFULL
from functools import partial

from ..abi.errors import CommandError
from .peer import Memory
from .quota import User
from .shares import Budget

_STEP = 1 << 16
"""How many bytes of a pool are charged at a time."""
_LOOKED_AT = 64
"""How many free slices are looked at for one that lies within a pool smaller than its arena."""
_PIECE = 64
"""How many slices of a pool that ends are given back at a time."""


def _nothing() -> None:
    pass


class Slice:
    """A piece of a pool. *kernel* and *user* are its two holds; neither: it is free."""

    __slots__ = ("offset", "size", "kernel", "user", "before", "after")

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.kernel = False
        self.user = False
        self.before: Slice | None = None
        self.after: Slice | None = None

    def __repr__(self) -> str:
        holds = ("k" if self.kernel else "-") + ("u" if self.user else "-")
        return f"<Slice {self.offset}+{self.size} {holds}>"


class Lease:
    """What user *uid* is charged for a memory of *size* bytes for as long as anybody has it mapped.
    ENOMEM: no address space for it."""

    __slots__ = ("_budget", "_size", "_uid", "user")

    def __init__(self, budget: Budget, uid: int, size: int) -> None:
        budget.addresses.charge(uid, size)
        self._budget = budget
        self._uid = uid
        self._size = size
        self.user: User | None = None
        """Whose connection it goes on to count as when none is left, and it is still mapped."""

    def charge(self, n: int) -> None:
        """Put *n* bytes more of it to use. EXFULL: the user has no share of memory left."""
        self._budget.pools.charge(self._uid, n)

    def join(self) -> None:
        """There is a connection again, which counts for itself."""
        user, self.user = self.user, None
        if user is not None:
            user.n_connections -= 1

    def end(self, charged: int) -> None:
        """Nobody has it mapped any more; *charged* bytes had been put to use."""
        self.join()
        self._budget.addresses.discharge(self._uid, self._size)
        self._budget.pools.discharge(self._uid, charged)


class Arena:
    """A *memory* of *size* bytes, from which pools take slices; *lease* is asked before more of it
    is put to use, and told when nobody has it mapped any more. It may not refer to the arena: a
    ring would keep the memory."""

    __slots__ = (
        "size",
        "memory",
        "lease",
        "charged",
        "n_pools",
        "sealed",
        "closed",
        "_first",
        "_free",
        "_by_offset",
    )

    def __init__(self, size: int, memory: Memory, lease: Lease | None = None) -> None:
        self.size = size
        self.memory = memory
        self.lease = lease
        self.charged = 0
        """Bytes from the start that have been in use: a page that was touched once stays."""
        self.n_pools = 0
        self.sealed = False
        self.closed = False
        self._first = Slice(0, size)
        """The slice at the start; what is taken off it lies behind it, so it is always the same."""
        self._free: list[tuple[int, int]] = [(size, 0)]
        """(size, offset) of each free slice, in order: the best fit is a bisection away."""
        self._by_offset: dict[int, Slice] = {0: self._first}
        """Free slices by offset."""

    def seal(self) -> None:
        """A pool is in use: the size is final."""
        if not self.sealed:
            self.memory.seal()
            self.sealed = True

    def take(self, size: int, limit: int) -> Slice:
        """A slice of *size* bytes, rounded up to 8, in front of *limit*."""
        size = (size + 7) & ~7
        free = self._free
        i = bisect_left(free, (size, 0))
        if limit < self.size:
            i = self._find_within(i, size, limit)
        if i == len(free):
            raise CommandError(EXFULL, f"no free slice of {size} bytes")
        offset = free[i][1]
        if offset + size > self.charged:
            self._put_to_use(offset + size)
        del free[i]
        slice_ = self._by_offset.pop(offset)
        if slice_.size > size:
            rest = Slice(offset + size, slice_.size - size)
            slice_.size = size
            rest.before, rest.after = slice_, slice_.after
            if rest.after is not None:
                rest.after.before = rest
            slice_.after = rest
            self._by_offset[rest.offset] = rest
            insort(free, (rest.size, rest.offset))
        return slice_

    def _find_within(self, i: int, size: int, limit: int) -> int:
        """The best fit from *i* on that lies in front of *limit*, as far as it pays to look."""
        free = self._free
        for j in range(i, min(i + _LOOKED_AT, len(free))):
            if free[j][1] + size <= limit:
                return j
        return len(free)

    def _put_to_use(self, end: int) -> None:
        end = min((end + _STEP - 1) // _STEP * _STEP, self.size)
        if self.lease is not None:
            self.lease.charge(end - self.charged)
        self.charged = end

    def give_back(self, slice_: Slice) -> None:
        """*slice_* is free again."""
        if self.closed:
            return
        before, after = slice_.before, slice_.after
        if after is not None and after.offset in self._by_offset:
            self._forget_free(after)
            slice_.size += after.size
            slice_.after = after.after
            if after.after is not None:
                after.after.before = slice_
        if before is not None and before.offset in self._by_offset:
            self._forget_free(before)
            before.size += slice_.size
            before.after = slice_.after
            if slice_.after is not None:
                slice_.after.before = before
            slice_ = before
        self._by_offset[slice_.offset] = slice_
        insort(self._free, (slice_.size, slice_.offset))

    def _forget_free(self, slice_: Slice) -> None:
        del self._by_offset[slice_.offset]
        del self._free[bisect_left(self._free, (slice_.size, slice_.offset))]

    def close(self) -> None:
        """Break the ring of slices and give up the memory; clients' mappings stay as they are."""
        self.closed = True
        slice_: Slice | None = self._first
        while slice_ is not None:
            after = slice_.after
            slice_.before = slice_.after = None
            slice_ = after
        lease, self.lease = self.lease, None
        # No function of its own: compiled, it would refer to itself.
        self.memory.close(_nothing if lease is None else partial(lease.end, self.charged))

    def free_slices(self) -> list[Slice]:
        """Those that are nobody's."""
        return list(self._by_offset.values())

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        at = 0
        previous: Slice | None = None
        slice_: Slice | None = self._first
        while slice_ is not None:
            used = slice_.kernel or slice_.user
            assert slice_.offset == at and slice_.size > 0 and slice_.size % 8 == 0, slice_
            assert slice_.before is previous and (previous is None or previous.after is slice_)
            assert used == (slice_.offset not in self._by_offset), slice_
            assert used or previous is None or previous.kernel or previous.user, "unmerged"
            at += slice_.size
            previous, slice_ = slice_, slice_.after
        assert at == self.size
        assert sorted(self._free) == self._free
        assert {o for _, o in self._free} == self._by_offset.keys()


class Inode:
    """What all handles on one inode have in common: the arena of their pools. The first HELLO that
    succeeds makes it, and it stays as long as any of them is open."""

    __slots__ = ("arena", "n_handles")

    def __init__(self) -> None:
        self.arena: Arena | None = None
        self.n_handles = 0

    def leave(self) -> None:
        """A handle is closed."""
        self.n_handles -= 1
        self.tidy()

    def tidy(self) -> None:
        """Give the arena up if it is not needed any more."""
        arena = self.arena
        if arena is None or arena.n_pools or (self.n_handles and arena.sealed):
            return
        self.arena = None
        arena.close()


class Pool:
    """The slices of a connection in *arena*, all in the first *size* bytes of it; EBUSY: it has
    fewer."""

    __slots__ = ("size", "arena", "memory", "_used")

    def __init__(self, arena: Arena, size: int) -> None:
        if size > arena.size:
            raise CommandError(EBUSY, f"the inode has a pool of {arena.size} bytes already")
        self.size = size
        self.arena = arena
        self.memory = arena.memory
        self._used: dict[int, Slice] = {}
        arena.n_pools += 1

    def allocate(self, size: int) -> Slice:
        """A slice of *size* bytes, rounded up to 8, under the kernel's hold; EXFULL: none fits, or
        its user has no share of memory left."""
        slice_ = self.arena.take(size, self.size)
        slice_.kernel = True
        self._used[slice_.offset] = slice_
        return slice_

    def publish(self, slice_: Slice) -> None:
        """Hand the slice to user space: its offset is about to be told."""
        self.memory.publish(slice_.offset, slice_.size)
        slice_.user = True

    def release(self, slice_: Slice) -> None:
        """Drop the kernel's hold."""
        slice_.kernel = False
        if not slice_.user:
            self._reclaim(slice_)

    def free(self, offset: int) -> None:
        """FREE: drop the user's hold of the slice that starts at *offset*; ENXIO if there is no
        slice that user space was told of."""
        slice_ = self._used.get(offset)
        if slice_ is None or not slice_.user:
            raise CommandError(ENXIO, f"no slice of yours at {offset}")
        slice_.user = False
        if not slice_.kernel:
            self._reclaim(slice_)

    def _reclaim(self, slice_: Slice) -> None:
        del self._used[slice_.offset]
        self.arena.give_back(slice_)

    def close(self) -> Iterator[None] | None:
        """No more slices are asked for. What user space holds goes back to the arena; if it is too
        much to be done at once, the rest is left to whoever exhausts what is returned. What the
        bus holds goes back when it is released."""
        self.arena.n_pools -= 1
        work = self._give_back_all()
        try:
            next(work)
        except StopIteration:
            return None
        return work

    def _give_back_all(self) -> Iterator[None]:
        told = [slice_ for slice_ in self._used.values() if slice_.user]
        for n, slice_ in enumerate(told, 1):
            if self.arena.closed:
                return
            slice_.user = False
            if not slice_.kernel:
                self._reclaim(slice_)
            if n % _PIECE == 0:
                yield

    def slices(self) -> list[Slice]:
        """Its own slices and the free ones, in order of offset."""
        slices = (*self._used.values(), *self.arena.free_slices())
        return sorted(slices, key=lambda s: s.offset)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        self.arena.check()
        for offset, slice_ in self._used.items():
            assert slice_.offset == offset and (slice_.kernel or slice_.user)
            assert offset + slice_.size <= self.size
