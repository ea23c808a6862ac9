# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pyproject.toml can't say: libkdbus is compiled in, behind cffi."""

from setuptools import setup

setup(cffi_modules=["python/kdbus/_build.py:ffibuilder"])
