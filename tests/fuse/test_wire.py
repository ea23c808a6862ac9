# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon says of FUSE's structs and numbers is what <linux/fuse.h> says."""

import re
import shutil
import subprocess
from pathlib import Path
from struct import Struct, calcsize

import pytest

from kdbusfs.fuse import relay, wire

ATTR = (
    "attr.ino attr.size attr.blocks attr.atime attr.mtime attr.ctime attr.atimensec attr.mtimensec"
    " attr.ctimensec attr.mode attr.nlink attr.uid attr.gid attr.rdev attr.blksize -"
)
INIT_OUT = (
    "major minor max_readahead flags max_background congestion_threshold max_write time_gran"
    " max_pages map_alignment flags2 - -"
)

# The fields of each; `-` for those whose names headers of some years ago do not have.
STRUCTS: dict[str, tuple[Struct, str]] = {
    "fuse_in_header": (wire.IN_HEADER, "len opcode unique nodeid uid gid pid - -"),
    "fuse_out_header": (wire.OUT_HEADER, "len error unique"),
    "fuse_init_out": (wire.INIT_OUT, INIT_OUT),
    "fuse_entry_out": (
        wire.ENTRY_OUT,
        "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec " + ATTR,
    ),
    "fuse_attr_out": (wire.ATTR_OUT, "attr_valid attr_valid_nsec " + ATTR),
    "fuse_open_in": (wire.OPEN_IN, "flags open_flags"),
    "fuse_open_out": (wire.OPEN_OUT, "fh open_flags -"),
    "fuse_release_in": (wire.RELEASE_IN, "fh flags release_flags lock_owner"),
    "fuse_ioctl_in": (wire.IOCTL_IN, "fh flags cmd arg in_size out_size"),
    "fuse_poll_in": (wire.POLL_IN, "fh kh flags events"),
    "fuse_poll_out": (wire.POLL_OUT, "revents padding"),
    "fuse_read_in": (wire.READ_IN, "fh offset size read_flags lock_owner flags padding"),
    "fuse_interrupt_in": (wire.INTERRUPT_IN, "unique"),
    "fuse_forget_in": (wire.FORGET_IN, "nlookup"),
    "fuse_batch_forget_in": (wire.BATCH_FORGET_IN, "count dummy"),
    "fuse_forget_one": (wire.FORGET_ONE, "nodeid nlookup"),
    "fuse_dirent": (relay._DIRENT, "ino off namelen type"),
}

# With the fuse_out_header before them.
REPLIES: dict[str, tuple[Struct, str]] = {
    "fuse_ioctl_out": (wire.IOCTL_OUT, "result flags in_iovs out_iovs"),
    "fuse_notify_poll_wakeup_out": (wire.NOTIFY_POLL, "kh"),
    "fuse_notify_store_out": (wire.NOTIFY_STORE, "nodeid offset size padding"),
    "fuse_notify_inval_entry_out": (wire.NOTIFY_INVAL_ENTRY, "parent namelen -"),
    "fuse_notify_inval_inode_out": (wire.NOTIFY_INVAL_INODE, "ino off len"),
}

_LATE_OPCODES = {"STATX"}
"""Not in the headers of Linux 6.1."""

NUMBERS = {
    "sizeof(struct fuse_in_header)": wire.IN_HEADER_SIZE,
    "offsetof(struct fuse_in_header, opcode)": wire.IN_HEADER_OPCODE,
    "offsetof(struct fuse_in_header, uid)": wire.IN_HEADER_UID,
    "sizeof(struct fuse_out_header)": wire.OUT_HEADER_SIZE,
    "offsetof(struct fuse_init_in, minor)": wire.INIT_IN_MINOR,
    "offsetof(struct fuse_entry_out, attr)": relay._ENTRY_ATTR,
    "offsetof(struct fuse_attr_out, attr)": relay._ATTR_ATTR,
    "offsetof(struct fuse_direntplus, dirent)": relay._ENTRY_OUT_SIZE,
    "FUSE_NOTIFY_POLL": wire.NOTIFY_CODE_POLL,
    "FUSE_NOTIFY_INVAL_INODE": wire.NOTIFY_CODE_INVAL_INODE,
    "FUSE_NOTIFY_INVAL_ENTRY": wire.NOTIFY_CODE_INVAL_ENTRY,
    "FUSE_NOTIFY_STORE": wire.NOTIFY_CODE_STORE,
    "FUSE_POLL_SCHEDULE_NOTIFY": wire.POLL_SCHEDULE_NOTIFY,
    "FUSE_READ_LOCKOWNER": wire.READ_LOCKOWNER,
    "FUSE_IOCTL_DIR": wire.IOCTL_DIR,
    "FOPEN_DIRECT_IO": wire.FOPEN_DIRECT_IO,
    "FOPEN_KEEP_CACHE": wire.FOPEN_KEEP_CACHE,
    "FOPEN_NOFLUSH": wire.FOPEN_NOFLUSH,
    "FUSE_MAX_PAGES": wire.FLAG_MAX_PAGES,
    "FUSE_DO_READDIRPLUS": wire.FLAG_DO_READDIRPLUS,
    "FUSE_INIT_EXT": wire.FLAG_INIT_EXT,
} | {
    f"FUSE_{opcode.name}": int(opcode) for opcode in wire.Opcode if opcode.name not in _LATE_OPCODES
}


def offsets(layout: Struct) -> list[int]:
    """Where each field of *layout* begins."""
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        if kind == "x":
            at += int(count or 1)
            continue
        for _ in range(int(count or 1)):
            found.append(at)
            at += calcsize("=" + kind)
    return found


def expected() -> dict[str, int]:
    """What C has to say of each expression."""
    found = dict(NUMBERS)
    for before, structs in ((0, STRUCTS), (wire.OUT_HEADER_SIZE, REPLIES)):
        for name, (layout, fields) in structs.items():
            found[f"sizeof(struct {name})"] = layout.size - before
            own = [at - before for at in offsets(layout) if at >= before]
            for field, at in zip(fields.split(), own, strict=True):
                if field != "-":
                    found[f"offsetof(struct {name}, {field})"] = at
    return found


def test_structs_and_numbers_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    wanted = expected()
    lines = [f'\tprintf("%lld\\n", (long long)({expression}));' for expression in wanted]
    source = tmp_path / "program.c"
    source.write_text(
        "#include <linux/fuse.h>\n#include <stddef.h>\n#include <stdio.h>\n\nint main(void)\n{\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    program = tmp_path / "program"
    compiled = subprocess.run(["gcc", source, "-o", program], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert dict(zip(wanted, map(int, output.split()), strict=True)) == wanted
