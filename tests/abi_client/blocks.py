# SPDX-License-Identifier: LGPL-2.1-or-later
"""The argument of an EXCHANGE (kdbus/extension.h), put together by hand."""

import struct
from collections.abc import Iterable

from abi_client.building import item, u64
from kdbusfs.abi.numbers import EXCHANGE_MASK, ExchangeFlag, ExtensionCommand, ExtensionItemType
from kdbusfs.abi.structs import align8

WAIT, CALL = ExchangeFlag.WAIT, ExchangeFlag.CALL
NEVER = (1 << 64) - 1
HEAD = 72


def block(
    messages: Iterable[tuple[bytes, bytes]] = (),
    frees: Iterable[int] = (),
    flags: int = 0,
    n_recv: int = 0,
    deadline: int = NEVER,
    cancel_fd: int = -1,
    fd_socket: int = -1,
    **counts: int,
) -> bytes:
    """The argument of an EXCHANGE. Each of *messages* is one with a `HERE` item, and the payload
    that this is to describe."""
    messages, frees = list(messages), list(frees)
    at = HEAD + 24 * n_recv + 8 * len(frees)
    data_at = at + sum(align8(len(m)) for m, _ in messages)
    chain = payloads = b""
    for msg, payload in messages:
        place = data_at + len(payloads)
        chain += msg.replace(HERE, inline(len(payload), place)) + bytes(-len(msg) & 7)
        payloads += payload
    numbers = {
        "n_free": len(frees),
        "n_freed": 0,
        "n_send": len(messages),
        "n_sent": 0,
        "n_recv": n_recv,
        "n_received": 0,
        **counts,
    }
    tail = bytes(24 * n_recv) + u64(*frees) + chain + payloads
    return (
        u64(HEAD + len(tail), flags, 0, deadline, 0)
        + struct.pack("=6I", *numbers.values())
        + struct.pack("=ii", cancel_fd, fd_socket)
        + tail
    )


def inline(size: int, offset: int) -> bytes:
    """The item of a message whose payload is at *offset* of the block."""
    return item(ExtensionItemType.PAYLOAD_INLINE, u64(size, offset))


def code(argument: bytes) -> int:
    """The command's number for this block."""
    return ExtensionCommand.EXCHANGE & EXCHANGE_MASK | len(argument) << 16


HERE = inline(0, 0)
