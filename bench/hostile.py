#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measure what a bystander's calls take while somebody else attacks, and print a table.

For each attack a daemon of its own is mounted, an ordinary user attacks it with all
that `attack.c` knows to do, and another user, on a bus of its own, measures its calls
(`bystander.c`). With --against, each attack is also tried on another checkout's
kdbusfs, one right after the other.

Nothing here waits without end: a daemon that ends, or answers nobody, is a row of the
table like others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import CFLAGS, DEADLINE, HERE, ROOT, BenchError, end, kdbusfs_mounted, mountpoint

NO_ATTACK = "none"
ATTACKS = [
    NO_ATTACK,
    "compute",
    "bloom-masks",
    "bloom-broadcasts",
    "match-rules",
    "name-release",
    "list-names",
    "bus-end",
    "failing-calls",
    "stat",
    "open-close",
    "connect",
    "vecs",
    "pool-pages",
    "exchange",
    "stalled-memory",
]
OPERATIONS = ["open", "recv", "message"]
ATTACKER, BYSTANDER = 65534, 65533
PREPARATION = 60.0
"""Seconds that an attack gets to prepare itself."""
PATIENCE = 10.0
"""Seconds that a program gets for what should take none."""
SKIPPED = 77


class Skipped(Exception):
    """The attack can't be tried on this machine."""


@dataclasses.dataclass
class Row:
    """What came of one attack on one daemon: figures of each operation, or what went wrong."""

    attack: str
    pool: str
    kdbusfs: str
    which: str
    """"before" or "now"."""
    operations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    calls: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the attacker: how many were done and how many refused."""
    outcome: str = ""
    load: float = 0.0


def build(directory: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    include = ROOT / "libkdbus" / "include"
    for program in ("attack", "bystander"):
        sources = [HERE / f"{name}.c" for name in (program, "connection", "sample")]
        options = [*CFLAGS, f"-I{include}", "-pthread", "-o", str(directory / program)]
        command = [compiler, *options, *map(str, sources)]
        if subprocess.run(command, check=False).returncode:
            raise BenchError(f"{program} did not compile")


class Program:
    """A program that may get stuck in the kernel: it is never waited for without end."""

    def __init__(self, *command: object) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._name = Path(str(command[0])).name

    def tell(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")

    def lines(self, n: int, seconds: float) -> list[str]:
        """The next lines it writes."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while data.count(b"\n") < n:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise BenchError(f"{self._name} got no answer in {seconds:.0f} s")
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    raise self._failure()
                data += chunk
        return data.decode().splitlines()

    def _failure(self) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(PATIENCE) == SKIPPED:
                return Skipped()
        return BenchError(f"{self._name} failed")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Once its mount is gone; whoever does not go even then is left behind."""
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"hostile: {self._name} does not end", file=sys.stderr)
            self._process.returncode = -signal.SIGKILL  # no destructor is to wait for it
        for file in (self._process.stdin, self._process.stdout):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


@contextlib.contextmanager
def daemon(arguments: argparse.Namespace, kdbusfs: Path, scratch: Path) -> Iterator[Any]:
    """A mounted kdbusfs, and a list of programs that go before it, or with it."""
    programs: list[Program] = []
    with mountpoint(scratch, "mount") as mount:
        try:
            with kdbusfs_mounted(kdbusfs, arguments.pool, mount) as process:
                try:
                    yield process, mount, programs
                finally:
                    for program in programs:
                        program.kill()
                    stop(process, mount)
        finally:
            for program in programs:
                program.reap()


def stop(process: subprocess.Popen[str], mount: Path) -> None:
    """Leave it a moment to end by itself; then the kernel is told to give its calls up."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["umount", "-f", "-l", str(mount)], check=False, timeout=PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    end(process)


def measure(arguments: argparse.Namespace, row: Row, scratch: Path) -> None:
    """Fill the row."""
    kdbusfs = Path(row.kdbusfs)
    try:
        with daemon(arguments, kdbusfs, scratch) as (process, mount, programs):
            try:
                measure_mounted(arguments, row, scratch, mount, programs)
            finally:
                if process.poll() is not None:
                    row.outcome = f"the daemon ended with {process.returncode}"
    except Skipped:
        row.outcome = "SKIPPED: can't be tried on this machine"
    except BenchError as error:
        row.outcome = row.outcome or str(error)


