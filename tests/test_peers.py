# SPDX-License-Identifier: LGPL-2.1-or-later
"""What bench/peers.py makes of its figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

import peers

pytestmark = pytest.mark.one_pool

ECHO = peers.TABLE[0]


def results_of(**rounds: list[float]) -> Any:
    results = peers.Results()
    for peer, times in rounds.items():
        for ns in times:
            results.add(ECHO, peer.replace("_", "-"), ns)
    return results


def test_ratios_are_to_the_faster_daemon_within_each_round() -> None:
    results = results_of(
        dbus_daemon=[90.0, 900.0, 90.0], dbus_broker=[50.0, 500.0, 40.0], kdbus_lib=[100, 1000, 80]
    )
    assert results.faster_daemon(ECHO) == "dbus-broker"
    assert results.ratio(ECHO, "kdbus-lib") == 2.0


def test_there_is_no_ratio_without_a_daemon() -> None:
    assert results_of(kdbus_lib=[100.0], unix=[10.0]).ratio(ECHO, "kdbus-lib") is None


@pytest.mark.parametrize(("before", "is_worse"), [(1.51, False), (1.49, True)])
def test_a_ratio_that_is_worse_by_more_than_a_third_is_told(before: float, is_worse: bool) -> None:
    results = results_of(dbus_broker=[50.0], kdbus_lib=[100.0])
    stored = {"ratios": {ECHO.label: {"kdbus-lib": before}}}
    assert bool(peers.worse_than(stored, results)) is is_worse


def test_every_operation_of_the_table_has_a_stored_ratio() -> None:
    stored = json.loads(peers.STORED.read_text())["ratios"]
    assert {cell.label for cell in peers.TABLE} <= set(stored)
