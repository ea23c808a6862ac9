# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FUSE file system whose server lets files be opened, and then never answers again."""

from __future__ import annotations

import os
import stat
import struct

from kdbusfs.fuse import wire
from kdbusfs.fuse.wire import IN_HEADER, OUT_HEADER, OUT_HEADER_SIZE, Opcode
from privilege.people import mount

DIRECTORY = "/mnt"
FILE = "/mnt/file"

_ENTRY = struct.Struct("=QQQQII")
"""struct fuse_entry_out without attr: nodeid, generation, how long they are valid."""
_ATTR_VALID = struct.Struct("=QII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
"""struct fuse_attr: ino, size, blocks, times, their nanoseconds, mode, nlink, uid, gid, ..."""
_FILE_NODE = 2


def mount_it(user: int, allow_other: bool) -> int:
    """Mount it in the caller's mount namespace, as *user*'s; its device."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={user},group_id={user}"
    mount("hostile", DIRECTORY, "fuse", data=options + ",allow_other" * allow_other)
    return device


def serve(device: int) -> None:
    """Answer until a file is opened; then read requests, and let them wait."""
    while True:
        request = os.read(device, 1 << 18)
        _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(request)
        body = b""
        if opcode == Opcode.INIT:
            body = wire.INIT_OUT.pack(7, 31, 0, 0, 16, 16, 65536, 1, 1, 0, 0, 0, 0)
        elif opcode == Opcode.LOOKUP:
            body = _ENTRY.pack(_FILE_NODE, 0, 0, 0, 0, 0) + _attributes(_FILE_NODE)
        elif opcode == Opcode.GETATTR:
            body = _ATTR_VALID.pack(0, 0, 0) + _attributes(nodeid)
        elif opcode == Opcode.OPEN:
            body = wire.OPEN_OUT.pack(1, 0, 0)
        elif opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            continue
        os.write(device, OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), 0, unique) + body)
        if opcode == Opcode.OPEN:
            break
    while os.read(device, 1 << 18):
        pass


def _attributes(nodeid: int) -> bytes:
    kind = stat.S_IFREG if nodeid == _FILE_NODE else stat.S_IFDIR
    return _ATTR.pack(nodeid, 4096, 8, 0, 0, 0, 0, 0, 0, kind | 0o777, 1, 0, 0, 0, 4096, 0)
