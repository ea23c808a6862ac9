# SPDX-License-Identifier: LGPL-2.1-or-later
"""EXCHANGE on a mount: what the kernel carries, and how waits end there."""

import array
import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from abi_client.blocks import CALL, HEAD, HERE, WAIT, block, code
from abi_client.received import Received
from kdbusfs.abi.items import build
from kdbusfs.abi.numbers import HelloFlag, ItemType, MsgFlag
from kdbusfs.abi.structs import (
    CMD_EXCHANGE_N_RECEIVED,
    CMD_EXCHANGE_N_SENT,
    MSG,
    MSG_INFO,
    MSG_SIZE,
    U32,
)
from mount.processes import wait_in_ioctl
from mount.raw import Bus, Connection, Memory, fails, ioctl, monotonic_ns


def to(
    conn: Connection, data: bytes, items: bytes = b"", flags: int = 0, last: int = 0
) -> tuple[bytes, bytes]:
    """A message for `block`; *last* is timeout_ns or cookie_reply."""
    body = items + HERE
    return MSG.pack(MSG_SIZE + len(body), flags, 0, conn.id, 0, 1, 1, last) + body, data


class Exchange:
    """The argument of an EXCHANGE."""

    def __init__(self, *args: object, **options: object) -> None:
        argument = block(*args, **options)  # type: ignore[arg-type]
        self.code = code(argument)
        self.memory = Memory(argument)

    def run(self, conn: Connection) -> list[bytes]:
        """Make the call, on which OSError may come; what is received, its slices free again."""
        received = self.messages(conn)
        for message in received:
            conn.free(message.offset)
        return [message.data for message in received]

    def messages(self, conn: Connection) -> list[Received]:
        ioctl(conn.fileno(), self.code, self.memory.address)
        n = self._u32(CMD_EXCHANGE_N_RECEIVED)
        infos = (MSG_INFO.unpack_from(bytes(self.memory), HEAD + 24 * i) for i in range(n))
        return [
            Received(offset, conn.pool.read(offset, size), msg_return_flags=flags)
            for offset, size, flags in infos
        ]

    @property
    def n_sent(self) -> int:
        return self._u32(CMD_EXCHANGE_N_SENT)

    def _u32(self, offset: int) -> int:
        return int(U32.unpack_from(bytes(self.memory), offset)[0])


@pytest.fixture
def pair(bus: Bus) -> Iterator[tuple[Connection, Connection]]:
    with bus.connect() as client, bus.connect() as server:
        yield client, server


@contextmanager
def echoing(server: Connection, n: int) -> Iterator[None]:
    """A thread that answers *n* requests, each reply together with the next wait."""

    def serve() -> None:
        (request,) = Exchange(flags=WAIT, n_recv=1).messages(server)
        for left in reversed(range(n)):
            reply = (
                MSG.pack(MSG_SIZE + len(HERE), 0, 0, request.src_id, 0, 1, 1, request.cookie)
                + HERE,
                request.data,
            )
            options = {"flags": WAIT, "n_recv": 1} if left else {}
            received = Exchange([reply], frees=[request.offset], **options).messages(server)
            request = received[0] if left else request

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("size", [1, 8, 4095, 4096, 5000, 14000])
def test_calls_and_replies_of_any_size(pair: tuple[Connection, Connection], size: int) -> None:
    client, server = pair
    with echoing(server, 20):
        for n in range(20):
            data = bytes([n + 1]) * size
            last = monotonic_ns(30)
            request = to(server, data, flags=MsgFlag.EXPECT_REPLY, last=last)
            assert Exchange([request], flags=CALL, n_recv=1).run(client) == [data]


def test_many_messages_in_one_call(pair: tuple[Connection, Connection]) -> None:
    client, server = pair
    for _ in range(20):
        exchange = Exchange([to(server, b"%d" % n) for n in range(64)])
        exchange.run(client)
        assert exchange.n_sent == 64
        assert Exchange(n_recv=64).run(server) == [b"%d" % n for n in range(64)]


def test_nobody_writes_behind_the_block(pair: tuple[Connection, Connection]) -> None:
    client, server = pair
    argument = block(n_recv=2)
    memory = Memory(argument + b"\xaa" * 64)
    client.send(server.id, b"x")
    ioctl(server.fileno(), code(argument), memory.address)
    assert bytes(memory)[len(argument) :] == b"\xaa" * 64


