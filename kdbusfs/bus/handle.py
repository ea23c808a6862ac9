# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handles: our side of an open file, from open() to the last close().

A handle starts on the control file or on an endpoint and is bound, once and for good, by one
successful BUS_MAKE, ENDPOINT_MAKE or HELLO (`_MOVES`). What fails, or only negotiates, leaves it as
it was. While one of these commands is under way, which may take its time if the caller's memory
stalls, the handle takes no other. It has stored its results before anybody else can see any of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from enum import Enum, auto
from errno import (
    EBADFD,
    EBUSY,
    ECONNRESET,
    EEXIST,
    EINVAL,
    EMFILE,
    EOPNOTSUPP,
    EPERM,
    ESHUTDOWN,
)
from stat import S_IFDIR, S_IFREG
from typing import NamedTuple

from ..abi import structs
from ..abi.errors import CommandError, Stalled
from ..abi.items import build
from ..abi.numbers import Command, ItemType, Limit
from ..abi.specs import COMMAND_SPECS
from ..abi.structs import U64, U64x2
from ..abi.valid_names import is_policy_name
from .bus import Bus
from .call import NOTHING, Call, Step
from .commands import COMMANDS, attach_flags, read_policy
from .connection import ACTIVATOR, MONITOR, POLICY_HOLDER, SPECIAL, Connection
from .domain import Domain
from .endpoint import Endpoint
from .metadata import PROCESS, UNSET_ID, ProcessMetadata, Viewer
from .names import claim_size
from .node import Node, access_mode
from .peer import Credentials, Memory
from .policy import Entries, parse_entries, policy_size
from .pool import Arena, Inode, Lease, Pool, Slice
from .quota import User
from .shares import Charge

PAGE_SIZE = 4096
_SETUP = frozenset({Command.BUS_MAKE, Command.ENDPOINT_MAKE, Command.HELLO})
_FAKES = (ItemType.CREDS, ItemType.PIDS, ItemType.SECLABEL)


class HandleState(Enum):
    """What an open file is bound to."""

    CONTROL = auto()
    ENDPOINT = auto()
    SETTING_UP = auto()
    BUS_OWNER = auto()
    ENDPOINT_OWNER = auto()
    CONNECTION = auto()


class SetUp(Step):
    """A handle on its way into another *state*, and what its connection takes beforehand."""

    __slots__ = ("handle", "before", "state", "pool", "user")

    def __init__(self, handle: Handle, state: HandleState) -> None:
        self.handle = handle
        self.before = handle.state
        self.state = state
        self.pool: Pool | None = None
        self.user: User | None = None
        """Whose connections have been counted up."""
        handle.state = HandleState.SETTING_UP

    def commit(self) -> None:
        self.handle.state = self.state

    def undo(self) -> None:
        self.handle.state = self.before
        if self.user is not None:
            self.user.n_connections -= 1
        if self.pool is not None:
            self.pool.close()
            # The next HELLO may be for another size.
            self.handle.inode.tidy()


