# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw what peers.py measured, as SVG.

pygal does it: it writes SVG by itself, in Python alone, and needs nothing else;
matplotlib would bring a hundred megabytes for three drawings. It is of the
dependency group `bench` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pygal

Times = dict[str, dict[str, float]]
"""Microseconds by the label of an operation and the name of a peer."""

LATENCY = re.compile(r"echo (\d+ (?:B|KiB|MiB))")
RECEIVERS = re.compile(r"broadcast to (\d+)")
GROWTH = re.compile(r"echo 8 B beside ([\d,]+) (connections|names|matches)")


def series_of(
    times: Times, pattern: re.Pattern[str], value: Callable[[str, float], float]
) -> tuple[list[str], dict[str, list[float | None]]]:
    """What matches, in the order measured: the labels, and the values of each peer."""
    found = {match[1]: times[match[0]] for label in times if (match := pattern.fullmatch(label))}
    peers = dict.fromkeys(peer for row in found.values() for peer in row)
    return list(found), {
        peer: [value(x, row[peer]) if peer in row else None for x, row in found.items()]
        for peer in peers
    }


COLORS = {
    "unix": "#1f77b4",
    "mqueue": "#17becf",
    "pipe": "#7fb3d5",
    "dbus-daemon": "#d62728",
    "dbus-broker": "#ff7f0e",
    "kdbus-lib": "#2ca02c",
    "kdbus-sync": "#8c9a2b",
    "kdbus-raw": "#111111",
}
"""Blues for what has no daemon, reds for D-Bus, greens and black for kdbus."""


def draw_chart(
    path: Path, title: str, titles: tuple[str, str], labels: list[str], series: dict[str, list]
) -> None:
    chart = pygal.Line(
        pygal.Config(
            js=[],
            width=760,
            height=440,
            legend_at_bottom=False,
            dots_size=2,
        ),
        title=title,
        x_title=titles[0],
        y_title=titles[1],
        logarithmic=True,
        style=pygal.style.Style(
            colors=[COLORS[peer] for peer in series],
            background="white",
            plot_background="white",
            font_family="sans-serif",
        ),
    )
    chart.uuid = path.stem  # else it differs each time, and with it the file
    chart.x_labels = labels
    there = [value for values in series.values() for value in values if value is not None]
    marks = [mark * 10**power for power in range(-2, 7) for mark in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= min(there))
    high = min(mark for mark in marks if mark >= max(there))
    chart.y_labels = [mark for mark in marks if low <= mark <= high]
    for peer, values in series.items():
        chart.add(peer, values)
    path.write_bytes(chart.render() + b"\n")


def draw(times: Times, directory: Path) -> None:
    """latency.svg, broadcast.svg, and one of growth for each of what can be many."""
    directory.mkdir(parents=True, exist_ok=True)
    labels, series = series_of(times, LATENCY, lambda x, us: us)
    draw_chart(
        directory / "latency.svg", "Call and answer", ("bytes each way", "µs"), labels, series
    )
    labels, series = series_of(times, RECEIVERS, lambda x, us: int(x) / us * 1000)
    draw_chart(
        directory / "broadcast.svg",
        "Broadcast of 64 B",
        ("receivers", "thousand deliveries a second"),
        labels,
        series,
    )
    for what in ("connections", "names", "matches"):
        pattern = re.compile(GROWTH.pattern.replace("(connections|names|matches)", what))
        labels, series = series_of(times, pattern, lambda x, us: us)
        if labels:
            draw_chart(
                directory / f"growth-{what}.svg",
                f"Call and answer of 8 B beside other {what}",
                (what, "µs"),
                labels,
                series,
            )
