# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation names things that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@cache
def functions(path: Path) -> set[str]:
    """All functions of a Python file."""
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def anchors(path: Path) -> set[str]:
    """What `#...` may point at: headings in lower case, punctuation left out."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_tests_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(tests/[\w/.-]+)::(\w+)", page.read_text())
    missing = [f"{file}::{name}" for file, name in named if name not in functions(ROOT / file)]
    assert not missing


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_behaviour_has_a_test_or_a_reason() -> None:
    lines = (ROOT / "docs" / "conformance.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    rows = [row for row in rows if row[0] not in ("Behaviour", "---")]
    assert len(rows) > 500
    assert all(len(row) == 3 for row in rows)
    assert not [row for row in rows if "::" not in row[1] and not row[2]]