def measure_mounted(
    arguments: argparse.Namespace, row: Row, scratch: Path, mount: Path, programs: list[Program]
) -> None:
    bystander = Program(scratch / "bystander", mount, arguments.seconds, BYSTANDER)
    programs.append(bystander)
    bystander.lines(1, DEADLINE)

    attacker = None
    if row.attack != NO_ATTACK:
        attacker = Program(scratch / "attack", row.attack, mount, ATTACKER)
        programs.append(attacker)
        attacker.lines(1, PREPARATION)

    bystander.tell()
    for line in bystander.lines(len(OPERATIONS), arguments.seconds + 2 * PATIENCE):
        raw = json.loads(line)
        row.operations[raw["operation"]] = raw
    if any(raw["unfinished"] for raw in row.operations.values()):
        row.outcome = "a call did not return"

    if attacker is not None:
        attacker.tell()
        with contextlib.suppress(BenchError):
            row.calls = json.loads(attacker.lines(1, PATIENCE)[0])


# Output


def milliseconds(ns: int) -> str:
    return f"{ns / 1e6:.2f}" if ns < 10e6 else f"{ns / 1e6:.0f}"


def print_head(label: str) -> None:
    print(f"\n{label}; median / 99 of 100 / worst, in ms")
    print(f"  {'':<25}" + "".join(f"{name:>24}" for name in OPERATIONS) + "   attacker's calls")


def print_row(row: Row) -> None:
    cells = []
    for name in OPERATIONS:
        raw = row.operations.get(name)
        keys = ["median_ns", "p99_ns", "worst_ns"] if raw and raw["samples"] else []
        figures = [raw[key] for key in keys] if raw else []
        more = ">" if raw and raw["unfinished"] else ""
        cells.append(f"{more + ' / '.join(map(milliseconds, figures)):>24}")
    calls = ""
    if row.calls:
        calls = f"{row.calls['done']} done"
        if row.calls["refused"]:
            calls += f", {row.calls['refused']} refused ({row.calls['error']})"
    text = "   ".join(filter(None, [calls, row.outcome]))
    print(f"  {row.attack:<17} {row.which:<7}{''.join(cells)}   {text}".rstrip(), flush=True)


def machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure bystanders under attack.")
    parser.add_argument(
        "--attacks", default=",".join(ATTACKS), help="comma separated (%(default)s)"
    )
    parser.add_argument("--pool", default="passthrough", choices=["passthrough", "cache"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack (%(default)s)")
    parser.add_argument("--kdbusfs", type=Path, default=ROOT / ".venv" / "bin" / "kdbusfs")
    parser.add_argument("--against", type=Path, metavar="KDBUSFS", help="another, measured before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    arguments = parser.parse_args()
    arguments.attacks = arguments.attacks.split(",")
    for attack in arguments.attacks:
        if attack not in ATTACKS:
            parser.error(f"no such attack: {attack} (there are {', '.join(ATTACKS)})")
    return arguments


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    commands = {"now": arguments.kdbusfs.absolute()}
    if arguments.against:
        commands = {"before": arguments.against.absolute()} | commands
    scratch = Path(tempfile.mkdtemp(prefix="kdbusfs-hostile-"))
    try:
        scratch.chmod(0o755)  # other users come here
        build(scratch)
        about = machine()
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        for which, kdbusfs in commands.items():
            print(f"{which}: {kdbusfs}")
        print_head(f"{arguments.pool} pool")
        for attack in arguments.attacks:
            for which, kdbusfs in commands.items():
                row = Row(attack, arguments.pool, str(kdbusfs), which, load=os.getloadavg()[0])
                measure(arguments, row, scratch)
                print_row(row)
                yield row
    finally:
        if not os.path.ismount(scratch / "mount"):
            shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    arguments = parse_arguments()
    about = machine()
    try:
        rows = list(run(arguments))
    except (BenchError, OSError) as error:
        print(f"hostile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hostile: interrupted", file=sys.stderr)
        return 130

    if arguments.json:
        report = about | {"rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [row for row in rows if row.which == "now" and row.outcome]
    return int(any(not row.outcome.startswith("SKIPPED") for row in wrong))


if __name__ == "__main__":
    sys.exit(main())
