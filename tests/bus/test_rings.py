# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing refers to itself in a ring: a connection is freed, pool and all, when its file is closed,
not when the collector comes by."""

import gc
from collections.abc import Callable

import pytest

from abi_client.building import mask
from bus.harness import Bus, FakeDomain
from kdbusfs.abi.numbers import ListFlag
from kdbusfs.bus.bus import Bus as CoreBus
from kdbusfs.bus.connection import Connection, QueueEntry
from kdbusfs.bus.pool import Pool
from kdbusfs.bus.reply import Reply


def lists(bus: Bus) -> None:
    nameless, named = bus.hello(), bus.hello()
    named.acquire("a.a")
    nameless.list(ListFlag.UNIQUE | ListFlag.NAMES)


def moves_mail(bus: Bus) -> None:
    bus.activator("a.a")
    sender, owner = bus.hello(), bus.hello()
    sender.send("a.a", data=b"before")
    owner.acquire("a.a")
    sender.send("a.a", data=b"after")
    owner.release("a.a")


def broadcasts(bus: Bus) -> None:
    bus.monitor()
    receiver = bus.hello()
    receiver.match(mask([1]))
    bus.hello().broadcast()
    bus.endpoint()


@pytest.mark.parametrize("closes_bus_first", [True, False])
@pytest.mark.parametrize("scenario", [lists, moves_mail, broadcasts])
def test_nothing_waits_for_the_collector(
    scenario: Callable[[Bus], None], closes_bus_first: bool
) -> None:
    gc.collect()
    kinds = (CoreBus, Connection, Pool, QueueEntry, Reply)
    # Other tests may have left some, to which these can't belong.
    before = [o for o in gc.get_objects() if isinstance(o, kinds)]
    gc.disable()
    try:
        domain = FakeDomain()
        scenario(domain.make_bus())
        if not closes_bus_first:
            domain.files.reverse()
        domain.end()
        # The harness keeps its files and calls, as nobody else does.
        for file in domain.files:
            file.__dict__.clear()
        del domain
        known = {id(o) for o in before}
        left = [o for o in gc.get_objects() if isinstance(o, kinds) and id(o) not in known]
        assert not left
    finally:
        gc.enable()
