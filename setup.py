# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pyproject.toml can't say: the two packages' rooms, their cffi modules, and what is compiled.

The modules that every message passes through are compiled by mypyc; their Python source is the
truth, and runs as it is with KDBUSFS_COMPILE=0.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

COMPILED = [
    "kdbusfs/abi/items.py",
    "kdbusfs/bus/bus.py",
    "kdbusfs/bus/call.py",
    "kdbusfs/bus/commands.py",
    "kdbusfs/bus/connection.py",
    "kdbusfs/bus/handle.py",
    "kdbusfs/bus/listing.py",
    "kdbusfs/bus/message.py",
    "kdbusfs/bus/pool.py",
    "kdbusfs/bus/quota.py",
    "kdbusfs/bus/reply.py",
    "kdbusfs/bus/shares.py",
    "kdbusfs/fuse/handles.py",
    "kdbusfs/fuse/ioctl.py",
    "kdbusfs/peer/process.py",
]


def compiled_modules() -> list:
    """The extension modules mypyc makes, none if it is not wanted."""
    if os.environ.get("KDBUSFS_COMPILE", "1") == "0":
        return []
    from mypyc.build import mypycify

    options = ["--follow-imports=silent", "--ignore-missing-imports"]
    return mypycify([*options, *COMPILED], opt_level="3", debug_level="0")


PYTHON_CLIENT = "libkdbus/python"

# The Python client lives beside the C library whose header it is built on.
builders = ["kdbusfs/native/build.py", f"{PYTHON_CLIENT}/kdbus/_build.py"]

setup(
    packages=find_packages(include=["kdbusfs", "kdbusfs.*"])
    + find_packages(PYTHON_CLIENT, include=["kdbus", "kdbus.*"]),
    package_dir={"kdbus": f"{PYTHON_CLIENT}/kdbus"},
    package_data={"kdbusfs": ["py.typed"], "kdbus": ["py.typed"]},
    ext_modules=compiled_modules(),
    cffi_modules=[f"{path}:ffibuilder" for path in builders if Path(path).exists()],
)
