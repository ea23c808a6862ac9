# SPDX-License-Identifier: LGPL-2.1-or-later
"""EXCHANGE: slices are freed, messages are sent, awaited and received in one call."""

import struct
from errno import (
    E2BIG,
    EAGAIN,
    EBADF,
    ECANCELED,
    ECONNRESET,
    EFAULT,
    EINTR,
    EINVAL,
    EMSGSIZE,
    ENOBUFS,
    ENXIO,
    EOPNOTSUPP,
    EPIPE,
    ESRCH,
    ETIMEDOUT,
)
from typing import Any

import pytest

from abi_client.blocks import CALL, HEAD, HERE, WAIT, block, code, inline
from abi_client.building import bloom, fds, message, text, u64, vec
from abi_client.received import Received
from abi_client.verbs import SECOND
from bus.fakes import FakeFile, FakePeer
from bus.harness import Bus, Client, Pending, fails
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import (
    ID_ANY,
    ExtensionCommand,
    HelloFlag,
    ItemType,
    MsgFlag,
)

ACTIVATOR = int(HelloFlag.ACTIVATOR)


def to(client: Client, data: bytes = b"", *items: bytes, **fields: Any) -> tuple[bytes, bytes]:
    """A message to *client* with *data*, for `block`."""
    return message(client.id, *items, *([HERE] if data else []), **fields), data


def start(client: Client, argument: bytes) -> Pending:
    return client.start(code(argument), client.peer.put(argument))


class Result:
    """What an EXCHANGE that has ended has left in its block."""

    def __init__(self, client: Client, pending: Pending) -> None:
        self.error = pending.error
        raw = client.peer.read(pending.call.address, HEAD)
        self.return_flags, _, self.lost = struct.unpack_from("=3Q", raw, 16)
        _, self.n_freed, _, self.n_sent, self.n_recv, n = struct.unpack_from("=6I", raw, 40)
        raw = client.peer.read(pending.call.address + HEAD, 24 * n) if n else b""
        self.messages = [
            Received(offset, client.visible(offset, size), msg_return_flags=flags)
            for offset, size, flags in struct.iter_unpack("=3Q", raw)
        ]

    @property
    def data(self) -> list[bytes]:
        return [message.data for message in self.messages]


def exchange(client: Client, *args: Any, **options: Any) -> Result:
    """An EXCHANGE that does not wait; CommandError if it fails."""
    result = Result(client, start(client, block(*args, **options)))
    assert result.error is not None, "it waits"
    if result.error:
        raise CommandError(result.error)
    return result


@pytest.fixture
def pair(bus: Bus) -> tuple[Client, Client]:
    return bus.hello(), bus.hello()


# --- free, send, receive


def test_an_empty_one_does_nothing(bus: Bus) -> None:
    result = exchange(bus.hello())
    assert (result.n_freed, result.n_sent, result.messages) == (0, 0, [])


def test_a_message_arrives_with_its_payload(pair: tuple[Client, Client]) -> None:
    client, server = pair
    assert exchange(client, [to(server, b"payload", cookie=5)]).n_sent == 1
    received = server.recv()
    assert (received.data, received.cookie, received.src_id) == (b"payload", 5, client.id)
    assert received.types == [ItemType.PAYLOAD_OFF]


def test_many_messages_arrive_in_order(pair: tuple[Client, Client]) -> None:
    client, server = pair
    assert exchange(client, [to(server, b"%d" % n) for n in range(50)]).n_sent == 50
    result = exchange(server, n_recv=64)
    assert result.data == [b"%d" % n for n in range(50)]


def test_no_more_are_received_than_there_is_room_for(pair: tuple[Client, Client]) -> None:
    client, server = pair
    exchange(client, [to(server, b"%d" % n) for n in range(5)])
    assert exchange(server, n_recv=3).data == [b"0", b"1", b"2"]
    assert exchange(server, n_recv=3).data == [b"3", b"4"]
    assert exchange(server, n_recv=3).data == []


def test_slices_are_freed_first(pair: tuple[Client, Client]) -> None:
    client, server = pair
    exchange(client, [to(server, b"a"), to(server, b"b")])
    offsets = [m.offset for m in exchange(server, n_recv=2).messages]
    result = exchange(server, frees=[*offsets, server.pool_size])
    assert result.n_freed == 3
    assert [s.size for s in server.connection.pool.slices()] == [server.pool_size]


def test_a_wrong_offset_ends_it_before_anything_is_sent(pair: tuple[Client, Client]) -> None:
    client, server = pair
    exchange(server, [to(client, b"x")])
    (received,) = exchange(client, n_recv=1).messages
    argument = block([to(server, b"y")], frees=[received.offset, 64, 128])
    result = Result(client, start(client, argument))
    assert (result.error, result.n_freed, result.n_sent) == (ENXIO, 1, 0)
    with fails(EAGAIN):
        server.recv()


