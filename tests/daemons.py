# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbusfs processes and mount namespaces for tests: started, watched, ended, nothing left."""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

KDBUSFS = Path(sys.executable).with_name("kdbusfs")
DEADLINE_SECONDS = 20.0
POOL_KINDS = ("passthrough", "cache")
# What a daemon that works as it should never says.
FAULTS = ("Traceback", "ERROR", "CRITICAL", "Exception")

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str) -> T:
    """The first true value of *condition*; a failed test if there is none in time."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {DEADLINE_SECONDS:.0f} s in vain: {what}")
        time.sleep(0.005)
    return value


def need_mounting() -> None:
    """Skip the test where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("mounting needs /dev/fuse")


def need_pool(kind: str) -> None:
    """Skip the test where the kernel can't make this kind of pool."""
    if kind == "passthrough" and not _has_passthrough():
        pytest.skip(f"Linux {platform.release()} has no FUSE passthrough")


def usual_pool() -> str:
    """The kind of pool that a daemon makes here unless it is told otherwise."""
    return POOL_KINDS[0] if _has_passthrough() else POOL_KINDS[1]


def _has_passthrough() -> bool:
    version = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    return version >= (6, 9)


def mount_table(pid: int | str = "self") -> list[str]:
    """The lines of mountinfo of *pid*; anybody may have mounted on a path in no encoding."""
    return os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes()).rstrip("\n").split("\n")


def mounted_at(path: Path, pid: int | str = "self") -> list[str]:
    """The kdbusfs mounts at *path*, as lines of mountinfo, in the mount namespace of *pid*."""
    lines = mount_table(pid)
    return [line for line in lines if line.split()[4] == str(path) and " - fuse.kdbusfs " in line]


def serving(path: Path) -> list[int]:
    """The kdbusfs processes whose command line names *path*."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(KDBUSFS) in words and os.fsencode(path) in words:
                    found.append(int(entry.name))
    return found


@dataclass
class Mount:
    """A mounted domain and the daemon in the foreground that serves it."""

    path: Path
    """Where it is mounted: holds `control` and the buses."""
    pool: str
    """The kind of its pools: one of POOL_KINDS."""
    log: Path
    """What the daemon wrote to stderr."""
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        return self.process.pid

    def faults(self) -> list[str]:
        """The lines of the log that a daemon that works as it should never writes."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(fault in line for fault in FAULTS)]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have it unmount and exit; its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, which must come in time."""
        try:
            return self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"kdbusfs did not end:\n{self.log.read_text(errors='replace')}")


@contextmanager
def running(directory: Path, pool: str, *options: str) -> Iterator[Mount]:
    """A kdbusfs mounted in *directory*; checked at the end for faults and remains."""
    need_mounting()
    need_pool(pool)
    path = directory / "kdbus"
    path.mkdir()
    log = directory / "log"
    command = [KDBUSFS, "--foreground", f"--pool={pool}", *options, path]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    mount = Mount(path, pool, log, process)
    try:
        wait_until(lambda: process.poll() is not None or mounted_at(path), "kdbusfs never mounted")
        assert process.poll() is None, f"kdbusfs ended at once:\n{log.read_text()}"
        assert "control" in os.listdir(path)
        yield mount
        if process.poll() is None:
            mount.end()
        assert process.returncode == 0, log.read_text(errors="replace")
        assert not mounted_at(path)
        assert not mount.faults()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        while mounted_at(path):
            subprocess.run(["umount", "--lazy", path], check=True)


class MountNamespace:
    """A mount namespace that lives as long as a process that sleeps in it."""

    def __init__(self, propagation: str) -> None:
        self._sleeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", propagation, "sleep", "infinity"]
        )
        self.pid = self._sleeper.pid
        comm = Path(f"/proc/{self.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "no mount namespace")

    def path(self, path: str) -> Path:
        """*path* as it is in the namespace, to be used from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def mounts(self) -> list[str]:
        """What is mounted in it: device, root, path, and everything of the filesystem. Not what is
        in the directory for temporary files: other tests mount there at the same time, and a
        namespace that shares its mounts sees that."""
        elsewhere = f"{tempfile.gettempdir()}/"
        return sorted(
            line.split(" ", 2)[2]
            for line in mount_table(self.pid)
            if not line.split(" ", 5)[4].startswith(elsewhere)
        )

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in it."""
        enter: Sequence[str | Path] = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt"]
        return subprocess.run(
            [*enter, *command],
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_SECONDS,
            env=env,
        )

    def do(self, script: str) -> None:
        """Run shell commands in it that must not fail."""
        result = self.run("sh", "-euc", script)
        assert result.returncode == 0, result.stderr

    def end(self) -> None:
        self._sleeper.kill()
        self._sleeper.wait()
