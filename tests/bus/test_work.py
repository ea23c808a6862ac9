# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that is cut into pieces, and what others do between two of them."""

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from errno import ECONNRESET, EIO, EPIPE, ETIMEDOUT, EXFULL

import pytest

from abi_client.building import access, command, message, name, parse_items, send_command, u64
from abi_client.verbs import SECOND
from bus.fakes import FakePeer
from bus.harness import Bus, Client, FakeDomain, Pending, fails
from kdbusfs.abi.numbers import Command, ItemType, ListFlag, NameFlag, PolicyAccess, PolicyType
from kdbusfs.abi.specs import COMMAND_SPECS
from kdbusfs.bus.bus import Bus as CoreBus
from kdbusfs.bus.call import PENDING, Call
from kdbusfs.bus.connection import Queue, QueueEntry
from kdbusfs.bus.quota import User
from kdbusfs.bus.work import Work

N_CLIENTS, N_NAMES = 12, 100
ALL = ListFlag.UNIQUE | ListFlag.NAMES | ListFlag.ACTIVATORS | ListFlag.QUEUED


def test_users_take_turns_and_each_has_one_thing_done_after_the_other() -> None:
    done: list[str] = []

    def job(what: str, pieces: int) -> Iterator[None]:
        for n in range(pieces):
            done.append(f"{what}{n}")
            yield

    one, other, work = User(1), User(2), Work()
    work.add(one, job("a", 3))
    work.add(one, job("b", 1))
    work.add(other, job("c", 2))
    while work:
        work.proceed()
    assert done == ["a0", "c0", "a1", "c1", "a2", "b0"]


@pytest.fixture
def entries(bus: Bus) -> list[QueueEntry]:
    """Messages that are not queued any more."""
    target, sender = bus.hello(), bus.hello()
    for n in range(8):
        sender.send(target, cookie=n)
    queued = list(target.connection.queue)
    for entry in queued:
        target.connection.queue.remove(entry)
        target.connection.discard(entry)
    return queued


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_keeps_the_order_whatever_leaves_it(entries: list[QueueEntry], seed: int) -> None:
    queue, chance = Queue(), random.Random(seed)
    model: list[QueueEntry] = []
    for _ in range(60):
        outside = [entry for entry in entries if entry not in model]
        if outside and (not model or chance.random() < 0.5):
            model.append(chance.choice(outside))
            queue.append(model[-1])
        else:
            queue.remove(model.pop(chance.randrange(len(model))))
        assert list(queue) == model
        assert len(queue) == len(model)
        assert queue.first is (model[0] if model else None)
        assert queue.last is (model[-1] if model else None)


# --- the end of a bus


