# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is mounted where, and the few things that are done to any mount.

The table is /proc/self/mountinfo (proc_pid_mountinfo(5)). Whoever may mount anything anywhere has a
say in it, so it is taken as bytes: a path is in no encoding, and only b"\\n" ends a line.

A mount is known by its id, never by its path alone: whatever was mounted, moved or unmounted in
between, nothing else is taken away. The kernel gives the id of a mount that is gone to the next
one, even at the same path. Hence `MountId`, which has a number that is never given again.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from kdbusfs.native import ffi, lib

FILESYSTEM_TYPE = "fuse.kdbusfs"
SOURCE = "kdbusfs"
"""What is given as the source of a mount (mount(8)) unless something else is asked for."""


def checked(result: int, what: str) -> int:
    """Return the result of a C call; OSError, naming what it was for, if it is -errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
    return result


class MountId(NamedTuple):
    """Which mount it is, and for good from Linux 6.8 on."""

    id: int
    """As in the table; the next mount gets it when this one is gone."""
    unique: int
    """No other mount ever gets it; 0 before Linux 6.8."""

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """The mount that a file was opened on; its filesystem is not asked and may be dead."""
        ids = ffi.new("uint64_t[2]")
        checked(lib.kdbusfs_mount_id(descriptor, ids, ids + 1), "statx")
        return cls(int(ids[0]), int(ids[1]))


class Mount(NamedTuple):
    """A line of the table, as far as it is of interest here."""

    id: int
    parent_id: int
    device: int
    """st_dev of its files."""
    path: str
    fstype: str
    source: str
    options: str
    """Those of the filesystem, separated by commas."""

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read one line; ValueError if it isn't one."""
        left, _, right = line.partition(b" - ")
        id_, parent_id, device, _, path, *_ = left.split(b" ")
        fstype, source, options = right.split(b" ", 2)
        major, minor = device.split(b":")
        return cls(
            id=int(id_),
            parent_id=int(parent_id),
            device=os.makedev(int(major), int(minor)),
            path=_text(path),
            fstype=_text(fstype),
            source=_text(source),
            options=_text(options),
        )

    @property
    def is_kdbusfs(self) -> bool:
        """Whether it is one of any daemon, living or dead."""
        return self.fstype == FILESYSTEM_TYPE


def _text(field: bytes) -> str:
    """A field without its escapes: blanks and the like are written as octal numbers."""
    if b"\\" in field:
        field = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8) & 255]), field)
    return os.fsdecode(field)


def mounts(needle: bytes = b"") -> Iterator[Mount]:
    """All mounts of this mount namespace, or those with *needle* in their line.

    A line that makes no sense is passed over: some filesystem didn't escape what it says of itself.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        lines = file.read().split(b"\n")
    for line in lines:
        if needle in line:
            with suppress(ValueError):
                yield Mount.parse(line)


def fstype_of(device: int) -> str | None:
    """The type of the filesystem with the st_dev *device*, None if it is mounted nowhere."""
    listed = mounts(b" %d:%d " % (os.major(device), os.minor(device)))
    return next((mount.fstype for mount in listed if mount.device == device), None)


def mount_with(mount_id: int) -> Mount | None:
    """The mount that has this id in the table now."""
    return next((mount for mount in mounts() if mount.id == mount_id), None)


@contextmanager
def opened(path: str | Path, flags: int = 0) -> Iterator[int]:
    """A descriptor for *path* that asks nothing of its filesystem (O_PATH)."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def mount_at(path: Path) -> tuple[MountId, Mount] | None:
    """The mount that is seen at *path*; None if *path* is not a mount point.

    It is asked for by a descriptor, as the table also lists mounts that others cover.
    """
    try:
        with opened(path) as descriptor:
            mount_id = MountId.of(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    mount = mount_with(mount_id.id)
    return (mount_id, mount) if mount and mount.path == str(path) else None


def below(mount_id: MountId) -> Mount | None:
    """What this mount was stacked on: another one at the very same path."""
    mount = mount_with(mount_id.id)
    parent = mount_with(mount.parent_id) if mount else None
    return parent if mount and parent and parent.path == mount.path else None


def detach(mount_id: MountId) -> bool:
    """Unmount this very mount wherever it is by now, even if it is busy, with all below it.

    Nothing happens if it is gone. One that another mount covers can't be unmounted: False.
    """
    mount = mount_with(mount_id.id)
    if mount is None:
        return True
    try:
        with opened(mount.path, os.O_NOFOLLOW) as descriptor:
            seen = MountId.of(descriptor)
            if seen == mount_id:
                _unmount(descriptor)
                return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    # The same number but not the same mount: it was given to another one.
    return seen.id == mount_id.id


def _unmount(descriptor: int) -> None:
    # By the descriptor, so that nobody can lead the path elsewhere meanwhile.
    result = lib.kdbusfs_mount_detach(f"/proc/self/fd/{descriptor}".encode())
    # EINVAL: somebody else was quicker.
    if result != -errno.EINVAL:
        checked(result, "umount2")


def new_filesystem(
    fstype: str, options: Iterable[tuple[str, str | None]] = (), *, noexec: bool = False
) -> int:
    """A filesystem (nosuid, nodev) that is mounted nowhere, as a descriptor of its root.

    Gone with the descriptor unless it is attached. Options without a value have None.
    """
    words = [ffi.new("char[]", fstype.encode())]
    for key, value in options:
        words.append(ffi.new("char[]", key.encode()))
        words.append(ffi.NULL if value is None else ffi.new("char[]", os.fsencode(value)))
    array = ffi.new("char *[]", [*words[1:], ffi.NULL])
    return checked(lib.kdbusfs_mount_new(words[0], array, noexec), fstype)


def clone_tree(path: Path) -> int:
    """A descriptor of a copy of the mounts at and below *path* that is mounted nowhere."""
    return checked(lib.kdbusfs_mount_clone(os.fsencode(path)), str(path))


def attach(tree: int, directory: int, name: str) -> None:
    """Mount *tree* on *directory*, both descriptors; *name* tells in errors what that is."""
    checked(lib.kdbusfs_mount_attach(tree, directory), name)
