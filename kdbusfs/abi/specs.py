# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each command takes and gives: its struct, flags and items.

One `CommandSpec` per command, and one for the message that SEND points at. The direction bits in an
ioctl's number say nothing about the real flow: every command reads its struct and items, and
every command writes at least return_flags.
"""

from struct import Struct
from typing import NamedTuple

from . import structs
from .items import ItemRule, item_rules
from .numbers import (
    EXCHANGE_MASK,
    Command,
    ExchangeFlag,
    ExtensionCommand,
    ExtensionItemType,
    HelloFlag,
    ItemType,
    ListFlag,
    MakeFlag,
    MatchFlag,
    MsgFlag,
    NameFlag,
    RecvFlag,
    SendFlag,
)

_I = ItemType

RETURN_FLAGS = structs.CMD_RETURN_FLAGS, structs.CMD_SIZE
"""What every command gives back, also with an error, once its argument has been read."""


class CommandSpec(NamedTuple):
    """What a command's argument may hold."""

    name: str
    size: int
    """Bytes of the fixed struct; items start behind it."""
    flags: int
    """The flags it allows, as they come back from negotiation."""
    items: dict[int, ItemRule]
    mandatory: frozenset[int]
    tolerated: int
    """Flags that are accepted without being allowed, and ignored."""
    returns: tuple[int, int]
    """Which bytes of the struct a command that succeeds gives back: from return_flags to here."""
    msg_return_flags: int
    """Where the return_flags of a message that is handed over stand, 0 where none is."""
    is_block: bool = False
    """Whether what follows the struct is no items, and all of it comes with the request."""


def _spec(
    name: str,
    struct: Struct,
    flags: int = 0,
    items: dict[int, ItemRule] | None = None,
    tolerated: int = 0,
    returns: tuple[int, int] = RETURN_FLAGS,
    msg_return_flags: int = 0,
) -> CommandSpec:
    items = item_rules() if items is None else items
    mandatory = frozenset(t for t, rule in items.items() if rule.mandatory)
    return CommandSpec(
        *(name, struct.size, int(flags), items, mandatory, int(tolerated)),
        *(returns, msg_return_flags),
    )


def _up_to_end(struct: Struct) -> tuple[int, int]:
    """All that follows the flags: the fields that the bus fills in are the last ones."""
    return structs.CMD_RETURN_FLAGS, struct.size


def _all(family: type) -> int:
    mask = 0
    for member in family:  # type: ignore[attr-defined]
        mask |= int(member)
    return mask


MESSAGE = _spec(
    "message",
    structs.MSG,
    _all(MsgFlag),
    item_rules(
        single=(_I.FDS, _I.BLOOM_FILTER, _I.DST_NAME),
        repeated=(_I.PAYLOAD_VEC, _I.PAYLOAD_MEMFD),
    ),
)
"""struct kdbus_msg as SEND finds it at msg_address."""

EXCHANGE_MESSAGE = MESSAGE._replace(
    items=MESSAGE.items | item_rules(repeated=(ExtensionItemType.PAYLOAD_INLINE,))
)
"""The same in the block of an EXCHANGE."""

_SEND = _spec(
    "SEND",
    structs.CMD_SEND,
    _all(SendFlag),
    item_rules(single=(_I.CANCEL_FD,)),
    returns=_up_to_end(structs.CMD_SEND),
    msg_return_flags=structs.CMD_SEND_REPLY_RETURN_FLAGS,
)
_RECV = _spec(
    "RECV",
    structs.CMD_RECV,
    _all(RecvFlag),
    returns=_up_to_end(structs.CMD_RECV),
    msg_return_flags=structs.CMD_RECV_MSG_RETURN_FLAGS,
)

