# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for every room. What needs no mount asks for none."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import daemons

# How long an example takes says more about the machine than about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that uses `mount` runs on both kinds of pool, unless it is marked `one_pool`."""
    if "mount" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("one_pool")
        kinds = [daemons.usual_pool()] if one else daemons.POOL_KINDS
        metafunc.parametrize("mount", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def mount(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[daemons.Mount]:
    """A mounted domain, one for all tests with the same kind of pool."""
    with daemons.running(tmp_path_factory.mktemp("domain"), request.param) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_fault_in_the_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blame the test during which the daemon of `mount` logged a fault or ended."""
    if "mount" not in request.fixturenames:
        yield
        return
    running: daemons.Mount = request.getfixturevalue("mount")
    before = len(running.faults())
    yield
    assert running.process.poll() is None, "the daemon has ended"
    faults = running.faults()[before:]
    assert not faults, faults
