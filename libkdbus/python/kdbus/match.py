# SPDX-License-Identifier: LGPL-2.1-or-later
"""Matches and bloom filters: which signals and notifications to receive (kdbus.match(7))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import check
from kdbus.numbers import MATCH_ID_ANY, ItemType


@dataclass(frozen=True, slots=True)
class Bloom:
    """The bloom filters of a bus: *size* in bytes, and number of hash functions."""

    size: int = 64
    n_hash: int = 8

    def bits(self, elements: Iterable[bytes | str]) -> bytes:
        """A filter of what a signal is about, or a mask of what is wanted.

        A signal passes if its filter has all the bits of the mask.
        """
        parameter = ffi.new("struct kdbus_bloom_parameter *", (self.size, self.n_hash))
        bits = bytearray(self.size)
        for element in elements:
            data = element.encode() if isinstance(element, str) else element
            lib.kdbus_bloom_add(parameter, ffi.from_buffer(bits), data, len(data))
        return bytes(bits)


class Match:
    """A set of rules that all have to be met; without any, everything passes.

    Rules about signals (`bloom_mask`, `src_id`, `dst_id`, `src_name`) never meet
    notifications, and the others never meet signals.
    """

    def __init__(self) -> None:
        p = ffi.new("struct kdbus_match **")
        check(lib.kdbus_match_new(p))
        self._match = ffi.gc(p[0], lib.kdbus_match_free)

    def bloom_mask(self, *masks: bytes) -> Self:
        """Only signals with the bits of the mask; one mask for each generation."""
        mask = b"".join(masks)
        check(lib.kdbus_match_add_bloom_mask(self._match, mask, len(mask)))
        return self

    def src_id(self, id_: int = MATCH_ID_ANY) -> Self:
        """Only signals from a connection."""
        check(lib.kdbus_match_add_src_id(self._match, id_))
        return self

    def dst_id(self, id_: int = MATCH_ID_ANY) -> Self:
        """Only signals to a connection."""
        check(lib.kdbus_match_add_dst_id(self._match, id_))
        return self

    def src_name(self, name: str) -> Self:
        """Only signals from the owner of a name."""
        check(lib.kdbus_match_add_src_name(self._match, os.fsencode(name)))
        return self

    def id_change(self, type_: ItemType, id_: int = MATCH_ID_ANY) -> Self:
        """Only ID_ADD or ID_REMOVE, of one connection or any."""
        check(lib.kdbus_match_add_id_change(self._match, type_, id_))
        return self

    def name_change(
        self,
        type_: ItemType,
        name: str | None = None,
        *,
        old_id: int = MATCH_ID_ANY,
        new_id: int = MATCH_ID_ANY,
    ) -> Self:
        """Only NAME_ADD, NAME_REMOVE or NAME_CHANGE, of one name or any."""
        string = ffi.NULL if name is None else os.fsencode(name)
        check(lib.kdbus_match_add_name_change(self._match, type_, old_id, new_id, string))
        return self
