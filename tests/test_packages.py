# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is installed for the build is all that it needs, and in versions that were chosen."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import debian

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
# What only bench/peers.py needs has packages of its own (tools/packages.sh PYTHON peers).
WITH_SD_BUS = ("dbus.c", "broker.c")
C_SOURCES = [
    source
    for room in ("kdbusfs", "libkdbus/src", "examples", "bench", "tests")
    for source in sorted((ROOT / room).rglob("*.c"))
    if source.name not in ("_native.c", *WITH_SD_BUS)
]
# As what pip compiles: pyfuse3, and what cffi and mypyc write.
OTHERS = "#define FUSE_USE_VERSION 35\n#include <Python.h>\n#include <fuse_lowlevel.h>\n"

needs_dpkg = pytest.mark.skipif(
    not shutil.which("dpkg-query"), reason="whose a header is can't be told without dpkg"
)


def includes(*command: str | Path, source: str = "") -> set[Path]:
    """The headers outside of the project that are read by what *command* compiles."""
    told = subprocess.run(["cc", "-M", *command], input=source, capture_output=True, text=True)
    assert not told.returncode, told.stderr
    paths = {Path(word).resolve() for word in told.stdout.replace("\\\n", " ").split()}
    return {path for path in paths if path.is_file() and ROOT not in path.parents}


def headers() -> set[Path]:
    """All of them, but those of a Python that no package brought."""
    folders = ["-I", ROOT / "libkdbus" / "include", "-I", ROOT / "kdbusfs" / "native"]
    own = includes("-D_GNU_SOURCE=", *folders, *C_SOURCES)
    python = Path(sysconfig.get_path("include")).resolve()
    fuse = debian.output("pkg-config", "--cflags", "fuse3").split()
    others = includes("-I", python, *fuse, "-x", "c", "-", source=OTHERS)
    if not python_is_debians():
        others = {path for path in others if python not in path.parents}
    return own | others


def python_is_debians() -> bool:
    header = Path(sysconfig.get_path("include"), "Python.h").resolve()
    return bool(debian.owners({header})[header])


@needs_dpkg
def test_every_header_is_of_a_package_that_is_asked_for() -> None:
    owners = debian.owners(headers())
    assert {"stdio.h", "fuse_lowlevel.h"} <= {path.name for path in owners}
    assert not {path: who for path, who in owners.items() if not who & debian.available()}


@needs_dpkg
def test_all_that_is_asked_for_is_there() -> None:
    python = {"python3", "python3-dev", "python3-venv"}
    assert set(debian.listed()) - (set() if python_is_debians() else python) <= debian.installed()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_packages_are_pinned_with_hashes_and_name_no_place(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    entries = re.split(r"\n(?=\S)", "\n".join(lines))
    pin = re.compile(r"[\w.-]+==[\w.]+( ; [^\\]+)? \\(\n    --hash=sha256:[0-9a-f]{64}( \\)?)+\n?")
    assert len(entries) >= 3
    assert not [entry for entry in entries if not pin.fullmatch(entry)]


def test_one_package_has_one_version() -> None:
    pins = {pin for lock in LOCKS for pin in re.findall(r"^([\w.-]+)==", lock.read_text(), re.M)}
    versions = {
        pin for lock in LOCKS for pin in re.findall(r"^[\w.-]+==[\w.]+", lock.read_text(), re.M)
    }
    assert len(pins) == len(versions)


def test_what_builds_the_distributions_is_pinned() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "requirements/build.txt").read_text(), re.M)
    for folder in (ROOT, ROOT / "libkdbus"):
        settings = tomllib.loads((folder / "pyproject.toml").read_text())
        needs = {need.split(">=")[0] for need in settings["build-system"]["requires"]}
        assert needs <= set(pins)


def test_types_of_the_client_are_seen_by_those_who_use_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import kdbus\n\nversion: str = kdbus.__version__\nkdbus.Bus(version, 1)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir=/dev/null", program.name]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in told.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, told
    assert errors[0].endswith('expected "str"  [arg-type]')
