# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that are killed at any moment of a call, while others go on undisturbed."""

import errno
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import daemons
from kdbusfs.abi.numbers import ListFlag
from mount.processes import Child, fds_of
from mount.raw import MIB, Bus, succeeds

N_KILLED = 300


def exchange(bus: Bus, test: socket.socket) -> tuple[int, float]:
    """Two connections that check every byte of what they send each other until they are told to
    stop: how many rounds, and the longest one in seconds."""
    chance = random.Random(2)
    n, longest = 0, 0.0
    test.setblocking(False)
    with bus.connect(pool_size=4 * MIB) as a, bus.connect(pool_size=4 * MIB) as b:
        test.send(b"ready")
        while True:
            start = time.monotonic()
            data = chance.randbytes(chance.choice([1, 100, 4096, 70_000]))
            a.request(b.id, data, cookie=n + 1)
            request = b.take()
            assert (request.src_id, request.data) == (a.id, data)
            b.reply(request, data[::-1])
            reply = a.take()
            assert (reply.src_id, reply.cookie_reply, reply.data) == (b.id, n + 1, data[::-1])
            longest = max(longest, time.monotonic() - start)
            n += 1
            try:
                test.recv(1)
            except BlockingIOError:
                continue
            return n, longest


def ignore(bus: Bus, test: socket.socket) -> int:
    """Receive whatever comes, in vain."""
    with bus.connect(pool_size=4 * MIB) as conn:
        test.send(conn.id.to_bytes(8, "little"))
        test.setblocking(False)
        n = 0
        while True:
            for message in conn.inbox():
                message.close_fds()
                n += 1
            try:
                test.recv(1)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            return n


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_clients_killed_at_random_disturb_nobody(
    mount: daemons.Mount, bus: Bus, programs: Path, number: signal.Signals
) -> None:
    chance = random.Random(number)
    before = fds_of(mount.pid)
    with (
        Child(lambda test: exchange(bus, test)) as pair,
        Child(lambda test: ignore(bus, test)) as sink,
    ):
        pair.hear()
        to = int.from_bytes(sink.socket.recv(8), "little")
        for n in range(N_KILLED):
            command = [programs / "victim", bus.path, str(to), str(n)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
                assert victim.stdout is not None
                assert victim.stdout.readline() == "ready\n"
                # Anywhere in the first milliseconds of its work.
                end = time.monotonic() + chance.random() ** 2 * 0.02
                while time.monotonic() < end:
                    os.sched_yield()
                assert victim.poll() is None
                victim.send_signal(number)
                assert victim.wait(daemons.DEADLINE_SECONDS) == -number
        with bus.connect() as conn:
            # All of them are gone: the pair, the sink and ourselves are what is left.
            daemons.wait_until(
                lambda: len(conn.list(ListFlag.UNIQUE | ListFlag.NAMES)) == 4, "the dead stay"
            )
        for child in (pair, sink):
            child.say(b"x")
        rounds, longest = pair.result()
        assert rounds > N_KILLED
        assert longest < daemons.DEADLINE_SECONDS
        sink.result()
    daemons.wait_until(lambda: fds_of(mount.pid) <= before, "descriptors are left in the daemon")


def test_buses_killed_at_random_disturb_nobody(mount: daemons.Mount, bus: Bus) -> None:
    chance = random.Random(6)

    def own(test: socket.socket) -> None:
        test.send(b"ready")
        while True:
            with Bus(mount.path) as own, own.connect() as conn, own.connect() as other:
                other.match()
                conn.acquire("com.example.own")
                conn.send(other.id, b"x" * 1000)
                conn.broadcast(b"x")
                other.inbox()

    buses = set(os.listdir(mount.path))
    with Child(lambda test: exchange(bus, test)) as pair:
        pair.hear()
        for _ in range(100):
            with Child(own) as owner:
                owner.hear()
                end = time.monotonic() + chance.random() * 0.01
                while time.monotonic() < end:
                    os.sched_yield()
                owner.kill()
        pair.say(b"x")
        rounds, _ = pair.result()
        assert rounds > 100
    daemons.wait_until(lambda: set(os.listdir(mount.path)) == buses, "dead buses stay")


def test_a_caller_killed_in_each_call_in_turn_leaves_its_target_well(bus: Bus) -> None:
    def call(to: int) -> None:
        with bus.connect() as conn:
            for n in range(1, 1 << 30):
                succeeds(
                    lambda n=n: conn.call(to, b"x" * 10_000, cookie=n, timeout=0.001),
                    *(errno.ETIMEDOUT, errno.EMLINK, errno.ENOBUFS),
                )

    with bus.connect() as target:
        for n in range(100):
            with Child(lambda _: call(target.id)) as caller:
                target.wait()
                end = time.monotonic() + (n % 10) * 0.001
                while time.monotonic() < end:
                    os.sched_yield()
                caller.kill()
            for request in target.inbox():
                assert request.data == b"x" * 10_000
        with bus.connect() as conn:
            conn.send(target.id, b"still fine")
            assert target.take().data == b"still fine"
