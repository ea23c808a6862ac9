# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests at volume share: their programs, and what a daemon takes of the machine."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import daemons

ROOT = Path(__file__).parents[1]
LIBKDBUS = ROOT / "libkdbus"
SHARES = ROOT / "tests/fuzz/shares.c"
MAX_DESCRIPTORS_MORE = 3
"""Two to wake the router with, which it keeps after the first time, and one to be lenient."""


def compile_program(target: Path, *sources: Path) -> Path:
    """Compile a C program together with the client library."""
    command = ["gcc", "-std=gnu11", "-O2", "-D_GNU_SOURCE=", "-Wall", "-Wextra", "-Werror"]
    command += ["-pthread", "-I", f"{LIBKDBUS}/include", "-o", f"{target}"]
    command += [*map(str, sources), *map(str, sorted((LIBKDBUS / "src").glob("*.c")))]
    subprocess.run(command, check=True)
    return target


def run(seconds: float, *command: str | Path | int) -> dict[str, Any]:
    """Run a program that says in JSON what it did, and must succeed within *seconds*."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextmanager
def public_mount(pool: str) -> Iterator[daemons.Mount]:
    """A daemon of one's own, mounted where every user can get to."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        with daemons.running(Path(directory), pool) as mount:
            yield mount


@dataclass(frozen=True)
class Footprint:
    """What a daemon takes."""

    resident: int
    """Bytes of memory, those of pools included."""
    peak: int
    """The most that this ever was."""
    descriptors: tuple[str, ...]
    """What they are open on."""
    pools: int
    """Mappings of pools."""

    @classmethod
    def of(cls, mount: daemons.Mount) -> "Footprint":
        process = Path(f"/proc/{mount.pid}")
        lines = (process / "status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return cls(
            resident=int(values["VmRSS"].split()[0]) * 1024,
            peak=int(values["VmHWM"].split()[0]) * 1024,
            descriptors=tuple(sorted(_links(process / "fd"))),
            pools=(process / "maps").read_text().count("kdbus-conn"),
        )

    def is_settled(self, before: "Footprint") -> bool:
        """Whether pools and descriptors have gone back to what they were."""
        more = len(self.descriptors) - len(before.descriptors)
        return self.pools == 0 and more <= MAX_DESCRIPTORS_MORE


def _links(directory: Path) -> Iterator[str]:
    for entry in directory.iterdir():
        # It may have been closed meanwhile.
        with suppress(OSError):
            yield os.readlink(entry)


def check_nothing_is_left(mount: daemons.Mount, before: Footprint, more_memory: int) -> Footprint:
    """Hold the daemon, whose clients have all gone, against what it was *before* they came: its
    memory may have grown by *more_memory* bytes."""
    assert mount.process.poll() is None, "the daemon has ended"
    assert not mount.faults()
    assert os.listdir(mount.path) == ["control"]

    end = time.monotonic() + daemons.DEADLINE_SECONDS
    while not (now := Footprint.of(mount)).is_settled(before):
        if time.monotonic() > end:
            pytest.fail(f"{now}\ndoes not get back to\n{before}")
        time.sleep(0.05)
    assert now.resident <= before.resident + more_memory, (before, now)
    return now
