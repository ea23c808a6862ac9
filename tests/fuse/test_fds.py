# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors on a connection's own socket: what the network layer refuses is lost alone. That
libkdbus makes of the rest what it should is in tests/libkdbus/unit.c."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

import daemons
from kdbusfs.fuse import fds
from kdbusfs.peer import descriptors
from kdbusfs.peer.descriptors import FileDescriptor
from privilege import uring

OFFSET = 4096
LOST = 1 << 63


def _nobody(fd: int, callback: Callable[[], None]) -> None:
    """A watcher that watches nothing."""


def taken(fd: int) -> FileDescriptor:
    """As it is taken from a sender."""
    descriptors.charge(os.getuid())
    return FileDescriptor(fd, _nobody, os.getuid())


class Channel:
    """A connection's socket, and what comes out of its other end."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.ours = taken(ours.detach())

    def send(self, *files: FileDescriptor) -> bool:
        """Whether all of *files* were sent."""
        return fds._send_fds(self.ours, OFFSET, list(files))

    def receive(self) -> tuple[tuple[int, ...], list[int]]:
        """The words of a packet, and the inode numbers of the files that came with it."""
        data, received, _, _ = socket.recv_fds(self.theirs, 64, 16)
        inodes = [os.fstat(fd).st_ino for fd in received]
        for fd in received:
            os.close(fd)
        return struct.unpack(f"={len(data) // 8}Q", data), inodes

    def close(self) -> None:
        self.ours.release()
        self.theirs.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    channel = Channel()
    yield channel
    channel.close()


def inode(file: FileDescriptor) -> int:
    return os.fstat(file.fd).st_ino


def pipe() -> FileDescriptor:
    read, write = os.pipe()
    os.close(write)
    return taken(read)


@pytest.fixture
def ring() -> Iterator[FileDescriptor]:
    """A file that no AF_UNIX socket takes."""
    try:
        file = taken(uring.set_up())
    except OSError as error:
        pytest.skip(f"no io_uring: {error}")
    yield file
    file.release()


def test_what_can_not_be_sent_is_lost_alone(channel: Channel, ring: FileDescriptor) -> None:
    """Whatever is before and after it arrives, a memfd too, and its place is told."""
    before, after = pipe(), pipe()
    memfd = taken(os.memfd_create("payload"))
    for place in range(4):
        files = [before, after, memfd]
        files.insert(place, ring)
        assert not channel.send(*files)
        words, inodes = channel.receive()
        assert words == (OFFSET, 4 | LOST, 1 << place)
        assert inodes == [inode(f) for f in (before, after, memfd)]
    for file in (before, after, memfd):
        file.release()


def test_nothing_is_sent_for_files_that_are_all_lost(
    channel: Channel, ring: FileDescriptor
) -> None:
    assert not channel.send(ring, ring)
    with pytest.raises(BlockingIOError):
        channel.receive()


def test_all_that_can_be_sent_come_in_one_packet(channel: Channel) -> None:
    files = [pipe() for _ in range(3)]
    assert channel.send(*files)
    assert channel.receive() == ((OFFSET, 3), [inode(file) for file in files])
    for file in files:
        file.release()


def test_a_socket_that_nobody_reads_is_not_waited_for(channel: Channel) -> None:
    """It is a blocking one, as libkdbus hands it over, and the thread that sends runs the bus."""
    file = taken(os.eventfd(0))
    refused: list[bool] = []

    def fill() -> None:
        while channel.send(file):
            pass
        refused.append(True)

    sender = threading.Thread(target=fill, daemon=True)
    sender.start()
    try:
        daemons.wait_until(lambda: bool(refused), "a socket that takes no more")
    finally:
        # Whoever waits there goes on with EPIPE.
        channel.theirs.close()
        sender.join()
        file.release()