COMMAND_SPECS: dict[int, CommandSpec] = {
    Command.BUS_MAKE: _spec(
        "BUS_MAKE",
        structs.CMD,
        _all(MakeFlag),
        item_rules(single=(_I.ATTACH_FLAGS_SEND,), mandatory=(_I.MAKE_NAME, _I.BLOOM_PARAMETER)),
    ),
    Command.ENDPOINT_MAKE: _spec(
        "ENDPOINT_MAKE", structs.CMD, _all(MakeFlag), item_rules(mandatory=(_I.MAKE_NAME,))
    ),
    Command.ENDPOINT_UPDATE: _spec(
        "ENDPOINT_UPDATE", structs.CMD, 0, item_rules(repeated=(_I.NAME, _I.POLICY_ACCESS))
    ),
    Command.HELLO: _spec(
        "HELLO",
        structs.CMD_HELLO,
        _all(HelloFlag),
        item_rules(
            single=(_I.NAME, _I.CREDS, _I.PIDS, _I.SECLABEL, _I.CONN_DESCRIPTION),
            repeated=(_I.POLICY_ACCESS,),
        ),
        returns=_up_to_end(structs.CMD_HELLO),
    ),
    Command.UPDATE: _spec(
        "UPDATE",
        structs.CMD,
        0,
        item_rules(
            single=(_I.ATTACH_FLAGS_SEND, _I.ATTACH_FLAGS_RECV),
            repeated=(_I.NAME, _I.POLICY_ACCESS),
        ),
    ),
    Command.BYEBYE: _spec("BYEBYE", structs.CMD),
    Command.FREE: _spec("FREE", structs.CMD_FREE),
    Command.CONN_INFO: _spec(
        "CONN_INFO",
        structs.CMD_INFO,
        0,
        item_rules(single=(_I.NAME,)),
        returns=_up_to_end(structs.CMD_INFO),
    ),
    Command.BUS_CREATOR_INFO: _spec(
        "BUS_CREATOR_INFO", structs.CMD_INFO, returns=_up_to_end(structs.CMD_INFO)
    ),
    Command.LIST: _spec(
        "LIST", structs.CMD_LIST, _all(ListFlag), returns=_up_to_end(structs.CMD_LIST)
    ),
    Command.SEND: _SEND,
    Command.RECV: _RECV,
    Command.NAME_ACQUIRE: _spec(
        "NAME_ACQUIRE",
        structs.CMD,
        NameFlag.REPLACE_EXISTING | NameFlag.ALLOW_REPLACEMENT | NameFlag.QUEUE,
        item_rules(mandatory=(_I.NAME,)),
        # Programs of the time hand the flags that came back straight in again, see
        # docs/conformance.md.
        tolerated=NameFlag.PRIMARY | NameFlag.ACQUIRED,
    ),
    Command.NAME_RELEASE: _spec("NAME_RELEASE", structs.CMD, 0, item_rules(mandatory=(_I.NAME,))),
    Command.MATCH_ADD: _spec(
        "MATCH_ADD",
        structs.CMD_MATCH,
        _all(MatchFlag),
        item_rules(
            repeated=(
                _I.BLOOM_MASK,
                _I.NAME,
                _I.ID,
                _I.DST_ID,
                _I.NAME_ADD,
                _I.NAME_REMOVE,
                _I.NAME_CHANGE,
                _I.ID_ADD,
                _I.ID_REMOVE,
            )
        ),
    ),
    Command.MATCH_REMOVE: _spec("MATCH_REMOVE", structs.CMD_MATCH),
    ExtensionCommand.FD_SOCKET: _spec("FD_SOCKET", structs.CMD_FD_SOCKET),
    ExtensionCommand.RECV: _RECV._replace(name="RECV+"),
    ExtensionCommand.SEND: _SEND._replace(name="SEND+"),
    ExtensionCommand.EXCHANGE: _spec("EXCHANGE", structs.CMD_EXCHANGE, _all(ExchangeFlag))._replace(
        is_block=True
    ),
}


def find_command(code: int) -> int:
    """The command that an ioctl has the number of: for an EXCHANGE, whose number says the size of
    its block, that of the smallest."""
    if code & EXCHANGE_MASK == ExtensionCommand.EXCHANGE & EXCHANGE_MASK:
        return ExtensionCommand.EXCHANGE
    return code
