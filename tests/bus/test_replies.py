# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests, replies, deadlines, and calls that wait."""

import gc
from errno import (
    EAGAIN,
    EBADF,
    EBADSLT,
    ECANCELED,
    ECOMM,
    ECONNRESET,
    EFAULT,
    EINTR,
    EMLINK,
    ENOBUFS,
    ENXIO,
    EPERM,
    EPIPE,
    EREMOTEIO,
    ESRCH,
    ETIMEDOUT,
    EXFULL,
)

import pytest

from abi_client.building import fds, item, memfd, vec
from abi_client.verbs import SECOND
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, Pending, fails
from kdbusfs.abi.numbers import HelloFlag, ItemType, RecvFlag
from kdbusfs.bus.reply import Reply

I = ItemType  # noqa: E741
DROP, PEEK = RecvFlag.DROP, RecvFlag.PEEK


@pytest.fixture
def client(bus: Bus) -> Client:
    return bus.hello()


@pytest.fixture
def server(bus: Bus) -> Client:
    return bus.hello()


def cancel_fd(client: Client, file: FakeFile) -> bytes:
    fd = client.peer.open(file)
    return item(I.CANCEL_FD, fd.to_bytes(4, "little"))


# --- asynchronous requests


def test_a_request_is_answered_once(client: Client, server: Client) -> None:
    client.request(server, cookie=5)
    assert server.recv().flags == 1
    server.reply(client, 5, data=b"answer")
    got = client.recv()
    assert (got.cookie_reply, got.data, got.flags) == (5, b"answer", 0)
    with fails(EBADSLT):
        server.reply(client, 5)
    client.domain.advance(2 * SECOND)
    assert client.inbox() == []


def test_a_request_that_is_refused_keeps_nobody(bus: Bus, client: Client) -> None:
    """Objects of the bus go with the last that refers to them: the collector looks seldom."""
    target = bus.hello(flags=0)
    fd = client.peer.open(FakeFile())
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            with fails(ECOMM):
                client.request(target, fds(fd))
        kept = [o for o in gc.get_objects() if isinstance(o, Reply)]
        # Others of other tests may be about in the same process.
        assert not [reply for reply in kept if reply.requester is client.connection]
    finally:
        gc.enable()


def test_a_request_may_be_answered_before_it_is_read(client: Client, server: Client) -> None:
    client.request(server, cookie=5)
    server.reply(client, 5)
    assert client.connection.n_requests == 1, "its message is still queued"
    server.recv()
    assert client.connection.n_requests == 0


def test_only_the_one_who_was_asked_may_answer(bus: Bus, client: Client, server: Client) -> None:
    client.request(server, cookie=5)
    other = bus.hello()
    for who, cookie in ((other, 5), (server, 6), (client, 5)):
        with fails(EBADSLT):
            who.reply(client, cookie)
    with fails(EBADSLT):
        server.reply(other, 5)
    with fails(ENXIO):
        server.reply(12345, 5)
    server.reply(client, 5)


def test_requests_with_the_same_cookie_are_answered_newest_first(
    client: Client, server: Client
) -> None:
    client.request(server, cookie=5, timeout=client.domain.clock.now + 100)
    client.request(server, cookie=5, timeout=client.domain.clock.now + 200)
    server.reply(client, 5)
    client.domain.advance(100)
    assert [m.cookie_reply for m in client.inbox()] == [5, 5]
    client.domain.advance(100)
    assert client.inbox() == []
    with fails(EBADSLT):
        server.reply(client, 5)


def test_a_request_with_cookie_0_can_never_be_answered(client: Client, server: Client) -> None:
    client.request(server, cookie=0)
    server.recv()
    server.reply(client, 0, cookie=9)
    assert client.cookies() == [9], "a plain message, no reply"
    client.domain.advance(SECOND)
    assert client.notifications() == [(I.REPLY_TIMEOUT, 0)]


def test_a_reply_needs_no_right_to_talk(bus: Bus) -> None:
    server, asker = bus.hello(peer=FakePeer(2000)), bus.hello()
    with fails(EPERM):
        server.send(asker)
    asker.request(server, cookie=5)
    server.reply(asker, 5)
    assert len(asker.inbox()) == 1
    with fails(EPERM):
        server.send(asker)


