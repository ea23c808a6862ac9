# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that stall, in the ways that cost most: signals, stores, many at a time, one's own pool."""

import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi import structs
from kdbusfs.abi.numbers import Command, MsgFlag, SendFlag
from mount.processes import Child, become
from mount.raw import (
    MIB,
    PAGE,
    Bus,
    Connection,
    Mapping,
    Memory,
    Vec,
    ioctl,
    libc,
    make_message,
    monotonic_ns,
    outcome,
)
from mount.test_slow_memory import Trap, _is_faulting, exchange, trap

LONG = 1000.0
"""A deadline, in seconds, that no test means to reach."""
MAX_OF_USER = 32
_MADV_DONTNEED = 4


def vec(pages: Trap) -> Vec:
    return Vec(pages.memory.address, pages.memory.size)


# --- signals


def _call_from_a_trap(
    bus: Bus, to: int, test: socket.socket, conn: Connection | None = None
) -> str:
    """A synchronous call whose payload stalls until the test says "go"."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    with conn or bus.connect() as conn:
        pages = Trap(1)

        def serve() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            daemons.wait_until(lambda: _is_faulting(pages), "a fault")
            test.send(b"ready")
            test.recv(2)
            pages.spring()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return outcome(lambda: conn.call(to, vec(pages), timeout=LONG))


def _call_and_stay(bus: Bus, to: int, test: socket.socket, conn: Connection) -> None:
    """The same; the pages are never there, also when the call has ended."""
    _call_from_a_trap(bus, to, test, conn)
    threading.Event().wait()


def test_a_signal_that_comes_while_the_payload_stalls_ends_the_wait(bus: Bus) -> None:
    with bus.connect() as target, bus.connect() as other:
        with Child(lambda test: _call_from_a_trap(bus, target.id, test)) as caller:
            caller.hear()
            caller.kill(signal.SIGUSR1)
            exchange(other, other)
            caller.say()
            assert caller.result() == "EINTR"
        # The request itself has gone out.
        assert [request.data for request in target.inbox()] == [bytes(PAGE)]
        exchange(other, target)


@pytest.mark.parametrize("first", [None, signal.SIGUSR1], ids=["at once", "after another signal"])
def test_a_caller_that_is_killed_while_it_stalls_ends(
    bus: Bus, first: signal.Signals | None
) -> None:
    with bus.connect() as target, bus.connect() as other:
        with Child(lambda test: _call_from_a_trap(bus, target.id, test)) as caller:
            caller.hear()
            if first is not None:
                caller.kill(first)
                # FUSE has told of it when this is answered, and will not do so again.
                exchange(other, other)
            caller.kill()
            assert caller.status == -signal.SIGKILL
        assert target.inbox() == []
        exchange(other, target)


# --- results


def test_whoever_answers_a_call_does_not_wait_for_where_the_results_go(bus: Bus) -> None:
    with bus.connect() as requester, bus.connect() as target, trap() as pages:
        pages.spring()
        content, kept = make_message(
            target.id, [b"x"], flags=MsgFlag.EXPECT_REPLY, cookie=7, last=monotonic_ns(LONG)
        )
        message = Memory(content)
        fields = (56, SendFlag.SYNC_REPLY, 0, message.address, 0, 0, 0)
        pages.memory.write(0, b"".join(structs.U64.pack(field) for field in fields))
        result: list[str] = []

        def call() -> None:
            address = pages.memory.address
            result.append(outcome(lambda: ioctl(requester.fd, Command.SEND, address)))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        request = target.take()
        # The struct has been read, and will have to be faulted in anew.
        libc.madvise(pages.memory.address, PAGE, _MADV_DONTNEED)
        target.reply(request, b"answer")
        exchange(target, target)
        daemons.wait_until(lambda: _is_faulting(pages), "the results to be stored")
        exchange(target, target)
        assert thread.is_alive()
        pages.spring()
        thread.join(daemons.DEADLINE_SECONDS)
        del kept
        assert result == ["0"]
        offset, size, _ = structs.MSG_INFO.unpack_from(pages.memory.read(0, 56), 32)
        assert requester.pool.read(offset, size).rstrip(b"\0").endswith(b"answer")
        requester.free(offset)
        exchange(requester, target)


# --- many


def _n_threads(mount: daemons.Mount) -> int:
    return len(os.listdir(f"/proc/{mount.pid}/task"))


def _stall_many(bus: Bus, to: int, n: int, uid: int, test: socket.socket) -> list[str]:
    pages = Trap(1)
    results: list[str] = []
    connections = [bus.connect() for _ in range(n)]
    become(uid, uid)

    def send(conn: Connection) -> None:
        results.append(outcome(lambda: conn.send(to, vec(pages))))

    threads = [threading.Thread(target=send, args=(conn,), daemon=True) for conn in connections]
    for thread in threads:
        thread.start()
    test.send(b"ready")
    test.recv(2)
    pages.spring()
    for thread in threads:
        thread.join(daemons.DEADLINE_SECONDS)
    return results


def test_a_user_whose_calls_stall_gets_so_many_threads_and_no_more(
    mount: daemons.Mount, bus: Bus
) -> None:
    n = MAX_OF_USER + 20
    before = _n_threads(mount)
    with bus.connect(pool_size=4 * MIB) as target, bus.connect() as other:
        with Child(lambda test: _stall_many(bus, target.id, n, 4242, test)) as child:
            child.hear()
            daemons.wait_until(
                lambda: _n_threads(mount) >= before + MAX_OF_USER, "the calls do not stall"
            )
            exchange(other, other)
            # Those of others that are started for something else are few.
            assert _n_threads(mount) <= before + MAX_OF_USER + 4
            child.say()
            assert child.result() == ["0"] * n
        assert len(target.inbox()) == n
    daemons.wait_until(lambda: _n_threads(mount) <= before + 4, "threads are left")


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
def test_a_signal_ends_the_daemon_under_calls_that_stall(tmp_path: Path, pool: str) -> None:
    with (
        daemons.running(tmp_path, pool) as mount,
        Bus(mount.path) as bus,
        bus.connect() as target,
        bus.connect() as other,
    ):
        callers = [Child(lambda test: _call_from_a_trap(bus, target.id, test)) for _ in range(3)]
        for caller in callers:
            caller.hear()
        exchange(other, other)
        assert mount.end() == 0
        for caller in callers:
            assert caller.result() in ("ECONNABORTED", "ENOTCONN")


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
def test_a_signal_ends_a_daemon_that_is_stuck_since_it_gets_no_thread(
    tmp_path: Path, pool: str
) -> None:
    with (
        daemons.running(tmp_path, pool) as mount,
        Bus(mount.path) as bus,
        bus.connect() as target,
    ):
        exchange(target, target)
        before = _n_threads(mount)
        # What the daemon needs memory for when it is used for the first time, it has then.
        with Child(lambda test: _call_from_a_trap(bus, target.id, test)) as caller:
            caller.hear()
            exchange(target, target)
            caller.kill()
        connections = [bus.connect() for _ in range(2)]
        daemons.wait_until(lambda: _n_threads(mount) == before, "the end of the stall")
        # There is room, but not for a thread's stack.
        size = int(Path(f"/proc/{mount.pid}/statm").read_text().split()[0]) * PAGE
        resource.prlimit(mount.pid, resource.RLIMIT_AS, (size + 120 * PAGE, MIB << 20))
        callers = [
            Child(lambda test, conn=conn: _call_and_stay(bus, target.id, test, conn))
            for conn in connections
        ]
        for caller in callers:
            caller.hear()
        assert mount.end() == 0
        for caller in callers:
            caller.kill()
        for conn in connections:
            conn.close()


# --- one's own pool


def test_what_was_received_can_be_sent_on_from_where_it_lies(bus: Bus) -> None:
    data = os.urandom(100_000)
    with bus.connect() as sender, bus.connect() as receiver:
        for _ in range(20):
            with bus.connect() as proxy:
                sender.send(proxy.id, data)
                proxy.wait()
                result = bytes(proxy.recv_raw())
                offset, size, _ = structs.MSG_INFO.unpack_from(result, 40)
                proxy.send(receiver.id, Vec(proxy.pool.address + offset, size))
                assert data in receiver.take().data


class Torture:
    """Threads that do something to a file and its mapping, while messages come there."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._stop = False
        self._threads = [threading.Thread(target=self._run, args=(a,)) for a in actions]

    def _run(self, action: Callable[[], object]) -> None:
        while not self._stop:
            action()

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join(daemons.DEADLINE_SECONDS)
            assert not thread.is_alive()