def test_numbers_that_say_too_little(pair: tuple[Connection, Connection]) -> None:
    client, _ = pair
    argument = block(n_recv=1)
    memory = Memory(argument)
    for size, error in [(0, errno.ENOTTY), (71, errno.ENOTTY), (72, errno.EINVAL)]:
        with fails(error):
            ioctl(client.fileno(), code(argument) & ~(0x3FFF << 16) | size << 16, memory.address)
    assert bytes(memory)[16:] == argument[16:]


def test_descriptors_come_on_the_socket_that_it_brings(bus: Bus) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    with ours, theirs, bus.connect(flags=HelloFlag.ACCEPT_FD) as conn:
        fds = build(ItemType.FDS, struct.pack("=i", writer))
        sent = Exchange([to(conn, b"x", fds)], fd_socket=theirs.fileno(), n_recv=8)
        (message,) = sent.messages(conn)
        assert (message.fds, message.msg_return_flags) == ([-1], 0)
        packet, ancillary, _, _ = ours.recvmsg(64, socket.CMSG_SPACE(16))
        assert struct.unpack("=QQ", packet) == (message.offset, 1)
        (received,) = array.array("i", ancillary[0][2][:4])
        os.write(received, b"through")
        assert os.read(reader, 100) == b"through"
        for fd in (received, reader, writer):
            os.close(fd)


def test_without_a_socket_descriptors_are_lost_and_the_message_is_not(bus: Bus) -> None:
    with bus.connect(flags=HelloFlag.ACCEPT_FD) as conn:
        conn.send(conn.id, b"x", fds=[0])
        (message,) = Exchange(n_recv=1).messages(conn)
        assert (message.data, message.fds, message.msg_return_flags) == (b"x", [-1], 1)


# --- how waits end


def waiting(conn: Connection, act: Callable[[int], None], **options: object) -> int:
    """The errno of an EXCHANGE that waits in a child, upon which *act* does something."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        error = 0
        try:
            Exchange(flags=WAIT, n_recv=1, **options).run(conn)
        except OSError as failure:
            error = failure.errno or 0
        os.write(writer, b"%d" % error)
        os._exit(0)
    os.close(writer)
    try:
        wait_in_ioctl(child)
        act(child)
        return int(os.read(reader, 10) or -1)
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def test_a_message_ends_the_wait(pair: tuple[Connection, Connection]) -> None:
    client, server = pair
    assert waiting(server, lambda _: client.send(server.id, b"x")) == 0


def test_a_deadline_ends_the_wait(pair: tuple[Connection, Connection]) -> None:
    _, server = pair
    with fails(errno.ETIMEDOUT):
        Exchange(flags=WAIT, n_recv=1, deadline=monotonic_ns(0.05)).run(server)


def test_a_cancel_descriptor_ends_the_wait(pair: tuple[Connection, Connection]) -> None:
    _, server = pair
    reader, writer = os.pipe()
    act = lambda _: os.write(writer, b"x")  # noqa: E731
    assert waiting(server, act, cancel_fd=reader) == errno.ECANCELED
    os.close(reader)
    os.close(writer)


def test_byebye_ends_the_wait(pair: tuple[Connection, Connection]) -> None:
    _, server = pair
    assert waiting(server, lambda _: server.byebye()) == errno.ECONNRESET


def test_a_killed_waiter_is_gone_at_once(pair: tuple[Connection, Connection]) -> None:
    client, server = pair
    assert waiting(server, lambda pid: os.kill(pid, signal.SIGKILL)) == -1
    client.send(server.id, b"x")
    assert Exchange(n_recv=1).run(server) == [b"x"]


def test_the_wait_goes_on_after_a_handler_with_sa_restart(
    pair: tuple[Connection, Connection],
) -> None:
    client, server = pair

    def act(pid: int) -> None:
        for _ in range(5):
            os.kill(pid, signal.SIGUSR1)
            wait_in_ioctl(pid)
        # What it sent was sent once.
        assert Exchange(n_recv=8).run(client) == [b"once"]
        client.send(server.id, b"x")

    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    try:
        assert waiting(server, act, messages=[to(client, b"once")]) == 0
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_each_message_comes_to_one_of_several_waiters(
    pair: tuple[Connection, Connection],
) -> None:
    client, server = pair
    received: list[bytes] = []
    n = 100

    def take() -> None:
        while True:
            got = Exchange(flags=WAIT, n_recv=1).run(server)
            received.extend(got)
            if b"end" in got:
                return

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(n):
        client.send(server.id, b"%d" % i)
    for _ in threads:
        client.send(server.id, b"end")
    for thread in threads:
        thread.join(30)
    assert sorted(received) == sorted([*(b"%d" % i for i in range(n)), b"end", b"end"])
