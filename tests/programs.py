# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs in C that tests need: compiled once in each run, however many processes it has."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The directory *name* of this run, as the first test process that asks for it has filled it
    by *build*."""
    run = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    directory = run / name
    with (run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = factory.mktemp(name)
            build(unfinished)
            unfinished.rename(directory)
    return directory
