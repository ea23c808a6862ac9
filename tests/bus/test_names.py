# SPDX-License-Identifier: LGPL-2.1-or-later
"""Well-known names: who owns them, who waits, what is said about it, and which mail follows."""

from errno import (
    E2BIG,
    EADDRINUSE,
    EBADSLT,
    EEXIST,
    EINVAL,
    EPERM,
    EPIPE,
    ESRCH,
    ETIMEDOUT,
    EXFULL,
)
from typing import Any

import pytest

from abi_client.building import access, fds, name, vec
from abi_client.verbs import SECOND
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, fails
from kdbusfs.abi.numbers import HelloFlag, ItemType, NameFlag, PolicyAccess, PolicyType

I = ItemType  # noqa: E741
A, B = "com.example.a", "com.example.b"
REPLACE, ALLOW, QUEUE, IN_QUEUE, ACTIVATOR, PRIMARY, ACQUIRED = NameFlag


@pytest.fixture
def watcher(bus: Bus) -> Client:
    """Takes every notification."""
    client = bus.hello()
    client.match()
    return client


def added(who: Client, flags: int, string: str = A) -> tuple[Any, ...]:
    return (I.NAME_ADD, string, (0, 0), (who.id, flags))


def removed(who: Client, flags: int, string: str = A) -> tuple[Any, ...]:
    return (I.NAME_REMOVE, string, (who.id, flags), (0, 0))


def passed(
    old: Client, old_flags: int, new: Client, new_flags: int, string: str = A
) -> tuple[Any, ...]:
    return (I.NAME_CHANGE, string, (old.id, old_flags), (new.id, new_flags))


def two(bus: Bus, watcher: Client) -> tuple[Client, Client]:
    first, second = bus.hello(), bus.hello()
    watcher.inbox()
    return first, second


def queue_of(bus: Bus, string: str = A) -> list[tuple[int, int]]:
    """(id, flags) of all claims: the queue, then the activator."""
    entry = bus.core.names.entries.get(string.encode())
    if entry is None:
        return []
    claims = entry.queue + ([entry.activator] if entry.activator else [])
    return [(c.connection.id, c.flags) for c in claims]


# --- ACQUIRE, case by case


@pytest.mark.parametrize("flags", range(8))
def test_a_free_name_is_acquired(bus: Bus, watcher: Client, flags: int) -> None:
    first, _ = two(bus, watcher)
    kept = flags & (ALLOW | QUEUE)
    assert first.acquire(A, flags) == kept | PRIMARY | ACQUIRED
    assert watcher.notifications() == [added(first, kept | PRIMARY)]
    assert queue_of(bus) == [(first.id, kept | PRIMARY)]


@pytest.mark.parametrize("flags", range(8))
def test_an_activators_name_is_taken_over_without_any_flag(
    bus: Bus, watcher: Client, flags: int
) -> None:
    activator = bus.activator(A)
    first, _ = two(bus, watcher)
    kept = flags & (ALLOW | QUEUE)
    assert first.acquire(A, flags) == kept | PRIMARY | ACQUIRED
    assert watcher.notifications() == [passed(activator, 0x30, first, kept | PRIMARY)]
    assert queue_of(bus) == [(first.id, kept | PRIMARY), (activator.id, ACTIVATOR | IN_QUEUE)]


@pytest.mark.parametrize("flags", range(8))
def test_acquiring_ones_own_name_again_changes_its_flags_in_silence(
    bus: Bus, watcher: Client, flags: int
) -> None:
    first, _ = two(bus, watcher)
    first.acquire(A, ALLOW)
    watcher.inbox()
    kept = flags & (ALLOW | QUEUE)
    assert first.acquire(A, flags) == kept | PRIMARY
    assert watcher.notifications() == []
    assert queue_of(bus) == [(first.id, kept | PRIMARY)]


