# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tmpfs over /sys/fs, for a mount point that only the kernel could make there.

kdbus lived at /sys/fs/kdbus, where the kernel made the directory; sysfs lets nobody
else make one. `SysfsOverlay` puts a tmpfs in the place of /sys/fs that carries every
child of the old one and a `kdbus` directory beside them. The tree is put together in
a mount namespace of its own and attached in a single step: no process ever sees
/sys/fs half full, and a failure on the way leaves nothing to undo. Its mounts are
slaves of the originals (mount_namespaces(7)): what is mounted below those appears in
it, while taking it down again reaches none of them.

Its root is locked (flock(2)) as long as its kdbusfs lives. By that it is told from what
a killed one left, and the next kdbusfs for the same place waits until this one has gone.
"""

import fcntl
import logging
import os
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kdbusfs.mount import mountinfo
from kdbusfs.native import lib
from kdbusfs.user_error import UserError

SYSFS_DIRECTORY = Path("/sys/fs")

log = logging.getLogger(__name__)


def try_lock(directory: int) -> bool:
    """Lock an open directory against other kdbusfs; False if somebody has locked it.

    In a filesystem without locks for directories nobody is kept out.
    """
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        log.debug("a directory that can't be locked", exc_info=True)
    return True


class SysfsOverlay:
    """A tmpfs over /sys/fs with all that was there and one directory more; undone on exit.

    *sysfs* is /sys/fs, opened and locked by `try_lock`; if it is what a killed kdbusfs left, it
    is taken over, and stays locked. UserError if the kernel refuses.
    """

    def __init__(self, name: str, sysfs: int) -> None:
        self._name = name
        self._sysfs = sysfs
        self._root = -1
        self._mount_id: mountinfo.MountId | None = None

    @staticmethod
    def covers() -> bool:
        """Whether an overlay, of whichever kdbusfs, is in place."""
        seen = mountinfo.mount_at(SYSFS_DIRECTORY)
        return seen is not None and _is_overlay(seen[1])

    @staticmethod
    def wanted_for(mount_point: Path) -> bool:
        """Whether *mount_point* needs the overlay: it is missing in /sys/fs.

        So does one in an overlay that a killed kdbusfs left, which is then taken over;
        but not one in the overlay of another kdbusfs, where mkdir(1) works.
        """
        if mount_point.parent != SYSFS_DIRECTORY:
            return False
        if not SysfsOverlay.covers():
            return not os.path.lexists(mount_point)
        return not any(
            mount.is_kdbusfs
            and mount.path != str(mount_point)
            and Path(mount.path).parent == SYSFS_DIRECTORY
            for mount in mountinfo.mounts()
        )

    def __enter__(self) -> Self:
        try:
            if self.covers():
                log.info("%s: taking over what a killed kdbusfs left", SYSFS_DIRECTORY)
                with suppress(FileExistsError):
                    os.mkdir(self._name, dir_fd=self._sysfs)
                self._root = os.dup(self._sysfs)
                self._mount_id = mountinfo.MountId.of(self._root)
            else:
                self._attach()
        except BaseException as error:
            self._close()
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"can't make {SYSFS_DIRECTORY / self._name}: {error.strerror} ({error.filename})",
                os.EX_OSERR,
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._mount_id is not None
        try:
            if not mountinfo.detach(self._mount_id):
                log.warning("%s is covered by another mount and stays as it is", SYSFS_DIRECTORY)
        finally:
            self._close()

    def _close(self) -> None:
        root, self._root = self._root, -1
        if root != -1:
            os.close(root)

    def _attach(self) -> None:
        tree = _in_thread(self._build)
        try:
            # Before anybody sees it.
            self._root = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)
            try_lock(self._root)
            mount_id = mountinfo.MountId.of(self._root)
            mountinfo.attach(tree, self._sysfs, str(SYSFS_DIRECTORY))
        finally:
            os.close(tree)
        try:
            below = mountinfo.below(mount_id)
            if below is not None and _is_overlay(below):
                raise UserError(f"{SYSFS_DIRECTORY}: another kdbusfs was quicker", os.EX_CANTCREAT)
        except BaseException:
            mountinfo.detach(mount_id)
            raise
        self._mount_id = mount_id

    def _build(self) -> int:
        """Put the tree together in a mount namespace of this thread's own.

        The namespace ends with the thread. Returns a descriptor of a detached copy of
        the tree, which goes on to exist.
        """
        mountinfo.checked(lib.kdbusfs_mount_namespace(), "unshare")
        children = [Path(entry) for entry in os.scandir(SYSFS_DIRECTORY)]
        links = {child: os.readlink(child) for child in children if child.is_symlink()}
        with ExitStack() as stack:

            def held(descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            others = [child for child in children if child not in links]
            clones = {child: held(mountinfo.clone_tree(child)) for child in others}
            options = (("source", mountinfo.SOURCE), ("mode", "755"), ("size", "1m"))
            root = held(mountinfo.new_filesystem("tmpfs", options, noexec=True))
            with mountinfo.opened(SYSFS_DIRECTORY) as target:
                mountinfo.attach(root, target, str(SYSFS_DIRECTORY))
            for child, link in links.items():
                child.symlink_to(link)
            for child, clone in clones.items():
                _carry(child, clone)
        (SYSFS_DIRECTORY / self._name).mkdir()
        return mountinfo.clone_tree(SYSFS_DIRECTORY)


def _is_overlay(mount: mountinfo.Mount) -> bool:
    return (mount.fstype, mount.source) == ("tmpfs", mountinfo.SOURCE)


def _carry(child: Path, clone: int) -> None:
    """Put the mounts behind *clone* at *child*, which is made for them."""
    if stat.S_ISDIR(os.fstat(clone).st_mode):
        child.mkdir()
    else:
        child.touch()
    with mountinfo.opened(child) as target:
        mountinfo.attach(clone, target, str(child))


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
