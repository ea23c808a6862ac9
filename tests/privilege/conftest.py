# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for tests with several users and namespaces on a real mount."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import daemons
from kdbusfs.abi.numbers import MakeFlag
from mount.raw import Bus
from privilege.people import Person

NewPerson = Callable[..., Person]


@pytest.fixture
def bus(mount: daemons.Mount) -> Iterator[Bus]:
    """A bus of root's that everybody may use, gone after the test."""
    with Bus(mount.path, flags=MakeFlag.ACCESS_WORLD) as bus:
        yield bus


@pytest.fixture
def person(mount: daemons.Mount) -> Iterator[NewPerson]:
    """Makes people (`people.Person`) who stand in the mount's root."""
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Person:
            return stack.enter_context(Person(mount.path, *args, **options))

        yield make
