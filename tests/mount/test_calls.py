# SPDX-License-Identifier: LGPL-2.1-or-later
"""Synchronous calls (SYNC_REPLY of kdbus.message(7)) and what ends them."""

import errno
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import HelloFlag, ItemType, MsgFlag
from kdbusfs.abi.structs import I32
from mount.processes import Child, wait_in_ioctl
from mount.raw import MIB, Bus, Connection, fails, monotonic_ns, poll

LONG = 60_000
"""A deadline, in milliseconds, that no test means to reach."""


class Caller:
    """programs/caller.c, calling a connection of ours."""

    def __init__(
        self, programs: Path, bus: Bus, to: Connection, *how: str, milliseconds: int = LONG
    ) -> None:
        command = [programs / "caller", bus.path, str(to.id), *how, str(milliseconds)]
        self.process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], daemons.DEADLINE_SECONDS)
        assert ready, "the caller says nothing"
        return self.process.stdout.readline().strip()

    def lines(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.read().splitlines()

    def ended(self) -> tuple[str, int]:
        """How an attempt ended, and how often the signal handler has run."""
        error, n_signals = map(int, self.line().split())
        return errno.errorcode.get(error, "0"), n_signals


@contextmanager
def calling(
    programs: Path, bus: Bus, to: Connection, *how: str, milliseconds: int = LONG
) -> Iterator[Caller]:
    caller = Caller(programs, bus, to, *how, milliseconds=milliseconds)
    try:
        yield caller
    finally:
        caller.process.kill()
        with caller.process:
            pass


@pytest.fixture
def target(bus: Bus) -> Iterator[Connection]:
    with bus.connect() as conn:
        yield conn


def cancel_item(fd: int) -> bytes:
    return build(ItemType.CANCEL_FD, I32.pack(fd))


# --- answered


def test_a_call_returns_its_reply(bus: Bus, target: Connection) -> None:
    def call(test: socket.socket) -> tuple[bytes, int, int, int]:
        with bus.connect() as conn:
            reply = conn.call(target.id, b"question", cookie=99)
            assert poll(conn) & select.POLLIN == 0
            with fails(errno.EAGAIN):
                conn.recv()
            conn.free(reply.offset)
            with fails(errno.ENXIO):
                conn.free(reply.offset)
            test.recv(2)
            return reply.data, reply.src_id, reply.cookie_reply, reply.flags

    with Child(call) as child:
        request = target.take()
        assert request.data == b"question"
        assert request.flags == MsgFlag.EXPECT_REPLY
        assert request.cookie_reply > monotonic_ns(0)
        target.reply(request, b"answer")
        with fails(errno.EBADSLT):
            target.reply(request, b"twice")
        child.say()
        assert child.result() == (b"answer", target.id, 99, 0)


def test_a_large_reply_arrives_whole(bus: Bus, target: Connection) -> None:
    data = os.urandom(2 * MIB)

    def call(_: socket.socket) -> bytes:
        with bus.connect(pool_size=16 * MIB) as conn:
            return conn.call(target.id).data

    with Child(call) as child:
        target.reply(target.take(), data)
        assert child.result() == data


def test_messages_meanwhile_wait_in_the_queue(bus: Bus, target: Connection) -> None:
    def call(_: socket.socket) -> list[bytes]:
        with bus.connect() as conn:
            reply = conn.call(target.id)
            return [reply.data, *(m.data for m in conn.inbox())]

    with Child(call) as child:
        request = target.take()
        for n in range(3):
            target.send(request.src_id, b"%d" % n)
        target.reply(request, b"reply")
        assert child.result() == [b"reply", b"0", b"1", b"2"]


def test_blocked_calls_block_nobody_else(bus: Bus, target: Connection, programs: Path) -> None:
    with (
        calling(programs, bus, target, "threads", "60"),
        bus.connect() as one,
        bus.connect() as two,
    ):
        daemons.wait_until(lambda: len(target.list(1)) == 4, "no caller")
        for n in range(200):
            one.send(two.id, b"%d" % n)
            assert two.take().data == b"%d" % n


def test_many_threads_of_one_connection_each_get_their_reply(
    bus: Bus, target: Connection, programs: Path
) -> None:
    n = 60
    with calling(programs, bus, target, "threads", str(n)) as caller:
        requests = [target.take() for _ in range(n)]
        assert sorted(r.cookie for r in requests) == list(range(1, n + 1))
        for request in reversed(requests):
            target.reply(request)
        assert caller.lines() == [f"{cookie} 0 {cookie}" for cookie in range(1, n + 1)]


# --- not answered


def test_time_runs_out(bus: Bus, target: Connection) -> None:
    with bus.connect() as conn:
        start = time.monotonic()
        with fails(errno.ETIMEDOUT):
            conn.call(target.id, b"?", timeout=0.05)
        assert 0.05 <= time.monotonic() - start < 5
        # The request is still there, the reply comes too late, and nobody is told of it.
        request = target.take()
        assert request.data == b"?"
        with fails(errno.EBADSLT):
            target.reply(request)
        with fails(errno.EAGAIN):
            conn.recv()


def test_deadlines_and_cancel_descriptors_are_served_under_load(
    bus: Bus, target: Connection, programs: Path
) -> None:
    """48 threads see to it that a request is always waiting; with no more than one other of them
    between a deadline and its end, only the machine's load makes it late."""
    command = [programs / "flood", bus.path, "48"]
    flood = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == b"up\n"
        with bus.connect() as conn:
            start = time.monotonic()
            conn.request(target.id, cookie=7, timeout=0.1)
            with fails(errno.ETIMEDOUT):
                conn.call(target.id, timeout=0.1)
            assert conn.take().types[0] == ItemType.REPLY_TIMEOUT
            event = os.eventfd(1)
            with fails(errno.ECANCELED):
                conn.call(target.id, timeout=60, command_items=cancel_item(event))
            os.close(event)
            assert flood.poll() is None
            assert time.monotonic() - start < 5
    finally:
        flood.kill()
        flood.communicate()


def test_a_deadline_in_the_past_is_looked_at_before_the_destination(bus: Bus) -> None:
    with bus.connect() as conn:
        for deadline in (1, monotonic_ns(-0.001), 1 << 63, (1 << 64) - 1):
            with fails(errno.ETIMEDOUT):
                conn.send(1 << 40, sync=True, flags=MsgFlag.EXPECT_REPLY, last=deadline)


def test_a_readable_cancel_descriptor_ends_the_call(bus: Bus, target: Connection) -> None:
    read, write = os.pipe()

    def call(_: socket.socket) -> str:
        with bus.connect() as conn, fails(errno.ECANCELED):
            conn.send(
                *(target.id, b"?"),
                sync=True,
                command_items=cancel_item(read),
                flags=MsgFlag.EXPECT_REPLY,
                last=monotonic_ns(60),
            )
        return "cancelled"

    with Child(call) as child:
        request = target.take()
        wait_in_ioctl(child.pid)
        os.write(write, b"x")
        assert child.result() == "cancelled"
        with pytest.raises(OSError, match=r".") as caught:
            target.reply(request)
        assert caught.value.errno in (errno.EBADSLT, errno.ENXIO)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("kind", ["eventfd", "pipe", "socket"])
def test_cancelled_from_the_start_the_message_still_goes_out(
    bus: Bus, target: Connection, kind: str
) -> None:
    if kind == "eventfd":
        fds = [os.eventfd(1)]
    elif kind == "pipe":
        fds = [*os.pipe()]
        os.write(fds[1], b"x")
    else:
        fds = [s.detach() for s in socket.socketpair()]
        os.write(fds[1], b"x")
    with bus.connect() as conn:
        with fails(errno.ECANCELED):
            conn.send(
                *(target.id, b"out"),
                sync=True,
                command_items=cancel_item(fds[0]),
                flags=MsgFlag.EXPECT_REPLY,
                last=monotonic_ns(60),
            )
        assert target.take().data == b"out"
    for fd in fds:
        os.close(fd)


def test_what_cannot_be_polled_cannot_cancel(bus: Bus, target: Connection) -> None:
    regular = os.open(__file__, os.O_RDONLY)
    path = os.open("/dev/null", os.O_PATH)
    with bus.connect() as conn:
        for fd, expected in (
            (-1, errno.EBADF),
            (1000, errno.EBADF),
            (path, errno.EBADF),
            (regular, errno.EINVAL),
        ):
            with fails(expected):
                conn.send(target.id, command_items=cancel_item(fd))
    with fails(errno.EAGAIN):
        target.recv()
    os.close(regular)
    os.close(path)


@pytest.mark.parametrize("read", [True, False])
def test_the_death_of_the_target_ends_the_call(bus: Bus, programs: Path, read: bool) -> None:
    target = bus.connect()
    with calling(programs, bus, target, "once", "NONE") as caller:
        target.wait()
        if read:
            target.recv()
        target.close()
        assert caller.ended() == ("EPIPE", 0)


def test_a_killed_target_ends_the_call(bus: Bus) -> None:
    def serve(test: socket.socket) -> None:
        with bus.connect() as conn:
            test.send(conn.id.to_bytes(8, "little"))
            conn.take()
            test.send(b"ready")
            signal.pause()

    def call(to: int) -> str:
        with bus.connect() as conn, fails(errno.EPIPE):
            conn.call(to, timeout=60)
        return "EPIPE"

    with Child(serve) as server:
        to = int.from_bytes(server.socket.recv(8), "little")
        with Child(lambda _: call(to)) as caller:
            server.hear()
            server.kill()
            assert caller.result() == "EPIPE"


def test_a_dropped_request_ends_the_call(bus: Bus, target: Connection, programs: Path) -> None:
    with calling(programs, bus, target, "once", "NONE") as caller:
        target.wait()
        target.drop()
        assert caller.ended() == ("EPIPE", 0)


def test_a_reply_there_is_no_room_for_fails_on_both_sides(bus: Bus, target: Connection) -> None:
    def call(_: socket.socket) -> str:
        with bus.connect(pool_size=4096) as conn, fails(errno.ENOBUFS):
            conn.call(target.id)
        return "ENOBUFS"

    with Child(call) as child:
        request = target.take()
        with fails(errno.ENOBUFS):
            target.reply(request, bytes(4000))
        assert child.result() == "ENOBUFS"


def test_byebye_of_another_thread_ends_the_call(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "byebye", "-") as caller:
        target.wait()
        assert caller.process.stdin is not None
        caller.process.stdin.write("x")
        caller.process.stdin.flush()
        assert caller.line() == f"{errno.ECONNRESET} 0"


def test_the_end_of_the_bus_ends_the_call(mount: daemons.Mount, programs: Path) -> None:
    bus = Bus(mount.path)
    with bus.connect() as target, calling(programs, bus, target, "once", "NONE") as caller:
        target.wait()
        bus.close()
        error, _ = caller.ended()
        assert error in ("ECONNRESET", "EPIPE")


def test_the_death_of_an_activators_implementer_does_not_end_a_call_by_name(bus: Bus) -> None:
    name = build_string(ItemType.NAME, b"com.example.activated")

    def call(_: socket.socket) -> bytes:
        with bus.connect() as conn:
            return conn.call(name="com.example.activated").data

    with bus.connect(flags=HelloFlag.ACTIVATOR, items=name) as activator:
        first = bus.connect()
        first.acquire("com.example.activated")
        with Child(call) as child:
            assert first.take().data == b""
            # The child has a copy of it, so closing it here is not enough.
            first.byebye()
            first.close()
            wait_in_ioctl(child.pid)
            with fails(errno.EAGAIN):
                activator.recv()
            with bus.connect() as second:
                second.acquire("com.example.activated")
                (caller,) = (
                    r.id for r in second.list(1) if r.id > activator.id + 1 and r.id != second.id
                )
                second.send(caller, b"by the next one", last=1)
                assert child.result() == b"by the next one"


# --- signals


def interrupt(caller: Caller, number: int = signal.SIGUSR1) -> None:
    wait_in_ioctl(caller.pid)
    os.kill(caller.pid, number)


def test_a_handler_with_sa_restart_lets_the_call_go_on(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "once", "RESTART") as caller:
        request = target.take()
        for _ in range(5):
            interrupt(caller)
            # It is back inside, and nothing was sent again.
            daemons.wait_until(lambda: _no_signal_pending(caller.pid), "the signal stays pending")
        wait_in_ioctl(caller.pid)
        with fails(errno.EAGAIN):
            target.recv()
        target.reply(request)
        error, n_signals = caller.ended()
        assert (error, n_signals) == ("0", 5)


def _no_signal_pending(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    return int(fields["SigPnd"], 16) == int(fields["ShdPnd"], 16) == 0


def test_a_handler_without_it_ends_the_call_which_can_be_resumed(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "once", "PLAIN") as caller:
        request = target.take()
        for n in range(1, 4):
            interrupt(caller)
            assert caller.ended() == ("EINTR", n)
        wait_in_ioctl(caller.pid)
        with fails(errno.EAGAIN):
            target.recv()
        target.reply(request)
        assert caller.ended() == ("0", 3)


def test_whatever_becomes_of_the_signals_calls_end_with_their_reply_or_eintr(
    bus: Bus, target: Connection, programs: Path
) -> None:
    n = 100
    with calling(programs, bus, target, "storm", str(n)) as caller:
        for _ in range(3 * n):
            target.reply(target.take())
        assert set(caller.lines()) <= {"0", str(errno.EINTR)}
        # Each was sent once.
        with fails(errno.EAGAIN):
            target.recv()


def test_a_restarted_call_keeps_its_deadline(bus: Bus, target: Connection, programs: Path) -> None:
    start = time.monotonic()
    with calling(programs, bus, target, "once", "RESTART", milliseconds=300) as caller:
        target.wait()
        for _ in range(3):
            interrupt(caller)
            daemons.wait_until(lambda: _no_signal_pending(caller.pid), "the signal stays pending")
        assert caller.ended()[0] == "ETIMEDOUT"
        assert 0.3 <= time.monotonic() - start < 5


def test_a_reply_between_interruption_and_resumption_is_not_lost(
    bus: Bus, target: Connection
) -> None:
    def call(test: socket.socket) -> bytes:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        with bus.connect() as conn:
            deadline = monotonic_ns(60)
            request = {"sync": True, "flags": MsgFlag.EXPECT_REPLY, "last": deadline, "cookie": 7}
            test.send(b"ready")
            with fails(errno.EINTR):
                conn.send(target.id, b"?", **request)  # type: ignore[arg-type]
            test.send(b"break")
            test.recv(2)
            reply = conn.send(target.id, b"?", **request)  # type: ignore[arg-type]
            assert reply is not None
            return reply.data

    with Child(call) as child:
        child.hear()
        request = target.take()
        wait_in_ioctl(child.pid)
        child.kill(signal.SIGUSR1)
        child.hear(b"break")
        target.reply(request, b"in between")
        child.say()
        assert child.result() == b"in between"
        with fails(errno.EAGAIN):
            target.recv()


def test_a_killed_caller_is_gone_at_once(bus: Bus, target: Connection, programs: Path) -> None:
    with calling(programs, bus, target, "once", "NONE") as caller:
        request = target.take()
        wait_in_ioctl(caller.pid)
        caller.process.kill()
        assert caller.process.wait(10) == -signal.SIGKILL
        with pytest.raises(OSError, match=r".") as caught:
            target.reply(request)
        assert caught.value.errno in (errno.ENXIO, errno.EBADSLT)


def test_a_signal_that_nobody_handles_ends_the_caller_at_once(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "once", "NONE") as caller:
        target.wait()
        interrupt(caller)
        assert caller.process.wait(10) == -signal.SIGUSR1


def test_a_killed_caller_with_many_threads_is_gone_at_once(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "threads", "50") as caller:
        for _ in range(50):
            target.take()
        caller.process.kill()
        assert caller.process.wait(10) == -signal.SIGKILL


def test_a_stopped_caller_goes_on_when_it_is_continued(
    bus: Bus, target: Connection, programs: Path
) -> None:
    with calling(programs, bus, target, "once", "NONE") as caller:
        request = target.take()
        wait_in_ioctl(caller.pid)
        os.kill(caller.pid, signal.SIGSTOP)
        daemons.wait_until(lambda: _state(caller.pid) == "T", "not stopped")
        os.kill(caller.pid, signal.SIGCONT)
        daemons.wait_until(lambda: _state(caller.pid) == "S", "not continued")
        wait_in_ioctl(caller.pid)
        with fails(errno.EAGAIN):
            target.recv()
        target.reply(request)
        assert caller.ended() == ("0", 0)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- trackers


def test_a_connection_may_have_so_many_requests_outstanding(bus: Bus, target: Connection) -> None:
    with bus.connect() as conn:
        for cookie in range(1, 129):
            conn.request(target.id, cookie=cookie, timeout=60)
        with fails(errno.EMLINK):
            conn.request(target.id, cookie=129)
        with fails(errno.EMLINK):
            conn.call(target.id, cookie=130)
        target.reply(target.take())
        conn.request(target.id, cookie=129)


def test_only_whom_was_asked_may_answer(bus: Bus, target: Connection) -> None:
    with bus.connect() as conn, bus.connect() as stranger:
        conn.request(target.id, cookie=5)
        with fails(errno.EBADSLT):
            stranger.send(conn.id, b"not asked", last=5)
        with fails(errno.EBADSLT):
            target.send(conn.id, b"wrong cookie", last=6)
        target.send(conn.id, b"right", last=5)
        with fails(errno.EBADSLT):
            target.send(conn.id, b"again", last=5)
        assert [m.data for m in conn.inbox()] == [b"right"]


def test_timeouts_come_in_the_order_of_deadlines(bus: Bus, target: Connection) -> None:
    with bus.connect() as conn:
        for cookie, timeout in ((1, 0.15), (2, 0.05), (3, 0.1)):
            conn.request(target.id, cookie=cookie, timeout=timeout)
        told = [conn.take() for _ in range(3)]
        assert [(m.types[0], m.cookie_reply) for m in told] == [
            (ItemType.REPLY_TIMEOUT, cookie) for cookie in (2, 3, 1)
        ]
        assert [(m.size, m.dst_id, m.src_id) for m in told] == [(120, conn.id, 0)] * 3
