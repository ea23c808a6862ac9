# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a path to a mounted FUSE filesystem and back.

kdbusfs mounts by itself rather than through libfuse, because it wants every request
on a /dev/fuse descriptor of its own. What is mounted here is known by its mount id
(proc_pid_mountinfo(5)), never by its path alone, so that the end takes away exactly
what the start brought, whatever was mounted, moved or unmounted in between.

kdbus lived at /sys/fs/kdbus, where the kernel made the directory; sysfs lets nobody
else make one. `SysfsOverlay` puts a tmpfs in the place of /sys/fs that carries every
child of the old one and a `kdbus` directory beside them. The tree is put together in
a mount namespace of its own and attached in a single step: no process ever sees
/sys/fs half full, and a failure on the way leaves nothing to undo. Its mounts are
slaves of the originals (mount_namespaces(7)): what is mounted below those appears in
it, while taking it down again reaches none of them.
"""

import ctypes
import errno
import logging
import os
import re
import select
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntFlag
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from kdbusfs.errors import UserError

FUSE_DEVICE = "/dev/fuse"
FILESYSTEM_TYPE = "fuse.kdbusfs"
SOURCE = "kdbusfs"
SYSFS_DIRECTORY = Path("/sys/fs")

# What a FUSE filesystem answers whose daemon is gone, or just going.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)

log = logging.getLogger(__name__)

# --- system calls ---------------------------------------------------------------
# The numbers of the newer ones are the same on every architecture that has them
# (all but alpha); libcs before glibc 2.36 have no function for them.

SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432

CLONE_NEWNS = 0x00020000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6


class MountFlag(IntFlag):
    """MS_* of mount(2)."""

    NOSUID = 1 << 1
    NODEV = 1 << 2
    NOEXEC = 1 << 3
    REC = 1 << 14
    SLAVE = 1 << 19


class UnmountFlag(IntFlag):
    """MNT_* and UMOUNT_* of umount2(2)."""

    NONE = 0
    DETACH = 1 << 1
    NOFOLLOW = 1 << 3


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    """Return the result of a C call; OSError, naming what it was for, if it is -1."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
    return result


def _mount(source: str, target: str, fstype: str | None, flags: MountFlag, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        ctypes.c_ulong(flags),
        data.encode(),
    )
    _checked(result, target)


def _umount(target: str, flags: UnmountFlag) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def _clone_tree(path: Path) -> int:
    """A descriptor of a detached copy of the mounts at and below *path*: open_tree(2)."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    result = _libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), ctypes.c_uint(flags))
    return _checked(result, str(path))


def _attach_tree(tree: int, path: Path) -> None:
    """Mount the detached mounts behind *tree* at *path*: move_mount(2)."""
    result = _libc.syscall(
        SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(path), MOVE_MOUNT_F_EMPTY_PATH
    )
    _checked(result, str(path))


@contextmanager
def _detached_filesystem(fstype: str) -> Iterator[int]:
    """A filesystem without options that is mounted nowhere, as a directory descriptor."""
    context = _checked(_libc.syscall(SYS_FSOPEN, fstype.encode(), FSOPEN_CLOEXEC), fstype)
    try:
        result = _libc.syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        _checked(result, fstype)
        root = _checked(_libc.syscall(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, 0), fstype)
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


# --- what is mounted where --------------------------------------------------------


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo, as far as it is of interest here."""

    id: int
    parent_id: int
    device: int
    path: str
    fstype: str
    source: str

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read one line; blanks and the like are written in it as octal numbers."""
        left, _, right = line.partition(" - ")
        id_, parent_id, device, _, path, *_ = left.split(" ")
        fstype, source, *_ = right.split(" ")
        major, _, minor = device.partition(":")
        path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
        path = os.fsdecode(path.encode("latin-1"))
        return cls(
            int(id_), int(parent_id), os.makedev(int(major), int(minor)), path, fstype, source
        )


def mounts() -> list[Mount]:
    """All mounts of this mount namespace, in the order in which they were made."""
    # latin-1 keeps each byte of a path apart, whatever encoding the path is in.
    with open("/proc/self/mountinfo", encoding="latin-1", newline="\n") as lines:
        return [Mount.parse(line.rstrip("\n")) for line in lines]


def mount_at(path: Path) -> Mount | None:
    """The mount that is seen at *path*; None if *path* is not a mount point.

    It is asked for by a descriptor, as mountinfo also lists mounts at the same path
    that others hide. O_PATH needs no answer from a filesystem that is dead.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
    finally:
        os.close(descriptor)
    mount = _mount_with(int(fields["mnt_id"]))
    return mount if mount and mount.path == str(path) else None


