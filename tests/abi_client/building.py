# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes into a command, put together by hand: structs, items, messages.

Numbers and layouts are those of `kdbusfs.abi`, which tests/abi holds against the header. What is
to be refused can be built as well: nothing here is checked.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from kdbusfs.abi import structs
from kdbusfs.abi.numbers import ATTACH_ALL, ItemType, PayloadType
from kdbusfs.abi.structs import align8

GARBAGE = 0xDEADBEEFDEADBEEF
"""What output fields hold when a command goes in."""
NEGOTIATE = 1 << 63
"""The flag of every command that asks for those it knows."""
BLOOM_SIZE = 64
POOL_SIZE = 1 << 20


def u64(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *(n & (1 << 64) - 1 for n in numbers))


# --- items


def item(type_: int, payload: bytes = b"", *, pad: bytes = b"\0") -> bytes:
    """One item, padded to 8 with *pad*."""
    size = structs.ITEM_HEADER_SIZE + len(payload)
    return u64(size, type_) + payload + pad * (-size & 7)


def text(type_: int, string: str) -> bytes:
    return item(type_, string.encode() + b"\0")


def name(string: str) -> bytes:
    return text(ItemType.NAME, string)


def vec(address: int, size: int) -> bytes:
    """A PAYLOAD_VEC; address 0 stands for zeros without data."""
    return item(ItemType.PAYLOAD_VEC, u64(size, address))


def memfd(fd: int, size: int, start: int = 0) -> bytes:
    return item(ItemType.PAYLOAD_MEMFD, structs.MEMFD.pack(start, size, fd, 0))


def fds(*numbers: int) -> bytes:
    return item(ItemType.FDS, struct.pack(f"={len(numbers)}i", *numbers))


def bloom(bits: bytes | Iterable[int] = (), generation: int = 0, size: int = BLOOM_SIZE) -> bytes:
    """A BLOOM_FILTER item, as every signal needs one: with these bits set, or of these bytes."""
    filter_ = bits if isinstance(bits, bytes) else bits_to_bytes(bits, size)
    return item(ItemType.BLOOM_FILTER, u64(generation) + filter_)


def mask(*generations: Iterable[int], size: int = BLOOM_SIZE) -> bytes:
    """A BLOOM_MASK item; one set of bits for each generation."""
    return item(ItemType.BLOOM_MASK, b"".join(bits_to_bytes(bits, size) for bits in generations))


def bits_to_bytes(bits: Iterable[int], size: int) -> bytes:
    return sum(1 << bit for bit in set(bits)).to_bytes(size, "little")


def bloom_parameter(size: int = BLOOM_SIZE, n_hash: int = 1) -> bytes:
    return item(ItemType.BLOOM_PARAMETER, u64(size, n_hash))


def access(type_: int, level: int, id_: int = 0) -> bytes:
    return item(ItemType.POLICY_ACCESS, u64(type_, level, id_))


def parse_items(chain: bytes) -> list[tuple[int, bytes]]:
    """The (type, payload) of each item, each held against what is left."""
    found = []
    while chain:
        size, type_ = structs.ITEM_HEADER.unpack_from(chain)
        assert structs.ITEM_HEADER_SIZE <= size <= len(chain)
        found.append((type_, chain[structs.ITEM_HEADER_SIZE : size]))
        chain = chain[align8(size) :]
    return found


# --- structs


def command(flags: int = 0, *items: bytes, fields: bytes = b"") -> bytes:
    """A command's struct: size, flags, return_flags, *fields* and items."""
    body = fields + b"".join(items)
    return u64(structs.CMD_SIZE + len(body), flags, GARBAGE) + body


def hello(
    *items: bytes,
    flags: int = 0,
    send: int = ATTACH_ALL,
    recv: int = 0,
    pool_size: int = POOL_SIZE,
) -> bytes:
    fields = u64(send, recv, GARBAGE, GARBAGE, pool_size, GARBAGE, GARBAGE, GARBAGE, GARBAGE)
    return command(flags, *items, fields=fields)


def message(
    dst_id: int = 0,
    *items: bytes,
    flags: int = 0,
    cookie: int = 1,
    timeout: int = 0,
    priority: int = 0,
    src_id: int = 0,
    payload_type: int = PayloadType.DBUS,
) -> bytes:
    """A struct kdbus_msg; *timeout* is cookie_reply as well."""
    body = b"".join(items)
    fields = (flags, priority, dst_id, src_id, payload_type, cookie, timeout)
    return u64(structs.MSG_SIZE + len(body), *fields) + body


def send_command(address: int, *items: bytes, flags: int = 0) -> bytes:
    return command(flags, *items, fields=u64(address, GARBAGE, GARBAGE, GARBAGE))


@dataclass(frozen=True)
class Memfd:
    """What a PAYLOAD_MEMFD says: a part of a sealed file."""

    fd: int
    size: int
    start: int = 0