def test_a_reply_that_fails_has_used_the_request_up(bus: Bus, server: Client) -> None:
    asker = bus.hello(pool_size=4096)
    asker.request(server, cookie=5)
    with fails(ENOBUFS):
        server.reply(asker, 5, data=bytes(4096))
    with fails(EBADSLT):
        server.reply(asker, 5)
    asker.domain.advance(2 * SECOND)
    assert asker.inbox() == [], "not even a timeout"


def test_a_reply_refused_for_its_descriptors_leaves_the_request(
    client: Client, server: Client
) -> None:
    client.request(server, cookie=5)
    with fails(EBADF):
        server.reply(client, 5, fds(99))
    server.reply(client, 5)


# --- deadlines


def test_a_deadline_that_passes_is_told(client: Client, server: Client) -> None:
    client.request(server, cookie=5, timeout=client.domain.clock.now + SECOND)
    server.recv()
    client.domain.advance(SECOND - 1)
    assert client.inbox() == []
    client.domain.advance(1)
    assert client.notifications() == [(I.REPLY_TIMEOUT, 5)]
    with fails(EBADSLT):
        server.reply(client, 5)


def test_a_deadline_in_the_past_is_told_at_once(client: Client, server: Client) -> None:
    client.request(server, cookie=5, timeout=1)
    assert client.domain.core.next_deadline() == 1
    client.domain.advance(0)
    assert client.notifications() == [(I.REPLY_TIMEOUT, 5)]
    assert server.cookies() == [5]


def test_a_shorter_deadline_is_told_before_a_longer_one(client: Client, server: Client) -> None:
    now = client.domain.clock.now
    for cookie, delay in ((1, 300), (2, 100), (3, 200)):
        client.request(server, cookie=cookie, timeout=now + delay)
    seen = []
    for _ in range(3):
        client.domain.advance(100)
        seen.append(client.notifications())
    assert seen == [[(I.REPLY_TIMEOUT, n)] for n in (2, 3, 1)]


def test_what_has_been_answered_leaves_no_deadline(client: Client, server: Client) -> None:
    for cookie in range(1, 1001):
        client.request(server, cookie=cookie)
        server.recv()
        server.reply(client, cookie)
        client.recv()
    assert client.domain.core.next_deadline() is None
    assert len(client.domain.core._deadlines) < 100


# --- how many


def test_a_connection_has_at_most_128_requests(client: Client, server: Client) -> None:
    for cookie in range(1, 128):
        client.request(server, cookie=cookie)
    waiting = client.call(server, cookie=128)
    with fails(EMLINK):
        client.request(server, cookie=129)
    assert client.call(server, cookie=129).error == EMLINK
    assert waiting.waiting
    server.request(client, cookie=1)
    server.recv()
    server.reply(client, 1)
    client.request(server, cookie=129)


def test_requests_that_timed_out_count_until_they_are_read(client: Client, server: Client) -> None:
    for cookie in range(1, 129):
        client.request(server, cookie=cookie)
    client.domain.advance(SECOND)
    assert len(client.inbox()) == 128
    with fails(EMLINK):
        client.request(server, cookie=129)
    server.recv()
    client.request(server, cookie=129)
    with fails(EMLINK):
        client.request(server, cookie=130)


def test_peeking_does_not_count_as_reading(client: Client, server: Client) -> None:
    client.request(server, cookie=1)
    client.domain.advance(SECOND)
    server.recv(PEEK)
    assert client.connection.n_requests == 1
    server.recv(DROP, free=False)
    assert client.connection.n_requests == 0


def test_a_request_that_fails_does_not_count(bus: Bus, client: Client) -> None:
    small = bus.hello(pool_size=4096)
    with fails(ENOBUFS):
        client.request(small, data=bytes(4096))
    assert client.connection.n_requests == 0
    assert client.domain.core.next_deadline() is None


# --- the table of ends


