# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a path to a mounted FUSE filesystem and back.

`table` is what is mounted where, `overlay` the tmpfs over /sys/fs, `fuse` the mount itself.
"""

from kdbusfs.mount.fuse_mount import FuseMount, check_mount_point, check_remount

__all__ = ["FuseMount", "check_mount_point", "check_remount"]
