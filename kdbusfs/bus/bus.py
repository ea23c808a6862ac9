# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus (kdbus.bus(7)): connections that can send to each other, and the order they see.

Everything that one call causes is done before that call is answered: messages are copied into
the receivers' pools, trackers and names are settled, and the notifications that came up are
sent, in the order in which they came up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from errno import (
    EADDRNOTAVAIL,
    EBADSLT,
    EBUSY,
    ECOMM,
    ECONNRESET,
    ENXIO,
    EPERM,
    EPIPE,
    EREMCHG,
    EREMOTEIO,
    ESRCH,
    ETIMEDOUT,
)
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.items import build
from ..abi.numbers import ID_ANY, ItemType, MsgFlag
from .call import PENDING, Call
from .connection import ACTIVATOR, MONITOR, Connection, Loss, QueueEntry
from .endpoint import Endpoint
from .match import Change, MatchIndex
from .message import Message, Notification, id_item, name_item
from .names import NameChange, NameRegistry
from .policy import PolicyDatabase
from .reply import Reply

if TYPE_CHECKING:
    from .domain import Domain
    from .metadata import ProcessMetadata
    from .peer import Descriptor
    from .quota import User

_EXPECT_REPLY = int(MsgFlag.EXPECT_REPLY)
_PIECE = 64
"""How many messages or requests of a dead bus are dropped, or notifications sent, at a time."""
_NO_AUTO_START = int(MsgFlag.NO_AUTO_START)
_SIGNAL = int(MsgFlag.SIGNAL)


