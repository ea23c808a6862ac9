# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain and a bus for each test; what must always hold is asserted after every command, and
at the end that nothing is left behind."""

from collections.abc import Iterator

import pytest

from bus.harness import Bus, FakeDomain


@pytest.fixture
def domain() -> Iterator[FakeDomain]:
    domain = FakeDomain()
    yield domain
    domain.check()
    domain.end()


@pytest.fixture
def bus(domain: FakeDomain) -> Bus:
    """A bus of uid 1000."""
    return domain.make_bus()