class Ask:
    """A request, asynchronous or not, and what its sender hears of it."""

    def __init__(self, client: Client, to: Client | str, sync: bool, *items: bytes) -> None:
        self.client = client
        self.pending: Pending | None = None
        if sync:
            self.pending = client.call(to, *items, cookie=5)
        else:
            client.request(to, *items, cookie=5)

    def heard(self) -> object:
        """An errno for a call; else the notifications."""
        if self.pending is not None:
            assert not self.client.connection.queue
            return self.pending.error
        return [n[0] for n in self.client.notifications()]


SYNC = pytest.mark.parametrize("sync", [False, True])


@SYNC
def test_a_request_ends_at_its_deadline(client: Client, server: Client, sync: bool) -> None:
    ask = Ask(client, server, sync)
    client.domain.advance(SECOND)
    assert ask.heard() == (ETIMEDOUT if sync else [I.REPLY_TIMEOUT])
    assert server.recv().cookie == 5, "the request stays in the queue"
    with fails(EBADSLT):
        server.reply(client, 5)


@SYNC
def test_a_dropped_request_is_dead(client: Client, server: Client, sync: bool) -> None:
    ask = Ask(client, server, sync)
    server.recv(DROP, free=False)
    assert ask.heard() == (EPIPE if sync else [I.REPLY_DEAD])


@pytest.mark.also_mounted
def test_a_request_that_moved_to_its_own_sender_is_dead_when_dropped(bus: Bus) -> None:
    bus.activator("com.example.a")
    implementer = bus.hello()
    implementer.request("com.example.a", cookie=5)
    implementer.acquire("com.example.a")
    implementer.recv(DROP, free=False)
    assert implementer.notifications() == [(I.REPLY_DEAD, 5)]


@SYNC
def test_dropping_what_has_been_answered_says_nothing(
    client: Client, server: Client, sync: bool
) -> None:
    ask = Ask(client, server, sync)
    server.reply(client, 5)
    if not sync:
        client.recv()
    server.recv(DROP, free=False)
    assert ask.heard() == (0 if sync else [])


@SYNC
@pytest.mark.parametrize("read", [False, True])
def test_the_death_of_the_target_is_told_once(
    client: Client, server: Client, sync: bool, read: bool
) -> None:
    ask = Ask(client, server, sync)
    if read:
        server.recv()
    server.close()
    assert ask.heard() == (EPIPE if sync else [I.REPLY_DEAD])
    assert client.connection.n_requests == 0


def test_the_death_of_the_target_says_nothing_of_what_timed_out(
    client: Client, server: Client
) -> None:
    ask = Ask(client, server, sync=False)
    client.domain.advance(SECOND)
    assert ask.heard() == [I.REPLY_TIMEOUT]
    server.close()
    assert ask.heard() == []


@SYNC
def test_the_requester_takes_its_request_with_it(
    client: Client, server: Client, sync: bool
) -> None:
    ask = Ask(client, server, sync)
    client.close()
    if ask.pending:
        assert ask.pending.error == ECONNRESET
    assert server.recv().cookie == 5
    with fails(ENXIO):
        server.reply(client, 5)
    assert server.inbox() == []


@SYNC
def test_the_end_of_a_bus_ends_its_requests(bus: Bus, sync: bool) -> None:
    client, server = bus.hello(), bus.hello()
    ask = Ask(client, server, sync)
    bus.file.close()
    if ask.pending:
        assert ask.pending.error == ECONNRESET


# --- synchronous calls


def test_a_call_returns_its_reply_outside_of_the_queue(client: Client, server: Client) -> None:
    waiting = client.call(server, data=b"question", cookie=5)
    assert waiting.waiting
    assert server.recv().data == b"question"
    client.send(client, cookie=77)
    server.reply(client, 5, data=b"answer")
    got = waiting.reply
    assert (got.data, got.cookie_reply, len(got.raw)) == (b"answer", 5, 104)
    assert client.cookies() == [77]
    client.free(got.offset)
    with fails(ENXIO):
        client.free(got.offset)


