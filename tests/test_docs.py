# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation names things that exist, and its examples run."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import daemons

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@cache
def functions(path: Path) -> set[str]:
    """All functions of a Python file, and what it calls Test..., which may be made by a model."""
    text = path.read_text() if path.is_file() else ""
    found = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    return found | set(re.findall(r"^(Test\w+) = ", text, re.MULTILINE))


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


def example(language: str) -> str:
    """The program in *language* in docs/libkdbus.md."""
    text = (ROOT / "docs" / "libkdbus.md").read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.one_pool
def test_the_example_in_c_runs(mount: daemons.Mount, tmp_path: Path) -> None:
    library = ROOT / "libkdbus"
    source, program = tmp_path / "upper.c", tmp_path / "upper"
    source.write_text(example("c"))
    warnings = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
    sources = (source, *sorted((library / "src").glob("*.c")))
    include = ("-D_GNU_SOURCE", f"-I{library / 'include'}", "-pthread")
    subprocess.run(["cc", *warnings, *include, "-o", program, *sources], check=True)
    run = subprocess.run([program, mount.path], capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (0, "FOOBAR\n", "")


@pytest.mark.one_pool
def test_the_example_in_python_runs(mount: daemons.Mount) -> None:
    run = subprocess.run(
        [sys.executable, "-c", example("python"), mount.path],
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = f"called by uid {os.geteuid()}\nFOOBAR\nsignal: colour\n"
    assert (run.returncode, run.stdout, run.stderr) == (0, said, "")
