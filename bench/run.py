#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measure kdbusfs against the floor, and print tables.

Builds the C programs of this directory, mounts the floor (a FUSE server that
does nothing) and kdbusfs with each kind of pool, runs the C client on them, and
says for each operation how many FUSE round trips it is worth. All of it runs on
one CPU, chosen before anything is started, so that no figure depends on where
the scheduler puts whom.

What is mounted and started here is unmounted and ended here, in reverse order,
also after a failure or an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CLIENT_SOURCES = [
    "client.c",
    "connection.c",
    "idle.c",
    "sample.c",
    "table-basic.c",
    "table-broadcast.c",
    "table-calls.c",
    "table-fds.c",
    "table-metadata.c",
    "table-scale.c",
]
CFLAGS = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
DEADLINE = 30.0
"""Seconds that a program gets to come up, or to go away."""

POOL_SIZE = 16 << 20
N_IDLE = 500


class BenchError(Exception):
    """Something could not be run; the message says what."""


@dataclasses.dataclass
class Row:
    """One line of a table.

    *value* is in *unit*; *ratio* is in round trips of the floor, or a growth.
    """

    table: str
    pool: str
    label: str
    value: float
    unit: str
    ratio: float | None = None
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Bench:
    """What the tables need: the built client, where things are mounted, how long to go on."""

    client: Path
    floor: Path
    mount: Path
    daemon: subprocess.Popen[str]
    pool: str
    rounds: int

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """Run one table of the client; yield its rows as they come."""
        command = [self.client, table, self.floor, self.mount, str(self.rounds)]
        with started(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
            if process.wait():
                raise BenchError(f"{table}: the client ended with {process.returncode}")
        self.check_daemon()

    def check_daemon(self) -> None:
        if self.daemon.poll() is not None:
            raise BenchError(f"kdbusfs ended with {self.daemon.returncode}")


# Programs and mounts


@contextlib.contextmanager
def started(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run *command* in a session of its own, and end all of that session at the end."""
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True} | options
    with subprocess.Popen([str(word) for word in command], **options) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM first, since daemons unmount on it; SIGKILL if that takes too long."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE)
            return


@contextlib.contextmanager
def mountpoint(parent: Path, name: str) -> Iterator[Path]:
    """A directory to mount on, unmounted at the end if its server did not do so."""
    path = parent / name
    path.mkdir()
    try:
        yield path
    finally:
        if os.path.ismount(path):
            subprocess.run(["umount", "-l", str(path)], check=False)
        path.rmdir()


def build(directory: Path) -> tuple[Path, Path]:
    """Compile the floor and the client into *directory*."""
    compiler = os.environ.get("CC", "cc")
    include = ROOT / "libkdbus" / "include"
    programs = {
        directory / "floor": [HERE / "floor.c"],
        directory / "client": [HERE / source for source in CLIENT_SOURCES],
    }
    for program, sources in programs.items():
        command = [compiler, *CFLAGS, f"-I{include}", "-o", program, *sources]
        if subprocess.run([str(word) for word in command], check=False).returncode:
            raise BenchError(f"{program.name} did not compile")
    return directory / "floor", directory / "client"


@contextlib.contextmanager
def floor_mounted(program: Path, path: Path) -> Iterator[None]:
    with started([program, path]) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise BenchError("the floor did not mount")
        yield


@contextlib.contextmanager
def kdbusfs_mounted(program: Path, pool: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [program, "-f", f"--pool={pool}", path]
    with started(command, stdout=sys.stderr) as process:  # stdout is for the tables
        deadline = time.monotonic() + DEADLINE
        while not (path / "control").exists():
            if process.poll() is not None:
                raise BenchError(f"kdbusfs --pool={pool} ended with {process.returncode}")
            if time.monotonic() > deadline:
                raise BenchError(f"kdbusfs --pool={pool} did not come up")
            time.sleep(0.01)
        yield process


# Tables: each takes a Bench and yields rows


def timed_row(bench: Bench, raw: dict[str, Any], label: str) -> Row:
    return Row(
        table=raw["table"],
        pool=bench.pool,
        label=label,
        value=raw["median_ns"] / 1000,
        unit="us",
        ratio=raw["median_ns"] / raw["floor_ns"],
        raw=raw,
    )


def bytes_text(n: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size} {unit}"
    return f"{n} B"


def table_basic(bench: Bench) -> Iterator[Row]:
    for raw in bench.rows("basic"):
        parts = [raw["operation"], raw["variant"], bytes_text(raw["n"]) if raw["n"] else ""]
        yield timed_row(bench, raw, ", ".join(filter(None, parts)))


def table_calls(bench: Bench) -> Iterator[Row]:
    for raw in bench.rows("calls"):
        yield timed_row(
            bench, raw, f"{raw['operation']}, {raw['variant']}, {bytes_text(raw['n'])} each way"
        )


def table_broadcast(bench: Bench) -> Iterator[Row]:
    for raw in bench.rows("broadcast"):
        yield timed_row(bench, raw, f"SEND to {raw['n']} receivers")


def table_fds(bench: Bench) -> Iterator[Row]:
    for raw in bench.rows("fds"):
        yield timed_row(bench, raw, f"{raw['operation']} of {raw['n']} fds, {raw['variant']}")


def table_metadata(bench: Bench) -> Iterator[Row]:
    for raw in bench.rows("metadata"):
        yield timed_row(bench, raw, f"SEND, {raw['variant']}")


def table_scale(bench: Bench) -> Iterator[Row]:
    """The ratio of these rows is not to the floor: it is the growth since the first level."""
    first: dict[tuple[str, str], float] = {}
    for raw in bench.rows("scale"):
        key = raw["operation"], raw["variant"]
        row = timed_row(bench, raw, f"{raw['operation']}, {raw['n']} {raw['variant']}")
        assert row.ratio is not None
        row.ratio /= first.setdefault(key, row.ratio)
        yield row


def meminfo() -> dict[str, int]:
    """KiB by the names of /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(word) for word in (task / "children").read_text().split()]
    return [pid, *(found for child in children for found in descendants(child))]


def memory_of(pid: int) -> dict[str, int]:
    """KiB that a process and its children map, and some of the system's, by their /proc names."""
    system = meminfo()
    total = {name: system[name] for name in ("Shmem", "Slab", "Cached")}
    total |= {"Rss": 0, "Pss": 0, "Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    for process in descendants(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, rest = line.split(":", 1)
            if name in ("Rss", "Pss", "Pss_Anon", "Pss_File", "Pss_Shmem"):
                total[name] += int(rest.split()[0])
    return total


def settled_memory_of(pid: int) -> dict[str, int]:
    """The same once it no longer changes: files are released in the background."""
    deadline = time.monotonic() + DEADLINE
    before: dict[str, int] = {}
    now = memory_of(pid)
    while before.get("Pss") != now["Pss"] and time.monotonic() < deadline:
        time.sleep(0.2)
        before, now = now, memory_of(pid)
    return now


def table_memory(bench: Bench) -> Iterator[Row]:
    """What connections cost that only said hello.

    Pages of pools are shared memory, which the daemon may map or not: they are
    taken from /proc/meminfo, and only the rest from the daemon.
    """
    command = [bench.client, "idle", bench.mount, str(N_IDLE), str(POOL_SIZE)]
    stages: dict[str, dict[str, int]] = {}
    with started(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for stage in ("few", "many", "closed"):
            if process.stdout.readline().strip() != stage:
                raise BenchError("memory: the client failed")
            stages[stage] = settled_memory_of(bench.daemon.pid)
            process.stdin.write("\n")
            process.stdin.flush()
    bench.check_daemon()

    def growth(name: str, until: str = "many") -> float:
        return (stages[until][name] - stages["few"][name]) / N_IDLE

    def row(label: str, value: float) -> Row:
        return Row("memory", bench.pool, label, value, "KiB", value, stages)

    own = growth("Pss_Anon") + growth("Pss_File")
    yield row("daemon's own memory and pools, each", own + growth("Shmem"))
    yield row("daemon's own memory (Pss without shmem), each", own)
    yield row("untouched pool (Shmem of the system), each", growth("Shmem"))
    yield row("pools mapped by the daemon (Pss_Shmem), each", growth("Pss_Shmem"))
    yield row("Rss of the daemon, each", growth("Rss"))
    yield row("kernel objects (Slab of the system), each", growth("Slab"))
    yield row("page cache (Cached of the system), each", growth("Cached"))
    yield row("once all are closed: daemon's own memory, each", growth("Pss_Anon", "closed"))
    yield row("once all are closed: pools (Shmem), each", growth("Shmem", "closed"))


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "basic": table_basic,
    "memory": table_memory,
    "calls": table_calls,
    "broadcast": table_broadcast,
    "scale": table_scale,
    "fds": table_fds,
    "metadata": table_metadata,
}


# Output


def print_head(table: str, pool: str) -> None:
    print(f"\n{table}, {pool} pool")
    third = {"memory": "", "scale": "growth"}.get(table, "x floor")
    print(f"  {'':<52} {'value':>11} {third:>8}".rstrip())


def print_row(row: Row) -> None:
    value = f"{row.value:.2f} {row.unit}"
    ratio = "" if row.ratio is None or row.unit != "us" else f"{row.ratio:.2f}"
    print(f"  {row.label:<52} {value:>11} {ratio:>8}".rstrip(), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure kdbusfs, and print tables.")
    parser.add_argument("--tables", default=",".join(TABLES), help="comma separated (%(default)s)")
    parser.add_argument(
        "--pools", default="passthrough,cache", help="comma separated (%(default)s)"
    )
    parser.add_argument("--kdbusfs", type=Path, default=ROOT / ".venv" / "bin" / "kdbusfs")
    parser.add_argument("--cpu", type=int, help="CPU to run all of it on (the last one)")
    parser.add_argument("--rounds", type=int, help="rounds of each table (5000)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    arguments = parser.parse_args()
    arguments.kdbusfs = arguments.kdbusfs.absolute()
    arguments.tables = arguments.tables.split(",")
    arguments.pools = arguments.pools.split(",")
    for table in arguments.tables:
        if table not in TABLES:
            parser.error(f"no such table: {table} (there are {', '.join(TABLES)})")
    if arguments.rounds is None:
        arguments.rounds = 500 if arguments.quick else 5000
    return arguments


def run(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Returns all rows, and what failed."""
    rows: list[Row] = []
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdbusfs-bench-")))
        scratch.chmod(0o755)  # other users connect, too
        floor_program, client = build(scratch)
        floor = stack.enter_context(mountpoint(scratch, "floor-mount"))
        stack.enter_context(floor_mounted(floor_program, floor))
        for pool in arguments.pools:
            try:
                rows += run_pool(arguments, pool, client, floor, scratch, failures)
            except BenchError as error:
                failures.append(str(error))
    return rows, failures


def run_pool(
    arguments: argparse.Namespace,
    pool: str,
    client: Path,
    floor: Path,
    scratch: Path,
    failures: list[str],
) -> list[Row]:
    rows: list[Row] = []
    for table in arguments.tables:
        # a daemon of its own for each table, so that none inherits memory from another
        with (
            mountpoint(scratch, "mount") as mount,
            kdbusfs_mounted(arguments.kdbusfs, pool, mount) as daemon,
        ):
            bench = Bench(client, floor, mount, daemon, pool, arguments.rounds)
            print_head(table, pool)
            try:
                for row in TABLES[table](bench):
                    rows.append(row)
                    print_row(row)
            except BenchError as error:
                failures.append(f"{pool}: {error}")
    return rows


def write_json(path: Path, rows: list[Row], failures: list[str]) -> None:
    report = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "failures": failures,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    arguments = parse_arguments()

    def interrupt(number: int, frame: object) -> None:
        # once: a second one must not stop the cleaning up
        for caught in (signal.SIGINT, signal.SIGTERM):
            signal.signal(caught, signal.SIG_IGN)
        raise KeyboardInterrupt

    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, interrupt)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus) if arguments.cpu is None else arguments.cpu})

    try:
        rows, failures = run(arguments)
    except (BenchError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130

    if arguments.json:
        write_json(arguments.json, rows, failures)
    for failure in failures:
        print(f"bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
