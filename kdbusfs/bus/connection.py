# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections (kdbus.connection(7)): a place on a bus with an id, a pool and a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import ECOMM, ECONNRESET, EMFILE
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.items import Buffer, build, build_string
from ..abi.numbers import AttachFlag, HelloFlag, ItemType, Limit, NameFlag, RecvReturnFlag
from ..abi.structs import I32, U64
from .call import WAITS_AGAIN, Call, Held, Step
from .metadata import ProcessMetadata, Viewer
from .peer import Credentials, release
from .pool import Pool, Slice
from .quota import Quota, User
from .reply import Reply, ReplyState

if TYPE_CHECKING:
    from .bus import Bus
    from .endpoint import Endpoint
    from .exchange import Exchange
    from .listing import Listing
    from .match import Match
    from .message import Outgoing
    from .names import NameClaim, NameEntry, NamesView
    from .peer import Descriptor

ACCEPT_FD = int(HelloFlag.ACCEPT_FD)
ACTIVATOR = int(HelloFlag.ACTIVATOR)
POLICY_HOLDER = int(HelloFlag.POLICY_HOLDER)
MONITOR = int(HelloFlag.MONITOR)
SPECIAL = ACTIVATOR | POLICY_HOLDER | MONITOR
_IN_QUEUE = int(NameFlag.IN_QUEUE)
_NAMES = int(AttachFlag.NAMES)
_DESCRIPTION = int(AttachFlag.CONN_DESCRIPTION)
_INCOMPLETE_FDS = int(RecvReturnFlag.INCOMPLETE_FDS)


class QueueEntry(Held):
    """A message in a receiver's pool: staged, queued, or the answer a synchronous call waits
    for."""

    __slots__ = (
        "receiver",
        "before",
        "after",
        "slice",
        "user",
        "size",
        "priority",
        "name",
        "fds",
        "memfds",
        "positions",
        "reply",
        "copy",
        "payer",
    )

    def __init__(self, receiver: Connection, message: Outgoing, slice_: Slice) -> None:
        self.receiver = receiver
        self.before: QueueEntry | None = None
        self.after: QueueEntry | None = None
        """Its neighbours in the queue."""
        self.slice = slice_
        self.user = message.user
        self.size = slice_.size
        self.priority = message.priority
        self.name: NameEntry | None = None
        self.fds: list[Descriptor] = message.fds
        self.memfds: list[Descriptor] = message.memfds
        self.positions: list[int] = []
        if self.fds or self.memfds:
            self.positions = message.fd_positions()
            for descriptor in (*self.fds, *self.memfds):
                descriptor.hold()
        self.reply: Reply | None = None
        """The tracker, if this is a request."""
        self.copy: bytes | None = None
        """The slice's bytes, kept where the message may have to move on to another pool, since
        its receiver could have tampered with its own. The payload may be missing, see `_keep`."""
        self.payer = message.payer
        """Whose share of memory the copy is taken from, a real uid."""

    def commit(self) -> None:
        self.receiver.queue.append(self)
        self.receiver.wake()

    def undo(self) -> None:
        self.receiver.discard(self)

    def hand_over(self, call: Call) -> None:
        """As the answer to a synchronous call."""
        call.fds = self.receiver.publish(self)
        # Nothing below can fail.
        self.receiver.discard(self)
        call.answered(self.slice.offset, self.size)

    def release_descriptors(self) -> None:
        """The message is gone. Whoever receives its files has holds of its own."""
        if self.positions:
            release(self.fds)
            release(self.memfds)


class Queue:
    """Messages in the order in which they came. Each knows its neighbours, so that one can leave
    from anywhere at the same price."""

    __slots__ = ("first", "last", "_n")

    def __init__(self) -> None:
        self.first: QueueEntry | None = None
        self.last: QueueEntry | None = None
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[QueueEntry]:
        entry = self.first
        while entry is not None:
            yield entry
            entry = entry.after

    def append(self, entry: QueueEntry) -> None:
        last = self.last
        entry.before = last
        if last is None:
            self.first = entry
        else:
            last.after = entry
        self.last = entry
        self._n += 1

    def remove(self, entry: QueueEntry) -> None:
        before, after = entry.before, entry.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        entry.before = entry.after = None
        self._n -= 1