def test_a_reply_to_a_call_brings_its_descriptors(bus: Bus, server: Client) -> None:
    client = bus.hello(flags=HelloFlag.ACCEPT_FD)
    client.peer.n_files_max = 1
    waiting = client.call(server, cookie=5)
    fd, mem = server.peer.open(FakeFile()), server.peer.open(FakeFile(size=8))
    server.reply(client, 5, fds(fd), memfd(mem, 8))
    assert (waiting.reply.fds, waiting.reply.memfd_numbers, waiting.reply.msg_return_flags) == (
        [0],
        [-1],
        1,
    )


@pytest.mark.parametrize("ahead", [0, -1, -SECOND + 1, 1 << 63])
def test_a_deadline_that_has_passed_is_seen_before_anything_else(bus: Bus, ahead: int) -> None:
    stranger = bus.hello(peer=FakePeer(2000))
    timeout = stranger.domain.clock.now + ahead
    for to in (12345, "com.example.a", bus.hello()):
        assert stranger.call(to, timeout=timeout).error == ETIMEDOUT


def test_a_call_fails_as_a_send_does(bus: Bus, client: Client) -> None:
    stranger, small = bus.hello(peer=FakePeer(2000)), bus.hello(pool_size=4096)
    assert client.call(12345).error == ENXIO
    assert client.call("com.example.a").error == ESRCH
    assert stranger.call(client).error == EPERM
    assert client.call(small, vec(8, 8)).error == EFAULT
    assert client.call(small, vec(client.peer.map(4096), 4096)).error == ENOBUFS
    fd = client.peer.open(FakeFile())
    assert client.call(small, fds(fd)).error == ECOMM
    assert client.connection.n_requests == 0
    assert client.domain.core.next_deadline() is None


def test_several_calls_may_wait_on_one_connection(client: Client, server: Client) -> None:
    calls = [client.call(server, cookie=n) for n in range(1, 5)]
    for n in (3, 1, 4, 2):
        server.reply(client, n, data=b"%d" % n)
    assert [c.reply.data for c in calls] == [b"1", b"2", b"3", b"4"]


def test_calling_oneself_is_legal(client: Client) -> None:
    waiting = client.call(client, cookie=5)
    assert client.recv().cookie == 5
    client.reply(client, 5)
    assert waiting.error == 0


def test_a_reply_without_permission_for_descriptors_fails_on_both_sides(
    client: Client, server: Client
) -> None:
    waiting = client.call(server, cookie=5)
    with fails(ECOMM):
        server.reply(client, 5, fds(server.peer.open(FakeFile())))
    assert waiting.error == EREMOTEIO


def test_a_reply_that_does_not_fit_fails_on_both_sides(bus: Bus, server: Client) -> None:
    client = bus.hello(pool_size=4096)
    waiting = client.call(server, cookie=5)
    with fails(ENOBUFS):
        server.reply(client, 5, data=bytes(4096))
    assert waiting.error == ENOBUFS
    waiting = client.call(server, cookie=6)
    with fails(EXFULL):
        while True:
            client.info(client.id, kinds=0, free=False)
    with fails(EXFULL):
        server.reply(client, 6)
    assert waiting.error == EXFULL


def test_the_reply_of_a_call_is_charged_until_it_is_handed_over(
    client: Client, server: Client
) -> None:
    waiting = client.call(server, cookie=5)
    server.reply(client, 5, data=bytes(1000))
    assert waiting.error == 0
    assert client.connection.quota.queued == 0


def test_monitors_see_calls_and_replies(bus: Bus, client: Client, server: Client) -> None:
    monitor = bus.monitor()
    client.call(server, cookie=5)
    server.reply(client, 5, cookie=6)
    assert monitor.cookies() == [5, 6]


# --- cancelling


def test_a_call_is_cancelled_by_its_descriptor(client: Client, server: Client) -> None:
    file = FakeFile()
    waiting = client.call(server, cookie=5, command_items=(cancel_fd(client, file),))
    assert waiting.waiting
    file.become_readable()
    assert waiting.error == ECANCELED
    assert file.watchers == []
    assert server.recv().cookie == 5
    with fails(EBADSLT):
        server.reply(client, 5)


