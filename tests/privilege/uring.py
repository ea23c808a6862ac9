# SPDX-License-Identifier: LGPL-2.1-or-later
"""open() by io_uring, with the credentials of somebody else (io_uring_register(2), personality)."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_REGISTER_PERSONALITY = 9
_OP_OPENAT = 18
_GET_EVENTS = 1
_OFF_CQ_RING, _OFF_SQES = 0x8000000, 0x10000000
_AT_FDCWD = -100

_SQE = struct.Struct("=BBHiQQIIQHHi16x")
"""struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, open_flags, user_data,
buf_index, personality, splice_fd."""

_libc = ctypes.CDLL(None, use_errno=True)
_rings: dict[int, bytes] = {}
"""struct io_uring_params of each ring, by its descriptor."""


def _call(number: int, *args: object) -> int:
    result = int(_libc.syscall(number, *args))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def set_up() -> int:
    """A ring; its descriptor."""
    params = ctypes.create_string_buffer(120)
    ring = _call(_SETUP, 4, params)
    _rings[ring] = params.raw
    return ring


def register_personality(ring: int) -> int:
    """Lend the caller's credentials to whoever uses the ring; the number they have there."""
    return _call(_REGISTER, ring, _REGISTER_PERSONALITY, None, 0)


def open_as(ring: int, personality: int, path: str) -> int:
    """open(2) with these credentials."""
    _, sq_tail, _, _, _, _, sq_array, _ = struct.unpack_from("=8I", _rings[ring], 40)
    cq_head, cq_tail, cq_mask, _, _, cqes, _, _ = struct.unpack_from("=8I", _rings[ring], 80)
    name = ctypes.create_string_buffer(path.encode())
    flags = os.O_RDWR | os.O_CLOEXEC
    with (
        mmap.mmap(ring, 4096, offset=0) as sq,
        mmap.mmap(ring, 4096, offset=_OFF_CQ_RING) as cq,
        mmap.mmap(ring, 4096, offset=_OFF_SQES) as sqes,
    ):
        entry = (_OP_OPENAT, 0, 0, _AT_FDCWD, 0, ctypes.addressof(name), 0, flags, 7, 0)
        _SQE.pack_into(sqes, 0, *entry, personality, 0)
        struct.pack_into("=I", sq, sq_array, 0)
        (tail,) = struct.unpack_from("=I", sq, sq_tail)
        # The ring has more than one place for an index; the entry itself is always the first.
        (mask,) = struct.unpack_from("=I", sq, struct.unpack_from("=3I", _rings[ring], 40)[2])
        struct.pack_into("=I", sq, sq_array + 4 * (tail & mask), 0)
        struct.pack_into("=I", sq, sq_tail, tail + 1)
        assert _call(_ENTER, ring, 1, 1, _GET_EVENTS, None, 0) == 1
        (head,) = struct.unpack_from("=I", cq, cq_head)
        assert struct.unpack_from("=I", cq, cq_tail)[0] != head
        (cq_mask,) = struct.unpack_from("=I", cq, cq_mask)
        _, result, _ = struct.unpack_from("=QiI", cq, cqes + 16 * (head & cq_mask))
        struct.pack_into("=I", cq, cq_head, head + 1)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(result)
