# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain and a bus for each test; what must always hold is asserted after every command, and
at the end that nothing is left behind. Tests marked `also_mounted` run on a real mount as well."""

from collections.abc import Iterator

import pytest

import daemons
from bus import mounted
from bus.harness import Bus, FakeDomain


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("also_mounted"):
        metafunc.parametrize("bus", ["core", "mounted"], indirect=True)


@pytest.fixture
def domain() -> Iterator[FakeDomain]:
    domain = FakeDomain()
    yield domain
    domain.check()
    domain.end()


@pytest.fixture(scope="session")
def mounted_domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Mount]:
    """A mount for all tests of the core that run on one."""
    with daemons.running(tmp_path_factory.mktemp("core"), daemons.usual_pool()) as running:
        yield running


@pytest.fixture
def bus(request: pytest.FixtureRequest) -> Iterator[Bus | mounted.Bus]:
    """A bus of uid 1000, or on a mount one of whoever runs the tests."""
    if getattr(request, "param", "core") == "core":
        yield request.getfixturevalue("domain").make_bus()
        return
    bus = mounted.Bus(request.getfixturevalue("mounted_domain").path)
    yield bus
    bus.close()