ROUNDS = 200
_PAGES = 16


def _torture(path: Path, hurt: Callable[[Connection, Mapping], list[Callable[[], object]]]) -> int:
    """Messages to oneself meanwhile; how many came as they were sent."""
    data = os.urandom(30_000)
    n = 0
    with Connection(path) as conn:
        writable = Mapping(conn.fd, conn.pool_size, protection=3)
        with Torture(*hurt(conn, writable)):
            for _ in range(ROUNDS):
                conn.send(conn.id, data)
                conn.free(conn.recv().offset)
                n += 1
    return n


def _scribble(conn: Connection, pool: Mapping) -> list[Callable[[], object]]:
    def write() -> None:
        for page in range(_PAGES):
            pool.write(page * PAGE + 17, b"x")
        libc.sync_file_range(conn.fd, 0, _PAGES * PAGE, 2)

    def truncate() -> None:
        os.ftruncate(conn.fd, conn.pool_size)

    return [write, truncate]


def _drop(conn: Connection, pool: Mapping) -> list[Callable[[], object]]:
    def fault() -> None:
        libc.madvise(pool.address, _PAGES * PAGE, _MADV_DONTNEED)
        os.posix_fadvise(conn.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        pool.read(0, _PAGES * PAGE)

    def remap() -> None:
        other = Mapping(conn.fd, conn.pool_size)
        other.read(0, 1)
        other.unmap()

    return [fault, remap]


@pytest.mark.parametrize("hurt", [_scribble, _drop])
def test_no_call_fails_beside_what_a_client_does_to_its_own_pool(
    bus: Bus, hurt: Callable[[Connection, Mapping], list[Callable[[], object]]]
) -> None:
    path = bus.path
    with Child(lambda _: _torture(path, hurt)) as child, bus.connect() as other:
        exchange(other, other)
        assert child.result() == ROUNDS
        exchange(other, other)
