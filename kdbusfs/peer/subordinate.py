# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has subordinate ids: subuid(5)."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

SUBUID = Path("/etc/subuid")
_MOST_BYTES = 1 << 20


def read_ranges(path: Path = SUBUID) -> list[tuple[int, int]]:
    """First id and number of each range; none where there is no such file. Lines that make no sense
    are passed over."""
    try:
        with path.open("rb") as file:
            lines = file.read(_MOST_BYTES).splitlines()
    except OSError as error:
        log.debug("no subordinate ids: %s", error)
        return []
    ranges = []
    for line in lines:
        fields = line.strip().split(b":")
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            ranges.append((int(fields[1]), int(fields[2])))
    return ranges
