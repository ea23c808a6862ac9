# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that set a handle up: each is a function that returns what it made (a bus, an
endpoint, a connection), or raises and leaves nothing of it.

Each stores its results before anybody else can see what it made: from `call.commit()` on nothing
can fail.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from errno import EEXIST, EINVAL, EMFILE, EOPNOTSUPP, EPERM
from stat import S_IFDIR, S_IFREG

from ..abi import structs
from ..abi.errors import CommandError
from ..abi.items import build
from ..abi.numbers import ItemType, Limit
from ..abi.structs import U64, U64x2
from ..abi.valid_names import is_policy_name
from .bus import Bus
from .call import NOTHING, Call, Step
from .commands import attach_flags, read_policy
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
_FAKES = (ItemType.CREDS, ItemType.PIDS, ItemType.SECLABEL)


# --- BUS_MAKE


def make_bus(domain: Domain, call: Call) -> Bus:
    """KDBUS_CMD_BUS_MAKE (kdbus.bus(7))."""
    size, n_hash = structs.BLOOM_PARAMETER.unpack(_given(call, ItemType.BLOOM_PARAMETER))
    if not Limit.BLOOM_SIZE_MIN <= size <= Limit.BLOOM_SIZE_MAX or size % 8 or not n_hash:
        raise CommandError(EINVAL, f"bloom filter of {size} bytes, {n_hash} hashes")
    given = call.find(ItemType.ATTACH_FLAGS_SEND)
    mask = attach_flags(U64.unpack(given)[0]) if given else 0
    who = call.peer.credentials()
    name = _prefixed_name(domain, call, who)
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
    _add_endpoint(bus, directory, "bus", call.flags, who, custom=False)
    domain.root.link(directory)
    return bus


def _prefixed_name(domain: Domain, call: Call, who: Credentials) -> str:
    name = _given(call, ItemType.MAKE_NAME)[:-1].decode()
    euid = domain.user_namespace.uid(who.euid, -1)
    if not name.startswith(f"{euid}-"):
        raise CommandError(EINVAL, f"name must start with {euid}-")
    return name


def _add_endpoint(
    bus: Bus, directory: Node, name: str, flags: int, who: Credentials, *, custom: bool
) -> Endpoint:
    mode = S_IFREG | access_mode(flags, 0o600)
    node = bus.domain.new_node(name, mode, bus, who)
    endpoint = Endpoint(bus, node, custom)
    node.subject = endpoint
    bus.endpoints[endpoint] = None
    directory.link(node)
    return endpoint


def _store_results(call: Call) -> None:
    """Store what BUS_MAKE and ENDPOINT_MAKE return while they can still fail."""
    call.store_results()
    call.store = NOTHING


def _given(call: Call, type_: ItemType) -> bytes:
    payload = call.find(type_)
    assert payload is not None, "mandatory items have been checked"
    return payload


# --- ENDPOINT_MAKE, ENDPOINT_UPDATE


def make_endpoint(beside: Endpoint, call: Call) -> Endpoint:
    """KDBUS_CMD_ENDPOINT_MAKE (kdbus.endpoint(7)): a custom one, in the same directory as that on
    which the command was given."""
    bus, directory = beside.bus, beside.node.parent
    assert directory is not None
    who = call.peer.credentials()
    name = _prefixed_name(bus.domain, call, who)
    if name in directory.children:
        raise CommandError(EEXIST, f"endpoint {name} exists")
    _store_results(call)
    # Nothing below can fail.
    call.commit()
    return _add_endpoint(bus, directory, name, call.flags, who, custom=True)


def update_endpoint(endpoint: Endpoint, opener: Credentials, call: Call) -> None:
    """KDBUS_CMD_ENDPOINT_UPDATE (kdbus.endpoint(7)): replace the endpoint's policy, for which
    *opener* is charged."""
    users = call.peer.credentials().user_namespace
    entries = parse_entries(call, users)
    call.begin(Charge(endpoint.bus.domain.budget.memory, opener.uid, policy_size(entries)))
    call.commit()
    endpoint.policy.replace(endpoint, opener.uid, entries)


# --- HELLO


class NewPool(Step):
    """A pool that goes again if anything fails."""

    __slots__ = ("inode", "pool")

    def __init__(self, inode: Inode, pool: Pool) -> None:
        self.inode = inode
        self.pool = pool

    def commit(self) -> None:
        pass

    def undo(self) -> None:
        self.pool.close()
        # The next HELLO may be for another size.
        self.inode.tidy()


class NewMember(Step):
    """A connection that *user* has been counted up for, which is taken back if anything fails."""

    __slots__ = ("user",)

    def __init__(self, user: User) -> None:
        self.user = user

    def commit(self) -> None:
        pass

    def undo(self) -> None:
        self.user.n_connections -= 1


