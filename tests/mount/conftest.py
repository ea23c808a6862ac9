# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for tests on a real mount."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi.numbers import MakeFlag
from mount.raw import Bus
from programs import once

PROGRAMS = Path(__file__).parent / "programs"
INCLUDE = Path(__file__).parents[2] / "libkdbus" / "include"


@pytest.fixture
def bus(mount: daemons.Mount) -> Iterator[Bus]:
    """A bus that everybody may use, gone after the test."""
    with Bus(mount.path, flags=MakeFlag.ACCESS_WORLD) as bus:
        yield bus


@pytest.fixture
def root_fd(mount: daemons.Mount) -> Iterator[int]:
    """The mount's root, for users who may not walk the test's own directories."""
    fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the programs of tests/mount/programs, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.fail("no C compiler")
    command = [
        *(compiler, "-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE=", "-Wall", "-Wextra", "-Wshadow"),
        *("-Wstrict-prototypes", "-Wmissing-prototypes", "-Werror", f"-I{INCLUDE}", "-pthread"),
    ]

    def build(directory: Path) -> None:
        for source in sorted(PROGRAMS.glob("*.c")):
            subprocess.run([*command, "-o", directory / source.stem, source], check=True)

    return once(tmp_path_factory, "mount-programs", build)