@pytest.mark.parametrize("old", [ALLOW, ALLOW | QUEUE])
@pytest.mark.parametrize("new", [REPLACE, REPLACE | QUEUE, REPLACE | ALLOW])
def test_an_owner_that_allows_it_is_replaced(bus: Bus, watcher: Client, old: int, new: int) -> None:
    first, second = two(bus, watcher)
    first.acquire(A, old)
    watcher.inbox()
    kept = new & (ALLOW | QUEUE)
    assert second.acquire(A, new) == kept | PRIMARY | ACQUIRED
    assert watcher.notifications() == [passed(first, old | PRIMARY, second, kept | PRIMARY)]
    rest = [(first.id, old | IN_QUEUE)] if old & QUEUE else []
    assert queue_of(bus) == [(second.id, kept | PRIMARY), *rest]


def test_who_was_replaced_is_next_in_line_not_last(bus: Bus) -> None:
    first, second, third = bus.hello(), bus.hello(), bus.hello()
    first.acquire(A, ALLOW | QUEUE)
    second.acquire(A, QUEUE)
    third.acquire(A, REPLACE)
    assert [id_ for id_, _ in queue_of(bus)] == [third.id, first.id, second.id]
    third.release(A)
    assert bus.owner_of(A) == first.id


def test_one_who_queued_may_replace_later(bus: Bus, watcher: Client) -> None:
    first, second = two(bus, watcher)
    first.acquire(A, ALLOW | QUEUE)
    second.acquire(A, QUEUE)
    watcher.inbox()
    assert second.acquire(A, REPLACE) == PRIMARY | ACQUIRED
    assert watcher.notifications() == [passed(first, ALLOW | QUEUE | PRIMARY, second, PRIMARY)]
    assert queue_of(bus) == [(second.id, PRIMARY), (first.id, ALLOW | QUEUE | IN_QUEUE)]


def test_queueing_is_told_to_the_caller_only(bus: Bus, watcher: Client) -> None:
    first, second = two(bus, watcher)
    first.acquire(A)
    watcher.inbox()
    assert second.acquire(A, QUEUE) == QUEUE | IN_QUEUE | ACQUIRED
    assert second.acquire(A, QUEUE) == QUEUE | IN_QUEUE
    assert second.acquire(A, QUEUE | ALLOW) == QUEUE | ALLOW | IN_QUEUE
    assert watcher.notifications() == []
    assert queue_of(bus) == [(first.id, PRIMARY), (second.id, QUEUE | ALLOW | IN_QUEUE)]


def test_asking_again_keeps_ones_place_in_the_queue(bus: Bus) -> None:
    first, second, third = bus.hello(), bus.hello(), bus.hello()
    first.acquire(A)
    second.acquire(A, QUEUE)
    third.acquire(A, QUEUE)
    second.acquire(A, QUEUE)
    assert [id_ for id_, _ in queue_of(bus)] == [first.id, second.id, third.id]


@pytest.mark.parametrize("flags", [0, ALLOW, REPLACE])
def test_asking_again_without_queue_leaves_the_queue(bus: Bus, watcher: Client, flags: int) -> None:
    first, second = two(bus, watcher)
    first.acquire(A)
    second.acquire(A, QUEUE)
    watcher.inbox()
    assert second.acquire(A, flags) == flags & ALLOW
    assert watcher.notifications() == []
    assert queue_of(bus) == [(first.id, PRIMARY)]
    assert not second.connection.names


@pytest.mark.parametrize(
    ("old", "new"), [(0, 0), (0, ALLOW), (0, REPLACE), (ALLOW, 0), (QUEUE, REPLACE), (ALLOW, ALLOW)]
)
def test_a_name_that_is_taken_is_refused(bus: Bus, watcher: Client, old: int, new: int) -> None:
    first, second = two(bus, watcher)
    first.acquire(A, old)
    watcher.inbox()
    with fails(EEXIST):
        second.acquire(A, new)
    assert watcher.notifications() == []
    assert queue_of(bus) == [(first.id, old | PRIMARY)]
    assert not second.connection.names