class Bus:
    """One bus of a *domain*."""

    def __init__(
        self,
        domain: Domain,
        id_: int,
        name: str,
        flags: int,
        bloom: tuple[int, int],
        creator_mask: int,
        uid: int,
    ) -> None:
        self.domain = domain
        self.name = name
        self.flags = flags
        self.id = id_
        self.id128 = bytes(16)
        self.bloom_size, self.bloom_n_hash = bloom
        self.creator_mask = creator_mask
        """Attach flags: what BUS_CREATOR_INFO may tell."""
        self.creator_metadata: ProcessMetadata
        self.creator: User
        """Whom the bus counts for."""
        self.uid = uid
        """Effective uid of the maker; connections of that uid are owners."""
        self.alive = True
        self.endpoints: dict[Endpoint, None] = {}
        """The default endpoint first."""
        self.connections: dict[int, Connection] = {}
        """By id, monitors among them."""
        self.monitors: dict[Connection, None] = {}
        self.names = NameRegistry(domain.budget.memory)
        self.policy = PolicyDatabase(domain.budget.memory)
        self.matches = MatchIndex()
        self._seqnum = 0
        self._notifications: deque[Notification] = deque()
        self.busy = False
        """Whether notifications are being sent, so that commands have to wait."""

    # --- connections

    def connect(self, connection: Connection) -> None:
        """Make *connection* reachable."""
        self.connections[connection.id] = connection
        connection.endpoint.connections[connection] = None
        if connection.kind == MONITOR:
            self.monitors[connection] = None
        else:
            self._announce_id(ItemType.ID_ADD, connection)

    def disconnect(self, connection: Connection, *, polite: bool = False) -> None:
        """End *connection* (BYEBYE if *polite*, else close or the end of its endpoint).

        ECONNRESET: it has ended already. EBUSY: polite, and messages are queued.
        """
        if not connection.alive:
            raise CommandError(ECONNRESET, "disconnected")
        if polite and connection.queue:
            raise CommandError(EBUSY, f"{len(connection.queue)} messages unread")
        connection.alive = False
        for reply in [r for r in connection.requests if r.call is not None]:
            reply.end(ECONNRESET)
        for call in list(connection.completed):
            connection.abandon(call)
        for listing in list(connection.listings):
            listing.abort()
        for waiter in list(connection.waiters):
            waiter.end(ECONNRESET)
        self.policy.remove(connection)
        del self.connections[connection.id]
        del connection.endpoint.connections[connection]
        self.monitors.pop(connection, None)
        connection.remove_matches()
        connection.group_by_name()
        for name in list(connection.names):
            self.announce(self.names.release(connection, name))
        connection.groups = None
        # It refers to the connection: a ring would keep both, and the pool.
        connection.view = None
        self.flush()
        while (entry := connection.queue.first) is not None:
            connection.queue.remove(entry)
            connection.discard(entry)
        for reply in [*connection.requests, *connection.suspended.values()]:
            reply.forget()
        for reply in list(connection.pending_replies):
            reply.die()
        connection.lost = 0
        if connection.fd_socket is not None:
            connection.fd_socket.release()
            connection.fd_socket = None
        if connection.kind != MONITOR:
            self._announce_id(ItemType.ID_REMOVE, connection)
        self.flush()
        connection.wake()

    # --- notifications

    def _next_seqnum(self) -> int:
        self._seqnum += 1
        return self._seqnum

    def _announce_id(self, type_: ItemType, connection: Connection) -> None:
        item, change = id_item(type_, connection.id, connection.flags)
        domain = self.domain
        self._notifications.append(
            Notification(domain.kernel_user, domain.clock, self._next_seqnum(), item, change=change)
        )

    def announce(self, name_change: NameChange | None) -> None:
        """Have a notification of *name_change* sent with the next `flush`."""
        if name_change is not None:
            item, change = name_item(name_change)
            domain = self.domain
            self._notifications.append(
                Notification(
                    domain.kernel_user, domain.clock, self._next_seqnum(), item, change=change
                )
            )

    def announce_reply(self, type_: ItemType, reply: Reply) -> None:
        """Have the requester told, with the next `flush`, that nobody answers."""
        domain = self.domain
        self._notifications.append(
            Notification(
                domain.kernel_user,
                domain.clock,
                self._next_seqnum(),
                build(type_, b""),
                dst_id=reply.requester.id,
                cookie_reply=reply.cookie,
            )
        )

    def flush(self) -> None:
        """Send the notifications that have come up. If that takes long, the bus is busy with it
        and sends the rest in pieces: until then no command on it begins (`Handle.execute`), so
        nothing that is sent later arrives earlier."""
        if self.busy or not self._notifications:
            return
        sending = self._send_notifications()
        self.busy = True
        for _ in sending:
            self.domain.work.add(self.creator, sending)
            break

    def _send_notifications(self) -> Iterator[None]:
        n = 0
        while self._notifications:
            notification = self._notifications.popleft()
            if notification.change is None:
                self._notify(notification)
                continue
            for receiver in self._takers(notification.change):
                if receiver.alive:
                    self._tell(receiver, notification)
                    n += 1
                    if n % _PIECE == 0:
                        yield
        self.busy = False

    def _takers(self, change: Change) -> list[Connection]:
        """Who gets a notification of *change*."""
        name = change.name
        return [*self.monitors] + [
            receiver
            for receiver in self.matches.takers_of_change(change)
            if not name or receiver.endpoint.may_see_name(receiver.opener, name)
        ]

    def _tell(self, receiver: Connection, notification: Notification) -> None:
        """Queue a notification, or count it as lost: what it tells of can't be undone."""
        try:
            step = receiver.offer(notification)
        except Exception as error:
            self.domain.report(error)
            step = Loss(receiver)
        step.commit()

    def _notify(self, notification: Notification) -> None:
        """REPLY_* to the requester, if it still exists; lost without trace if it does not fit."""
        requester = self.connections.get(notification.dst_id)
        if requester is None:
            return
        for monitor in self.monitors:
            self._tell(monitor, notification)
        try:
            entry = requester.stage(notification)
        except CommandError:
            return
        except Exception as error:
            self.domain.report(error)
            return
        entry.commit()

    # --- sending

    def send(self, message: Message, call: Call, *, sync: bool, cancel: Descriptor | None) -> int:
        """SEND a message that has passed examination."""
        message.number(self._next_seqnum())
        try:
            message.take_descriptors()
            return self._route(message, call, sync, cancel)
        finally:
            message.release_descriptors()

    def _route(self, message: Message, call: Call, sync: bool, cancel: Descriptor | None) -> int:
        if message.dst_id == ID_ANY:
            self._broadcast(message, call)
        elif sync:
            return self._call(message, call, cancel)
        elif message.flags & _EXPECT_REPLY or not message.timeout:
            self._unicast(message, call)
        else:
            self._reply(message, call)
        return 0

    def _pin(self, message: Message) -> Connection:
        """Find the destination."""
        if message.dst_name is None:
            target = self.connections.get(message.dst_id)
            if target is None or target.kind:
                raise CommandError(ENXIO, f"no connection {message.dst_id}")
            return target
        entry = self.names.entries.get(message.dst_name)
        owner = entry.owner if entry is not None else None
        if owner is None:
            raise CommandError(ESRCH, f"no owner of {message.dst_name.decode()}")
        target = owner.connection
        if message.dst_id and message.dst_id != target.id:
            raise CommandError(EREMCHG, f"{message.dst_name.decode()} is owned by {target.id}")
        if target.kind == ACTIVATOR and message.flags & _NO_AUTO_START:
            raise CommandError(EADDRNOTAVAIL, f"{message.dst_name.decode()} is not running")
        message.name = entry
        return target

    def _check_talk(self, message: Message, target: Connection) -> None:
        sender, peer = message.sender, message.peer
        endpoint = sender.endpoint
        # The request tells the filesystem uid for free. It is one of the caller's own uids, so
        # whoever may talk by it could make it the effective one as well; only where it does not
        # suffice are the real credentials fetched.
        if not endpoint.custom and (sender.owner or peer.uid == target.opener.uid):
            return
        if not endpoint.may_talk(sender, peer.credentials(), target):
            raise CommandError(EPERM, f"{sender.id} may not talk to {target.id}")

    def _stage_for_monitors(self, message: Message, call: Call) -> None:
        for monitor in self.monitors:
            call.begin(monitor.offer(message))

    def _broadcast(self, message: Message, call: Call) -> None:
        self._stage_for_monitors(message, call)
        sender = message.sender
        for receiver in self.matches.takers_of_signal(message.signal()):
            if receiver.endpoint.may_talk(receiver, receiver.opener, sender):
                call.begin(receiver.offer(message))
        # Nothing below can fail.
        call.commit()

    def _signal(self, message: Message, target: Connection, call: Call) -> None:
        """A unicast signal: dropped in silence unless the target wants and may have it."""
        self._stage_for_monitors(message, call)
        signal = message.signal()
        wanted = any(match.passes_signal(signal) for match in target.matches)
        if wanted and target.endpoint.may_talk(target, target.opener, message.sender):
            try:
                call.begin(target.stage(message))
            except CommandError:
                pass
        # Nothing below can fail.
        call.commit()

    def _unicast(self, message: Message, call: Call) -> None:
        target = self._pin(message)
        if message.flags & _SIGNAL:
            self._signal(message, target, call)
            return
        self._check_talk(message, target)
        if message.flags & _EXPECT_REPLY:
            self._request(message, target, call)
            return
        entry = self._stage(message, target, call)
        # Nothing below can fail.
        call.commit()
        entry.commit()

    def _stage(self, message: Message, target: Connection, call: Call) -> QueueEntry:
        """Copy *message* to the monitors and to *target*. If that is refused, the monitors have
        seen it nevertheless."""
        if self.monitors:
            self._stage_for_monitors(message, call)
        try:
            return target.stage(message)
        except CommandError:
            call.commit()
            raise

    def _request(
        self,
        message: Message,
        target: Connection,
        call: Call,
        waiting: Call | None = None,
        cancel: Descriptor | None = None,
    ) -> Reply:
        """Queue a request with its tracker; *cancel* ends the wait of *waiting*."""
        reply = Reply(message.sender, target, message.cookie, message.name, message.timeout)
        entry = self._stage(message, target, call)
        call.begin(entry)
        if cancel is not None:
            reply.watch(cancel)
        # Nothing below can fail.
        reply.enlist(entry, waiting)
        call.commit()
        return reply

    def _reply(self, message: Message, call: Call) -> None:
        """A message with cookie_reply: the answer to a request."""
        requester = self._pin(message)
        sender = message.sender
        for reply in reversed(requester.requests):
            if reply.cookie == message.timeout and reply.target is sender:
                break
        else:
            raise CommandError(EBADSLT, f"no request {message.timeout} waits for {sender.id}")
        # The tracker is the permission: whoever asked may be answered. It is used up also by an
        # answer that is refused.
        try:
            entry = self._stage(message, requester, call)
        except CommandError as error:
            reply.end(EREMOTEIO if error.errno == ECOMM else error.errno)
            raise
        # Nothing below can fail.
        call.commit()
        reply.end(0, entry)

    def _call(self, message: Message, call: Call, cancel: Descriptor | None) -> int:
        """A synchronous call, or one that a signal interrupted and that is made again."""
        sender = message.sender
        reply = sender.suspended.get(message.cookie)
        if reply is not None:
            reply.resume(call, cancel)
            return PENDING
        if message.timeout <= self.domain.clock.monotonic_ns() or message.timeout >= 1 << 63:
            raise CommandError(ETIMEDOUT, "deadline has passed")
        target = self._pin(message)
        self._check_talk(message, target)
        reply = self._request(message, target, call, call, cancel)
        reply.cancel_if_due(cancel)
        return PENDING

    # --- receiving

    def drop(self, connection: Connection, entry: QueueEntry) -> None:
        """RECV with DROP: the message goes, and whoever waits for an answer hears of it."""
        connection.queue.remove(entry)
        reply = entry.reply
        connection.discard(entry)
        if reply is not None and reply.answerable:
            reply.die()
            self.flush()

    # --- endpoints

    def end_endpoint(self, endpoint: Endpoint) -> None:
        """Disconnect everybody on *endpoint* and take its node away."""
        endpoint.alive = False
        for connection in list(endpoint.connections):
            self.disconnect(connection)
        del self.endpoints[endpoint]
        endpoint.policy.remove(endpoint)
        node = endpoint.node
        assert node.parent is not None
        node.parent.unlink(node)

    def end(self, unlink: Callable[[], None]) -> None:
        """The bus owner is gone: everything ends. *unlink* takes the directory away.

        From now on nobody can do anything here. There is nobody left to be told of what goes, and
        it goes in pieces.
        """
        self.alive = False
        self._notifications.clear()
        for endpoint in self.endpoints:
            endpoint.alive = False
            node = endpoint.node
            assert node.parent is not None
            node.parent.unlink(node)
        for connection in self.connections.values():
            connection.alive = False
        unlink()
        self.domain.work.add(self.creator, self._wind_up())

    def _wind_up(self) -> Iterator[None]:
        """Take the bus apart, each connection in its turn."""
        for endpoint in list(self.endpoints):
            while endpoint.connections:
                connection = next(iter(endpoint.connections))
                yield from self._empty(connection)
                del endpoint.connections[connection]
                del self.connections[connection.id]
                yield
            del self.endpoints[endpoint]
            endpoint.policy.clear()
        self.monitors.clear()
        self.policy.clear()

    def _empty(self, connection: Connection) -> Iterator[None]:
        """End whoever waits on a connection of this dead bus, and drop all that it has."""
        for reply in [r for r in connection.requests if r.call is not None]:
            reply.end(ECONNRESET)
        for call in list(connection.completed):
            connection.abandon(call)
        for listing in list(connection.listings):
            listing.abort()
        for waiter in list(connection.waiters):
            waiter.end(ECONNRESET)
        connection.lost = 0
        connection.wake()
        yield
        for reply in [*connection.requests, *connection.suspended.values()]:
            reply.forget()
        for n, reply in enumerate(list(connection.pending_replies)):
            # It may have come to its end since the last piece.
            if reply.answerable:
                reply.end(EPIPE)
            if n % _PIECE == 0:
                yield
        n = 0
        while (entry := connection.queue.first) is not None:
            connection.queue.remove(entry)
            connection.discard(entry)
            n += 1
            if n % _PIECE == 0:
                yield
        connection.remove_matches()
        yield
        for name in list(connection.names):
            self.names.drop(connection, name)
        connection.view = None
        if connection.fd_socket is not None:
            connection.fd_socket.release()
            connection.fd_socket = None

    def check(self) -> list[Connection]:
        """Assert what must hold between any two calls; returns the connections."""
        assert self.alive
        assert self.busy or not self._notifications
        directory = next(iter(self.endpoints)).node.parent
        assert directory is not None
        assert set(directory.children.values()) == {e.node for e in self.endpoints}
        self.names.check()
        self.matches.check(m for c in self.connections.values() for m in c.matches)
        for endpoint in self.endpoints:
            endpoint.check()
        for connection in self.connections.values():
            assert connection.alive and connection in connection.endpoint.connections
            assert (connection in self.monitors) == (connection.kind == MONITOR)
            for name, claim in connection.names.items():
                entry = self.names.entries[name]
                assert claim.entry is entry
                assert claim is entry.activator or claim in entry.queue
            connection.check()
        assert len(self.connections) == sum(len(e.connections) for e in self.endpoints)
        return list(self.connections.values())