class Handle:
    """One open file. *opener* is who opened it; *new_memory* makes a pool's memory for it, unless
    another handle on the same *inode* has one already."""

    __slots__ = (
        "domain",
        "node",
        "opener",
        "new_memory",
        "inode",
        "state",
        "endpoint",
        "bus",
        "connection",
    )

    def __init__(
        self,
        domain: Domain,
        node: Node,
        opener: Credentials,
        new_memory: Callable[[int], Memory],
        inode: Inode | None = None,
    ) -> None:
        if not node.alive:
            raise CommandError(ESHUTDOWN, "the node has gone")
        self.inode = inode or Inode()
        self.inode.n_handles += 1
        self.domain = domain
        self.node = node
        self.opener = opener
        self.new_memory = new_memory
        subject = node.subject
        self.endpoint: Endpoint | None = subject if isinstance(subject, Endpoint) else None
        self.state = HandleState.ENDPOINT if self.endpoint else HandleState.CONTROL
        self.bus: Bus | None = None
        """The bus this handle made."""
        self.connection: Connection | None = None

    def execute(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        """Carry out *call*. *inline* is what of its argument came with the request.

        Returns 0, or PENDING if `call.complete` will be called later (or has been), and then
        `finish` is due, or CONTINUE; raises CommandError.
        """
        try:
            return self._execute(call, inline)
        except BaseException:
            # Whatever went wrong, expected or not, and also if the caller's memory stalled.
            if call.begun:
                call.undo()
            raise

    def _execute(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        connection = self.connection
        if connection is None:
            return self._set_up(call, inline)
        row = COMMANDS.get(call.code)
        if row is None:
            if call.code in _SETUP:
                raise CommandError(EBADFD, "connected already")
            if not connection.alive:
                raise CommandError(ECONNRESET, "disconnected")
            raise CommandError(EBADFD, "ENDPOINT_UPDATE on a connection")
        if not connection.alive:
            raise CommandError(ECONNRESET, "disconnected")
        if connection.kind not in row.kinds:
            raise CommandError(EOPNOTSUPP, "not for this kind of connection")
        call.fetch(inline)
        if call.negotiating and call.code not in _NEGOTIATES_MORE:
            return 0
        return row.handler(connection, call)

    def finish(self, call: Call) -> int:
        """Give a call that has been completed its results: what is held for it becomes visible in
        the pool, `call.data` and `call.fds` tell of it. Returns the call's errno, or WAITS_AGAIN.

        Stalled: nothing has happened, to be tried again. Any other exception: the call has been
        abandoned.
        """
        connection = self.connection
        assert connection is not None
        try:
            return connection.finish(call)
        except Stalled:
            raise
        except BaseException:
            connection.abandon(call)
            raise

    def abandon(self, call: Call) -> None:
        """Give up what is held for a completed call instead: nobody is there to get it."""
        assert self.connection is not None
        self.connection.abandon(call)

    def _set_up(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        code, state = call.code, self.state
        if state is HandleState.SETTING_UP and code in _SETUP:
            raise CommandError(EBUSY, "another command is setting it up")
        if (state is HandleState.ENDPOINT and code in _SETUP) or (
            state is HandleState.ENDPOINT_OWNER and code not in _SETUP
        ):
            self._check_endpoint()
        move = _MOVES.get((state, code))
        if move is None:
            raise CommandError(EBADFD, f"not on a {state.name.lower()} handle")
        if code == Command.ENDPOINT_MAKE:
            self._check_may_make_endpoint()
        call.fetch(inline)
        if not call.negotiating:
            set_up = SetUp(self, move.state)
            call.begin(set_up)
            move.action(self, call, set_up)
        return 0

    def _check_endpoint(self) -> Endpoint:
        endpoint = self.endpoint
        assert endpoint is not None
        if not endpoint.alive or not endpoint.bus.alive:
            raise CommandError(ESHUTDOWN, "the endpoint has gone")
        return endpoint

    # --- BUS_MAKE

    def _bus_make(self, call: Call, set_up: SetUp) -> None:
        """KDBUS_CMD_BUS_MAKE (kdbus.bus(7)): make a bus that lives as long as this handle."""
        domain = self.domain
        size, n_hash = structs.BLOOM_PARAMETER.unpack(_given(call, ItemType.BLOOM_PARAMETER))
        if not Limit.BLOOM_SIZE_MIN <= size <= Limit.BLOOM_SIZE_MAX or size % 8 or not n_hash:
            raise CommandError(EINVAL, f"bloom filter of {size} bytes, {n_hash} hashes")
        given = call.find(ItemType.ATTACH_FLAGS_SEND)
        mask = attach_flags(U64.unpack(given)[0]) if given else 0
        who = call.peer.credentials()
        name = self._prefixed_name(call, who)
        id_ = domain.next_id()
        if name in domain.root.children:
            raise CommandError(EEXIST, f"bus {name} exists")
        metadata = ProcessMetadata()
        call.peer.gather(metadata, PROCESS)
        creator = domain.user(who.uid)
        if creator.n_buses >= Limit.USER_BUSES:
            raise CommandError(EMFILE, f"{creator.n_buses} buses of this user")
        bus = Bus(domain, id_, name, call.flags, (size, n_hash), mask, who.euid)
        bus.creator, bus.creator_metadata = creator, metadata
        bus.id128 = uuid.uuid4().bytes
        _store_results(call)
        # Nothing below can fail.
        call.commit()
        creator.n_buses += 1
        mode = S_IFDIR | access_mode(call.flags, 0o500)
        directory = domain.new_node(name, mode, bus, who)
        self._add_endpoint(bus, directory, "bus", call.flags, who, custom=False)
        domain.root.link(directory)
        self.bus = bus

    def _prefixed_name(self, call: Call, who: Credentials) -> str:
        name = _given(call, ItemType.MAKE_NAME)[:-1].decode()
        euid = self.domain.user_namespace.uid(who.euid, -1)
        if not name.startswith(f"{euid}-"):
            raise CommandError(EINVAL, f"name must start with {euid}-")
        return name

    def _add_endpoint(
        self, bus: Bus, directory: Node, name: str, flags: int, who: Credentials, *, custom: bool
    ) -> Endpoint:
        mode = S_IFREG | access_mode(flags, 0o600)
        node = self.domain.new_node(name, mode, bus, who)
        endpoint = Endpoint(bus, node, custom)
        node.subject = endpoint
        bus.endpoints[endpoint] = None
        directory.link(node)
        return endpoint

    # --- ENDPOINT_MAKE, ENDPOINT_UPDATE

    def _check_may_make_endpoint(self) -> None:
        endpoint = self.endpoint
        assert endpoint is not None
        if not endpoint.is_owner(self.opener):
            raise CommandError(EPERM, "only the bus's owner makes endpoints, on the default one")

    def _endpoint_make(self, call: Call, set_up: SetUp) -> None:
        """KDBUS_CMD_ENDPOINT_MAKE (kdbus.endpoint(7)): make a custom endpoint that lives as long
        as this handle."""
        assert self.endpoint is not None
        bus, directory = self.endpoint.bus, self.endpoint.node.parent
        assert directory is not None
        who = call.peer.credentials()
        name = self._prefixed_name(call, who)
        if name in directory.children:
            raise CommandError(EEXIST, f"endpoint {name} exists")
        _store_results(call)
        # Nothing below can fail.
        call.commit()
        self.endpoint = self._add_endpoint(bus, directory, name, call.flags, who, custom=True)

    def _endpoint_update(self, call: Call, set_up: SetUp) -> None:
        """KDBUS_CMD_ENDPOINT_UPDATE (kdbus.endpoint(7)): replace the endpoint's policy."""
        assert self.endpoint is not None
        users = call.peer.credentials().user_namespace
        entries = parse_entries(call, users)
        call.begin(Charge(self.domain.budget.memory, self.opener.uid, policy_size(entries)))
        call.commit()
        self.endpoint.policy.replace(self.endpoint, self.opener.uid, entries)

    # --- HELLO

    def _hello(self, call: Call, set_up: SetUp) -> None:
        """KDBUS_CMD_HELLO (kdbus.connection(7)): become a connection."""
        endpoint = self.endpoint
        assert endpoint is not None
        pool_size = call.u64(structs.CMD_HELLO_POOL_SIZE)
        name = self._check_hello(call, endpoint, pool_size)
        send_mask = attach_flags(call.u64(structs.CMD_HELLO_ATTACH_FLAGS_SEND))
        recv_mask = attach_flags(call.u64(structs.CMD_HELLO_ATTACH_FLAGS_RECV))
        id_ = self.domain.next_id()
        metadata, faked = self._hello_metadata(call)
        user = endpoint.user
        if not endpoint.custom:
            uid = self.opener.uid
            if faked and metadata.creds and endpoint.is_privileged(self.opener):
                uid = metadata.creds[0] if metadata.creds[0] != UNSET_ID else uid
            user = self.domain.user(uid)
        pool = set_up.pool = self._new_pool(pool_size)
        self.domain.connect(user)
        set_up.user = user
        connection = Connection(endpoint, id_, call.flags, self.opener, user, pool)
        connection.attach_flags_send, connection.attach_flags_recv = send_mask, recv_mask
        connection.description = call.string(ItemType.CONN_DESCRIPTION)
        connection.metadata, connection.faked = metadata, faked
        connection.viewer = Viewer(
            self.opener.user_namespace, call.peer.pid_namespace(), call.peer.root()
        )
        if connection.kind == ACTIVATOR:
            assert name is not None
            endpoint.bus.names.check_activator(name)
            call.begin(Charge(self.domain.budget.memory, self.opener.uid, claim_size(name)))
        policy = None if name is None else read_policy(connection, call)
        slice_ = self._store_hello(connection, call)
        # Nothing below can fail.
        call.commit()
        pool.release(slice_)
        if pool.arena.lease is not None:
            pool.arena.lease.join()
        self.connection = connection
        self._join(connection, name, policy)

    def _store_hello(self, connection: Connection, call: Call) -> Slice:
        """Store the results of HELLO, all but the last step of it; returns the slice that holds
        the bus's bloom parameters."""
        bus, pool = connection.bus, connection.pool
        bloom = structs.BLOOM_PARAMETER.pack(bus.bloom_size, bus.bloom_n_hash)
        item = build(ItemType.BLOOM_PARAMETER, bloom)
        slice_ = pool.allocate(len(item))
        pool.memory.write(slice_.offset, item)
        pool.publish(slice_)
        U64x2.pack_into(call.data, structs.CMD_HELLO_BUS_FLAGS, bus.flags, connection.id)
        U64x2.pack_into(call.data, structs.CMD_HELLO_OFFSET, slice_.offset, len(item))
        call.data[structs.CMD_HELLO_ID128 : structs.CMD_HELLO.size] = bus.id128
        call.store_results()
        # No HELLO can follow on a pool that has been sealed, so this comes last.
        pool.arena.seal()
        return slice_

    def _join(self, connection: Connection, name: bytes | None, policy: Entries | None) -> None:
        """Let others see the new connection."""
        bus = connection.bus
        bus.connect(connection)
        if connection.kind == ACTIVATOR:
            assert name is not None
            bus.announce(bus.names.activate(connection, name))
        if policy is not None:
            bus.policy.replace(connection, connection.opener.uid, policy)
        bus.flush()

    def _new_pool(self, size: int) -> Pool:
        """A pool, charged to who opened the file as long as it is mapped; ENOMEM. EBUSY: another
        connection on this inode has a smaller one."""
        inode = self.inode
        if inode.arena is not None:
            return Pool(inode.arena, size)
        # First, since it finds out what has gone of earlier pools.
        arena = Arena(size, self.new_memory(size))
        try:
            arena.lease = Lease(self.domain.budget, self.opener.uid, size)
        except CommandError:
            arena.close()
            raise
        inode.arena = arena
        return Pool(arena, size)

    def _check_hello(self, call: Call, endpoint: Endpoint, pool_size: int) -> bytes | None:
        """Checks that come before anything is made; returns the name, if one is given."""
        flags = call.flags
        if not pool_size or pool_size % PAGE_SIZE:
            raise CommandError(EINVAL, f"pool of {pool_size} bytes")
        kind = flags & SPECIAL
        if kind & (kind - 1):
            raise CommandError(EINVAL, "more than one special kind of connection")
        name = call.string(ItemType.NAME)
        if (name is not None) != (kind in (ACTIVATOR, POLICY_HOLDER)):
            raise CommandError(EINVAL, "a name goes with activators and policy holders, only")
        if name is not None and not is_policy_name(name):
            raise CommandError(EINVAL, "invalid name")
        if kind == MONITOR and endpoint.custom:
            raise CommandError(EOPNOTSUPP, "no monitors on custom endpoints")
        if not endpoint.is_owner(self.opener):
            if kind:
                raise CommandError(EPERM, "a special connection is for the bus's owner")
            if any(item.type in _FAKES for item in call.items):
                raise CommandError(EPERM, "faked credentials are for the bus's owner")
        return name

    def _hello_metadata(self, call: Call) -> tuple[ProcessMetadata, bool]:
        """Who the connection is: what it claims, if it claims anything, or its process."""
        metadata, peer = ProcessMetadata(), call.peer
        creds, pids = call.find(ItemType.CREDS), call.find(ItemType.PIDS)
        metadata.seclabel = call.string(ItemType.SECLABEL)
        if creds is None and pids is None and metadata.seclabel is None:
            peer.gather(metadata, PROCESS)
            return metadata, False
        if creds is not None:
            users = peer.credentials().user_namespace
            claimed = structs.CREDS.unpack(creds)
            uids = [_claimed_id(i, users.outer_uid) for i in claimed[:4]]
            gids = [_claimed_id(i, users.outer_gid) for i in claimed[4:]]
            metadata.creds = (*uids, *gids)
        if pids is not None:
            found = []
            for pid in structs.PIDS.unpack(pids):
                numbers = peer.find_process(pid) if pid else (0,)
                if numbers is None:
                    raise CommandError(EINVAL, f"no process {pid}")
                found.append(numbers)
            metadata.pids = tuple(found)
            metadata.pid_namespace = peer.pid_namespace()
        metadata.gathered = PROCESS
        return metadata, True

    # --- poll and close

    @property
    def hung_up(self) -> bool:
        """Whether poll says POLLERR|POLLHUP: no connection, or one that has ended."""
        return self.connection is None or not self.connection.alive

    @property
    def readable(self) -> bool:
        return self.connection is not None and self.connection.readable

    def close(self) -> None:
        """The last close of the file."""
        # It belongs to the file, which refers to this handle; a ring would keep both.
        self.new_memory = _no_memory
        if self.state is HandleState.BUS_OWNER:
            self._end_bus()
        elif self.state is HandleState.ENDPOINT_OWNER:
            assert self.endpoint is not None
            if self.endpoint.alive:
                self.endpoint.bus.end_endpoint(self.endpoint)
        elif self.connection is not None:
            if self.connection.alive:
                self.connection.bus.disconnect(self.connection)
            self._close_pool(self.connection)
        self.inode.leave()

    def _close_pool(self, connection: Connection) -> None:
        """Give the pool up. The last connection of an inode goes on to count as long as anybody has
        the memory mapped: else nobody would be charged for it."""
        user, pool = connection.user, connection.pool
        arena = pool.arena
        if self.inode.n_handles > 1:
            work = pool.close()
            if work is not None:
                self.domain.work.add(user, work)
        else:
            # All of it goes at once.
            arena.n_pools -= 1
        if arena.n_pools or arena.lease is None:
            user.n_connections -= 1
        else:
            arena.lease.user = user

    def _end_bus(self) -> None:
        bus = self.bus
        assert bus is not None
        directory = next(iter(bus.endpoints)).node.parent
        assert directory is not None
        bus.end(lambda: self.domain.root.unlink(directory))
        bus.creator.n_buses -= 1


class Move(NamedTuple):
    """A command that a handle without a connection takes, and the state it leads to."""

    action: Callable[[Handle, Call, SetUp], None]
    state: HandleState


_MOVES: dict[tuple[HandleState, int], Move] = {
    (HandleState.CONTROL, Command.BUS_MAKE): Move(Handle._bus_make, HandleState.BUS_OWNER),
    (HandleState.ENDPOINT, Command.ENDPOINT_MAKE): Move(
        Handle._endpoint_make, HandleState.ENDPOINT_OWNER
    ),
    (HandleState.ENDPOINT, Command.HELLO): Move(Handle._hello, HandleState.CONNECTION),
    (HandleState.ENDPOINT_OWNER, Command.ENDPOINT_UPDATE): Move(
        Handle._endpoint_update, HandleState.ENDPOINT_OWNER
    ),
}

_NEGOTIATES_MORE = frozenset(
    code for code, spec in COMMAND_SPECS.items() if spec.name.startswith("SEND")
)
"""SEND has the message to negotiate about, too."""


def _no_memory(size: int) -> Memory:
    raise CommandError(EBADFD, "closed")


def _store_results(call: Call) -> None:
    """Store what BUS_MAKE and ENDPOINT_MAKE return while they can still fail."""
    call.store_results()
    call.store = NOTHING


def _given(call: Call, type_: ItemType) -> bytes:
    payload = call.find(type_)
    assert payload is not None, "mandatory items have been checked"
    return payload


def _claimed_id(value: int, outer: Callable[[int], int | None]) -> int:
    """One id of a faked CREDS item, as the domain knows it."""
    if value == UNSET_ID:
        return UNSET_ID
    mapped = outer(value & 0xFFFFFFFF)
    if mapped is None or value & 0xFFFFFFFF == UNSET_ID:
        raise CommandError(EINVAL, f"id {value} is not mapped")
    return mapped
