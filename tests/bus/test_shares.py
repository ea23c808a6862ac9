# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one user may have the daemon keep: all of it is charged, bounded, and given back."""

from errno import EEXIST, EMFILE, ENOMEM, EXFULL

import pytest

from abi_client.building import access, mask
from bus.fakes import FakePeer
from bus.harness import Bus, FakeDomain, fails
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import ListFlag, NameFlag, PolicyAccess, PolicyType
from kdbusfs.bus.shares import Budget, Share

ALICE, BOB = 1000, 1001


def owner(uid: int) -> FakePeer:
    """A user that counts as the bus's owner, so that policy is in nobody's way."""
    return FakePeer(uid, ipc_owner=True)


def budget(bus: Bus) -> Budget:
    return bus.domain.core.budget


def test_a_user_has_a_third_of_what_others_leave_and_a_quarter_is_for_root() -> None:
    share = Share("things", EMFILE, total=16, most=3)
    share.charge(ALICE, 3)
    with pytest.raises(CommandError) as refused:
        share.charge(ALICE, 1)
    assert refused.value.errno == EMFILE
    share.charge(BOB, 3)
    share.charge(1002, 2)
    with pytest.raises(CommandError):
        share.charge(1002, 1)
    share.charge(0, 8)
    with pytest.raises(CommandError):
        share.charge(0, 1)
    share.check()
    for uid, n in ((ALICE, 3), (BOB, 3), (1002, 2), (0, 8)):
        assert share.taken(uid) == n
        share.discharge(uid, n)
    share.check_empty()


def test_more_than_was_taken_can_not_be_given_back() -> None:
    share = Share("things", EMFILE, 3, 3)
    share.charge(ALICE, 1)
    with pytest.raises(AssertionError):
        share.discharge(ALICE, 2)


def test_the_names_of_a_user_are_charged(bus: Bus) -> None:
    client = bus.hello(peer=owner(ALICE))
    before = budget(bus).memory.taken(ALICE)
    client.acquire("com.example.a")
    one = budget(bus).memory.taken(ALICE) - before
    budget(bus).memory.most = before + one + one // 2
    with fails(ENOMEM):
        client.acquire("com.example.b")
    client.release("com.example.a")
    assert budget(bus).memory.taken(ALICE) == before
    client.acquire("com.example.b")


def test_who_waits_for_a_name_is_charged_and_who_only_asked_is_not(bus: Bus) -> None:
    bus.hello(peer=owner(BOB)).acquire("com.example.a")
    client = bus.hello(peer=owner(ALICE))
    with fails(EEXIST):
        client.acquire("com.example.a")
    assert budget(bus).memory.taken(ALICE) == 0
    client.acquire("com.example.a", NameFlag.QUEUE)
    assert budget(bus).memory.taken(ALICE) > 0
    client.acquire("com.example.a")  # leaves the queue
    assert budget(bus).memory.taken(ALICE) == 0


def test_matches_are_charged_by_number_and_by_size(bus: Bus) -> None:
    client, other = bus.hello(peer=owner(ALICE)), bus.hello(peer=owner(ALICE))
    budget(bus).matches.most = 2
    client.match(mask([1]))
    other.match(mask([2]))
    with fails(EMFILE):
        client.match(mask([3]))
    budget(bus).matches.most = 100
    budget(bus).memory.most = budget(bus).memory.taken(ALICE) + 1
    with fails(ENOMEM):
        client.match(mask([3]))
    assert budget(bus).matches.taken(ALICE) == 2
    client.close()
    assert budget(bus).matches.taken(ALICE) == 1
    other.match(mask([3]))


def test_a_policy_is_charged(bus: Bus) -> None:
    lines = [access(PolicyType.USER, PolicyAccess.TALK, uid) for uid in range(50)]
    before = budget(bus).memory.taken(ALICE)
    holder = bus.holder("com.example.a", *lines, peer=owner(ALICE))
    charged = budget(bus).memory.taken(ALICE) - before
    assert charged > 50 * 24
    budget(bus).memory.most = before + charged + 10
    with fails(ENOMEM):
        bus.holder("com.example.b", *lines, peer=owner(ALICE))
    holder.close()
    assert budget(bus).memory.taken(ALICE) == before


def test_copies_for_messages_that_may_move_are_charged_to_their_sender(bus: Bus) -> None:
    bus.activator("com.example.a", peer=owner(ALICE))
    receiver, sender = bus.hello(peer=owner(ALICE)), bus.hello(peer=owner(ALICE))
    receiver.acquire("com.example.a")
    before = budget(bus).memory.taken(ALICE)
    sender.send("com.example.a", data=bytes(1000))
    assert budget(bus).memory.taken(ALICE) > before + 1000
    budget(bus).memory.most = budget(bus).memory.taken(ALICE) + 500
    with fails(ENOMEM):
        sender.send("com.example.a", data=bytes(1000))
    receiver.recv()
    assert budget(bus).memory.taken(ALICE) == before


def test_a_pool_is_charged_as_far_as_it_has_been_in_use(bus: Bus) -> None:
    pools = budget(bus).pools
    client = bus.hello(peer=owner(ALICE), pool_size=1 << 24)
    first = pools.taken(ALICE)
    assert 0 < first < 1 << 20
    client.send(client, data=bytes(1 << 20))
    client.recv()
    full = pools.taken(ALICE)
    assert full >= 1 << 20
    client.send(client, data=bytes(1 << 10))
    pools.most = full
    with fails(EXFULL):
        client.send(client, data=bytes(1 << 21))
    assert pools.taken(ALICE) == full
    client.close()
    assert pools.taken(ALICE) == 0


@pytest.mark.parametrize(("share", "error"), [("addresses", ENOMEM), ("pools", EXFULL)])
def test_a_connection_that_its_user_has_no_share_for_leaves_nothing(
    domain: FakeDomain, share: str, error: int
) -> None:
    bus = domain.make_bus()
    of: Share = getattr(domain.core.budget, share)
    n_before = len(bus.hello(peer=owner(BOB)).list(ListFlag.UNIQUE))
    of.most = 0
    with fails(error):
        bus.hello(peer=owner(ALICE))
    assert of.taken(ALICE) == 0
    of.most = 1 << 40
    assert len(bus.hello(peer=owner(BOB)).list(ListFlag.UNIQUE)) == n_before + 1


def test_root_has_no_share_but_all_that_is_left(bus: Bus) -> None:
    budget(bus).matches.most = 0
    bus.hello(peer=owner(0)).match(mask([1]))
    assert budget(bus).matches.taken(0) == 1
