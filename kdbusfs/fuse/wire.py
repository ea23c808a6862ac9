# SPDX-License-Identifier: LGPL-2.1-or-later
"""The FUSE wire protocol (linux/fuse.h), as far as kdbusfs speaks it itself."""

from enum import IntEnum
from fcntl import ioctl
from struct import Struct
from typing import Final

from ..abi.items import Buffer
from ..abi.structs import I32

IN_HEADER = Struct("=IIQQIIIHH")
"""struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
OUT_HEADER = Struct("=IiQ")
"""struct fuse_out_header: len, error (negative errno, or a notification's code), unique."""
IN_HEADER_SIZE: Final = 40
IN_HEADER_OPCODE: Final = 4
IN_HEADER_UID: Final = 24
OUT_HEADER_SIZE: Final = 16

INIT_IN = Struct("=IIIII")
"""struct fuse_init_in: major, minor, max_readahead, flags, flags2."""
INIT_IN_MINOR: Final = 4
INIT_OUT = Struct("=IIIIHHIIHHIIH22x")
"""struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth, request_timeout."""
_ATTR = "QQQQQQIIIIIIIIII"
"""struct fuse_attr: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid,
gid, rdev, blksize, flags."""
ENTRY_OUT = Struct("=QQQQII" + _ATTR)
"""struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid, the nanoseconds of both,
attr."""
ATTR_OUT = Struct("=QI4x" + _ATTR)
"""struct fuse_attr_out: attr_valid, its nanoseconds, dummy, attr."""
OPEN_IN = Struct("=II")
"""struct fuse_open_in: flags, open_flags."""
OPEN_OUT = Struct("=QIi")
"""struct fuse_open_out: fh, open_flags, backing_id."""
RELEASE_IN = Struct("=QIIQ")
"""struct fuse_release_in: fh, flags, release_flags, lock_owner."""
IOCTL_IN = Struct("=QIIQII")
"""struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size."""
IOCTL_REQUEST = Struct("=8xQ8xIII4xQIIQI4x")
"""What of fuse_in_header and struct fuse_ioctl_in is used: unique, uid, gid, pid; fh, flags, cmd,
arg, in_size."""
IOCTL_OUT = Struct("=IiQiIII")
"""fuse_out_header and struct fuse_ioctl_out in one: ..., result, flags, in_iovs, out_iovs."""
POLL_IN = Struct("=QQII")
"""struct fuse_poll_in: fh, kh, flags, events."""
POLL_OUT = Struct("=II")
"""struct fuse_poll_out: revents, padding."""
READ_IN = Struct("=QQIIQII")
"""struct fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding."""
INTERRUPT_IN = Struct("=Q")
"""struct fuse_interrupt_in: unique."""
FORGET_IN = Struct("=Q")
"""struct fuse_forget_in: nlookup."""
BATCH_FORGET_IN = Struct("=II")
"""struct fuse_batch_forget_in: count, dummy."""
FORGET_ONE = Struct("=QQ")
"""struct fuse_forget_one: nodeid, nlookup."""
NOTIFY_POLL = Struct("=IiQQ")
"""fuse_out_header and struct fuse_notify_poll_wakeup_out in one: ..., kh."""
NOTIFY_STORE = Struct("=IiQQQII")
"""fuse_out_header and struct fuse_notify_store_out in one: ..., nodeid, offset, size, padding."""
NOTIFY_INVAL_ENTRY = Struct("=IiQQII")
"""fuse_out_header and struct fuse_notify_inval_entry_out in one: ..., parent, namelen, flags."""

NOTIFY_INVAL_INODE = Struct("=IiQQqq")
"""fuse_out_header and struct fuse_notify_inval_inode_out in one: ..., ino, off, len."""

IOCTL_AT = IN_HEADER_SIZE + IOCTL_IN.size
"""Where the struct that comes with an ioctl begins in its request."""

NOTIFY_CODE_POLL = 1
NOTIFY_CODE_INVAL_INODE = 2
NOTIFY_CODE_INVAL_ENTRY = 3
NOTIFY_CODE_STORE = 4

POLL_SCHEDULE_NOTIFY = 1
READ_LOCKOWNER = 2
IOCTL_DIR = 1 << 4

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
FOPEN_PASSTHROUGH = 1 << 7

FLAG_MAX_PAGES = 1 << 22
FLAG_DO_READDIRPLUS = 1 << 13
FLAG_INIT_EXT = 1 << 30
FLAG2_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)
FLAG2_PASSTHROUGH = 1 << (37 - 32)

_BACKING_MAP = Struct("=iIQ")
_DEV_IOC_BACKING_OPEN = 0x4010E501
_DEV_IOC_BACKING_CLOSE = 0x4004E502


Ids = tuple[int, int, int]
"""uid, gid and thread id of a caller."""


class Opcode(IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


def interrupted(request: Buffer) -> int:
    """The unique of the request that an INTERRUPT is for."""
    unique: int = INTERRUPT_IN.unpack_from(request, IN_HEADER_SIZE)[0]
    return unique


def backing_open(device: int, fd: int) -> int:
    """Register *fd* as a backing file of the connection (Linux 6.9); returns its id."""
    backing_id: int = ioctl(device, _DEV_IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0)))
    return backing_id


def backing_close(device: int, backing_id: int) -> None:
    ioctl(device, _DEV_IOC_BACKING_CLOSE, bytearray(I32.pack(backing_id)))