class Result(Held):
    """A slice of a caller's own pool, outside of any quota, that holds the result of its call."""

    __slots__ = ("pool", "slice")

    def __init__(self, pool: Pool, size: int) -> None:
        """EXFULL: there is no room for *size* bytes."""
        self.pool = pool
        self.slice = pool.allocate(size)

    def commit(self) -> None:
        pass

    def undo(self) -> None:
        self.pool.release(self.slice)

    def hand_over(self, call: Call) -> None:
        self.pool.publish(self.slice)
        self.pool.release(self.slice)


class Loss(Step):
    """A message that *receiver* can't get, and will count as lost."""

    __slots__ = ("receiver",)

    def __init__(self, receiver: Connection) -> None:
        self.receiver = receiver

    def commit(self) -> None:
        self.receiver.count_lost()

    def undo(self) -> None:
        pass


class FdTransfer:
    """Descriptors on their way into the process that receives a message, and held until `release`.

    The numbers in the slice are -1 until `installed` is told better ones.
    """

    __slots__ = ("pool", "slice", "descriptors", "positions", "accepted")

    def __init__(self, pool: Pool, entry: QueueEntry, accept_fds: bool) -> None:
        self.pool = pool
        self.slice = entry.slice
        skip = 0 if accept_fds else len(entry.fds)
        self.descriptors = (entry.fds + entry.memfds)[skip:]
        self.positions = entry.positions[skip:]
        self.accepted = skip == 0
        for position in entry.positions:
            self.pool.memory.write(self.slice.offset + position, b"\xff\xff\xff\xff")
        for descriptor in self.descriptors:
            descriptor.hold()

    def installed(self, numbers: list[int]) -> int:
        """Put the receiver's *numbers* (-1: could not be installed) into the slice. Returns the
        msg.return_flags that go with that."""
        memory = self.pool.memory
        for position, number in zip(self.positions, numbers, strict=True):
            offset = self.slice.offset + position
            memory.write(offset, I32.pack(number))
            memory.publish(offset, I32.size)
        return 0 if self.accepted and -1 not in numbers else _INCOMPLETE_FDS

    def release(self) -> None:
        """The receiver has got what it could."""
        descriptors, self.descriptors = self.descriptors, []
        release(descriptors)


