# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and building items (kdbus.item(7)): the only place that walks a chain.

A chain is a run of items behind a command's struct or a message's header, each
{u64 size, u64 type, payload}, each starting at a multiple of 8. Sizes are checked here, once,
before anything is used; the bytes between items are neither read nor checked.
"""

from collections.abc import Callable, Iterable
from errno import EBADF, EINVAL, ENAMETOOLONG
from typing import NamedTuple

from .errors import CommandError
from .numbers import ExtensionItemType, ItemType, Limit
from .structs import (
    BLOOM_PARAMETER,
    CREDS,
    I32,
    ID_CHANGE,
    ITEM_HEADER,
    ITEM_HEADER_SIZE,
    MEMFD,
    NAME_CHANGE,
    PIDS,
    POLICY_ACCESS,
    U64,
    VEC,
)
from .valid_names import is_sysname

Buffer = bytes | bytearray | memoryview

_unpack_item_header = ITEM_HEADER.unpack_from
_unpack_vec = VEC.unpack_from
_VEC_SIZE = VEC.size
_new_tuple = tuple.__new__


class Item(NamedTuple):
    """An item found in a chain: where its payload lies in the walked buffer."""

    type: int
    start: int
    """Offset of the payload in the buffer."""
    size: int
    """Bytes of payload, without the header and without padding."""


class ItemRule(NamedTuple):
    """How a command takes one type of item."""

    check: Callable[[Buffer, int, int], None] | None
    repeatable: bool
    mandatory: bool


def _exactly(n: int) -> Callable[[Buffer, int, int], None]:
    def check(_data: Buffer, _start: int, size: int) -> None:
        if size != n:
            raise CommandError(EINVAL, f"item payload of {size} bytes, expected {n}")

    return check


def _multiple_of(n: int) -> Callable[[Buffer, int, int], None]:
    def check(_data: Buffer, _start: int, size: int) -> None:
        if size % n:
            raise CommandError(EINVAL, f"item payload of {size} bytes, expected a multiple of {n}")

    return check


def _check_vec(data: Buffer, start: int, size: int) -> None:
    if size != _VEC_SIZE or not _unpack_vec(data, start)[0]:
        raise CommandError(EINVAL, "malformed payload item")


def _check_memfd(data: Buffer, start: int, size: int) -> None:
    if size != MEMFD.size:
        raise CommandError(EINVAL, "malformed PAYLOAD_MEMFD")
    _, length, fd, _ = MEMFD.unpack_from(data, start)
    if not length:
        raise CommandError(EINVAL, "PAYLOAD_MEMFD of size 0")
    if fd < 0:
        raise CommandError(EBADF, "PAYLOAD_MEMFD with a negative descriptor")


def _check_bloom_filter(_data: Buffer, _start: int, size: int) -> None:
    if size < U64.size:
        raise CommandError(EINVAL, "BLOOM_FILTER without a generation")


def _check_string(data: Buffer, start: int, size: int) -> None:
    if size < 1 or bytes(data[start : start + size]).find(0) != size - 1:
        raise CommandError(EINVAL, "string item must end with its only NUL")


def _check_sysname(data: Buffer, start: int, size: int) -> None:
    if size < 2:
        raise CommandError(EINVAL, "empty name")
    if size > Limit.SYSNAME_LENGTH + 1:
        raise CommandError(ENAMETOOLONG, f"name of {size - 1} bytes")
    _check_string(data, start, size)
    if not is_sysname(bytes(data[start : start + size - 1])):
        raise CommandError(EINVAL, "name with a character that is not allowed")


def _check_name_change(data: Buffer, start: int, size: int) -> None:
    if size < NAME_CHANGE.size:
        raise CommandError(EINVAL, "malformed NAME_* rule")
    if size > NAME_CHANGE.size:
        _check_string(data, start + NAME_CHANGE.size, size - NAME_CHANGE.size)


_CHECKS: dict[ItemType | ExtensionItemType, Callable[[Buffer, int, int], None] | None] = {
    ItemType.NEGOTIATE: _multiple_of(U64.size),
    ItemType.PAYLOAD_VEC: _check_vec,
    ItemType.PAYLOAD_MEMFD: _check_memfd,
    ItemType.FDS: _multiple_of(I32.size),
    ItemType.CANCEL_FD: _exactly(I32.size),
    ItemType.BLOOM_PARAMETER: _exactly(BLOOM_PARAMETER.size),
    ItemType.BLOOM_FILTER: _check_bloom_filter,
    ItemType.BLOOM_MASK: None,
    ItemType.DST_NAME: _check_string,
    ItemType.MAKE_NAME: _check_sysname,
    ItemType.ATTACH_FLAGS_SEND: _exactly(U64.size),
    ItemType.ATTACH_FLAGS_RECV: _exactly(U64.size),
    ItemType.ID: _exactly(U64.size),
    ItemType.NAME: _check_string,
    ItemType.DST_ID: _exactly(U64.size),
    ItemType.CREDS: _exactly(CREDS.size),
    ItemType.PIDS: _exactly(PIDS.size),
    ItemType.SECLABEL: _check_string,
    ItemType.CONN_DESCRIPTION: _check_sysname,
    ItemType.POLICY_ACCESS: _exactly(POLICY_ACCESS.size),
    ItemType.NAME_ADD: _check_name_change,
    ItemType.NAME_REMOVE: _check_name_change,
    ItemType.NAME_CHANGE: _check_name_change,
    ItemType.ID_ADD: _exactly(ID_CHANGE.size),
    ItemType.ID_REMOVE: _exactly(ID_CHANGE.size),
    ExtensionItemType.PAYLOAD_INLINE: _check_vec,
}


def item_rules(
    single: Iterable[ItemType] = (),
    repeated: Iterable[ItemType | ExtensionItemType] = (),
    mandatory: Iterable[ItemType] = (),
) -> dict[int, ItemRule]:
    """Say which items a command takes; NEGOTIATE is taken by every one."""
    rules = {int(t): ItemRule(_CHECKS[t], False, False) for t in (ItemType.NEGOTIATE, *single)}
    rules |= {int(t): ItemRule(_CHECKS[t], True, False) for t in repeated}
    rules |= {int(t): ItemRule(_CHECKS[t], False, True) for t in mandatory}
    return rules


def walk(data: Buffer, start: int, end: int, accepted: dict[int, ItemRule]) -> list[Item]:
    """Find the items of *data*[*start*:*end*], *start* being a multiple of 8.

    Raises EINVAL for an item that does not fit, whose type is not in *accepted*, or that comes
    twice without being repeatable; else what the item's own check says.
    """
    items: list[Item] = []
    while start < end:
        left = end - start
        if left < ITEM_HEADER_SIZE:
            raise CommandError(EINVAL, "stray bytes behind the last item")
        size, type_ = _unpack_item_header(data, start)
        if size < ITEM_HEADER_SIZE or size > left:
            raise CommandError(EINVAL, f"item of {size} bytes where {left} are left")
        rule = accepted.get(type_)
        if rule is None:
            raise CommandError(EINVAL, f"item type {type_:#x} is not accepted here")
        check, repeatable, _ = rule
        payload = start + ITEM_HEADER_SIZE
        if check is not None:
            check(data, payload, size - ITEM_HEADER_SIZE)
        if not repeatable and any(item[0] == type_ for item in items):
            raise CommandError(EINVAL, f"item type {type_:#x} given twice")
        # Item(...) takes twice as long, and most messages come through here.
        items.append(_new_tuple(Item, (type_, payload, size - ITEM_HEADER_SIZE)))
        start += (size + 7) & ~7
    return items


def build(type_: int, payload: bytes) -> bytes:
    """One item of *type_*, padded with zeros to a multiple of 8."""
    size = ITEM_HEADER_SIZE + len(payload)
    return ITEM_HEADER.pack(size, type_) + payload + bytes(-size & 7)


def build_string(type_: int, text: bytes) -> bytes:
    """One string item: *text* and its NUL."""
    return build(type_, text + b"\0")