def test_the_first_message_that_is_refused_ends_it(pair: tuple[Client, Client]) -> None:
    client, server = pair
    nobody = message(0, text(ItemType.DST_NAME, "com.example.nobody"))
    argument = block(
        [to(server, b"1"), to(server, b"2"), (nobody, b""), to(server, b"3")], n_recv=1, flags=WAIT
    )
    result = Result(client, start(client, argument))
    assert (result.error, result.n_sent) == (ESRCH, 2)
    assert exchange(server, n_recv=4).data == [b"1", b"2"]


def test_quota_counts_each_message(pair: tuple[Client, Client]) -> None:
    client, server = pair
    for _ in range(4):
        exchange(client, [to(server)] * 60)
    result = Result(client, start(client, block([to(server)] * 60)))
    assert (result.error, result.n_sent) == (ENOBUFS, 16)


def test_payload_may_lie_elsewhere_if_there_is_one_message(pair: tuple[Client, Client]) -> None:
    client, server = pair
    address = client.peer.put(b"from elsewhere")
    there = message(server.id, HERE, vec(address, 14)), b"from here, "
    exchange(client, [there])
    assert server.recv().data == b"from here, from elsewhere"
    there = message(server.id, vec(address, 14), HERE), b", from here"
    exchange(client, [there])
    assert server.recv().data == b"from elsewhere, from here"
    with fails(EINVAL):
        exchange(client, [there, to(server, b"x")])
    with fails(EAGAIN):
        server.recv()


def test_one_of_several_messages_brings_no_descriptors(pair: tuple[Client, Client]) -> None:
    client, server = pair
    fd = client.peer.open(FakeFile())
    with fails(EINVAL):
        exchange(client, [to(server, b"x"), to(server, b"y", fds(fd))])
    assert server.recv().data == b"x"


def test_broadcasts_and_names_are_as_with_send(pair: tuple[Client, Client]) -> None:
    client, server = pair
    server.match(cookie=1)
    server.acquire("com.example.a")
    named = message(0, text(ItemType.DST_NAME, "com.example.a"), HERE), b"named"
    cast = message(ID_ANY, bloom(), HERE, flags=MsgFlag.SIGNAL), b"cast"
    exchange(client, [named, cast])
    assert [m.data for m in exchange(server, n_recv=9).messages if m.src_id] == [b"named", b"cast"]


def test_payload_of_any_length_keeps_its_place(pair: tuple[Client, Client]) -> None:
    client, server = pair
    for n in range(1, 40):
        exchange(client, [to(server, bytes(range(n)), cookie=n)] * 3)
        assert exchange(server, n_recv=3).data == [bytes(range(n))] * 3


def test_a_lost_message_is_told_of(pair: tuple[Client, Client]) -> None:
    _, server = pair
    server.connection.lost = 3
    result = exchange(server, n_recv=1, flags=WAIT)
    assert (result.return_flags, result.lost, result.messages) == (2, 3, [])
    assert exchange(server, n_recv=1).lost == 0


def test_one_with_descriptors_is_the_last(bus: Bus) -> None:
    client, server = bus.hello(), bus.hello(flags=1)
    exchange(client, [to(server, b"1")])
    exchange(client, [to(server, b"2", fds(client.peer.open(FakeFile())))])
    exchange(client, [to(server, b"3")])
    assert exchange(server, n_recv=9).data == [b"1", b"2"]
    assert exchange(server, n_recv=9).data == [b"3"]


# --- what is refused


@pytest.mark.parametrize(
    ("argument", "errno"),
    [
        (block(n_recv=65), E2BIG),
        (block([(message(1), b"")] * 65), E2BIG),
        (block(frees=[0] * 513), E2BIG),
        (block(n_send=1), EINVAL),
        (block(n_free=1), EINVAL),
        (block()[:64] + bytes(8), EBADF),
        (block(n_freed=1), EINVAL),
        (block(n_sent=1), EINVAL),
        (block(flags=CALL, n_recv=1), EINVAL),
        (block([(message(1), b"")], flags=CALL), EINVAL),
        (block([(message(1), b"")] * 2, flags=CALL, n_recv=1), EINVAL),
        (block(flags=4), EINVAL),
        (block([(u64(63) + message(1)[8:], b"")]), EINVAL),
        (block([(u64(1 << 63) + message(1)[8:], b"")]), EINVAL),
        (block([(message(1, inline(8, 1 << 40)), b"")]), EFAULT),
        (block([(message(1, inline(1 << 20, 0)), b"")]), EFAULT),
        (block([(message(1, inline(0, 0)), b"")]), EINVAL),
        (block([(message(1, *[inline(100, 0)] * 8), b"")]), EMSGSIZE),
        (block([(message(1, flags=1 << 63), b"")]), EINVAL),
    ],
)
def test_nonsense_is_refused(bus: Bus, argument: bytes, errno: int) -> None:
    with fails(errno):
        client = bus.hello()
        pending = start(client, argument)
        raise CommandError(pending.error or 0)


