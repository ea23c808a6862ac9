# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pyproject.toml can't say: the two packages' rooms and their cffi modules."""

from pathlib import Path

from setuptools import find_packages, setup

PYTHON_CLIENT = "libkdbus/python"

# The Python client lives beside the C library whose header it is built on.
builders = ["kdbusfs/native/build.py", f"{PYTHON_CLIENT}/kdbus/_build.py"]

setup(
    packages=find_packages(include=["kdbusfs", "kdbusfs.*"])
    + find_packages(PYTHON_CLIENT, include=["kdbus", "kdbus.*"]),
    package_dir={"kdbus": f"{PYTHON_CLIENT}/kdbus"},
    package_data={"kdbusfs": ["py.typed"], "kdbus": ["py.typed"]},
    cffi_modules=[f"{path}:ffibuilder" for path in builders if Path(path).exists()],
)
