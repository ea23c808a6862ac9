# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole bus under random commands of several clients.

The model keeps, for each client, the unicasts that should be waiting; every command is carried
out on the bus and on the model. All invariants of the domain are asserted after each command by
the harness. What a client receives must be just what the model says, once and in order.
"""

from errno import (
    EADDRINUSE,
    EADDRNOTAVAIL,
    EAGAIN,
    EBADSLT,
    EBUSY,
    ECOMM,
    EEXIST,
    EMFILE,
    EMLINK,
    ENOBUFS,
    ENXIO,
    EPERM,
    EREMCHG,
    ESRCH,
    EXFULL,
    errorcode,
)
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from abi_client.building import access, bloom, fds, mask, name
from abi_client.verbs import SECOND
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, FakeDomain, Pending
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import (
    HelloFlag,
    MsgFlag,
    NameFlag,
    PolicyAccess,
    PolicyType,
    RecvFlag,
)
from kdbusfs.bus.reply import ReplyState

NAMES = st.sampled_from(["a.a", "b.b", "c.c"])
SIZES = st.sampled_from([0, 1, 100, 1000])
UIDS = st.sampled_from([1000, 1000, 2000])


class BusMachine(RuleBasedStateMachine):
    """Random commands, and what is known about their effect."""

    clients = Bundle("clients")
    waiting = Bundle("waiting")

    @initialize()
    def start(self) -> None:
        self.domain = FakeDomain()
        self.bus: Bus = self.domain.make_bus()
        self.bus.holder("a.a", access(PolicyType.WORLD, PolicyAccess.OWN))
        self.bus.endpoint("1000-custom", name("a.a"), access(PolicyType.WORLD, PolicyAccess.OWN))
        self.cookie = 0
        self.expected: dict[Client, list[tuple[int, str | None]]] = {}
        """(cookie, name it was sent to) of the unicasts that wait, and should."""
        self.held: dict[Client, set[int]] = {}
        self.lost: dict[Client, int] = {}
        """How many messages each had lost before the command."""
        self.calls: list[Pending] = []

    def next_cookie(self) -> int:
        self.cookie += 1
        return self.cookie

    def attempt(self, allowed: tuple[int, ...], do: Any) -> int:
        """The errno of a command, which must be 0 or one of those allowed."""
        errno = 0
        try:
            do()
        except CommandError as error:
            errno = error.errno
        assert errno in (0, *allowed), errorcode[errno]
        return errno

    def _join(self, client: Client) -> Client:
        self.expected[client] = []
        self.held[client] = set()
        # An activator may turn up when there is mail already.
        client.memory.may_read = True
        return client

    # --- coming and going

    @rule(
        target=clients,
        uid=UIDS,
        custom=st.sampled_from([False, False, False, True]),
        pool_size=st.sampled_from([4096, 1 << 16]),
        flags=st.sampled_from([0, HelloFlag.ACCEPT_FD]),
        recv=st.sampled_from([0, 0x3FFF]),
    )
    def hello(self, uid: int, custom: bool, pool_size: int, flags: int, recv: int) -> object:
        if len(self.expected) >= 8:
            return multiple()
        return self._join(
            Client(
                self.bus,
                peer=FakePeer(uid),
                endpoint="1000-custom" if custom else "bus",
                pool_size=pool_size,
                flags=flags,
                recv=recv,
            )
        )

    @rule(target=clients, string=NAMES)
    def activator(self, string: str) -> object:
        if len(self.expected) >= 8:
            return multiple()
        made: list[Client] = []
        # A policy holder has a.a; others have one activator at most.
        if self.attempt((EEXIST,), lambda: made.append(self.bus.activator(string, flags=1))):
            return multiple()
        return self._join(made[0])

    @rule(target=clients)
    def monitor(self) -> object:
        if sum(c.connection.kind == HelloFlag.MONITOR for c in self.expected) >= 2:
            return multiple()
        return self._join(self.bus.monitor())

    def _leave(self, client: Client) -> None:
        mail = self.expected.pop(client)
        for owner, moved in self._migrations(client, mail):
            self._take(owner, moved)
        del self.held[client]

    def _migrations(
        self, old: Client, mail: list[tuple[int, str | None]]
    ) -> list[tuple[Client, list[tuple[int, str | None]]]]:
        """Mail that was addressed to a name now owned by its activator goes there."""
        found = []
        for string in {s for _, s in mail if s}:
            owner = self.owner(string)
            if owner is not None and owner is not old and owner.connection.kind == 2:
                found.append((owner, [m for m in mail if m[1] == string]))
        return found

    def _take(self, new: Client, moved: list[tuple[int, str | None]]) -> None:
        """Some of the mail may not fit, and then counts as lost; the rest must be in order."""
        there = self._cookies(new)
        self.expected[new] += [m for m in moved if m[0] in there]
        n_lost = sum(m[0] not in there for m in moved)
        assert new.connection.lost - self.lost[new] >= n_lost

    def _cookies(self, client: Client) -> list[int]:
        """The cookies of what is queued, as they lie in the pool."""
        found = []
        for entry in client.connection.queue:
            at = entry.slice.offset + 48
            found.append(int.from_bytes(client.memory.bytes[at : at + 8], "little"))
        return found

    @rule(client=consumes(clients))
    def close(self, client: Client) -> None:
        if client.closed:
            return
        client.close()
        self._leave(client)

    @rule(client=clients)
    def byebye(self, client: Client) -> None:
        if client.closed or client.connection.kind:
            return
        unread = bool(client.connection.queue)
        errno = self.attempt((EBUSY,), client.byebye)
        assert (errno == EBUSY) == unread
        if not errno:
            client.close()
            self._leave(client)

    # --- names

    def owner(self, string: str) -> Client | None:
        id_ = self.bus.owner_of(string)
        return next((c for c in self.expected if c.id == id_), None)

    @rule(client=clients, string=NAMES, flags=st.integers(0, 7))
    def acquire(self, client: Client, string: str, flags: int) -> None:
        if client.closed or client.connection.kind:
            return
        before = self.owner(string)
        errno = self.attempt((EPERM, EEXIST), lambda: client.acquire(string, flags))
        after = self.owner(string)
        if errno:
            assert before is after
        elif before is not after:
            assert after is client
            if before is not None and before.connection.kind == HelloFlag.ACTIVATOR:
                self._follow(string, before, client)
            elif before is not None:
                assert flags & NameFlag.REPLACE_EXISTING

    def _follow(self, string: str, old: Client, new: Client) -> None:
        mail = self.expected[old]
        self.expected[old] = [m for m in mail if m[1] != string]
        self._take(new, [m for m in mail if m[1] == string])

    @rule(client=clients, string=NAMES)
    def release(self, client: Client, string: str) -> None:
        if client.closed or client.connection.kind:
            return
        before = self.owner(string)
        errno = self.attempt((ESRCH, EADDRINUSE), lambda: client.release(string))
        after = self.owner(string)
        assert (errno == ESRCH) == (before is None)
        if before is client:
            assert not errno
            assert after is not client
            if after is not None and after.connection.kind == HelloFlag.ACTIVATOR:
                # Mail that was sent to an earlier life of the name stays.
                left = self._cookies(client)
                mail = self.expected[client]
                self.expected[client] = [m for m in mail if m[0] in left]
                gone = [m for m in mail if m[0] not in left]
                assert all(m[1] == string for m in gone)
                self._take(after, gone)

    # --- sending

    REFUSALS = (ENXIO, ESRCH, EPERM, EREMCHG, EADDRNOTAVAIL, ENOBUFS, EXFULL, EMFILE)

    @rule(
        client=clients,
        to=st.one_of(clients, NAMES),
        size=SIZES,
        flags=st.sampled_from([0, 0, MsgFlag.NO_AUTO_START, MsgFlag.EXPECT_REPLY]),
    )
    def send(self, client: Client, to: Client | str, size: int, flags: int) -> None:
        if client.closed or client.connection.kind:
            return
        cookie = self.next_cookie()
        timeout = self.domain.clock.now + SECOND if flags & MsgFlag.EXPECT_REPLY else 0
        target = self.owner(to) if isinstance(to, str) else to
        errno = self.attempt(
            (*self.REFUSALS, EMLINK),
            lambda: client.send(to, data=bytes(size), cookie=cookie, flags=flags, timeout=timeout),
        )
        if not errno:
            assert target is not None
            self.expected[target].append((cookie, to if isinstance(to, str) else None))

    @rule(client=clients, to=clients, n=st.integers(0, 9))
    def send_fds(self, client: Client, to: Client, n: int) -> None:
        if client.closed or client.connection.kind:
            return
        cookie = self.next_cookie()
        client.peer.files.setdefault(0, FakeFile())
        errno = self.attempt(
            (*self.REFUSALS, ECOMM), lambda: client.send(to, fds(*[0] * n), cookie=cookie)
        )
        if not errno:
            self.expected[to].append((cookie, None))

    @rule(target=waiting, client=clients, to=st.one_of(clients, NAMES))
    def call(self, client: Client, to: Client | str) -> object:
        if client.closed or client.connection.kind:
            return multiple()
        cookie = self.next_cookie()
        target = self.owner(to) if isinstance(to, str) else to
        pending = client.call(to, cookie=cookie)
        if pending.error:
            assert pending.error in (*self.REFUSALS, EMLINK)
            return multiple()
        assert target is not None
        self.expected[target].append((cookie, to if isinstance(to, str) else None))
        self.calls.append(pending)
        return pending

    @rule(pending=waiting)
    def interrupt(self, pending: Pending) -> None:
        if pending.waiting:
            pending.interrupt()
            self.domain.check()

    @rule(client=clients, data=st.data(), size=SIZES)
    def reply(self, client: Client, data: st.DataObject, size: int) -> None:
        if client.closed or client.connection.kind or not client.connection.pending_replies:
            return
        trackers = list(client.connection.pending_replies)
        tracker = trackers[data.draw(st.integers(0, len(trackers) - 1))]
        asker = next(c for c in self.expected if c.connection is tracker.requester)
        cookie = self.next_cookie()
        is_pending = tracker.state is ReplyState.PENDING
        n_pending = len(client.connection.pending_replies)
        errno = self.attempt(
            (EBADSLT, ENOBUFS, EXFULL),
            lambda: client.reply(asker, tracker.cookie, data=bytes(size), cookie=cookie),
        )
        assert errno != EBADSLT
        assert len(client.connection.pending_replies) == n_pending - 1
        if is_pending and not errno:
            self.expected[asker].append((cookie, None))

    @rule(client=clients, bits=st.sets(st.integers(0, 3)), to_all=st.booleans(), to=clients)
    def signal(self, client: Client, bits: set[int], to_all: bool, to: Client) -> None:
        if client.closed or client.connection.kind:
            return
        cookie = 0
        if to_all:
            client.broadcast(filter_=bloom(bits), cookie=cookie)
        else:
            self.attempt((ENXIO,), lambda: client.signal(to, cookie=cookie))

    @rule(client=clients, bits=st.sets(st.integers(0, 3)), cookie=st.integers(0, 2))
    def match(self, client: Client, bits: set[int], cookie: int) -> None:
        if not client.closed and not client.connection.kind:
            client.match(mask(bits), cookie=cookie)

    @rule(client=clients, cookie=st.integers(0, 2))
    def match_all_or_nothing(self, client: Client, cookie: int) -> None:
        if client.closed or client.connection.kind:
            return
        if self.attempt((EBADSLT,), lambda: client.unmatch(cookie)):
            client.match(cookie=cookie)

    # --- receiving

    @rule(client=clients, free=st.booleans())
    def recv(self, client: Client, free: bool) -> None:
        if client.closed:
            return
        if not client.connection.queue:
            assert self.attempt((EAGAIN,), client.recv) == EAGAIN
            return
        got = client.recv(free=False)
        if free:
            client.free(got.offset)
        else:
            self.held[client].add(got.offset)
        self._came(client, got)

    def _came(self, client: Client, got: Any) -> None:
        if client.connection.kind == HelloFlag.MONITOR or not got.cookie:
            return
        cookie, string = self.expected[client].pop(0)
        assert got.cookie == cookie
        assert got.dst_id == (0 if string else client.id)

    @rule(client=clients)
    def drop(self, client: Client) -> None:
        if client.closed or not client.connection.queue:
            return
        got = client.recv(RecvFlag.PEEK)
        client.recv(RecvFlag.DROP, free=False)
        self._came(client, got)

    @rule(client=clients)
    def free(self, client: Client) -> None:
        if not client.closed:
            for offset in self.held[client]:
                client.free(offset)
            self.held[client].clear()

    @rule(client=clients)
    def info(self, client: Client) -> None:
        if not client.closed:
            self.attempt((EXFULL,), lambda: client.list(0xF))

    @rule(ns=st.sampled_from([SECOND // 10, SECOND]))
    def time_passes(self, ns: int) -> None:
        self.domain.advance(ns)

    # --- what always holds

    @invariant()
    def queues_are_as_expected(self) -> None:
        for client, mail in getattr(self, "expected", {}).items():
            if client.connection.kind != HelloFlag.MONITOR:
                waiting = [cookie for cookie in self._cookies(client) if cookie]
                assert waiting == [cookie for cookie, _ in mail]
                assert client.readable or not mail
            self.lost[client] = client.connection.lost

    @invariant()
    def calls_end_once_and_wait_for_somebody(self) -> None:
        for pending in getattr(self, "calls", ()):
            tracker = pending.call.wait
            assert pending.waiting == (tracker is not None)
            if tracker is not None:
                assert tracker.state is ReplyState.WAITING
                assert tracker.call is pending.call

    def teardown(self) -> None:
        if hasattr(self, "domain"):
            self.domain.end()
            assert all(not pending.waiting for pending in self.calls)


BusMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestAWholeBusUnderRandomCommands = BusMachine.TestCase
