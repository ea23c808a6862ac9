# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long the daemon has a file that was handed to it: until the call returns that refused,
received or dropped it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kdbus
from abi_client.building import Memfd
from kdbusfs.abi.items import build
from kdbusfs.abi.numbers import ItemType
from kdbusfs.abi.structs import I32
from mount.raw import Bus, Connection, fails, outcome, succeeds

TIMES = 40


def refuse(sender: Connection, to: int, victim: int, how: str) -> None:
    if how == "fds":
        with fails(errno.EOPNOTSUPP):
            sender.send(to, fds=[victim])
    elif how == "among others":
        with fails(errno.EOPNOTSUPP):
            sender.send(to, fds=[0, victim])
    elif how == "memfd":
        with fails(errno.EMEDIUMTYPE):
            sender.send(to, Memfd(victim, 8))
    elif how == "cancel":
        with fails(errno.EINVAL):
            sender.send(to, command_items=build(ItemType.CANCEL_FD, I32.pack(victim)))


@pytest.mark.parametrize("how", ["fds", "among others", "memfd", "cancel"])
def test_a_connection_that_was_refused_ends_with_its_close(bus: Bus, how: str) -> None:
    with bus.connect() as sender, bus.connect() as watcher:
        for _ in range(TIMES):
            victim = bus.connect()
            victim.acquire("com.example.victim")
            refuse(sender, watcher.id, victim.fd, how)
            victim.close()
            with fails(errno.ENXIO):
                watcher.info(victim.id)


@pytest.fixture(params=["raw", "libkdbus"])
def receive(request: pytest.FixtureRequest, bus: Bus) -> Iterator[tuple[int, Callable[[], None]]]:
    """A connection, and a function that receives its next message and closes what comes in it."""
    if request.param == "raw":
        with bus.connect() as raw:
            yield raw.id, lambda: raw.recv().close_fds()
    else:
        with kdbus.Connection(bus.path) as library:
            yield library.id, lambda: library.recv(5).close()


Receive = tuple[int, Callable[[], None]]


def test_a_lock_is_free_when_its_receiver_closes_it(
    bus: Bus, receive: Receive, tmp_path: Path
) -> None:
    path = tmp_path / "lock"
    with bus.connect() as sender, path.open("w") as other:
        for _ in range(TIMES):
            fd = os.open(path, os.O_RDWR)
            fcntl.flock(fd, fcntl.LOCK_EX)
            sender.send(receive[0], fds=[fd])
            os.close(fd)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            receive[1]()
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(other, fcntl.LOCK_UN)


def listen(port: int = 0) -> socket.socket:
    listener = socket.socket(socket.AF_INET)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET) as probe:
        return succeeds(lambda: probe.bind(("127.0.0.1", port)), errno.EADDRINUSE)


@contextlib.contextmanager
def lingering(bus: Bus, seconds: int) -> Iterator[None]:
    """While a socket lingers for so long, which the daemon is the last to close."""
    with listen() as listener, bus.connect() as sender, bus.connect() as receiver:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        sender.send(receiver.id, fds=[ours.fileno()])
        ours.close()
        receiver.drop()
        yield
        theirs.close()


def test_a_port_is_free_when_its_receiver_closes_it(bus: Bus, receive: Receive) -> None:
    with bus.connect() as sender, lingering(bus, 30):
        for _ in range(TIMES):
            listener = listen()
            port = listener.getsockname()[1]
            sender.send(receive[0], fds=[listener.fileno()])
            listener.close()
            assert not is_free(port)
            receive[1]()
            assert is_free(port)


@pytest.mark.parametrize("how", ["received", "dropped", "the queue ends"])
def test_a_pipe_ends_with_what_the_receiver_has_of_it(bus: Bus, how: str) -> None:
    with bus.connect() as sender:
        for _ in range(TIMES):
            read, write = os.pipe2(os.O_NONBLOCK)
            receiver = bus.connect()
            sender.send(receiver.id, fds=[write])
            os.close(write)
            assert outcome(lambda read=read: os.read(read, 1)) == "EAGAIN"  # type: ignore[misc]
            if how == "received":
                receiver.recv().close_fds()
            elif how == "dropped":
                receiver.drop()
            receiver.close()
            if how != "the queue ends":
                # Else it ends with the connection, soon after close(2).
                assert os.read(read, 1) == b""
            os.close(read)