def _mount_with(mount_id: int) -> Mount | None:
    return next((mount for mount in mounts() if mount.id == mount_id), None)


def _detach(mount_id: int) -> None:
    """Unmount the mount *mount_id* wherever it is by now, even if it is busy.

    Nothing happens if it is gone. One that another mount covers can't be reached by
    its path and is left where it is.
    """
    mount = _mount_with(mount_id)
    if mount is None:
        return
    seen = mount_at(Path(mount.path))
    if seen is None or seen.id != mount_id:
        log.warning("%s is covered by another mount and stays mounted", mount.path)
        return
    # EINVAL: somebody else was quicker.
    with _ignored(errno.EINVAL, errno.ENOENT):
        _umount(mount.path, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW)


@contextmanager
def _ignored(*errnos: int) -> Iterator[None]:
    """Let an OSError with one of *errnos* pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise


# --- /sys/fs --------------------------------------------------------------------------


class SysfsOverlay:
    """A tmpfs over /sys/fs with all that was there and one directory more; undone on exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._mount_id: int | None = None

    @staticmethod
    def wanted_for(mount_point: Path) -> bool:
        """Whether *mount_point* needs the overlay: it is missing in /sys/fs.

        So does one in an overlay that a killed kdbusfs left, which is then taken over;
        but not one in the overlay of another kdbusfs, where mkdir(1) works.
        """
        if mount_point.parent != SYSFS_DIRECTORY:
            return False
        if not SysfsOverlay._is_in_place():
            return not os.path.lexists(mount_point)
        others = (mount for mount in mounts() if mount.path != str(mount_point))
        return not any(
            _is_kdbusfs(mount) and Path(mount.path).parent == SYSFS_DIRECTORY for mount in others
        )

    @staticmethod
    def _is_in_place() -> bool:
        mount = mount_at(SYSFS_DIRECTORY)
        return mount is not None and (mount.fstype, mount.source) == ("tmpfs", SOURCE)

    def __enter__(self) -> Self:
        try:
            if self._is_in_place():
                log.info("%s: taking over what a killed kdbusfs left", SYSFS_DIRECTORY)
                with suppress(FileExistsError):
                    os.mkdir(SYSFS_DIRECTORY / self._name)
            else:
                self._attach()
        except OSError as error:
            raise UserError(
                f"can't make {SYSFS_DIRECTORY / self._name}: {error.strerror} ({error.filename})",
                os.EX_OSERR,
            ) from error
        mount = mount_at(SYSFS_DIRECTORY)
        assert mount is not None
        self._mount_id = mount.id
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._mount_id is not None
        _detach(self._mount_id)

    def _attach(self) -> None:
        tree = _in_thread(self._build)
        try:
            _attach_tree(tree, SYSFS_DIRECTORY)
        finally:
            os.close(tree)

    def _build(self) -> int:
        """Put the tree together in a mount namespace of this thread's own.

        The namespace ends with the thread. Returns a descriptor of a detached copy of
        the tree, which goes on to exist.
        """
        _checked(_libc.unshare(CLONE_NEWNS), "unshare")
        # From here on nothing that is mounted or unmounted reaches another namespace.
        _mount("none", "/", None, MountFlag.REC | MountFlag.SLAVE)
        children = [Path(entry) for entry in os.scandir(SYSFS_DIRECTORY)]
        links = {child: os.readlink(child) for child in children if child.is_symlink()}
        clones: dict[Path, int] = {}
        try:
            for child in children:
                if child not in links:
                    clones[child] = _clone_tree(child)
            flags = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
            _mount(SOURCE, str(SYSFS_DIRECTORY), "tmpfs", flags, "mode=755,size=1m")
            for child, target in links.items():
                child.symlink_to(target)
            for child, clone in clones.items():
                if stat.S_ISDIR(os.fstat(clone).st_mode):
                    child.mkdir()
                else:
                    child.touch()
                _attach_tree(clone, child)
        finally:
            for clone in clones.values():
                os.close(clone)
        (SYSFS_DIRECTORY / self._name).mkdir()
        return _clone_tree(SYSFS_DIRECTORY)


def _in_thread(function: Callable[[], int]) -> int:
    """Run *function* in a thread that exists only for it, since it may unshare(2)."""
    results: list[int] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="kdbusfs-namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


# --- the mount itself ---------------------------------------------------------------