def hello(
    endpoint: Endpoint,
    opener: Credentials,
    inode: Inode,
    new_memory: Callable[[int], Memory],
    call: Call,
) -> Connection:
    """KDBUS_CMD_HELLO (kdbus.connection(7)): a connection through *endpoint*, of the file that
    *opener* opened on *inode*."""
    pool_size = call.u64(structs.CMD_HELLO_POOL_SIZE)
    name = _check_hello(call, endpoint, opener, pool_size)
    send_mask = attach_flags(call.u64(structs.CMD_HELLO_ATTACH_FLAGS_SEND))
    recv_mask = attach_flags(call.u64(structs.CMD_HELLO_ATTACH_FLAGS_RECV))
    domain = endpoint.bus.domain
    id_ = domain.next_id()
    metadata, faked = _hello_metadata(call)
    user = _user_of(endpoint, opener, metadata if faked else None)
    pool = _new_pool(domain, opener, inode, new_memory, pool_size)
    call.begin(NewPool(inode, pool))
    domain.connect(user)
    call.begin(NewMember(user))
    connection = Connection(endpoint, id_, call.flags, opener, user, pool)
    connection.attach_flags_send, connection.attach_flags_recv = send_mask, recv_mask
    connection.description = call.string(ItemType.CONN_DESCRIPTION)
    connection.metadata, connection.faked = metadata, faked
    connection.viewer = Viewer(opener.user_namespace, call.peer.pid_namespace(), call.peer.root())
    if connection.kind == ACTIVATOR:
        assert name is not None
        endpoint.bus.names.check_activator(name)
        call.begin(Charge(domain.budget.memory, opener.uid, claim_size(name)))
    policy = None if name is None else read_policy(connection, call)
    slice_ = _store_hello(connection, call)
    # Nothing below can fail.
    call.commit()
    pool.release(slice_)
    if pool.arena.lease is not None:
        pool.arena.lease.join()
    _join(connection, name, policy)
    return connection


def _user_of(endpoint: Endpoint, opener: Credentials, claimed: ProcessMetadata | None) -> User:
    """Whom a connection counts for: who opened the file, or, as the privileged may have it, who
    the connection claims to be. On a custom endpoint that is the endpoint's."""
    if endpoint.custom:
        return endpoint.user
    uid = opener.uid
    if claimed is not None and claimed.creds and endpoint.is_privileged(opener):
        uid = claimed.creds[0] if claimed.creds[0] != UNSET_ID else uid
    return endpoint.bus.domain.user(uid)


def _store_hello(connection: Connection, call: Call) -> Slice:
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


def _join(connection: Connection, name: bytes | None, policy: Entries | None) -> None:
    """Let others see the new connection."""
    bus = connection.bus
    bus.connect(connection)
    if connection.kind == ACTIVATOR:
        assert name is not None
        bus.announce(bus.names.activate(connection, name))
    if policy is not None:
        bus.policy.replace(connection, connection.opener.uid, policy)
    bus.flush()


def _new_pool(
    domain: Domain,
    opener: Credentials,
    inode: Inode,
    new_memory: Callable[[int], Memory],
    size: int,
) -> Pool:
    """A pool, charged to who opened the file as long as it is mapped; ENOMEM. EBUSY: another
    connection on this inode has a smaller one."""
    if inode.arena is not None:
        return Pool(inode.arena, size)
    # First, since it finds out what has gone of earlier pools.
    arena = Arena(size, new_memory(size))
    try:
        arena.lease = Lease(domain.budget, opener.uid, size)
    except CommandError:
        arena.close()
        raise
    inode.arena = arena
    return Pool(arena, size)


def _check_hello(
    call: Call, endpoint: Endpoint, opener: Credentials, pool_size: int
) -> bytes | None:
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
    if not endpoint.is_owner(opener):
        if kind:
            raise CommandError(EPERM, "a special connection is for the bus's owner")
        if any(item.type in _FAKES for item in call.items):
            raise CommandError(EPERM, "faked credentials are for the bus's owner")
    return name


def _hello_metadata(call: Call) -> tuple[ProcessMetadata, bool]:
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


def _claimed_id(value: int, outer: Callable[[int], int | None]) -> int:
    """One id of a faked CREDS item, as the domain knows it."""
    if value == UNSET_ID:
        return UNSET_ID
    mapped = outer(value & 0xFFFFFFFF)
    if mapped is None or value & 0xFFFFFFFF == UNSET_ID:
        raise CommandError(EINVAL, f"id {value} is not mapped")
    return mapped