class Full:
    """A bus with many names, matches, messages and requests, that ends."""

    def __init__(self, domain: FakeDomain) -> None:
        self.domain = domain
        self.bus = domain.make_bus("full")
        self.clients = [self.bus.hello() for _ in range(N_CLIENTS)]
        for n, client in enumerate(self.clients):
            for k in range(N_NAMES // 10):
                client.acquire(f"n{n}.m{k}")
            client.match()
            client.match(cookie=2)
        self.bus.activator("n0.m0")
        self.bus.monitor()
        self.calls: list[Pending] = []
        for to in self.clients[:2]:
            self.calls += [c.call(to, cookie=n) for n, c in enumerate(self.clients[2:])]
        self.calls.append(self.clients[0].call(self.clients[-1], cookie=98))
        for client in self.clients:
            client.request(self.clients[0], cookie=99, data=b"data")

    def end(self) -> None:
        """The last close of its file, but not yet what is left to do then."""
        self.domain.works = False
        self.bus.file.closed = True
        self.bus.file.handle.close()

    def wind_up(self, between: Callable[[int], object] = lambda n: None) -> int:
        """Do what is left; returns in how many pieces."""
        n = 0
        while self.domain.core.work:
            between(n)
            self.domain.core.work.proceed()
            self.domain.check()
            n += 1
        self.domain.works = True
        self.domain.finish()
        return n


@pytest.fixture
def full(domain: FakeDomain) -> Full:
    return Full(domain)


def test_a_bus_is_gone_at_once_and_taken_apart_in_pieces(full: Full) -> None:
    domain, user = full.domain, full.domain.core.user(1000)
    full.end()
    domain.check()
    assert domain.paths() == set()
    assert user.n_buses == 0
    for client in full.clients:
        assert client.hung_up
        with fails(ECONNRESET):
            client.recv()
    domain.make_bus("full")
    n_pieces = full.wind_up()
    assert n_pieces >= 3 * N_CLIENTS
    assert {pending.error for pending in full.calls} == {ECONNRESET, EPIPE}


def test_nobody_on_a_dead_bus_is_told_anything(full: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(CoreBus, "_announce_id", lambda *args: told.append(args))
    monkeypatch.setattr(CoreBus, "announce", lambda *args: told.append(args))
    monkeypatch.setattr(CoreBus, "announce_reply", lambda *args: told.append(args))
    full.end()
    full.domain.clock.now += 9 * SECOND
    full.wind_up(lambda n: n == 3 and full.domain.core.expire())
    assert told == []
    assert {pending.error for pending in full.calls} == {ECONNRESET, EPIPE, ETIMEDOUT}


def test_all_who_poll_on_a_bus_that_ends_are_woken(full: Full) -> None:
    woken: Counter[Client] = Counter()
    for client in full.clients:
        client.connection.waker = lambda client=client: woken.update([client])
    full.end()
    full.wind_up()
    assert set(woken) == set(full.clients)


MEANWHILE: dict[str, Callable[[Full], object]] = {
    "files are closed": lambda full: [c.close() for c in full.clients if not c.closed],
    "a file is closed": lambda full: full.clients[-1].closed or full.clients[-1].close(),
    "deadlines come": lambda full: full.domain.advance(9 * SECOND),
    "calls are interrupted": lambda full: [
        p.call.interrupt() for p in full.calls if p.call.wait is not None
    ],
}


@pytest.mark.parametrize("what", MEANWHILE)
@pytest.mark.parametrize("when", [0, 1, 2, 3, 4, 5, 6, 7, 30])
def test_others_may_do_anything_between_two_pieces(
    full: Full, what: str, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full.domain, "finish", lambda: None)
    full.end()
    full.wind_up(lambda n: n == when and MEANWHILE[what](full))
    monkeypatch.undo()
    full.domain.finish()
    assert all(not pending.waiting for pending in full.calls)


def test_many_messages_leave_a_dead_bus_a_few_at_a_time(domain: FakeDomain) -> None:
    bus = domain.make_bus("full")
    target = bus.hello()
    senders = [bus.hello() for _ in range(2)]
    for n in range(200):
        senders[n % 2].send(target, cookie=n)
    bus.file.closed = True
    bus.file.handle.close()
    left = []
    while domain.core.work:
        domain.core.work.proceed()
        left.append(len(target.connection.queue))
    steps = [before - after for before, after in zip([200, *left], left, strict=False)]
    assert max(steps) <= 64
    assert sum(steps) == 200


# --- LIST


@pytest.fixture
def crowd(bus: Bus) -> list[Client]:
    clients = [bus.hello() for _ in range(N_CLIENTS)]
    for n, client in enumerate(clients):
        for k in range(N_NAMES):
            client.acquire(f"n{n}.m{k}", NameFlag.ALLOW_REPLACEMENT)
    return clients


class Listing:
    """A LIST whose call waits."""

    def __init__(self, client: Client, flags: int = ALL) -> None:
        self.client = client
        self.domain = client.domain
        self.pending = Pending(client, client_call(client, flags))
        self.result = client.handle.execute(self.pending.call, b"")
        self.domain.works = False

    def proceed(self) -> None:
        self.domain.core.work.proceed()
        self.domain.check()

    def records(self) -> list[tuple[int, bytes, int]]:
        """(id, name, flags) of each record, when it has been completed."""
        self.domain.works = True
        self.domain.finish()
        assert self.pending.error == 0
        offset, size = struct.unpack_from("=QQ", self.pending.struct(), 24)
        raw = self.client.visible(offset, size)
        self.client.free(offset)
        found = []
        while raw:
            length, id_, _ = struct.unpack_from("=QQQ", raw)
            for _, payload in parse_items(raw[24:length]):
                flags = struct.unpack_from("=Q", payload)[0]
                found.append((id_, payload[8:-1], flags))
            raw = raw[length:]
        return found


def client_call(client: Client, flags: int) -> Call:
    address = client.peer.put(command(flags, fields=u64(0, 0)))
    return Call(Command.LIST, COMMAND_SPECS[Command.LIST], client.peer, address)


def expected(clients: list[Client]) -> list[tuple[int, bytes, int]]:
    return [
        (c.id, name_, owner.flags) for c in clients for name_, owner in c.connection.names.items()
    ]


def test_a_short_list_is_there_at_once(bus: Bus) -> None:
    client = bus.hello()
    client.acquire("a.a")
    assert Listing(client).result == 0


def test_a_long_list_waits_and_tells_how_things_were(crowd: list[Client], bus: Bus) -> None:
    before = expected(crowd)
    listing = Listing(crowd[0])
    assert listing.result == PENDING
    first, last, middle = crowd[0], crowd[-1], crowd[5]
    # Names come, go, and change hands, of who has been listed already and of who has not.
    last.release("n11.m7")
    bus.hello().acquire("n11.m8", NameFlag.REPLACE_EXISTING)
    listing.proceed()
    first.acquire("x.x")
    middle.acquire("n11.m9", NameFlag.REPLACE_EXISTING)
    middle.close()
    bus.activator("n3.m3")
    listing.proceed()
    assert listing.pending.call.error == 0
    while not listing.pending.completed:
        listing.proceed()
    assert listing.records() == before
    again = Listing(crowd[0])
    now = [c for c in (*crowd, *bus.domain.files) if isinstance(c, Client)]
    assert sorted(again.records()) == sorted(
        expected(list(dict.fromkeys(c for c in now if c.connection.alive)))
    )


def test_many_lists_at_once_all_tell_the_same(crowd: list[Client]) -> None:
    before = expected(crowd)
    listings = [Listing(client) for client in crowd]
    crowd[3].release("n3.m3")
    late = Listing(crowd[0])
    crowd[3].acquire("n3.m3")
    for listing in listings:
        assert listing.records() == before
    assert late.records() == [record for record in before if record[1] != b"n3.m3"]


ENDS: dict[str, Callable[[Client, Bus], object]] = {
    "byebye": lambda client, bus: client.handle.connection.bus.disconnect(client.connection),
    "the bus": lambda client, bus: bus.file.handle.close(),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("when", [0, 1, 4])
def test_who_ends_while_its_list_is_made_gets_none(
    crowd: list[Client], bus: Bus, how: str, when: int
) -> None:
    listing = Listing(crowd[0])
    for _ in range(when):
        listing.proceed()
    ENDS[how](crowd[0], bus)
    bus.file.closed = how == "the bus"
    bus.domain.works = True
    assert listing.pending.error == ECONNRESET
    assert not crowd[0].connection.listings


def test_a_signal_does_not_end_a_list(crowd: list[Client], bus: Bus) -> None:
    listing = Listing(crowd[0])
    listing.pending.call.interrupt()
    assert listing.records() == expected(crowd)


def test_a_list_that_does_not_fit_is_exfull(crowd: list[Client], bus: Bus) -> None:
    small = bus.hello(pool_size=4096)
    listing = Listing(small)
    bus.domain.works = True
    assert listing.pending.error == EXFULL
    assert not any(s.kernel or s.user for s in small.connection.pool.slices())


def test_a_list_that_can_not_be_written_leaves_nothing(
    crowd: list[Client], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[BaseException] = []
    bus.domain.core.report = reported.append
    listing = Listing(crowd[0])

    def fail(offset: int, data: bytes) -> None:
        raise OSError(5)

    with monkeypatch.context() as patch:
        patch.setattr(crowd[0].memory, "write", fail)
        bus.domain.works = True
        assert listing.pending.error == EIO
    assert [type(error) for error in reported] == [OSError]
    assert not any(s.kernel or s.user for s in crowd[0].connection.pool.slices())
    assert len(Listing(crowd[0]).records()) == N_CLIENTS * N_NAMES


def test_a_long_list_on_a_custom_endpoint_shows_what_may_be_seen(
    crowd: list[Client], bus: Bus
) -> None:
    bus.endpoint("1000-custom", name("n2.*"), access(PolicyType.WORLD, PolicyAccess.SEE))
    guest = bus.hello(endpoint="1000-custom", peer=FakePeer(1000))
    listing = Listing(guest)
    assert listing.result == PENDING
    assert {id_ for id_, _, _ in listing.records()} == {crowd[2].id}


# --- many notifications


@pytest.fixture
def told(bus: Bus) -> list[Client]:
    """Those who are told of everything on the bus."""
    listeners = [bus.hello() for _ in range(8)]
    for listener in listeners:
        listener.match()
    return listeners


def leave_many_names(bus: Bus) -> None:
    """A connection with names ends, and the notifications of that are left to be sent."""
    client = bus.hello()
    for n in range(64):
        client.acquire(f"n{n}.n")
    for listener in bus.domain.files:
        if isinstance(listener, Client) and not listener.closed and listener is not client:
            while listener.readable:
                listener.recv()
    bus.domain.works = False
    client.close()
    assert bus.core.busy


def test_many_notifications_are_sent_in_pieces(bus: Bus, told: list[Client]) -> None:
    leave_many_names(bus)
    work, n_pieces, most = bus.domain.core.work, 0, 0
    while work:
        before = sum(len(listener.connection.queue) for listener in told)
        work.proceed()
        after = sum(len(listener.connection.queue) for listener in told)
        n_pieces, most = n_pieces + 1, max(most, after - before)
    assert not bus.core.busy
    assert n_pieces > 64 * len(told) // 64 - 2
    assert most <= 64
    for listener in told:
        seqnums = []
        for n in range(64):
            message = listener.recv()
            assert message.notification[:2] == (ItemType.NAME_REMOVE, f"n{n}.n")
            seqnums.append(message.numbers(ItemType.TIMESTAMP)[0])
        assert listener.recv().notification[0] == ItemType.ID_REMOVE
        assert seqnums == sorted(seqnums)


def test_what_is_sent_meanwhile_comes_after_them(bus: Bus, told: list[Client]) -> None:
    leave_many_names(bus)
    domain, sender = bus.domain, told[0]
    with sender.peer.holding(message(told[1].id, cookie=7)) as address:
        pending = sender.start(Command.SEND, sender.peer.put(send_command(address)))
        assert pending.waiting
        assert domain.put_off == [pending]
        sender.go_on(pending)
        assert pending.waiting
        domain.works = True
        domain.finish()
        sender.go_on(pending)
    assert pending.error == 0
    received = [told[1].recv() for _ in range(66)]
    assert received[-1].cookie == 7
    assert all(message.src_id == 0 for message in received[:-1])


def test_others_do_not_wait_for_a_busy_bus(bus: Bus, told: list[Client]) -> None:
    other = bus.domain.make_bus("other")
    client = other.hello()
    leave_many_names(bus)
    client.send(client, data=b"x")
    assert client.recv().data == b"x"


def test_a_busy_bus_may_end(bus: Bus, told: list[Client]) -> None:
    leave_many_names(bus)
    bus.file.close()
    bus.domain.works = True
    bus.domain.finish()
    with fails(ECONNRESET):
        told[0].recv()
