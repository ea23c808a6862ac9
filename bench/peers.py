#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time kdbusfs beside other ways to carry messages, and compare.

Each peer is a C program of peers/ that does one operation for some milliseconds
and prints the median. All peers take their turn, round after round, on one CPU, so
that whatever slows the machine down slows all of them. What counts are ratios:
to the faster of dbus-daemon and dbus-broker, within each round, and of those the
median.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STORED = HERE / "ratios.json"
CFLAGS = "-O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror".split()
DEADLINE = 300.0
"""Seconds that a program gets: a machine under load takes one minute for 10,000 connections."""
CANNOT = 77
"""Exit code of a peer that does not have an operation."""

WORSE = 4 / 3
"""What a ratio may be times the stored one. On a busy machine chance alone can do more."""

KDBUS = ("kdbus-lib", "kdbus-sync", "kdbus-raw")
DBUS = ("dbus-daemon", "dbus-broker")

DBUS_DAEMON_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC
 "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
  <limit name="max_incoming_bytes">1000000000</limit>
  <limit name="max_outgoing_bytes">1000000000</limit>
  <limit name="max_message_size">100000000</limit>
  <limit name="max_completed_connections">100000</limit>
  <limit name="max_connections_per_user">100000</limit>
  <limit name="max_names_per_connection">100000</limit>
  <limit name="max_match_rules_per_connection">100000</limit>
</busconfig>
"""


class PeersError(Exception):
    """Something could not be run; the message says what."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One operation with its number: bytes, receivers, or how many others there are."""

    operation: str
    n: int = 0
    goals: tuple[float | None, ...] = (None, None, None)
    """Of the times of KDBUS, as ratios to the faster D-Bus daemon."""

    @property
    def label(self) -> str:
        what = {
            "echo": f"echo {bytes_text(self.n)}",
            "stream": f"one way {bytes_text(self.n)}",
            "broadcast": f"broadcast to {self.n}",
            "descriptor": "one descriptor",
            "memfd": "64 MiB memfd, mapped",
            "connect": "connect, hello, disconnect",
            "credentials": "echo 8 B, creds and pids",
        }
        return what.get(self.operation, f"echo 8 B beside {self.n:,} {self.operation}")


# A rate of three times is a time of a third.
TABLE = (
    Cell("echo", 8, (0.6, 1.2, 1.7)),
    Cell("echo", 1 << 10, (0.6, 1.2, 1.7)),
    Cell("echo", 8 << 10, (0.6, 1.2, 1.7)),
    Cell("echo", 64 << 10, (0.4, 0.6, 0.8)),
    Cell("echo", 1 << 20, (0.5, 0.5, 0.5)),
    Cell("stream", 64, (1 / 3, None, 1)),
    Cell("stream", 64 << 10, (1 / 3, None, 1 / 2)),
    Cell("broadcast", 1, (0.7, None, 1.5)),
    Cell("broadcast", 8, (0.7, None, 1.5)),
    Cell("broadcast", 64, (0.7, None, 1.5)),
    Cell("descriptor", 0, (1, None, 5)),
    Cell("memfd", 0, (1, None, 5)),
    Cell("connect", 0, (1 / 0.3, None, 1 / 0.3)),
    Cell("credentials", 8, (1, None, 2.2)),
)
GROWTH = tuple(
    Cell(operation, n)
    for operation in ("connections", "names", "matches")
    for n in (10, 100, 1000, 10000)
)
MORE = (Cell("echo", 256 << 10), Cell("broadcast", 2), Cell("broadcast", 24))
"""Only for the plots."""


def bytes_text(n: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size} {unit}"
    return f"{n} B"


# Programs and daemons