def test_what_is_readable_from_the_start_lets_the_message_out_first(
    client: Client, server: Client
) -> None:
    item_ = cancel_fd(client, FakeFile(readable=True))
    assert client.call(server, cookie=5, command_items=(item_,)).error == ECANCELED
    assert server.recv().cookie == 5


@pytest.mark.parametrize("end", ["reply", "timeout", "close", "interrupt"])
def test_a_call_that_ends_otherwise_stops_watching(
    client: Client, server: Client, end: str
) -> None:
    file = FakeFile()
    waiting = client.call(server, cookie=5, command_items=(cancel_fd(client, file),))
    if end == "reply":
        server.reply(client, 5)
    elif end == "timeout":
        client.domain.advance(SECOND)
    elif end == "close":
        client.close()
    else:
        waiting.interrupt()
    assert not waiting.waiting
    assert file.watchers == []


# --- signals


def test_an_interrupted_call_goes_on_where_it_was(client: Client, server: Client) -> None:
    waiting = client.call(server, cookie=5)
    waiting.interrupt()
    assert waiting.error == EINTR
    again = client.call(server, cookie=5)
    assert again.waiting
    assert server.cookies() == [5], "the request is sent once"
    server.reply(client, 5, data=b"answer")
    assert again.reply.data == b"answer"


def test_a_reply_between_interruption_and_restart_is_kept(client: Client, server: Client) -> None:
    waiting = client.call(server, cookie=5)
    waiting.interrupt()
    server.recv()
    server.reply(client, 5, data=b"answer")
    again = client.call(server, cookie=5)
    assert again.reply.data == b"answer"
    assert server.inbox() == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_resumed_call_keeps_its_first_deadline(
    client: Client, server: Client, resume: bool
) -> None:
    waiting = client.call(server, cookie=5)
    waiting.interrupt()
    client.domain.advance(SECOND // 2)
    again = client.call(server, cookie=5, timeout=client.domain.clock.now + 9 * SECOND)
    if not resume:
        again.interrupt()
    client.domain.advance(SECOND // 2)
    assert again.error == (ETIMEDOUT if resume else EINTR)
    assert client.inbox() == []
    assert client.domain.core.next_deadline() is None


def test_a_call_that_is_never_resumed_vanishes_at_its_deadline(
    client: Client, server: Client
) -> None:
    client.call(server, cookie=5).interrupt()
    client.call(server, cookie=6).interrupt()
    server.reply(client, 6, data=b"unheard")
    client.domain.advance(SECOND)
    assert client.inbox() == []
    with fails(EBADSLT):
        server.reply(client, 5)
    assert server.cookies() == [5, 6]
    assert client.connection.n_requests == 0
    assert client.connection.quota.queued == 0


def test_the_death_of_the_target_between_interruption_and_restart_is_kept(
    client: Client, server: Client
) -> None:
    client.call(server, cookie=5).interrupt()
    server.close()
    assert client.inbox() == []
    assert client.call(12345, cookie=5).error == EPIPE


def test_a_requester_that_dies_while_interrupted_leaves_nothing(
    client: Client, server: Client
) -> None:
    client.call(server, cookie=5).interrupt()
    client.call(server, cookie=6).interrupt()
    server.reply(client, 6)
    client.close()
    with fails(ENXIO):
        server.reply(client, 5)


def test_a_resumed_call_may_be_cancelled(client: Client, server: Client) -> None:
    client.call(server, cookie=5).interrupt()
    file = FakeFile()
    again = client.call(server, cookie=5, command_items=(cancel_fd(client, file),))
    file.become_readable()
    assert again.error == ECANCELED
    with fails(EAGAIN):
        client.recv()


def test_of_two_interrupted_calls_with_one_cookie_the_later_can_be_resumed(
    client: Client, server: Client
) -> None:
    calls = [client.call(server, cookie=5) for _ in range(2)]
    for call in calls:
        call.interrupt()
    server.reply(client, 5, data=b"answer")
    with fails(EBADSLT):
        server.reply(client, 5)
    assert client.call(server, cookie=5).reply.data == b"answer"
