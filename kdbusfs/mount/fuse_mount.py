# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount itself: where it may be, how it comes there, and how exactly it goes away.

kdbusfs mounts by itself rather than through libfuse, because it wants every request
on a /dev/fuse descriptor of its own. The mount is made apart from all others (fsopen(2),
fsmount(2)) and put in its place (move_mount(2)) when it answers: so whatever fails before
leaves nothing to undo, nobody ever waits for a mount that isn't served yet, and its id is
known before anybody else can touch it.

Of several kdbusfs that start at one place at once, one serves. They take turns by a lock
(flock(2)) on the directory, which is held until the mount is seen there. Since everybody who can
open the directory can lock it, the lock is waited for a few seconds only. If two should meet
nevertheless, the one that finds itself on top of the other withdraws.
"""

import errno
import logging
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kdbusfs.mount import mountinfo
from kdbusfs.mount.overlay import SYSFS_DIRECTORY, SysfsOverlay, try_lock
from kdbusfs.native import ffi, lib
from kdbusfs.user_error import UserError

FUSE_DEVICE = "/dev/fuse"
LOCK_SECONDS = 5.0
"""How long others that start or end at the same place are waited for."""

# What a FUSE filesystem answers whose daemon is gone, or just going.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)

# Directories that are full of what others need. An unset variable in a script is enough
# to name one of them: "/run/$NAME".
SYSTEM_DIRECTORIES = """
    /bin /boot /dev /etc /home /lib /lib32 /lib64 /proc /root /run /sbin /sys /sys/fs /tmp /usr /var