@contextlib.contextmanager
def started(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run *command* in a session of its own, and end all of that session at the end."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM first, since daemons unmount on it; SIGKILL if that takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE)


def wait_until(came_up: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not came_up():
        if process.poll() is not None or time.monotonic() > deadline:
            raise PeersError(f"{what} did not come up")
        time.sleep(0.01)


@contextlib.contextmanager
def dbus_daemon(scratch: Path, programs: dict[str, Path]) -> Iterator[tuple[str, int]]:
    path, configuration = scratch / "dbus-daemon", scratch / "dbus-daemon.conf"
    configuration.write_text(DBUS_DAEMON_CONFIGURATION.format(path=path))
    command = ["dbus-daemon", "--nofork", f"--config-file={configuration}"]
    with started(command, stderr=subprocess.DEVNULL) as process:
        wait_until(path.exists, process, "dbus-daemon")
        yield f"unix:path={path}", process.pid


@contextlib.contextmanager
def dbus_broker(scratch: Path, programs: dict[str, Path]) -> Iterator[tuple[str, int]]:
    path = scratch / "dbus-broker"
    command = [programs["broker"], path]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise PeersError("dbus-broker did not come up")
        yield f"unix:path={path}", process.pid


@contextlib.contextmanager
def kdbusfs(scratch: Path, programs: dict[str, Path]) -> Iterator[tuple[str, int]]:
    mount = scratch / "mount"
    mount.mkdir()
    try:
        with started([programs["kdbusfs"], "-f", mount], stdout=sys.stderr) as process:
            wait_until((mount / "control").exists, process, "kdbusfs")
            yield str(mount), process.pid
    finally:
        if os.path.ismount(mount):
            subprocess.run(["umount", "-l", str(mount)], check=False)


@contextlib.contextmanager
def nobody(scratch: Path, programs: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Between the processes of these peers there is only the kernel."""
    yield str(scratch), 0


@dataclasses.dataclass(frozen=True)
class Peer:
    """What one is compiled from, and the daemon between its processes."""

    name: str
    program: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    daemon: Callable[..., Any] = nobody
    needs: str = ""
    """A command, by the name of its Debian package."""


LIBKDBUS = tuple(str(path) for path in sorted((ROOT / "libkdbus" / "src").glob("*.c")))
PEERS = (
    Peer("unix", "unix", ("unix.c",)),
    Peer("mqueue", "queue", ("queue.c",), ("-lrt",)),
    Peer("pipe", "pipe", ("pipe.c",)),
    Peer("dbus-daemon", "dbus", ("dbus.c",), ("-lsystemd",), dbus_daemon, "dbus-daemon"),
    Peer("dbus-broker", "dbus", ("dbus.c",), ("-lsystemd",), dbus_broker, "dbus-broker"),
    Peer("kdbus-lib", "lib", ("kdbus-lib.c", *LIBKDBUS), ("-pthread",), kdbusfs),
    Peer("kdbus-sync", "sync", ("kdbus-raw.c", "../connection.c"), ("-DSYNC",), kdbusfs),
    Peer("kdbus-raw", "raw", ("kdbus-raw.c", "../connection.c"), (), kdbusfs),
)


def compile_program(program: Path, sources: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    compiler = os.environ.get("CC", "cc")
    paths = [str(HERE / "peers" / source) for source in sources]
    include = f"-I{ROOT / 'libkdbus' / 'include'}"
    command = [compiler, *CFLAGS, include, "-o", str(program), *paths, *flags]
    return subprocess.run(command, check=False).returncode == 0


def has_sd_bus() -> bool:
    command = ["pkg-config", "--exists", "libsystemd"]
    return subprocess.run(command, check=False).returncode == 0


def build(scratch: Path, wanted: list[Peer]) -> tuple[list[Peer], dict[str, Path]]:
    """Compile what can be; returns these peers. Who is missing is told, loudly."""
    programs: dict[str, Path] = {}
    there = []
    for peer in wanted:
        if peer.needs and not (shutil.which(peer.needs) and has_sd_bus()):
            print(
                f"peers: {peer.name} IS LEFT OUT: it needs {peer.needs} and libsystemd-dev",
                file=sys.stderr,
            )
            continue
        path = programs.setdefault(peer.program, scratch / f"peer-{peer.program}")
        if not path.exists() and not compile_program(path, ("peer.c", *peer.sources), peer.flags):
            raise PeersError(f"{peer.name} did not compile")
        there.append(peer)
    if any(peer.name == "dbus-broker" for peer in there):
        programs["broker"] = scratch / "broker"
        if not compile_program(programs["broker"], ("broker.c",), ("-lsystemd",)):
            raise PeersError("the controller of dbus-broker did not compile")
    return there, programs


# Measuring


@dataclasses.dataclass
class Results:
    """Of each cell and peer: nanoseconds of each round."""

    times: dict[Cell, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    daemon_times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Nanoseconds of CPU that a daemon takes for one echo of 8 bytes."""

    def add(self, cell: Cell, peer: str, ns: float) -> None:
        self.times.setdefault(cell, {}).setdefault(peer, []).append(ns)

    def median(self, cell: Cell, peer: str) -> float | None:
        rounds = self.times.get(cell, {}).get(peer)
        return statistics.median(rounds) if rounds else None

    def faster_daemon(self, cell: Cell) -> str | None:
        medians = {peer: self.median(cell, peer) for peer in DBUS}
        there = {peer: ns for peer, ns in medians.items() if ns is not None}
        return min(there, key=there.__getitem__) if there else None

    def ratio(self, cell: Cell, peer: str) -> float | None:
        """To the faster of the D-Bus daemons: the median of the ratios of all rounds."""
        rounds = self.times.get(cell, {})
        other = self.faster_daemon(cell)
        if other is None or peer not in rounds:
            return None
        pairs = zip(rounds[peer], rounds[other], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


def cpu_time(pid: int) -> int:
    """Nanoseconds that all threads of a daemon and its children have run."""
    total = 0
    for process in descendants(pid):
        for task in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text().split()[0])
    return total


@dataclasses.dataclass
class Bench:
    """What is there to be measured."""

    peers: list[Peer]
    programs: dict[str, Path]
    daemons: dict[Any, tuple[str, int]]
    ms: int
    cannot: set[tuple[str, Cell]] = dataclasses.field(default_factory=set)

    def sample(self, peer: Peer, cell: Cell, results: Results) -> None:
        if (peer.name, cell) in self.cannot:
            return
        address, daemon = self.daemons[peer.daemon]
        before = cpu_time(daemon) if daemon else 0
        command = [self.programs[peer.program], cell.operation, address, cell.n, self.ms]
        with started(command, stdout=subprocess.PIPE) as process:
            try:
                output, _ = process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                raise PeersError(f"{peer.name}: {cell.label}: takes too long") from None
        if process.returncode == CANNOT:
            self.cannot.add((peer.name, cell))
        elif process.returncode:
            raise PeersError(f"{peer.name}: {cell.label}: ended with {process.returncode}")
        else:
            ns, n_operations = output.split()
            results.add(cell, peer.name, float(ns))
            if daemon and (cell.operation, cell.n) == ("echo", 8):
                taken = (cpu_time(daemon) - before) / int(n_operations)
                results.daemon_times.setdefault(peer.name, []).append(taken)

    def measure(self, cells: list[Cell], rounds: int, results: Results) -> None:
        """All peers in turn, round after round; the next round begins with another peer."""
        for number in range(rounds):
            for cell in cells:
                first = number % len(self.peers)
                for peer in self.peers[first:] + self.peers[:first]:
                    self.sample(peer, cell, results)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)


# Machine


def busy_seconds() -> float:
    """CPU time of the whole machine, without what was idle or waited."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


@dataclasses.dataclass
class Load:
    """What else the machine did; read when all that was started here has ended."""

    before: float = dataclasses.field(default_factory=lambda: os.getloadavg()[0])
    start: float = dataclasses.field(default_factory=time.monotonic)
    busy: float = dataclasses.field(default_factory=busy_seconds)
    own: float = dataclasses.field(default_factory=own_seconds)

    def text(self) -> str:
        others = busy_seconds() - self.busy - (own_seconds() - self.own)
        share = max(0.0, others) / (time.monotonic() - self.start)
        return (
            f"load average {self.before:.1f} before and {os.getloadavg()[0]:.1f} after; "
            f"others took {share:.2f} CPUs of {os.cpu_count()}"
        )


def output_of(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "missing"
    return (result.stdout.splitlines() or ["unknown"])[0]


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{os.cpu_count()} x {model[0] if model else platform.machine()}",
        "kernel": platform.release(),
        "dbus-daemon": output_of("dbus-daemon", "--version").split()[-1],
        "dbus-broker": output_of("dbus-broker", "--version").split()[-1],
        "python": platform.python_version(),
        "kdbusfs": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


# Output


def number_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def times_table(results: Results, names: list[str]) -> Iterator[str]:
    """Microseconds, as a table of Markdown."""
    yield "| operation, µs | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for cell in results.times:
        values = [results.median(cell, name) for name in names]
        texts = [number_text(None if ns is None else ns / 1000) for ns in values]
        yield f"| {cell.label} | " + " | ".join(texts) + " |"


def ratio_texts(results: Results, cell: Cell) -> Iterator[str]:
    for peer, goal in zip(KDBUS, cell.goals, strict=True):
        ratio = results.ratio(cell, peer)
        text = number_text(ratio)
        if ratio is not None and goal is not None:
            text += f" ({goal:.2g}{'' if ratio <= goal else ', missed'})"
        yield text


def ratios_table(results: Results) -> Iterator[str]:
    yield "| time, in those of the faster D-Bus daemon (goal) | " + " | ".join(KDBUS) + " |"
    yield "|---|" + "---|" * len(KDBUS)
    for cell in results.times:
        if results.faster_daemon(cell):
            yield f"| {cell.label} | " + " | ".join(ratio_texts(results, cell)) + " |"


def daemon_table(results: Results) -> Iterator[str]:
    yield "| CPU time of the daemon for one echo of 8 B | µs |"
    yield "|---|---|"
    for peer, rounds in results.daemon_times.items():
        yield f"| {peer} | {number_text(statistics.median(rounds) / 1000)} |"


def ratios_of(results: Results) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for cell in results.times:
        ratios = {peer: results.ratio(cell, peer) for peer in KDBUS}
        there = {peer: round(ratio, 3) for peer, ratio in ratios.items() if ratio is not None}
        if there:
            found[cell.label] = there
    return found


def worse_than(stored: dict[str, Any], results: Results) -> dict[Cell, str]:
    """The cells with a ratio that is worse than the stored one by more than a third."""
    worse: dict[Cell, str] = {}
    for cell in results.times:
        for peer, before in stored["ratios"].get(cell.label, {}).items():
            now = results.ratio(cell, peer)
            if now is not None and now > before * WORSE:
                told = worse.get(cell)
                text = f"{peer} {now:.2f} times the faster D-Bus daemon, {before:.2f} stored"
                worse[cell] = f"{told}; {text}" if told else f"{cell.label}: {text}"
    return worse


def report(results: Results, names: list[str], load: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": machine(),
        "load": load,
        "ratios": ratios_of(results),
        "microseconds": {
            cell.label: {
                name: round(ns / 1000, 2)
                for name in names
                if (ns := results.median(cell, name)) is not None
            }
            for cell in results.times
        },
        "daemon_microseconds": {
            peer: round(statistics.median(rounds) / 1000, 2)
            for peer, rounds in results.daemon_times.items()
        },
    }


# All of it


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time kdbusfs beside other message carriers.")
    names = ",".join(peer.name for peer in PEERS)
    operations = ",".join(dict.fromkeys(cell.operation for cell in TABLE + GROWTH))
    parser.add_argument("--peers", default=names, help="comma separated (%(default)s)")
    parser.add_argument("--operations", default=operations, help="comma separated (%(default)s)")
    parser.add_argument("--all", action="store_true", help="also what only the plots show")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--ms", type=int, default=100, help="of a peer in a round (%(default)s)")
    parser.add_argument("--cpu", type=int, help="CPU to run all of it on (the last one)")
    parser.add_argument("--kdbusfs", type=Path, default=ROOT / ".venv" / "bin" / "kdbusfs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw the plots there")
    parser.add_argument("--store", action="store_true", help=f"keep the ratios in {STORED.name}")
    parser.add_argument(
        "--check", action="store_true", help=f"fail if one is a third worse than in {STORED.name}"
    )
    return parser.parse_args()


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    cells = TABLE + (MORE + GROWTH if arguments.all or arguments.plots else ())
    wanted = arguments.operations.split(",")
    return sorted(
        (cell for cell in cells if cell.operation in wanted),
        key=lambda cell: (wanted.index(cell.operation), cell.n),
    )


def measure(arguments: argparse.Namespace) -> tuple[Results, list[str], list[str]]:
    """Returns the results, the names of the peers, and which ratios are worse."""
    results = Results()
    worse: dict[Cell, str] = {}
    wanted = [peer for peer in PEERS if peer.name in arguments.peers.split(",")]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdbusfs-peers-")))
        scratch.chmod(0o755)  # other users connect, too
        peers, programs = build(scratch, wanted)
        programs["kdbusfs"] = arguments.kdbusfs.absolute()
        daemons = {
            daemon: stack.enter_context(daemon(scratch, programs))
            for daemon in dict.fromkeys(peer.daemon for peer in peers)
        }
        bench = Bench(peers, programs, daemons, arguments.ms)
        bench.measure(cells_of(arguments), arguments.rounds, results)
        if arguments.check:
            stored = json.loads(STORED.read_text())
            worse = worse_than(stored, results)
            if worse:  # once more: what was chance does not come twice
                again = Results()
                bench.measure(list(worse), 2 * arguments.rounds, again)
                worse = worse_than(stored, again)
    return results, [peer.name for peer in peers], list(worse.values())


def write_report(arguments: argparse.Namespace, results: Results, told: dict[str, Any]) -> None:
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    if arguments.json:
        arguments.json.write_text(text)
    if arguments.store:
        kept = {name: told[name] for name in ("date", "machine", "load", "ratios")}
        STORED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    if arguments.plots:
        from plots import draw

        draw(told["microseconds"], arguments.plots)


def main() -> int:
    arguments = parse_arguments()
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus) if arguments.cpu is None else arguments.cpu})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    load = Load()
    try:
        results, names, worse = measure(arguments)
    except (PeersError, OSError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    told = report(results, names, load.text())
    for table in (times_table(results, names), ratios_table(results), daemon_table(results)):
        print("\n".join(table), end="\n\n")
    print(told["load"])
    write_report(arguments, results, told)
    for line in worse:
        print(f"worse by more than a third: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