def test_a_block_is_not_larger_than_the_number_says(bus: Bus) -> None:
    client = bus.hello()
    argument = block(n_recv=1)
    with fails(EINVAL):
        client.ioctl(ExtensionCommand.EXCHANGE, argument)


def test_monitors_and_activators_receive_but_send_nothing(bus: Bus) -> None:
    client = bus.hello()
    for reader in (bus.monitor(), bus.activator("com.example.a")):
        with fails(EOPNOTSUPP):
            exchange(reader, [to(client, b"x")])
        client.send("com.example.a" if reader.connection.kind == ACTIVATOR else client, data=b"x")
        assert exchange(reader, n_recv=9).data[-1] == b"x"


def test_it_negotiates(bus: Bus) -> None:
    client = bus.hello()
    argument = block(flags=1 << 63)
    result = client.ioctl(ExtensionCommand.EXCHANGE, argument)
    assert result[8:16] == u64(WAIT | CALL)


# --- the wait


def test_a_message_ends_the_wait(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = start(server, block(flags=WAIT, n_recv=4))
    assert waits.waiting
    client.send(server, data=b"x")
    assert Result(server, waits).data == [b"x"]


def test_who_has_waited_longest_is_first(pair: tuple[Client, Client]) -> None:
    client, server = pair
    first, second = (start(server, block(flags=WAIT, n_recv=1)) for _ in range(2))
    client.send(server, data=b"1")
    assert not first.waiting
    assert second.waiting
    client.send(server, data=b"2")
    assert Result(server, first).data == [b"1"]
    assert Result(server, second).data == [b"2"]


def test_the_wait_goes_on_if_somebody_else_was_faster(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = start(server, block(flags=WAIT, n_recv=1))
    finish = server.domain.finish
    server.domain.finish = lambda: None  # type: ignore[method-assign]
    client.send(server, data=b"1")
    assert server.recv().data == b"1"
    server.domain.finish = finish  # type: ignore[method-assign]
    assert waits.waiting
    client.send(server, data=b"2")
    assert Result(server, waits).data == [b"2"]


def test_the_deadline_ends_the_wait(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = start(server, block(flags=WAIT, n_recv=1, deadline=server.domain.clock.now + SECOND))
    server.domain.advance(SECOND - 1)
    assert waits.waiting
    server.domain.advance(1)
    assert waits.error == ETIMEDOUT
    client.send(server, data=b"x")
    assert server.recv().data == b"x"


def test_a_deadline_in_the_past_looks_once(pair: tuple[Client, Client]) -> None:
    client, server = pair
    with fails(ETIMEDOUT):
        exchange(server, flags=WAIT, n_recv=1, deadline=1)
    client.send(server, data=b"x")
    assert exchange(server, flags=WAIT, n_recv=1, deadline=1).data == [b"x"]


def test_a_cancel_descriptor_ends_the_wait(pair: tuple[Client, Client]) -> None:
    _, server = pair
    file = FakeFile()
    fd = server.peer.open(file)
    waits = start(server, block(flags=WAIT, n_recv=1, cancel_fd=fd))
    assert waits.waiting
    file.become_readable()
    assert waits.error == ECANCELED
    with fails(ECANCELED):
        exchange(server, flags=WAIT, n_recv=1, cancel_fd=fd)


def test_a_signal_ends_the_wait_and_nothing_is_done_twice(pair: tuple[Client, Client]) -> None:
    client, server = pair
    server.send(client, data=b"x")
    (received,) = exchange(client, n_recv=1).messages
    argument = block([to(server, b"once")], frees=[received.offset], flags=WAIT, n_recv=1)
    waits = start(client, argument)
    waits.interrupt()
    assert waits.error == EINTR
    assert server.recv().data == b"once"
    # What a handler with SA_RESTART does.
    again = start(client, client.peer.read(waits.call.address, len(argument)))
    assert again.waiting
    with fails(EAGAIN):
        server.recv()
    server.send(client, data=b"y")
    assert Result(client, again).data == [b"y"]


def test_the_end_of_the_connection_ends_the_wait(bus: Bus) -> None:
    for end in (Client.byebye, Client.close):
        client = bus.hello()
        waits = start(client, block(flags=WAIT, n_recv=1))
        end(client)
        assert waits.error == ECONNRESET


def test_the_end_of_the_bus_ends_the_wait(bus: Bus) -> None:
    client = bus.hello()
    waits = start(client, block(flags=WAIT, n_recv=1))
    bus.file.close()
    assert waits.error == ECONNRESET


def test_a_waiter_that_is_gone_leaves_the_message_to_the_next(pair: tuple[Client, Client]) -> None:
    client, server = pair
    first, second = (start(server, block(flags=WAIT, n_recv=1)) for _ in range(2))
    finish = server.domain.finish
    server.domain.finish = lambda: None  # type: ignore[method-assign]
    client.send(server, data=b"x")
    server.domain.finish = finish  # type: ignore[method-assign]
    server.domain.completed.remove(first)
    server.handle.abandon(first.call)
    assert Result(server, second).data == [b"x"]


# --- a synchronous call


def call(client: Client, server: Client, data: bytes, **fields: Any) -> Pending:
    msg = to(
        server,
        data,
        flags=MsgFlag.EXPECT_REPLY,
        timeout=client.domain.clock.now + SECOND,
        **fields,
    )
    return start(client, block([msg], flags=CALL, n_recv=1))


def test_a_call_waits_for_its_reply_alone(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = call(client, server, b"?", cookie=9)
    (request,) = exchange(server, n_recv=1).messages
    assert (request.data, request.cookie) == (b"?", 9)
    server.send(client, data=b"something else")
    assert waits.waiting
    exchange(server, [to(client, b"!", timeout=9)])
    result = Result(client, waits)
    assert (result.error, result.n_sent, result.data) == (0, 1, [b"!"])
    assert client.recv().data == b"something else"


def test_reply_and_wait_is_one_call(pair: tuple[Client, Client]) -> None:
    client, server = pair
    serving = start(server, block(flags=WAIT, n_recv=1))
    for n in range(1, 6):
        waits = call(client, server, b"?%d" % n, cookie=n)
        (request,) = Result(server, serving).messages
        answer = to(client, b"!%d" % n, timeout=request.cookie)
        serving = start(server, block([answer], frees=[request.offset], flags=WAIT, n_recv=1))
        assert serving.waiting
        assert Result(client, waits).data == [b"!%d" % n]


def test_an_interrupted_call_goes_on(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = call(client, server, b"?", cookie=3)
    waits.interrupt()
    assert waits.error == EINTR
    again = start(client, client.peer.read(waits.call.address, waits.inline_size))
    assert again.waiting
    request = server.recv()
    with fails(EAGAIN):
        server.recv()
    server.reply(client, request.cookie, data=b"!")
    assert Result(client, again).data == [b"!"]


def test_a_call_ends_with_its_target(pair: tuple[Client, Client]) -> None:
    client, server = pair
    waits = call(client, server, b"?")
    server.close()
    assert waits.error == EPIPE


# --- turns


def slow_down(client: Client, ns: int) -> None:
    """Let so much time pass with each look at the clock."""
    clock = client.domain.clock
    monotonic_ns = clock.monotonic_ns

    def slowly() -> int:
        clock.now += ns
        return monotonic_ns()

    clock.monotonic_ns = slowly  # type: ignore[method-assign]


def test_a_block_that_takes_long_lets_others_go_first(pair: tuple[Client, Client]) -> None:
    client, server = pair
    slow_down(client, 600_000)
    waits = start(client, block([to(server, b"%d" % n) for n in range(10)]))
    n_turns = 0
    while waits.waiting:
        assert client.domain.put_off == [waits]
        server.send(server, data=b"between")
        client.go_on(waits)
        n_turns += 1
    assert n_turns > 1
    assert Result(client, waits).n_sent == 10
    received = exchange(server, n_recv=64).data
    assert [m for m in received if m != b"between"] == [b"%d" % n for n in range(10)]
    assert received[-1] != b"between"


def test_a_message_that_takes_long_is_the_only_one_of_its_turn(pair: tuple[Client, Client]) -> None:
    client, server = pair
    slow_down(client, 1_100_000)
    waits = start(client, block([to(server, b"%d" % n) for n in range(10)]))
    n_turns = 1
    while waits.waiting:
        client.go_on(waits)
        n_turns += 1
    assert n_turns == 10


def test_another_process_may_wait_on_a_connection(pair: tuple[Client, Client]) -> None:
    client, server = pair
    with server.used_by(FakePeer()):
        waits = start(server, block(flags=WAIT, n_recv=1))
        client.send(server, data=b"x")
        assert Result(server, waits).data == [b"x"]