@pytest.mark.also_mounted
def test_replacing_wants_consent_of_the_owner_not_of_the_next(bus: Bus) -> None:
    first, second, third = bus.hello(), bus.hello(), bus.hello()
    first.acquire(A)
    second.acquire(A, QUEUE | ALLOW)
    with fails(EEXIST):
        third.acquire(A, REPLACE)
    assert third.acquire(A, REPLACE | QUEUE) == QUEUE | IN_QUEUE | ACQUIRED


@pytest.mark.parametrize("string", ["nodot", "a.", "com.example.*", "1.a"])
@pytest.mark.also_mounted
def test_only_valid_names_are_acquired(bus: Bus, string: str) -> None:
    with fails(EINVAL):
        bus.hello().acquire(string)


def test_the_right_to_own_is_asked_before_anything_about_the_name(bus: Bus) -> None:
    stranger = bus.hello(peer=FakePeer(2000))
    bus.hello().acquire(A)
    for flags in (0, REPLACE, QUEUE):
        for string in (A, B):
            with fails(EPERM):
                stranger.acquire(string, flags)
    with fails(EINVAL):
        stranger.acquire("nodot")


def test_a_connection_has_at_most_256_names(bus: Bus) -> None:
    client, other = bus.hello(), bus.hello()
    bus.domain.check = lambda: None  # type: ignore[method-assign]
    for n in range(128):
        other.acquire(f"com.example.o{n}")
        client.acquire(f"com.example.o{n}", QUEUE)
        client.acquire(f"com.example.n{n}")
    other.acquire(A)
    for string in (A, B):
        with fails(E2BIG):
            client.acquire(string, QUEUE)
    assert client.acquire("com.example.n5") == PRIMARY
    client.release("com.example.o5")
    client.acquire(B)


# --- RELEASE


def test_a_released_name_that_nobody_wants_is_gone(bus: Bus, watcher: Client) -> None:
    first, _ = two(bus, watcher)
    first.acquire(A, ALLOW)
    first.release(A)
    assert watcher.notifications() == [
        added(first, ALLOW | PRIMARY),
        removed(first, ALLOW | PRIMARY),
    ]
    assert queue_of(bus) == []
    with fails(ESRCH):
        first.release(A)


def test_a_released_name_passes_to_the_next_in_queue(bus: Bus, watcher: Client) -> None:
    first, second = two(bus, watcher)
    first.acquire(A)
    second.acquire(A, QUEUE | ALLOW)
    watcher.inbox()
    first.release(A)
    kept = QUEUE | ALLOW | PRIMARY
    assert watcher.notifications() == [passed(first, PRIMARY, second, kept)]
    assert queue_of(bus) == [(second.id, kept)]


def test_a_name_passes_to_the_next_in_queue_on_byebye(bus: Bus, watcher: Client) -> None:
    first, second = two(bus, watcher)
    first.acquire(A)
    second.acquire(A, QUEUE)
    watcher.inbox()
    first.byebye()
    assert bus.owner_of(A) == second.id
    assert watcher.notifications() == [
        passed(first, PRIMARY, second, QUEUE | PRIMARY),
        (I.ID_REMOVE, first.id, 0),
    ]


def test_a_released_name_passes_back_to_its_activator(bus: Bus, watcher: Client) -> None:
    activator = bus.activator(A)
    first, _ = two(bus, watcher)
    first.acquire(A)
    watcher.inbox()
    first.release(A)
    assert watcher.notifications() == [passed(first, PRIMARY, activator, 0x30)]
    assert queue_of(bus) == [(activator.id, 0x30)]


def test_the_queue_comes_before_the_activator(bus: Bus) -> None:
    activator, first, second = bus.activator(A), bus.hello(), bus.hello()
    first.acquire(A)
    second.acquire(A, QUEUE)
    first.release(A)
    assert bus.owner_of(A) == second.id
    second.release(A)
    assert bus.owner_of(A) == activator.id


def test_leaving_the_queue_is_silent(bus: Bus, watcher: Client) -> None:
    first, second = two(bus, watcher)
    first.acquire(A)
    second.acquire(A, QUEUE)
    watcher.inbox()
    second.release(A)
    assert watcher.notifications() == []
    assert queue_of(bus) == [(first.id, PRIMARY)]


