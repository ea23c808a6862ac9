# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools: where slices lie, when they are free again, and what the bus never does to them."""

from errno import EBUSY, EMFILE, ENOBUFS, ENXIO, EXFULL
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from bus.fakes import FakeMemory, FakePeer
from bus.harness import Bus, File, fails
from kdbusfs.abi.numbers import ListFlag
from kdbusfs.bus.pool import Arena, Inode, Pool, Slice


def new_pool(size: int = 4096) -> Pool:
    return Pool(Arena(size, FakeMemory(size)), size)


def drop(pool: Pool, *slices: Slice) -> None:
    for slice_ in slices:
        pool.release(slice_)
        pool.check()


def test_a_fresh_pool_hands_out_its_start_first() -> None:
    pool = new_pool()
    assert [pool.allocate(8).offset, pool.allocate(8).offset] == [0, 8]


@pytest.mark.parametrize(("asked", "given"), [(1, 8), (8, 8), (9, 16), (63, 64), (4096, 4096)])
def test_sizes_are_rounded_up_to_8(asked: int, given: int) -> None:
    assert new_pool().allocate(asked).size == given


def test_the_smallest_free_slice_that_fits_is_taken_from_its_front() -> None:
    pool = new_pool()
    slices = [pool.allocate(n) for n in (64, 8, 32, 8, 48, 8)]
    drop(pool, slices[0], slices[2], slices[4])
    assert pool.allocate(40).offset == slices[4].offset
    assert pool.allocate(16).offset == slices[2].offset
    assert pool.allocate(16).offset == slices[2].offset + 16
    assert pool.allocate(56).offset == 0


def test_of_equal_slices_the_lowest_is_taken() -> None:
    pool = new_pool()
    slices = [pool.allocate(32) for _ in range(6)]
    drop(pool, slices[3], slices[1])
    assert pool.allocate(32).offset == 32


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0)])
def test_free_neighbours_merge(order: tuple[int, ...]) -> None:
    pool = new_pool(96)
    slices = [pool.allocate(32) for _ in range(3)]
    drop(pool, *(slices[n] for n in order))
    assert pool.allocate(96).offset == 0


def test_a_fragmented_pool_is_full_for_what_does_not_fit() -> None:
    pool = new_pool(96)
    slices = [pool.allocate(32) for _ in range(3)]
    drop(pool, slices[0], slices[2])
    with fails(EXFULL):
        pool.allocate(40)
    pool.allocate(32)


def test_a_slice_is_free_when_both_holds_are_gone() -> None:
    pool = new_pool()
    for first in ("kernel", "user"):
        slice_ = pool.allocate(64)
        with fails(ENXIO):
            pool.free(0)
        pool.publish(slice_)
        if first == "kernel":
            pool.release(slice_)
            pool.check()
            pool.free(0)
        else:
            pool.free(0)
            pool.check()
            with fails(ENXIO):
                pool.free(0)
            pool.release(slice_)
        pool.check()
        assert [s.size for s in pool.slices()] == [4096]


# --- any order of operations


