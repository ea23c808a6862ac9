# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs test-tracer.c, which exercises the ptrace engine on processes of its own, without FUSE."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from programs import once

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "kdbusfs" / "native"
SOURCE = HERE / "test-tracer.c"
CODE = [NATIVE / "tracer.c", NATIVE / "filter.c"]
NAMES = re.findall(r'^\t\{ "([a-z-]+)", test_', SOURCE.read_text(), re.MULTILINE)
SKIPPED = 77


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled test program, which ends at any error in memory or arithmetic."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

    def build(directory: Path) -> None:
        command = [compiler, *flags, SOURCE, *CODE, "-o", directory / "test-tracer"]
        subprocess.run(command, check=True)

    return once(tmp_path_factory, "native", build) / "test-tracer"


def test_every_test_of_the_program_is_run_here(program: Path) -> None:
    listed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert listed.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tracer(program: Path, name: str) -> None:
    result = subprocess.run([program, name], capture_output=True, text=True, timeout=150)
    if result.returncode == SKIPPED:
        pytest.skip("not possible for this user or on this architecture")
    assert (result.returncode, result.stderr) == (0, "")
