# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command leaves in a pool: messages, and what is told about connections and buses."""

import os
import struct
from dataclasses import dataclass
from typing import Any

from abi_client.building import Memfd, parse_items
from kdbusfs.abi import structs
from kdbusfs.abi.numbers import OFFSET_NONE, ItemType
from kdbusfs.abi.structs import I32


class _Items:
    """What has items."""

    items: list[tuple[int, bytes]]

    @property
    def types(self) -> list[int]:
        return [type_ for type_, _ in self.items]

    def all(self, type_: int) -> list[bytes]:
        """The payloads of all items of *type_*."""
        return [payload for found, payload in self.items if found == type_]

    def one(self, type_: int) -> bytes:
        """The payload of the only item of *type_*."""
        (payload,) = self.all(type_)
        return payload

    def numbers(self, type_: int) -> tuple[int, ...]:
        """The payload of the only item of *type_*, which is made of u64."""
        payload = self.one(type_)
        return struct.unpack(f"={len(payload) // 8}Q", payload)


@dataclass
class Received(_Items):
    """A message, or nothing after DROP, as it lies in the receiver's pool."""

    offset: int
    raw: bytes
    """The whole slice."""
    return_flags: int = 0
    """Those of the command."""
    msg_return_flags: int = 0
    """msg.return_flags, or reply.return_flags: INCOMPLETE_FDS."""
    lost: int = 0
    """dropped_msgs"""

    def __post_init__(self) -> None:
        if not self.raw:
            return
        header = structs.MSG.unpack_from(self.raw)
        self.size, self.flags, self.priority, self.dst_id = header[:4]
        self.src_id, self.payload_type, self.cookie, self.cookie_reply = header[4:]
        self.items = parse_items(self.raw[structs.MSG_SIZE : self.size])

    @property
    def timeout_ns(self) -> int:
        """The same field as cookie_reply."""
        return int(self.cookie_reply)

    @property
    def slice_size(self) -> int:
        return len(self.raw)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(offset, size) of each PAYLOAD_OFF."""
        pairs = map(structs.VEC.unpack, self.all(ItemType.PAYLOAD_OFF))
        return [(offset, size) for size, offset in pairs]

    @property
    def data(self) -> bytes:
        """What all PAYLOAD_OFF hold, one after the other; zeros where there are no data."""
        pieces = []
        for offset, size in self.offsets:
            zeros = offset == OFFSET_NONE
            pieces.append(bytes(size) if zeros else self.raw[offset : offset + size])
            assert len(pieces[-1]) == size
        return b"".join(pieces)

    @property
    def fds(self) -> list[int]:
        """The numbers in FDS."""
        return [fd for payload in self.all(ItemType.FDS) for (fd,) in I32.iter_unpack(payload)]

    @property
    def memfds(self) -> list[Memfd]:
        found = map(structs.MEMFD.unpack, self.all(ItemType.PAYLOAD_MEMFD))
        return [Memfd(fd, size, start) for start, size, fd, _ in found]

    @property
    def memfd_numbers(self) -> list[int]:
        return [memfd.fd for memfd in self.memfds]

    @property
    def seqnum(self) -> int:
        """The sequence number in TIMESTAMP."""
        return int(structs.TIMESTAMP.unpack(self.one(ItemType.TIMESTAMP))[0])

    @property
    def notification(self) -> tuple[Any, ...]:
        """(type, what happened...) of a message of the bus."""
        assert self.src_id == 0
        type_, payload = self.items[0]
        kind = ItemType(type_)
        if type_ in (ItemType.ID_ADD, ItemType.ID_REMOVE):
            return (kind, *structs.ID_CHANGE.unpack(payload))
        if type_ in (ItemType.REPLY_TIMEOUT, ItemType.REPLY_DEAD):
            assert not payload
            return (kind, self.cookie_reply)
        old_id, old_flags, new_id, new_flags = structs.NAME_CHANGE.unpack_from(payload)
        name = payload[structs.NAME_CHANGE.size : -1].decode()
        return (kind, name, (old_id, old_flags), (new_id, new_flags))

    def close_fds(self) -> None:
        """Close every descriptor that came along, where they are real ones."""
        for fd in (*self.fds, *self.memfd_numbers):
            if fd >= 0:
                os.close(fd)


@dataclass
class Info(_Items):
    """A struct kdbus_info and its items, as it lies in a pool."""

    offset: int
    raw: bytes

    def __post_init__(self) -> None:
        self.size, self.id, self.flags = structs.INFO.unpack_from(self.raw)
        assert self.size == len(self.raw)
        assert self.size % 8 == 0
        self.items = parse_items(self.raw[structs.INFO.size :])


def records(raw: bytes, offset: int = 0) -> list[Info]:
    """Those of a LIST, which lies at *offset* of the pool."""
    found = []
    while raw:
        (length,) = structs.U64.unpack_from(raw)
        assert length
        found.append(Info(offset, raw[:length]))
        raw, offset = raw[length:], offset + length
    return found
