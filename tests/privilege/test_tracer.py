# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks by way of the tracer, which puts descriptors into receivers (docs/security.md)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import daemons
from mount.raw import Bus
from privilege.test_policy import ALICE

pytestmark = pytest.mark.one_pool

PROGRAMS = Path(__file__).parent / "programs"
INCLUDE = Path(__file__).parents[2] / "libkdbus" / "include"
NOT_HERE, NEVER_REACHED = 77, 3


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A directory of everybody's with the compiled programs, `privileged` setuid root."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = Path("/tmp") / f"kdbusfs-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    for source in PROGRAMS.glob("*.c"):
        flags = ["-std=gnu11", "-O1", "-D_GNU_SOURCE=", "-Wall", "-Wextra", "-Werror", "-pthread"]
        command = [compiler, *flags, f"-I{INCLUDE}", str(source), "-o", directory / source.stem]
        subprocess.run(command, check=True)
    (directory / "privileged").chmod(0o4755)
    (directory / "alice").mkdir()
    os.chown(directory / "alice", ALICE, ALICE)
    yield directory
    shutil.rmtree(directory)


def attack(
    programs: Path, bus: Bus, root_fd: int, *arguments: Path | str
) -> subprocess.CompletedProcess[str]:
    """Run `patcher` as ALICE, who may not walk the test's own directories."""
    endpoint = f"/proc/self/fd/{root_fd}/{bus.path.parent.name}/bus"
    result = subprocess.run(
        [programs / "patcher", endpoint, *arguments],
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        pass_fds=[root_fd],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if result.returncode == NOT_HERE:
        pytest.skip("for x86-64 only")
    return result


@pytest.fixture
def root_fd(mount: daemons.Mount) -> Iterator[int]:
    fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_setuid_program_that_a_traced_receiver_becomes_is_not_touched(
    programs: Path, bus: Bus, root_fd: int
) -> None:
    n_reached = 0
    for _ in range(5):
        result = attack(programs, bus, root_fd, "exec", programs / "privileged")
        if result.returncode == NEVER_REACHED:
            continue
        n_reached += 1
        assert (result.returncode, result.stdout) == (0, "as it was written, euid 0\n")
    assert n_reached


def test_a_filter_holds_while_descriptors_are_received(
    programs: Path, bus: Bus, root_fd: int
) -> None:
    n_reached = 0
    made = programs / "alice" / "made"
    for _ in range(5):
        result = attack(programs, bus, root_fd, "mkdir", made)
        assert not made.exists()
        if result.returncode == NEVER_REACHED:
            continue
        n_reached += 1
        assert result.returncode == -signal.SIGSYS
    assert n_reached