class PoolMachine(RuleBasedStateMachine):
    """A pool against a list of its bytes."""

    queued = Bundle("queued")
    told = Bundle("told")
    SIZE = 1024

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool(self.SIZE)
        self.owner: list[Slice | None] = [None] * (self.SIZE // 8)
        self.held: dict[Slice, set[str]] = {}

    def holes(self) -> list[tuple[int, int]]:
        """(size, start) of each run of free bytes."""
        runs, start = [], None
        for at, owner in enumerate([*self.owner, self]):
            if owner is None and start is None:
                start = at
            elif owner is not None and start is not None:
                runs.append(((at - start) * 8, start * 8))
                start = None
        return runs

    @rule(target=queued, size=st.one_of(st.integers(1, 64), st.integers(1, 1100)))
    def allocate(self, size: int) -> object:
        need = -(-size // 8) * 8
        fitting = [hole for hole in self.holes() if hole[0] >= need]
        if not fitting:
            with fails(EXFULL):
                self.pool.allocate(size)
            return multiple()
        slice_ = self.pool.allocate(size)
        assert (slice_.offset, slice_.size) == (min(fitting)[1], need)
        self.owner[slice_.offset // 8 : (slice_.offset + need) // 8] = [slice_] * (need // 8)
        self.held[slice_] = {"kernel"}
        self.pool.memory.write(slice_.offset, bytes(need))
        return slice_

    def _let_go(self, slice_: Slice, hold: str) -> None:
        self.held[slice_].discard(hold)
        if not self.held[slice_]:
            del self.held[slice_]
            self.owner = [None if o is slice_ else o for o in self.owner]

    @rule(target=told, slice_=queued)
    def publish(self, slice_: Slice) -> object:
        if "kernel" not in self.held.get(slice_, ()) or "user" in self.held[slice_]:
            return multiple()
        self.pool.publish(slice_)
        self.held[slice_].add("user")
        return slice_

    @rule(slice_=consumes(queued))
    def release(self, slice_: Slice) -> None:
        if "kernel" in self.held.get(slice_, ()):
            self.pool.release(slice_)
            self._let_go(slice_, "kernel")

    @rule(slice_=consumes(told))
    def free(self, slice_: Slice) -> None:
        if "user" in self.held.get(slice_, ()):
            self.pool.free(slice_.offset)
            self._let_go(slice_, "user")

    @rule(offset=st.integers(0, 130).map(lambda n: n * 8))
    def free_anything(self, offset: int) -> None:
        slices = [s for s in self.held if s.offset == offset and "user" in self.held[s]]
        if slices:
            self.pool.free(offset)
            self._let_go(slices[0], "user")
        else:
            with fails(ENXIO):
                self.pool.free(offset)

    @precondition(lambda self: not self.held)
    @rule()
    def an_empty_pool_is_in_one_piece(self) -> None:
        assert [s.size for s in self.pool.slices()] == [self.SIZE]

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        for slice_, holds in self.held.items():
            assert (slice_.kernel, slice_.user) == ("kernel" in holds, "user" in holds)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrderOfOperations = PoolMachine.TestCase


# --- what the bus does with them


def test_room_is_used_again_from_its_start_at_once(bus: Bus) -> None:
    client = bus.hello()
    offsets = {client.info(client.id).offset for _ in range(5)}
    assert offsets == {0}


def test_a_forgetful_client_ends_in_exfull(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    held = []
    with fails(EXFULL):
        while True:
            client.send(client, data=bytes(200))
            held.append(client.recv(free=False).offset)
    for offset in held[1::2]:
        client.free(offset)
    # What is free now is in pieces.
    with fails(EXFULL):
        client.send(client, data=bytes(400))
    client.send(client, data=bytes(200))
    client.recv()
    for offset in held[::2]:
        client.free(offset)
    assert len(client.list(ListFlag.UNIQUE)) == 1
    assert [s.size for s in client.connection.pool.slices()] == [4096]


def test_what_a_client_writes_into_its_pool_changes_nothing(bus: Bus) -> None:
    client, sender = bus.hello(), bus.hello()
    for n in range(5):
        sender.send(client, cookie=n)
    client.memory.bytes[:] = b"\xff" * len(client.memory.bytes)
    held = [client.recv(free=False).offset for _ in range(5)]
    assert held == [0, 64, 128, 192, 256]
    for offset in held:
        client.free(offset)
    sender.send(client, cookie=7)
    assert client.cookies() == [7]


def test_freed_bytes_are_left_as_they_are(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"leftover")
    got = client.recv()
    assert client.visible(got.offset, len(got.raw)) == got.raw


# --- several pools on one inode


@pytest.fixture
def inode() -> Inode:
    return Inode()


def test_pools_on_one_inode_have_no_byte_in_common(bus: Bus, inode: Inode) -> None:
    large = bus.hello(pool_size=16384, inode=inode)
    small = bus.hello(pool_size=4096, inode=inode)
    assert small.memory is large.memory
    told = []
    for n in range(8):
        for client in (small, large):
            data = n.to_bytes() * 100
            client.send(client.id, data=data)
            told.append((client, client.recv(free=False), data))
    spans = sorted((m.offset, m.offset + len(m.raw)) for _, m, _ in told)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(m.offset + len(m.raw) <= client.pool_size for client, m, _ in told)
    for client, message, _ in told:
        with fails(ENXIO):
            (small if client is large else large).free(message.offset)
    large.close()
    for client, message, data in told:
        if client is small:
            assert data in small.visible(message.offset, len(message.raw))
            small.free(message.offset)
    small.close()


def test_the_first_pool_on_an_inode_is_the_largest(bus: Bus, inode: Inode) -> None:
    first = bus.hello(pool_size=4096, inode=inode)
    with fails(EBUSY):
        bus.hello(pool_size=8192, inode=inode)
    first.close()
    bus.domain.check()


def test_a_hello_that_failed_does_not_decide_how_large_a_pool_is(bus: Bus, inode: Inode) -> None:
    file = File(bus.domain, f"{bus.name}/bus", bus.owner, inode=inode)
    with fails(EMFILE):
        bus.domain.core.user(bus.owner.uid).n_connections += 1024
        try:
            file.hello(pool_size=4096)
        finally:
            bus.domain.core.user(bus.owner.uid).n_connections -= 1024
    file.hello(pool_size=8192)


def test_what_a_connection_left_is_given_back_in_pieces(bus: Bus, inode: Inode) -> None:
    first = bus.hello(pool_size=1 << 16, inode=inode)
    second = bus.hello(pool_size=1 << 16, inode=inode)
    for _ in range(200):
        first.send(first.id, data=b"x")
        first.recv(free=False)
    pool = second.connection.pool
    bus.domain.works = False
    first.close()
    assert bus.domain.core.work
    while bus.domain.core.work:
        # Others go on meanwhile.
        second.send(second.id, data=b"y")
        second.recv()
        bus.domain.core.step()
        bus.domain.check()
    assert [s.size for s in pool.slices()] == [1 << 16]


def test_what_the_bus_holds_of_a_closed_pool_is_nobody_elses_meanwhile() -> None:
    arena = Arena(4096, FakeMemory(4096))
    first, second = Pool(arena, 4096), Pool(arena, 4096)
    held, told = first.allocate(64), first.allocate(64)
    first.publish(told)
    first.publish(held)
    first.release(told)
    assert first.close() is None
    taken = second.allocate(2048)
    assert taken.offset >= held.offset + held.size
    assert {held.kernel, held.user} == {True, False}
    first.release(held)
    arena.check()
    second.release(taken)
    assert [s.size for s in second.slices()] == [4096]


def test_several_pools_on_one_inode_hold_no_more_for_others_than_one(
    bus: Bus, inode: Inode
) -> None:
    """However many connections it sends to, a stranger leaves room in each."""
    owner = FakePeer(2000)
    clients = [bus.hello(peer=owner, pool_size=1 << 16, inode=inode) for _ in range(8)]
    stranger = bus.hello()
    for client in clients:
        with fails(ENOBUFS):
            while True:
                stranger.send(client.id, data=bytes(200))
    sizes = [client.connection.quota.queued for client in clients]
    assert sum(sizes) <= (1 << 16) // 2 // 3
    for client in clients:
        bus.hello(peer=owner).send(client.id, data=bytes(200))


def test_an_inode_whose_connections_are_closed_counts_until_it_is_unmapped(
    bus: Bus, inode: Inode
) -> None:
    """Not once for each connection that was there, and not for none."""
    user, budget = bus.domain.core.user(2000), bus.domain.core.budget
    late = File(bus.domain, f"{bus.name}/bus", FakePeer(2000), inode=inode)
    clients = [bus.hello(peer=FakePeer(2000), pool_size=4096, inode=inode) for _ in range(3)]
    memory = clients[0].memory
    memory.mapped = True
    assert (user.n_connections, budget.addresses.taken(2000)) == (3, 4096)
    for client in clients:
        client.close()
    assert user.n_connections == 1
    late.hello(pool_size=4096)
    assert user.n_connections == 1
    late.close()
    assert (user.n_connections, budget.addresses.taken(2000)) == (1, 4096)
    memory.unmap()
    assert (user.n_connections, budget.addresses.taken(2000)) == (0, 0)