@pytest.mark.also_mounted
def test_release_looks_for_the_name_only(bus: Bus) -> None:
    first, second = bus.hello(), bus.hello()
    first.acquire(A)
    with fails(EADDRINUSE):
        second.release(A)
    for string in (B, "nodot", "com.example.*", "\xff"):
        with fails(ESRCH):
            second.release(string)


@pytest.mark.also_mounted
def test_an_activators_name_is_somebody_elses(bus: Bus) -> None:
    bus.activator(A)
    with fails(EADDRINUSE):
        bus.hello().release(A)


def test_all_names_go_in_order_of_acquisition_before_their_owner(bus: Bus, watcher: Client) -> None:
    first, _ = two(bus, watcher)
    for string in ("com.c", "com.a", "com.b"):
        first.acquire(string)
    watcher.inbox()
    first.close()
    assert watcher.notifications() == [
        removed(first, PRIMARY, "com.c"),
        removed(first, PRIMARY, "com.a"),
        removed(first, PRIMARY, "com.b"),
        (I.ID_REMOVE, first.id, 0),
    ]


# --- activators


def test_an_activator_of_a_free_name_owns_it(bus: Bus, watcher: Client) -> None:
    activator = bus.activator(A, flags=1)
    assert watcher.notifications() == [(I.ID_ADD, activator.id, 3), added(activator, 0x30)]
    activator.close()
    assert watcher.notifications() == [
        removed(activator, 0x30),
        (I.ID_REMOVE, activator.id, 3),
    ]


def test_an_activator_of_an_owned_name_waits_behind_the_queue(bus: Bus, watcher: Client) -> None:
    first, _ = two(bus, watcher)
    first.acquire(A)
    watcher.inbox()
    activator = bus.activator(A)
    assert watcher.notifications() == [(I.ID_ADD, activator.id, 2)]
    assert queue_of(bus) == [(first.id, PRIMARY), (activator.id, ACTIVATOR | IN_QUEUE)]
    activator.close()
    assert watcher.notifications() == [(I.ID_REMOVE, activator.id, 2)]
    assert queue_of(bus) == [(first.id, PRIMARY)]


@pytest.mark.also_mounted
def test_a_name_has_one_activator(bus: Bus) -> None:
    bus.activator(A)
    with fails(EEXIST):
        bus.activator(A)
    bus.activator(B)


# --- mail that follows the name


def test_mail_by_name_waits_at_the_activator_and_moves_to_who_takes_over(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A), bus.hello(), bus.hello()
    for n in range(3):
        client.send(A, data=b"%d" % n, cookie=n, priority=-n)
    assert activator.readable
    implementer.send(implementer, cookie=9)
    implementer.acquire(A)
    assert not activator.readable
    got = implementer.inbox()
    assert [(m.cookie, m.priority, m.data) for m in got] == [
        (9, 0, b""),
        (0, 0, b"0"),
        (1, -1, b"1"),
        (2, -2, b"2"),
    ]


@pytest.mark.also_mounted
def test_moved_mail_is_the_same_to_the_byte(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A, recv=0x3FFF), bus.hello(), bus.hello()
    client.send(A, data=b"payload")
    before = activator.recv(1)
    implementer.acquire(A)
    assert implementer.recv().raw == before.raw


def test_what_the_activator_did_to_its_pool_does_not_show(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A), bus.hello(), bus.hello()
    client.send(A, data=b"payload")
    activator.memory.bytes[:200] = b"\xff" * 200
    implementer.acquire(A)
    assert implementer.recv().data == b"payload"


def test_mail_goes_back_to_the_activator_and_on_again(bus: Bus) -> None:
    activator, client = bus.activator(A), bus.hello()
    first, second = bus.hello(), bus.hello()
    first.acquire(A)
    client.send(A, cookie=1)
    client.send(first, cookie=2)
    first.release(A)
    assert first.cookies() == [2], "mail by id stays"
    assert activator.readable
    second.acquire(A)
    assert second.cookies() == [1]


