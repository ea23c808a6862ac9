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
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from errno import ENXIO, EXFULL

from ..abi.errors import CommandError
from .peer import Memory

_STEP = 1 << 16
"""How many bytes of a pool are charged at a time."""


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


class Pool:
    """The slices of one pool of *size* bytes, and its *memory*; *charge* is asked before more
    of it is put to use, and may refuse; *on_gone* is called with what was charged when
    nobody has it mapped any more. Neither may refer to the pool: a ring would keep its memory."""

    __slots__ = ("size", "memory", "charge", "charged", "on_gone", "_used", "_free", "_by_offset")

    def __init__(
        self,
        size: int,
        memory: Memory,
        charge: Callable[[int], None] | None = None,
        on_gone: Callable[[int], None] | None = None,
    ) -> None:
        self.size = size
        self.memory = memory
        self.charge = charge
        self.charged = 0
        """Bytes from the start that have been in use: a page that was touched once stays."""
        self.on_gone = on_gone
        whole = Slice(0, size)
        self._used: dict[int, Slice] = {}
        self._free: list[tuple[int, int]] = [(size, 0)]
        """(size, offset) of each free slice, in order: the best fit is a bisection away."""
        self._by_offset: dict[int, Slice] = {0: whole}
        """Free slices by offset."""

    def allocate(self, size: int) -> Slice:
        """A slice of *size* bytes, rounded up to 8, under the kernel's hold; EXFULL: none fits, or
        its user has no share of memory left."""
        size = (size + 7) & ~7
        free = self._free
        i = bisect_left(free, (size, 0))
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
        slice_.kernel = True
        self._used[offset] = slice_
        return slice_

    def _put_to_use(self, end: int) -> None:
        end = min((end + _STEP - 1) // _STEP * _STEP, self.size)
        if self.charge is not None:
            self.charge(end - self.charged)
        self.charged = end

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
        if self._used.pop(slice_.offset, None) is None:
            return  # the pool was closed
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
        """Break the ring of slices and give up the memory; the client's mapping stays as it is."""
        for slice_ in (*self._used.values(), *self._by_offset.values()):
            slice_.before = slice_.after = None
        self._used.clear()
        self.charge = None
        on_gone, self.on_gone = self.on_gone, None
        charged = self.charged
        self.memory.close(_nothing if on_gone is None else lambda: on_gone(charged))

    def slices(self) -> list[Slice]:
        """All slices in order of offset, free ones too."""
        return sorted((*self._used.values(), *self._by_offset.values()), key=lambda s: s.offset)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        at = 0
        previous: Slice | None = None
        for slice_ in self.slices():
            used = slice_.kernel or slice_.user
            assert slice_.offset == at and slice_.size > 0 and slice_.size % 8 == 0, slice_
            assert slice_.before is previous and (previous is None or previous.after is slice_)
            assert used == (slice_.offset in self._used) != (slice_.offset in self._by_offset)
            assert used or previous is None or previous.kernel or previous.user, "unmerged"
            at += slice_.size
            previous = slice_
        assert at == self.size
        assert sorted(self._free) == self._free
        assert {o for _, o in self._free} == self._by_offset.keys()
