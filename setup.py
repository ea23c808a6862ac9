# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pyproject.toml can't say: the cffi module, and what is compiled.

The modules that every message passes through are compiled by mypyc; their Python source is the
truth, and runs as it is with KDBUSFS_COMPILE=0.
"""

import os
import sys

from setuptools import setup

COMPILED = [
    "kdbusfs/abi/items.py",
    "kdbusfs/bus/bus.py",
    "kdbusfs/bus/call.py",
    "kdbusfs/bus/commands.py",
    "kdbusfs/bus/connection.py",
    "kdbusfs/bus/domain.py",
    "kdbusfs/bus/exchange.py",
    "kdbusfs/bus/handle.py",
    "kdbusfs/bus/listing.py",
    "kdbusfs/bus/message.py",
    "kdbusfs/bus/pool.py",
    "kdbusfs/bus/quota.py",
    "kdbusfs/bus/reply.py",
    "kdbusfs/bus/set_up.py",
    "kdbusfs/bus/shares.py",
    "kdbusfs/fuse/calls.py",
    "kdbusfs/fuse/device.py",
    "kdbusfs/fuse/fds.py",
    "kdbusfs/fuse/files.py",
    "kdbusfs/fuse/ioctl.py",
    "kdbusfs/fuse/router.py",
    "kdbusfs/peer/process.py",
]


# Who asks for these wants no extension module, and mypyc would take half a minute each time.
WITHOUT_MODULES = {"dist_info", "egg_info", "sdist"}


def compiled_modules() -> list:
    """The extension modules mypyc makes, none if it is not wanted."""
    if os.environ.get("KDBUSFS_COMPILE", "1") == "0" or WITHOUT_MODULES.intersection(sys.argv[1:]):
        return []
    from mypyc.build import mypycify

    options = ["--follow-imports=silent", "--ignore-missing-imports"]
    return mypycify([*options, *COMPILED], opt_level="3", debug_level="0")


setup(
    ext_modules=compiled_modules(),
    cffi_modules=["kdbusfs/native/build.py:ffibuilder"],
)
