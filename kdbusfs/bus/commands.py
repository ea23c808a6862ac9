# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of a connection: one row and one function each.

A handler gets the connection and its `Call`, whose argument has been read and validated. It returns
0 or PENDING, or raises CommandError; results go into `call.data`, and `call.store` says which
part of that the caller gets back.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import (
    EAGAIN,
    EBADSLT,
    EDOM,
    EINVAL,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESRCH,
)
from struct import Struct
from typing import NamedTuple

from ..abi import structs
from ..abi.errors import CommandError
from ..abi.items import Item, build_string
from ..abi.numbers import (
    ATTACH_ALL,
    ATTACH_ANY,
    AttachFlag,
    Command,
    ExtensionCommand,
    ItemType,
    MatchFlag,
    RecvFlag,
    RecvReturnFlag,
    SendFlag,
)
from ..abi.specs import MESSAGE
from ..abi.structs import I32, I64, INFO, MSG_INFO, NAME_CHANGE, U64, U64x2
from ..abi.valid_names import is_well_known
from .call import Argument, Call
from .connection import (
    ACTIVATOR,
    MONITOR,
    POLICY_HOLDER,
    Connection,
    Result,
)
from .exchange import Exchange
from .listing import Listing
from .match import Match, Rule
from .message import Message
from .metadata import PROCESS
from .policy import Entries, parse_entries, policy_size
from .shares import Charge

ORDINARY = 0
_NEGOTIATE = int(ItemType.NEGOTIATE)
_BLOOM_MASK = int(ItemType.BLOOM_MASK)
_NAME = int(ItemType.NAME)
_IDS = frozenset(map(int, (ItemType.ID, ItemType.DST_ID, ItemType.ID_ADD, ItemType.ID_REMOVE)))
"""What a match may be about, as plain numbers: one match has more than a thousand of them."""
_READERS = frozenset({ORDINARY, ACTIVATOR, MONITOR})
_ANY_KIND = _READERS | {POLICY_HOLDER}

_PEEK = int(RecvFlag.PEEK)
_DROP = int(RecvFlag.DROP)
_USE_PRIORITY = int(RecvFlag.USE_PRIORITY)
_DROPPED_MSGS = int(RecvReturnFlag.DROPPED_MSGS)
_SYNC_REPLY = int(SendFlag.SYNC_REPLY)
_RECV_RESULT = Struct("=QQQQ")
"""The tail of struct kdbus_cmd_recv: dropped_msgs, msg {offset, msg_size, return_flags}."""
_TIMESTAMP = int(AttachFlag.TIMESTAMP)

MESSAGE_PREFETCH = 256
"""How much of a message is read at once, before its size is known: enough for most."""


class Row(NamedTuple):
    """How a connection takes a command."""

    handler: Callable[[Connection, Call], int]
    kinds: frozenset[int]
    """The kinds of connection that have it; EOPNOTSUPP for others, before anything is read."""


COMMANDS: dict[int, Row] = {}


def command(
    *codes: int, kinds: frozenset[int] = frozenset({ORDINARY})
) -> Callable[[Callable[[Connection, Call], int]], Callable[[Connection, Call], int]]:
    """Enter a handler into the table."""

    def enter(handler: Callable[[Connection, Call], int]) -> Callable[[Connection, Call], int]:
        for code in codes:
            COMMANDS[int(code)] = Row(handler, kinds)
        return handler

    return enter


def attach_flags(value: int) -> int:
    """Attach flags as a user gave them: ANY means ALL; EINVAL for unknown bits."""
    if value == ATTACH_ANY:
        return ATTACH_ALL
    if value & ~ATTACH_ALL:
        raise CommandError(EINVAL, f"attach flags {value:#x}")
    return value


