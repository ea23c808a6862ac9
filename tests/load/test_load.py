# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many connections, many buses, many messages: nothing that was accepted is lost, nothing comes
twice, and the daemon is afterwards as it was before.

KDBUSFS_LOAD_MESSAGES scales it (docs/load.md has the figures of a million); -s shows figures.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import daemons
import volume
from programs import once

MESSAGES = int(os.environ.get("KDBUSFS_LOAD_MESSAGES", "40000"))
"""In all, on each kind of pool: so many to and fro in a crowd and on many buses, the rest in a
flood."""
IN_CROWD = MESSAGES * 45 // 100
ON_BUSES = MESSAGES * 45 // 100
IN_FLOOD = MESSAGES - IN_CROWD - ON_BUSES
CONNECTIONS = 1000
SECONDS = 120 + MESSAGES // 1000
MORE_MEMORY = 24 << 20
"""Room that an interpreter keeps after it had a thousand connections; however many messages."""

pytestmark = [pytest.mark.timeout(SECONDS + 60)]


class Load:
    """The program that makes the load, and the daemon that takes it."""

    def __init__(self, program: Path, mount: daemons.Mount) -> None:
        self._program = program
        self._mount = mount
        self._before = volume.Footprint.of(mount)

    def run(self, *arguments: str | int) -> dict[str, Any]:
        """Do one thing, and hold the daemon against its beginnings when it is over."""
        result = volume.run(SECONDS, self._program, self._mount.path, *arguments)
        rate = result["messages"] / max(result["seconds"], 0.01)
        now = volume.check_nothing_is_left(self._mount, self._before, MORE_MEMORY)
        print(*arguments, self._mount.pool, result, f"{rate:.0f}/s")
        print(self._before, now)
        return result


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""

    def build(directory: Path) -> None:
        volume.compile_program(directory / "load", Path(__file__).parent / "load.c")

    return once(tmp_path_factory, "load", build) / "load"


@pytest.fixture(scope="module", params=daemons.POOL_KINDS)
def load(request: pytest.FixtureRequest, program: Path) -> Iterator[Load]:
    """A load on one daemon, which lives through all of them."""
    with volume.public_mount(request.param) as mount:
        yield Load(program, mount)


def test_a_thousand_connections_talk_to_each_other(load: Load) -> None:
    assert load.run("crowd", CONNECTIONS, IN_CROWD)["messages"] == IN_CROWD


def test_ten_users_have_ten_buses_each_and_no_more_than_they_may(load: Load) -> None:
    result = load.run("buses", ON_BUSES)
    assert result["messages"] == ON_BUSES
    assert result["connections"] == 1000


def test_senders_that_are_faster_than_their_receiver_are_refused_and_lose_nothing(
    load: Load,
) -> None:
    result = load.run("flood", IN_FLOOD)
    assert result["messages"] == IN_FLOOD
    assert result["refused"]


def test_receivers_that_never_read_are_in_nobodys_way(load: Load) -> None:
    assert load.run("deaf")["refused"] == 100


def test_nobody_is_left_when_all_are_killed_at_once(load: Load) -> None:
    assert load.run("massacre", CONNECTIONS, IN_FLOOD)["messages"] >= IN_FLOOD