@pytest.mark.also_mounted
def test_mail_by_name_and_id_is_mail_by_name(bus: Bus) -> None:
    activator, client, first = bus.activator(A), bus.hello(), bus.hello()
    first.acquire(A)
    client.send(A, dst_id=first.id, cookie=1)
    first.release(A)
    assert activator.cookies() == [1]


def test_mail_sent_before_the_activator_came_moves_too(bus: Bus) -> None:
    client, first = bus.hello(), bus.hello()
    first.acquire(A)
    client.send(A, data=b"early")
    activator = bus.activator(A)
    first.memory.may_read = True
    first.release(A)
    assert activator.recv().data == b"early"


@pytest.mark.also_mounted
def test_mail_does_not_move_between_implementers(bus: Bus) -> None:
    client, first, second = bus.hello(), bus.hello(), bus.hello()
    first.acquire(A, ALLOW | QUEUE)
    client.send(A, cookie=1)
    client.request(A, cookie=2)
    second.acquire(A, REPLACE)
    assert second.inbox() == []
    assert first.cookies() == [1, 2]
    first.reply(client, 2)
    with fails(EBADSLT):
        second.reply(client, 2)


@pytest.mark.also_mounted
def test_mail_for_another_name_stays(bus: Bus) -> None:
    activator, client, first = bus.activator(A), bus.hello(), bus.hello()
    first.acquire(A)
    first.acquire(B)
    client.send(B, cookie=1)
    client.send(A, cookie=2)
    first.release(A)
    assert first.cookies() == [1]
    assert activator.cookies() == [2]


@pytest.mark.also_mounted
def test_a_name_that_came_back_is_another_one(bus: Bus) -> None:
    client, first = bus.hello(), bus.hello()
    first.acquire(A)
    client.send(A, cookie=1)
    first.release(A)
    activator = bus.activator(A)
    first.acquire(A)
    first.release(A)
    assert first.cookies() == [1]
    assert activator.inbox() == []


def test_mail_that_can_not_move_is_lost_at_the_new_owner(bus: Bus) -> None:
    activator, client = bus.activator(A, flags=HelloFlag.ACCEPT_FD), bus.hello()
    small = bus.hello(pool_size=4096)
    client.send(A, fds(client.peer.open(FakeFile())))
    client.send(A, data=bytes(4096))
    client.send(A, cookie=3)
    small.acquire(A)
    got = small.recv()
    assert (got.cookie, got.lost) == (3, 2)
    assert activator.lost() == 0
    assert client.inbox() == []


def test_mail_does_not_move_into_a_pool_without_room(bus: Bus) -> None:
    bus.activator(A)
    client, full = bus.hello(), bus.hello(pool_size=4096)
    client.send(A)
    with fails(EXFULL):
        while True:
            full.info(full.id, kinds=0, free=False)
    full.acquire(A)
    assert full.connection.quota.queued == 0
    assert full.lost() == 1


def test_moved_descriptors_arrive(bus: Bus) -> None:
    bus.activator(A, flags=HelloFlag.ACCEPT_FD)
    client, implementer = bus.hello(), bus.hello(flags=HelloFlag.ACCEPT_FD)
    file = FakeFile()
    client.send(A, fds(client.peer.open(file)))
    implementer.acquire(A)
    assert implementer.recv().fds == [0]
    assert implementer.peer.files == {0: file}


def test_moved_mail_is_charged_to_its_sender(bus: Bus) -> None:
    bus.activator(A, access(PolicyType.WORLD, PolicyAccess.TALK))
    one, two_, implementer = bus.hello(), bus.hello(peer=FakePeer(2000)), bus.hello()
    for client in (one, one, two_):
        client.send(A, data=bytes(8))
    implementer.acquire(A)
    accounts = implementer.connection.quota.accounts
    size = 64 + 32 + 32 + 8
    assert {user.uid: account.size for user, account in accounts.items()} == {
        1000: 2 * size,
        2000: size,
    }
    assert len(implementer.inbox()) == 3
    assert not accounts