def publish_result(connection: Connection, call: Call, content: bytes) -> int:
    """Hand *content* to the caller in a slice of its pool, and return its offset. EXFULL: there is
    no room for it."""
    pool = connection.pool
    result = Result(pool, len(content))
    call.begin(result)
    pool.memory.write(result.slice.offset, content)
    result.hand_over(call)
    # Nothing below can fail.
    call.commit()
    return result.slice.offset


@command(Command.BYEBYE)
def byebye(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_BYEBYE (kdbus.connection(7)): leave, unless messages are queued (EBUSY)."""
    connection.bus.disconnect(connection, polite=True)
    return 0


@command(Command.FREE, kinds=_READERS)
def free(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_FREE (kdbus.pool(7)): give a slice back. The offset of an empty result, which is
    the pool's size, is fine too."""
    (offset,) = U64.unpack_from(call.data, structs.CMD_FREE_OFFSET)
    if offset != connection.pool.size:
        connection.pool.free(offset)
    return 0


@command(Command.RECV, ExtensionCommand.RECV, kinds=_READERS)
def recv(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_RECV (kdbus.message(7)): take, look at or drop the next message. Never blocks;
    EAGAIN without one. How many messages were lost is told, and forgotten, in both cases."""
    flags, data = call.flags, call.data
    if flags & _DROP and flags & _USE_PRIORITY:
        raise CommandError(EINVAL, "DROP together with USE_PRIORITY")
    priority = None
    if flags & _USE_PRIORITY:
        (priority,) = I64.unpack_from(data, structs.CMD_RECV_PRIORITY)
    entry = connection.pick(priority)
    transfer = None
    if entry is not None and not flags & _DROP:
        transfer = connection.publish(entry)
    # Nothing below can fail, but for the lack of a message.
    lost = connection.lost
    connection.lost = 0
    call.returns(_DROPPED_MSGS if lost else 0)
    _RECV_RESULT.pack_into(data, structs.CMD_RECV_DROPPED_MSGS, lost, connection.pool.size, 0, 0)
    if entry is None:
        call.store_on_error = call.store
        raise CommandError(EAGAIN, "no message")
    if flags & _DROP:
        connection.bus.drop(connection, entry)
        return 0
    if not flags & _PEEK:
        connection.queue.remove(entry)
        connection.discard(entry)
        call.fds = transfer
    elif transfer is not None:
        transfer.release()
    U64x2.pack_into(data, structs.CMD_RECV_MSG, entry.slice.offset, entry.size)
    return 0


@command(Command.SEND, ExtensionCommand.SEND)
def send(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_SEND (kdbus.message(7)): send a message, or make a synchronous call."""
    address = call.u64(structs.CMD_SEND_MSG_ADDRESS)
    if call.negotiating and not address:
        return 0
    argument = Argument(MESSAGE, call.peer, address)
    argument.load(b"", MESSAGE_PREFETCH)
    argument.validate()
    if call.negotiating:
        return 0
    if argument.negotiating:
        raise CommandError(EINVAL, "only the message negotiates")
    cancel = None
    if call.items:
        payload = call.find(ItemType.CANCEL_FD)
        if payload is not None:
            cancel = call.peer.take(I32.unpack(payload)[0])
    try:
        if cancel is not None:
            cancel.check_pollable()
        sync = bool(call.flags & _SYNC_REPLY)
        message = Message(connection, argument, sync)
        MSG_INFO.pack_into(call.data, structs.CMD_SEND_REPLY, connection.pool.size, 0, 0)
        return connection.bus.send(message, call, sync=sync, cancel=cancel)
    finally:
        if cancel is not None:
            cancel.release()


@command(Command.NAME_ACQUIRE)
def name_acquire(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_NAME_ACQUIRE (kdbus.name(7)): own a well-known name, or queue for it."""
    name = call.string(ItemType.NAME)
    assert name is not None
    if not is_well_known(name):
        raise CommandError(EINVAL, "invalid name")
    endpoint, bus = connection.endpoint, connection.bus
    may_all = connection.owner and not endpoint.custom
    if not may_all and not endpoint.may_own(connection, call.peer.credentials(), name):
        raise CommandError(EPERM, f"may not own {name.decode()}")
    acquired = bus.names.acquire(connection, name, call.flags)
    call.returns(acquired.return_flags)
    if acquired.error:
        raise CommandError(acquired.error, f"{name.decode()} is taken")
    bus.announce(acquired.change)
    bus.flush()
    return 0


@command(Command.NAME_RELEASE)
def name_release(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_NAME_RELEASE (kdbus.name(7)): give a name up, or leave its queue."""
    name = call.string(ItemType.NAME)
    assert name is not None
    bus = connection.bus
    bus.announce(bus.names.release(connection, name))
    bus.flush()
    return 0


@command(Command.LIST, kinds=_ANY_KIND)
def list_(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_LIST (kdbus.name(7)): connections and names, as records in a slice."""
    return Listing(connection, call).start()


@command(Command.CONN_INFO, kinds=_ANY_KIND)
def conn_info(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_CONN_INFO (kdbus.connection(7)): what is known of a connection."""
    kinds = attach_flags(call.u64(structs.CMD_INFO_ATTACH_FLAGS))
    target = _info_target(connection, call)
    kinds &= target.attach_flags_send & ~_TIMESTAMP
    items = target.metadata.items(kinds & PROCESS, connection.viewer, call.peer)
    items += target.metadata_items(kinds)
    _store_info(connection, call, target.id, target.flags, items)
    return 0


def _info_target(connection: Connection, call: Call) -> Connection:
    id_ = call.u64(structs.CMD_INFO_ID)
    name = call.string(ItemType.NAME)
    endpoint, bus = connection.endpoint, connection.bus
    who = call.peer.credentials() if endpoint.custom else connection.opener
    if name is not None:
        target = bus.names.owner_of(name)
        if target is None or not endpoint.may_see_name(who, name) or id_ not in (0, target.id):
            raise CommandError(ESRCH, "no such name, or it is owned by another id")
    elif id_:
        target = bus.connections.get(id_)
        if target is None or not endpoint.may_see(who, target):
            raise CommandError(ENXIO, f"no connection {id_}")
    else:
        raise CommandError(EINVAL, "neither id nor name")
    return target


def _store_info(
    connection: Connection, call: Call, id_: int, flags: int, items: list[bytes]
) -> None:
    chain = b"".join(items)
    size = INFO.size + len(chain)
    offset = publish_result(connection, call, INFO.pack(size, id_, flags) + chain)
    U64x2.pack_into(call.data, structs.CMD_INFO_OFFSET, offset, size)


@command(Command.BUS_CREATOR_INFO, kinds=_ANY_KIND)
def bus_creator_info(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_BUS_CREATOR_INFO (kdbus.bus(7)): who made the bus."""
    bus = connection.bus
    kinds = attach_flags(call.u64(structs.CMD_INFO_ATTACH_FLAGS)) & bus.creator_mask & PROCESS
    items = [build_string(ItemType.MAKE_NAME, bus.name.encode())]
    items += bus.creator_metadata.items(kinds, connection.viewer, call.peer)
    _store_info(connection, call, bus.id, bus.flags, items)
    return 0


@command(Command.UPDATE, kinds=_ANY_KIND)
def update(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_UPDATE (kdbus.connection(7)): new attach flags, or a new policy; all or nothing."""
    kind = connection.kind
    send_mask, recv_mask = connection.attach_flags_send, connection.attach_flags_recv
    given = call.find(ItemType.ATTACH_FLAGS_SEND)
    if given is not None:
        if kind not in (ORDINARY, MONITOR):
            raise CommandError(EOPNOTSUPP, "this kind of connection sends no metadata")
        send_mask = attach_flags(U64.unpack(given)[0])
    given = call.find(ItemType.ATTACH_FLAGS_RECV)
    if given is not None:
        if kind == POLICY_HOLDER:
            raise CommandError(EOPNOTSUPP, "a policy holder receives no metadata")
        recv_mask = attach_flags(U64.unpack(given)[0])
    if any(item.type in (ItemType.NAME, ItemType.POLICY_ACCESS) for item in call.items):
        if kind != POLICY_HOLDER:
            raise CommandError(EOPNOTSUPP, "only policy holders have a policy to update")
        policy = read_policy(connection, call)
        # Nothing below can fail.
        call.commit()
        connection.bus.policy.replace(connection, connection.opener.uid, policy)
    connection.attach_flags_send, connection.attach_flags_recv = send_mask, recv_mask
    return 0


def read_policy(connection: Connection, call: Call) -> Entries:
    """The policy of a holder or activator as *call* has it. EEXIST: another one has some of it."""
    users = call.peer.credentials().user_namespace
    entries = parse_entries(call, users, limit=1, wildcards=connection.kind == POLICY_HOLDER)
    connection.bus.policy.check_owner(connection, entries)
    memory = connection.bus.domain.budget.memory
    call.begin(Charge(memory, connection.opener.uid, policy_size(entries)))
    return entries


@command(Command.MATCH_ADD)
def match_add(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_MATCH_ADD (kdbus.match(7)): take messages that pass all of these rules."""
    bloom_size = connection.bus.bloom_size
    rules = [
        _rule(item, call.payload(item), bloom_size)
        for item in call.items
        if item.type != _NEGOTIATE
    ]
    cookie = call.u64(structs.CMD_MATCH_COOKIE)
    if call.flags & MatchFlag.REPLACE:
        connection.remove_matches(cookie)
    connection.add_match(Match(connection, cookie, rules))
    return 0


@command(Command.MATCH_REMOVE)
def match_remove(connection: Connection, call: Call) -> int:
    """KDBUS_CMD_MATCH_REMOVE (kdbus.match(7)): drop all matches with this cookie."""
    if not connection.remove_matches(call.u64(structs.CMD_MATCH_COOKIE)):
        raise CommandError(EBADSLT, "no match with this cookie")
    return 0


def _rule(item: Item, payload: bytes, bloom_size: int) -> Rule:
    type_ = item.type
    if type_ == _BLOOM_MASK:
        if len(payload) < bloom_size or len(payload) % bloom_size:
            raise CommandError(EDOM, f"bloom mask of {len(payload)} bytes")
        masks = tuple(
            int.from_bytes(payload[at : at + bloom_size], "little")
            for at in range(0, len(payload), bloom_size)
        )
        return Rule(type_, masks=masks)
    if type_ == _NAME:
        if not is_well_known(payload[:-1]):
            raise CommandError(EINVAL, "invalid name")
        return Rule(type_, name=payload[:-1])
    if type_ in _IDS:
        return Rule(type_, U64.unpack_from(payload)[0])
    old_id, _, new_id, _ = NAME_CHANGE.unpack_from(payload)
    name = payload[NAME_CHANGE.size : -1] if len(payload) > NAME_CHANGE.size else None
    return Rule(type_, new_id, old_id, name)


@command(ExtensionCommand.EXCHANGE, kinds=_READERS)
def exchange(connection: Connection, call: Call) -> int:
    """KDBUSFS_CMD_EXCHANGE: free slices, send messages, and wait for messages."""
    if call.negotiating:
        return 0
    return Exchange(connection, call).start()


@command(ExtensionCommand.FD_SOCKET, kinds=_ANY_KIND)
def fd_socket(connection: Connection, call: Call) -> int:
    """KDBUSFS_CMD_FD_SOCKET: take the socket on which descriptors are to be sent to those who
    receive with the extension's commands. EINVAL unless it is an AF_UNIX socket, SOCK_SEQPACKET,
    with the caller's own user at the other end; EBADF for an O_PATH descriptor."""
    fd = I32.unpack_from(call.data, structs.CMD_FD_SOCKET_FD)[0]
    connection.set_fd_socket(call.peer.take(fd))
    return 0