""".split()

log = logging.getLogger(__name__)


# --- where it may be ----------------------------------------------------------------


def check_mount_point(path: str) -> Path:
    """The absolute path of the directory to mount on; UserError if it can't be one.

    A directory missing in /sys/fs passes, since `SysfsOverlay` makes it.
    """
    if not path:
        raise UserError("the mount point is an empty string", os.EX_USAGE)
    try:
        mount_point = Path(os.path.realpath(path))
    except OSError as error:
        # A relative path, and the working directory is gone.
        raise _no_mount_point(path, error) from error
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        dead = error.errno in DEAD and _is_kdbusfs_at(mount_point)
        if dead or SysfsOverlay.wanted_for(mount_point):
            return mount_point
        raise _no_mount_point(path, error) from error
    if not stat.S_ISDIR(mode):
        raise _no_mount_point(path, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if _is_needed(mount_point):
        raise UserError(
            f"mount point {path}: {mount_point} is in use by the whole system", os.EX_USAGE
        )
    if _is_kdbusfs_at(mount_point):
        raise _mounted_already(path)
    return mount_point


def check_remount(path: str) -> None:
    """UserError unless a living kdbusfs is mounted at *path*."""
    try:
        os.stat(path)
    except OSError as error:
        raise _no_mount_point(path, error) from error
    if not _is_kdbusfs_at(Path(os.path.realpath(path))):
        raise UserError(f"{path}: no kdbusfs is mounted there", os.EX_NOINPUT)


def _no_mount_point(path: str, error: OSError) -> UserError:
    return UserError(f"mount point {path}: {error.strerror}", os.EX_NOINPUT)


def _mounted_already(path: str | Path) -> UserError:
    return UserError(f"{path}: a kdbusfs is mounted there already", os.EX_CANTCREAT)


def _is_kdbusfs_at(path: Path) -> bool:
    seen = mountinfo.mount_at(path)
    return seen is not None and seen[1].is_kdbusfs


def _is_needed(mount_point: Path) -> bool:
    """Whether the system, or this very process, could not go on if that were covered."""
    if mount_point.is_relative_to("/proc"):
        return True
    needed = [FUSE_DEVICE, sys.prefix, sys.base_prefix, __file__]
    return mount_point in {Path(os.path.realpath(path)) for path in SYSTEM_DIRECTORIES} or any(
        Path(os.path.realpath(path)).is_relative_to(mount_point) for path in needed
    )


# --- one at a time -------------------------------------------------------------------


class _Place:
    """The directory to mount on, held until the mount is seen there; with the overlay, if needed.

    `directory` is a descriptor of it, which nobody can turn elsewhere. UserError if a kdbusfs is
    there already; OSError ELOOP if it is not what it was when its symlinks were resolved: somebody
    may own a directory on the way.
    """

    def __init__(self, mount_point: Path) -> None:
        self.directory = -1
        self._mount_point = mount_point
        self._overlay = ExitStack()

    def __enter__(self) -> Self:
        deadline = time.monotonic() + LOCK_SECONDS
        with ExitStack() as stack:
            stack.push(self)
            while not self._take(is_late=time.monotonic() > deadline):
                time.sleep(0.01)
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._overlay:
            self.let_go()

    def let_go(self) -> None:
        """Let others have their turn. The overlay stays until the end."""
        directory, self.directory = self.directory, -1
        if directory != -1:
            os.close(directory)

    def _take(self, is_late: bool) -> bool:
        """Try to get it; False if that has to be tried again."""
        _make_way(self._mount_point)
        if SysfsOverlay.wanted_for(self._mount_point):
            if not self._take_sysfs(is_late):
                return False
            self.directory = _opened(self._mount_point)
        else:
            self.directory = _locked(self._mount_point, is_late)
        return self.directory != -1

    def _take_sysfs(self, is_late: bool) -> bool:
        """Cover /sys/fs, or take over the cover that a killed kdbusfs left."""
        sysfs = _locked(SYSFS_DIRECTORY, is_late and not SysfsOverlay.covers())
        if sysfs == -1 and is_late:
            raise UserError(
                f"{self._mount_point}: another kdbusfs starts or ends there, or somebody else"
                f" has locked {SYSFS_DIRECTORY} (lslocks(8) tells)",
                os.EX_CANTCREAT,
            )
        if sysfs == -1:
            return False
        try:
            if not SysfsOverlay.wanted_for(self._mount_point):
                return False
            self._overlay.enter_context(SysfsOverlay(self._mount_point.name, sysfs))
        finally:
            os.close(sysfs)
        return True


def _make_way(mount_point: Path) -> None:
    """Detach the mount of a kdbusfs that was killed at the same place; UserError if one lives."""
    seen = mountinfo.mount_at(mount_point)
    if seen is None or not seen[1].is_kdbusfs:
        return
    try:
        mount_point.stat()
    except OSError as error:
        if error.errno in DEAD:
            log.info("%s: unmounting what a killed kdbusfs left", mount_point)
            mountinfo.detach(seen[0])
            return
        raise
    raise _mounted_already(mount_point)


def _opened(directory: Path) -> int:
    """A descriptor of *directory* that asks nothing of it (O_PATH): it may be an automount point
    that waits for this very mount."""
    descriptor = os.open(directory, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not _is_at(descriptor, directory) or not stat.S_ISDIR(_mode_and_device(descriptor)[0]):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "it has become a symbolic link", str(directory))
    return descriptor


def _mode_and_device(descriptor: int) -> tuple[int, int]:
    """st_mode and st_dev, without asking whoever serves the filesystem."""
    fields = ffi.new("uint32_t[3]")
    mountinfo.checked(lib.kdbusfs_stat(descriptor, fields, fields + 1, fields + 2), "statx")
    return int(fields[0]), os.makedev(fields[1], fields[2])


def _is_at(descriptor: int, path: Path) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}") == str(path)


def _locked(directory: Path, is_late: bool) -> int:
    """A descriptor of *directory* that keeps others out; -1 if they have to be waited for.

    If it *is_late*, they are not; nor is anybody kept out of what can't be opened.
    """
    descriptor = _opened(directory)
    with suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        lockable = os.open(f"/proc/self/fd/{descriptor}", flags)
        os.close(descriptor)
        descriptor = lockable
    if (try_lock(descriptor) or is_late) and _is_on_top(descriptor, directory):
        return descriptor
    os.close(descriptor)
    return -1


def _is_on_top(descriptor: int, directory: Path) -> bool:
    """Whether it is what is still seen at *directory*: it may have been locked too late."""
    with suppress(OSError), mountinfo.opened(directory) as seen:
        return _is_at(descriptor, directory) and (
            mountinfo.MountId.of(seen) == mountinfo.MountId.of(descriptor)
        )
    return False


# --- the mount ------------------------------------------------------------------------


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
    """A kdbusfs for *mount_point*, and the /dev/fuse its requests arrive on.

    Use it as a context manager: on entry it is made, but not seen yet, and nobody else gets the
    place meanwhile; `attach` puts it there; on exit it is unmounted, if it still is mounted.
    *source* is what the table of mounts has as its source.
    It owns `device`: whoever reads requests has a duplicate of it.
    """

    def __init__(self, mount_point: Path, source: str = mountinfo.SOURCE) -> None:
        self.mount_point = mount_point
        self.device = -1
        self.device_number = -1
        """st_dev of its files."""
        self._source = source
        self._place = _Place(mount_point)
        self._root = -1
        self._mount_id: mountinfo.MountId | None = None
        self._is_told_covered = False
        # A signal may have it unmounted while it is being attached.
        self._lock = threading.Lock()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            with self._told_as_refusal():
                stack.enter_context(self._place)
            self.device = _open_device()
            stack.callback(self._close_device)
            stack.callback(self._detach)
            with self._told_as_refusal():
                self._create()
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _close_device(self) -> None:
        os.close(self.device)
        self.device = -1

    @contextmanager
    def _told_as_refusal(self) -> Iterator[None]:
        """Tell an OSError as one line of why this can't be mounted."""
        try:
            yield
        except OSError as error:
            code = os.EX_NOPERM if error.errno in (errno.EPERM, errno.EACCES) else os.EX_OSERR
            raise UserError(f"can't mount on {self.mount_point}: {error.strerror}", code) from error

    def _create(self) -> None:
        options = {
            "source": self._source,
            "subtype": mountinfo.FILESYSTEM_TYPE.partition(".")[2],
            "fd": str(self.device),
            "rootmode": "40000",
            "user_id": "0",
            "group_id": "0",
            "allow_other": None,
            "default_permissions": None,
        }
        self._root = mountinfo.new_filesystem("fuse", options.items())
        self._mount_id = mountinfo.MountId.of(self._root)
        _, self.device_number = _mode_and_device(self._root)

    def attach(self) -> None:
        """Let it be seen at the mount point; UserError if that can't be.

        Nothing happens if it was unmounted before.
        """
        with self._lock, self._told_as_refusal():
            if self._root == -1:
                return
            assert self._mount_id is not None
            mountinfo.attach(self._root, self._place.directory, str(self.mount_point))
            self._close_root()
            below = mountinfo.below(self._mount_id)
            if below is not None and below.is_kdbusfs:
                mountinfo.detach(self._mount_id)
                raise _mounted_already(self.mount_point)
            self._place.let_go()

    def _close_root(self) -> None:
        """Give up what keeps it alive where it is not mounted, and busy where it is."""
        root, self._root = self._root, -1
        os.close(root)

    def _detach(self) -> None:
        with self._lock:
            if self._root != -1:
                self._close_root()
            elif self._mount_id is not None and not mountinfo.detach(self._mount_id):
                self._tell_covered()

    def _tell_covered(self) -> None:
        if not self._is_told_covered:
            log.warning(
                "%s is covered by another mount and stays mounted, with nobody to serve it:"
                " unmount it when it can be seen",
                self.mount_point,
            )
        self._is_told_covered = True

    def unmount(self) -> None:
        """Unmount, and end the connection to the kernel even where that isn't enough.

        Open files keep a detached filesystem alive, and so do copies of the mount in
        other mount namespaces: their next call answers ENOTCONN from here on, and the
        next read of the device ENODEV.
        """
        self._detach()
        self._abort(self.device_number)

    def _abort(self, connection: int) -> None:
        """Abort the connection through fusectl, unless it has ended by itself.

        Its number may then be another filesystem's by now, so the device is asked first.
        """
        poll = select.poll()
        poll.register(self.device, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            return
        connections = mountinfo.new_filesystem("fusectl")
        try:
            path = f"{os.minor(connection)}/abort"
            with suppress(FileNotFoundError):
                abort = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections)
                try:
                    os.write(abort, b"1")
                finally:
                    os.close(abort)
        finally:
            os.close(connections)