def test_a_poller_is_woken_by_mail_that_moves_to_it(bus: Bus) -> None:
    bus.activator(A)
    client, implementer = bus.hello(), bus.hello()
    client.send(A)
    woken: list[int] = []
    implementer.connection.waker = lambda: woken.append(1)
    implementer.acquire(A)
    assert woken


# --- requests that follow the name


def test_a_request_is_answered_by_whoever_the_name_moved_to(bus: Bus) -> None:
    bus.activator(A)
    client, implementer = bus.hello(), bus.hello()
    client.request(A, cookie=1)
    waiting = client.call(A, cookie=2)
    implementer.acquire(A)
    assert implementer.cookies() == [1, 2]
    implementer.reply(client, 1, cookie=7)
    implementer.reply(client, 2, data=b"sync")
    assert client.cookies() == [7]
    assert waiting.reply.data == b"sync"


@pytest.mark.also_mounted
def test_even_requests_that_were_read_move_back_to_the_activator(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A), bus.hello(), bus.hello()
    implementer.acquire(A)
    client.request(A, cookie=1)
    implementer.recv()
    implementer.release(A)
    with fails(EBADSLT):
        implementer.reply(client, 1)
    implementer.acquire(A)
    implementer.reply(client, 1)
    assert len(client.inbox()) == 1
    assert activator.inbox() == []


def test_requests_to_an_activatable_name_outlive_their_implementer(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A), bus.hello(), bus.hello()
    implementer.acquire(A)
    client.request(A, cookie=1)
    implementer.recv()
    client.request(A, cookie=2)
    waiting = client.call(A, cookie=3)
    by_id = client.call(implementer, cookie=4)
    implementer.close()
    assert client.inbox() == []
    assert waiting.waiting
    assert by_id.error == EPIPE
    assert activator.cookies() == [2, 3]
    bus.domain.advance(SECOND)
    assert waiting.error == ETIMEDOUT
    assert client.notifications() == [(I.REPLY_TIMEOUT, 1), (I.REPLY_TIMEOUT, 2)]


def test_when_the_activator_dies_too_they_are_dead(bus: Bus) -> None:
    activator, client, implementer = bus.activator(A), bus.hello(), bus.hello()
    implementer.acquire(A)
    client.request(A, cookie=1)
    waiting = client.call(A, cookie=2)
    implementer.close()
    activator.close()
    assert waiting.error == EPIPE
    assert client.notifications() == [(I.REPLY_DEAD, 1)]


def test_requests_of_the_two_themselves_are_not_moved(bus: Bus) -> None:
    activator, implementer = bus.activator(A), bus.hello()
    implementer.request(A, cookie=1)
    implementer.acquire(A)
    assert implementer.cookies() == [1]
    (tracker,) = implementer.connection.requests
    assert tracker.target is activator.connection


def test_a_request_whose_message_could_not_move_times_out(bus: Bus) -> None:
    bus.activator(A)
    client, small = bus.hello(), bus.hello(pool_size=4096)
    client.request(A, data=bytes(4096), cookie=1)
    waiting = client.call(A, vec(client.peer.map(4096), 4096), cookie=2)
    small.acquire(A)
    assert small.lost() == 2
    bus.domain.advance(SECOND)
    assert client.notifications() == [(I.REPLY_TIMEOUT, 1)]
    assert waiting.error == ETIMEDOUT


def test_an_interrupted_call_moves_as_well(bus: Bus) -> None:
    bus.activator(A)
    client, implementer = bus.hello(), bus.hello()
    waiting = client.call(A, cookie=1)
    waiting.interrupt()
    implementer.acquire(A)
    implementer.recv()
    implementer.reply(client, 1, data=b"late")
    again = client.call(A, cookie=1)
    assert again.reply.data == b"late"
    assert implementer.inbox() == []


@pytest.mark.also_mounted
def test_the_name_item_of_an_activator_is_its_only_one(bus: Bus) -> None:
    with fails(EINVAL):
        bus.special(HelloFlag.ACTIVATOR, name(A), name(B))