class Connection:
    """What HELLO makes of an open endpoint: ordinary, activator, policy holder or monitor."""

    __slots__ = (
        "bus",
        "endpoint",
        "id",
        "flags",
        "kind",
        "opener",
        "owner",
        "user",
        "pool",
        "quota",
        "queue",
        "lost",
        "names",
        "matches",
        "attach_flags_send",
        "attach_flags_recv",
        "description",
        "metadata",
        "faked",
        "viewer",
        "requests",
        "suspended",
        "n_requests",
        "pending_replies",
        "completed",
        "listings",
        "view",
        "groups",
        "alive",
        "waiters",
        "waker",
        "fd_socket",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        id_: int,
        flags: int,
        opener: Credentials,
        user: User,
        pool: Pool,
    ) -> None:
        self.bus: Bus = endpoint.bus
        self.endpoint = endpoint
        self.id = id_
        self.flags = flags
        self.kind = flags & SPECIAL
        """0 for an ordinary connection, else the flag of its kind."""
        self.opener = opener
        """Who opened the file; the `cred` of the connection ever after."""
        self.owner = endpoint.is_owner(opener)
        self.user = user
        self.pool = pool
        self.quota = Quota(pool.size, pool.arena)
        self.queue = Queue()
        self.lost = 0
        self.names: dict[bytes, NameClaim] = {}
        """Records in the name registry, in order of acquisition; queued ones too."""
        self.matches: list[Match] = []
        self.attach_flags_send = 0
        self.attach_flags_recv = 0
        self.description: bytes | None = None
        self.metadata: ProcessMetadata
        """The process that said HELLO, or what it claimed to be."""
        self.faked = False
        self.viewer: Viewer
        self.requests: list[Reply] = []
        """Trackers of its own requests, oldest first."""
        self.suspended: dict[int, Reply] = {}
        """Synchronous requests whose call was interrupted by a signal and may resume, by cookie."""
        self.n_requests = 0
        self.pending_replies: dict[Reply, None] = {}
        """Trackers of others that wait for its answer."""
        self.completed: dict[Call, None] = {}
        """Calls of its own that have been completed and not yet finished."""
        self.listings: dict[Listing, None] = {}
        """Its LISTs that are under way."""
        self.view: NamesView | None = None
        """Its names as they are, if somebody may look at them later."""
        self.groups: dict[NameEntry | None, list[QueueEntry]] | None = None
        """The queue by the names that were addressed, while all of the names go."""
        self.alive = True
        self.waiters: dict[Exchange, None] = {}
        """Calls of its own that wait for a message, the one that has waited longest first."""
        self.waker: Callable[[], None] | None = None
        """Called when poll may have something to say."""
        self.fd_socket: Descriptor | None = None
        """Where descriptors go for those who receive with the extension's commands."""

    def wake(self) -> None:
        """There may be something new for poll, or for a call that waits for a message."""
        if self.waiters:
            self.wake_waiter()
        if self.waker is not None:
            try:
                self.waker()
            except Exception as error:
                self.bus.domain.report(error)

    def wake_waiter(self) -> None:
        """Have one of the calls that wait for a message look whether there is one."""
        if self.waiters:
            next(iter(self.waiters)).end(0)

    def set_fd_socket(self, socket: Descriptor) -> None:
        """Have descriptors sent on *socket* from now on, which is given up if it is no good for
        that (`Descriptor.become_channel`)."""
        try:
            socket.become_channel()
        except BaseException:
            socket.release()
            raise
        before, self.fd_socket = self.fd_socket, socket
        if before is not None:
            before.release()

    @property
    def readable(self) -> bool:
        return len(self.queue) > 0 or self.lost > 0

    def owned_names(self) -> list[bytes]:
        """The names it owns, not those it queues for, in order of acquisition."""
        return [name for name, claim in self.names.items() if not claim.flags & _IN_QUEUE]

    def metadata_items(self, kinds: int) -> list[bytes]:
        """The OWNED_NAME and CONN_DESCRIPTION items among *kinds*."""
        items: list[bytes] = []
        if kinds & _NAMES and self.names:
            for name, claim in self.names.items():
                if not claim.flags & _IN_QUEUE:
                    items.append(owned_name_item(name, claim.flags))
        if kinds & _DESCRIPTION and self.description is not None:
            items.append(build_string(ItemType.CONN_DESCRIPTION, self.description))
        return items

    # --- calls that wait

    def complete(self, call: Call, error: int, held: Held | None = None) -> None:
        """End the wait of *call*, with *error* or with what is *held* for it."""
        call.wait = None
        call.error, call.held = error, held
        self.completed[call] = None
        assert call.complete is not None
        call.complete(call, error)

    def finish(self, call: Call) -> int:
        """Give *call* its results; returns its errno, or WAITS_AGAIN. Nothing has happened if this
        stalls."""
        if not self.alive:
            self.abandon(call)
        held = call.held
        if held is not None:
            held.hand_over(call)
        # Nothing below can fail.
        call.held = None
        self.completed.pop(call, None)
        return WAITS_AGAIN if call.wait is not None else call.error

    def abandon(self, call: Call) -> None:
        """Let go of what is held for *call*: its caller won't get it."""
        held, call.held = call.held, None
        if held is not None:
            held.undo()
            call.error = ECONNRESET
        self.completed.pop(call, None)

    # --- matches

    def add_match(self, match: Match) -> None:
        """EMFILE: too many of this connection or user; ENOMEM: they take too much memory."""
        if len(self.matches) >= Limit.CONNECTION_MATCHES:
            raise CommandError(EMFILE, f"{len(self.matches)} matches")
        budget, uid = self.bus.domain.budget, self.opener.uid
        budget.matches.charge(uid, 1)
        try:
            budget.memory.charge(uid, match.size)
        except CommandError:
            budget.matches.discharge(uid, 1)
            raise
        self.matches.append(match)
        self.bus.matches.add(match)

    def remove_matches(self, cookie: int | None = None) -> bool:
        """Drop all matches with *cookie*, or all; False if there is none."""
        gone = [match for match in self.matches if cookie is None or match.cookie == cookie]
        if not gone:
            return False
        budget, uid = self.bus.domain.budget, self.opener.uid
        for match in gone:
            self.bus.matches.remove(match)
            budget.memory.discharge(uid, match.size)
        budget.matches.discharge(uid, len(gone))
        dropped = set(gone)
        self.matches = [match for match in self.matches if match not in dropped]
        return True

    # --- receiving

    def stage(self, message: Outgoing) -> QueueEntry:
        """Copy *message* into the pool. ECONNRESET, ECOMM, ENOBUFS, EMFILE, EXFULL, EFAULT. To
        queue what is returned, or to give it up, is left to the caller and can't fail.

        The copy may stall, and others run the bus meanwhile. So what it takes, quota and slice, is
        taken before, and belongs to the entry: whatever ends the copy, `discard` gives both back.
        """
        if not self.alive:
            raise CommandError(ECONNRESET, "destination is disconnected")
        fds = message.fds
        if fds and not self.flags & ACCEPT_FD and self.kind != MONITOR:
            raise CommandError(ECOMM, "destination accepts no descriptors")
        image = message.image(self)
        offset = len(image)
        size = (offset + message.n_payload + 7) & ~7
        self.quota.charge(message.user, size, len(fds))
        try:
            slice_ = self.pool.allocate(size)
        except CommandError:
            self.quota.discharge(message.user, size, len(fds))
            raise
        entry = QueueEntry(self, message, slice_)
        try:
            if message.name is not None:
                image = self._keep(entry, message, image)
            self.pool.memory.write(slice_.offset, image)
            if message.n_payload and len(image) == offset:
                message.fill(self, slice_.offset + offset)
                if message.n_payload & 7:
                    end = offset + message.n_payload
                    self.pool.memory.write(slice_.offset + end, bytes(size - end))
        except BaseException:
            self.discard(entry)
            raise
        return entry

    def _keep(self, entry: QueueEntry, message: Outgoing, image: Buffer) -> Buffer:
        """Prepare *entry*, which was addressed to a name, for message migration.

        Header, items and metadata are kept in any case. The payload is kept, at the price of a
        second copy, if the name has an activator: only then can the message move. An activator
        that turns up later gets the payload as it then is in this pool.
        """
        entry.name = message.name
        assert message.name is not None
        content = bytes(image)
        if message.name.activator is not None:
            content += message.payload()
            content += bytes(-len(content) & 7)
        self.bus.domain.budget.memory.charge(entry.payer, len(content))
        entry.copy = content
        return content

    def offer(self, message: Outgoing) -> Step:
        """Stage a broadcast, or a monitor's copy; one that can't be will count as lost."""
        try:
            return self.stage(message)
        except CommandError:
            return Loss(self)

    def count_lost(self) -> None:
        """Count a lost message."""
        self.lost += 1
        if self.lost == 1:
            self.wake()

    def settle(self, entry: QueueEntry) -> None:
        """*entry* is no longer queued: give back what it was charged."""
        self.quota.discharge(entry.user, entry.size, len(entry.fds))
        if entry.copy is not None:
            self._drop_copy(entry)
        if entry.reply is not None:
            entry.reply.unqueue()

    def _drop_copy(self, entry: QueueEntry) -> None:
        assert entry.copy is not None
        self.bus.domain.budget.memory.discharge(entry.payer, len(entry.copy))
        entry.copy = None

    def discard(self, entry: QueueEntry) -> None:
        """Destroy a staged or dequeued message."""
        self.settle(entry)
        self.pool.release(entry.slice)
        entry.release_descriptors()

    def pick(self, priority: int | None) -> QueueEntry | None:
        """The oldest message, or with *priority* the oldest of those with the lowest value, which
        must not exceed it. None if there is none."""
        entry = self.queue.first
        if entry is None or priority is None:
            return entry
        best = entry
        while entry is not None:
            if entry.priority < best.priority:
                best = entry
            entry = entry.after
        return best if best.priority <= priority else None

    def addressed_to(self, entry: NameEntry) -> list[QueueEntry]:
        """The queued messages that were addressed to this name, in order."""
        if self.groups is not None:
            return self.groups.get(entry, [])
        return [queued for queued in self.queue if queued.name is entry]

    def group_by_name(self) -> None:
        """All names are about to go: have the queue gone through once, not for each of them."""
        self.groups = {}
        for queued in self.queue:
            self.groups.setdefault(queued.name, []).append(queued)

    def publish(self, entry: QueueEntry) -> FdTransfer | None:
        """Hand the slice to user space; returns the descriptors to install with it, if any, which
        are the caller's to release."""
        transfer = None
        if entry.positions:
            transfer = FdTransfer(self.pool, entry, bool(self.flags & ACCEPT_FD))
        try:
            self.pool.publish(entry.slice)
        except BaseException:
            if transfer is not None:
                transfer.release()
            raise
        return transfer

    def stage_moved(self, entry: QueueEntry, old: Connection) -> Slice:
        """Message migration: copy what is queued at *old*. ECOMM, ENOBUFS, EMFILE, EXFULL."""
        if entry.fds and not self.flags & ACCEPT_FD:
            raise CommandError(ECOMM, "destination accepts no descriptors")
        content = entry.copy
        assert content is not None
        missing = entry.size - len(content)
        if missing:
            content += old.pool.memory.read(entry.slice.offset + len(content), missing)
        self.quota.charge(entry.user, entry.size, len(entry.fds))
        try:
            slice_ = self.pool.allocate(entry.size)
        except CommandError:
            self.quota.discharge(entry.user, entry.size, len(entry.fds))
            raise
        try:
            self.pool.memory.write(slice_.offset, content)
        except BaseException:
            self.unstage_moved(entry, slice_)
            raise
        return slice_

    def unstage_moved(self, entry: QueueEntry, slice_: Slice) -> None:
        """Give back what `stage_moved` took."""
        self.quota.discharge(entry.user, entry.size, len(entry.fds))
        self.pool.release(slice_)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        self.pool.check()
        queued = [*self.queue, *(r.answer for r in self.suspended.values() if r.answer)]
        queued += [c.held for c in self.completed if isinstance(c.held, QueueEntry)]
        assert sum(e.size for e in queued) == self.quota.queued
        accounts = self.quota.accounts
        for user in {e.user for e in queued} | accounts.keys():
            mine = [e for e in queued if e.user is user]
            assert accounts[user].size == sum(e.size for e in mine)
            assert accounts[user].messages == len(mine)
            assert accounts[user].fds == sum(len(e.fds) for e in mine)
        assert all(e.slice.kernel for e in queued)
        held = [e.slice for e in queued]
        held += [c.held.slice for c in self.completed if isinstance(c.held, Result)]
        held += [listing.result.slice for listing in self.listings if listing.result is not None]
        kernels = [s for s in self.pool.slices() if s.kernel]
        assert {id(s) for s in held} == {id(s) for s in kernels}, "a slice without a message"
        assert len(held) == len(kernels)
        assert all(c.wait is None for c in self.completed)
        assert all(e.receiver is self for e in queued)
        assert self.groups is None
        assert all(r.requester is self and r.answerable for r in self.requests)
        assert all(r.target is self and r.answerable for r in self.pending_replies)
        suspended = (ReplyState.SUSPENDED, ReplyState.KEPT)
        assert all(r.state in suspended for r in self.suspended.values())
        assert all(r.requester is self for r in self.suspended.values())
        requests = set(self.requests) | {
            e.reply
            for c in self.bus.connections.values()
            for e in c.queue
            if e.reply is not None and e.reply.requester is self
        }
        assert len(requests) == self.n_requests


def owned_name_item(name: bytes, flags: int) -> bytes:
    """An OWNED_NAME item: {u64 flags, string}."""
    return build(ItemType.OWNED_NAME, U64.pack(flags) + name + b"\0")
