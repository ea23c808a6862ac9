# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mount under fire: whatever callers do, the bus goes on, and forgets them when they go.

`make fuzz TIME=seconds` runs it for longer; SEED=number repeats a run. What it finds it names by
seed, worker and episode: `fuzz MOUNT BUS SECONDS SEED WORKER EPISODE` repeats that alone.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import daemons
import volume
from programs import once

HERE = Path(__file__).parent
SECONDS = int(os.environ.get("KDBUSFS_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("KDBUSFS_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)
USERS = (0, 65534, 60001, 60002)
"""Those that the fuzzer becomes."""
MORE_MEMORY = 16 << 20
"""Room that an interpreter under load may keep. Ten times as many calls keep no more."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are."""

    def build(where: Path) -> None:
        sources = (HERE / f"{name}.c" for name in ("fuzz", "action", "build"))
        volume.compile_program(where / "fuzz", *sources)
        volume.compile_program(where / "watchdog", HERE / "watchdog.c")
        volume.compile_program(where / "shares", volume.SHARES)

    return once(tmp_path_factory, "fuzz", build)


@contextmanager
def watched(watchdog: Path, mount: daemons.Mount) -> Iterator[Path]:
    """A bus whose messages are checked. Its directory; what it found is printed."""
    process = subprocess.Popen(
        [watchdog, mount.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert path, process.communicate()
        yield Path(path).parent
        output, errors = process.communicate(timeout=daemons.DEADLINE_SECONDS)
        assert process.returncode == 0, errors
        print("watchdog:", output)
        assert json.loads(output)["sent"] > 0
    finally:
        process.kill()
        process.communicate()


def check_reach(killed: int, results: dict[str, dict[str, int]]) -> None:
    """A fuzzer that is turned away at the door finds nothing, nor does one that is too polite."""
    assert killed
    for command, counts in results.items():
        assert counts["0"], command
        assert len(counts) > 3, command


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
def test_the_bus_survives_a_fuzzer_and_nothing_of_it_stays(pool: str, programs: Path) -> None:
    seconds = max(SECONDS // len(daemons.POOL_KINDS), 1)
    print(f"{seconds} s on {pool} pools with seed {SEED}")
    with volume.public_mount(pool) as mount:
        # Once before as well, so that the daemon has seen a crowd when it is weighed.
        volume.run(60, programs / "shares", mount.path, USERS[0])
        before = volume.Footprint.of(mount)
        with watched(programs / "watchdog", mount) as bus:
            result = volume.run(seconds + 60, programs / "fuzz", mount.path, bus, seconds, SEED)
        print("fuzzer:", json.dumps(result))
        now = volume.check_nothing_is_left(mount, before, MORE_MEMORY)
        print("daemon:", before, now)
        assert not result["report"]
        if SECONDS >= 20:
            check_reach(result["killed"], result["results"])
        for uid in USERS:
            volume.run(60, programs / "shares", mount.path, uid)
        volume.check_nothing_is_left(mount, before, MORE_MEMORY)