def check_mount_point(path: str) -> Path:
    """The absolute path of the directory to mount on; UserError if it can't be one.

    A directory missing in /sys/fs passes, since `SysfsOverlay` makes it.
    """
    mount_point = Path(os.path.abspath(path))
    mount_point = mount_point.parent.resolve() / mount_point.name
    try:
        mode = mount_point.stat().st_mode
    except OSError as error:
        dead = error.errno in DEAD and _is_kdbusfs(mount_at(mount_point))
        if dead or SysfsOverlay.wanted_for(mount_point):
            return mount_point
        raise UserError(f"mount point {path}: {error.strerror}", os.EX_NOINPUT) from error
    if not stat.S_ISDIR(mode):
        raise UserError(f"mount point {path}: {os.strerror(errno.ENOTDIR)}", os.EX_NOINPUT)
    mount_point = mount_point.resolve()
    if _is_kdbusfs(mount_at(mount_point)):
        raise UserError(f"{path}: a kdbusfs is mounted there already", os.EX_CANTCREAT)
    return mount_point


def _is_kdbusfs(mount: Mount | None) -> bool:
    return mount is not None and mount.fstype == FILESYSTEM_TYPE


@contextmanager
def _held(directory: Path) -> Iterator[str]:
    """A path to *directory* that nobody can turn elsewhere; OSError ELOOP if it is not what it
    was when its symlinks were resolved: somebody may own a directory on the way."""
    descriptor = os.open(directory, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{descriptor}"
        if os.readlink(path) != str(directory):
            raise OSError(errno.ELOOP, "it has become a symbolic link")
        yield path
    finally:
        os.close(descriptor)


def _open_device() -> int:
    """Open /dev/fuse; UserError if this machine has none or the caller may not."""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise UserError(f"{FUSE_DEVICE}: {error.strerror}", os.EX_NOPERM) from error
    except OSError as error:
        raise UserError(
            f"{FUSE_DEVICE}: {error.strerror} (is the kernel module fuse loaded?)",
            os.EX_UNAVAILABLE,
        ) from error


class FuseMount:
    """A kdbusfs mounted at *mount_point*, and the /dev/fuse its requests arrive on.

    Use it as a context manager: mounted on entry; on exit unmounted, if it still is.
    It owns `device`: whoever reads requests has a duplicate of it.
    """

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point
        self.device = -1
        self._mount: Mount | None = None

    def __enter__(self) -> Self:
        self.device = _open_device()
        try:
            self._remove_dead()
            self._attach()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._mount is not None
        try:
            _detach(self._mount.id)
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self.device)
        self.device = -1

    def _attach(self) -> None:
        options = (
            f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        )
        try:
            flags = MountFlag.NOSUID | MountFlag.NODEV
            with _held(self.mount_point) as target:
                _mount(SOURCE, target, FILESYSTEM_TYPE, flags, options)
        except OSError as error:
            code = os.EX_NOPERM if error.errno in (errno.EPERM, errno.EACCES) else os.EX_OSERR
            raise UserError(f"can't mount on {self.mount_point}: {error.strerror}", code) from error
        self._mount = mount_at(self.mount_point)
        assert self._mount is not None
        assert self._mount.fstype == FILESYSTEM_TYPE

    @property
    def device_number(self) -> int:
        """st_dev of its files."""
        assert self._mount is not None
        return self._mount.device

    def unmount(self) -> None:
        """Unmount, and end the connection to the kernel even where that isn't enough.

        Open files keep a detached filesystem alive, and so do copies of the mount in
        other mount namespaces: their next call answers ENOTCONN from here on, and the
        next read of the device ENODEV.
        """
        assert self._mount is not None
        _detach(self._mount.id)
        self._abort(self._mount.device)

    def _abort(self, connection: int) -> None:
        """Abort the connection through fusectl, unless it has ended by itself.

        Its number may then be another filesystem's by now, so the device is asked first.
        """
        poll = select.poll()
        poll.register(self.device, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            return
        with _detached_filesystem("fusectl") as connections, suppress(FileNotFoundError):
            path = f"{os.minor(connection)}/abort"
            abort = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections)
            try:
                os.write(abort, b"1")
            finally:
                os.close(abort)

    def _remove_dead(self) -> None:
        """Detach the mount of a kdbusfs that was killed at the same place."""
        try:
            self.mount_point.stat()
        except OSError as error:
            dead = mount_at(self.mount_point)
            if error.errno not in DEAD or dead is None or not _is_kdbusfs(dead):
                raise
            log.info("%s: unmounting what a killed kdbusfs left", self.mount_point)
            _detach(dead.id)
