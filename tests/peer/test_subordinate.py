# SPDX-License-Identifier: LGPL-2.1-or-later
"""subuid(5), as it is found."""

from pathlib import Path

import pytest

from kdbusfs.peer.subordinate import read_ranges


@pytest.mark.parametrize(
    ("content", "ranges"),
    [
        (b"", []),
        (b"alice:100000:65536\n1001:165536:65536\n", [(100000, 65536), (165536, 65536)]),
        (b"# none\n\nalice\nalice::\nalice:x:1\na:b:c:d\nalice:-5:10\n", []),
        (b"alice:\xff:1\n\0\0\nbob:7:8", [(7, 8)]),
    ],
)
def test_lines_that_make_no_sense_are_passed_over(
    tmp_path: Path, content: bytes, ranges: list[tuple[int, int]]
) -> None:
    path = tmp_path / "subuid"
    path.write_bytes(content)
    assert read_ranges(path) == ranges


def test_there_need_be_no_such_file(tmp_path: Path) -> None:
    assert read_ranges(tmp_path / "subuid") == []
    assert read_ranges(tmp_path) == []
