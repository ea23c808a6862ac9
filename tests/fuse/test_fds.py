# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors on a connection's own socket: what the network layer refuses is lost alone. That
libkdbus makes of the rest what it should is in tests/libkdbus/unit.c."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

import daemons
from kdbusfs.fuse import fds
from kdbusfs.peer import descriptors
from kdbusfs.peer.descriptors import FileDescriptor
from privilege import uring

OFFSET = 4096
LOST = 1 << 63
SO_SNDBUFFORCE = 32


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
        self.ours.become_channel()

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


def test_few_descriptors_lie_on_a_socket_that_nobody_reads(channel: Channel) -> None:
    """Nobody has these who could be charged for them, and its send buffer takes thousands."""
    made_large(channel)
    file = taken(os.eventfd(0))
    assert fill(channel, file, 5) == descriptors.MAX_UNREAD // 5
    # What has been read makes room: not for more, though it is not known to the last packet.
    for _ in range(60):
        channel.receive()
    assert 0 < fill(channel, file, 5) <= 60
    file.release()


def test_a_socket_that_is_handed_over_again_takes_no_more_for_that(channel: Channel) -> None:
    """For another connection, or for the same one."""
    made_large(channel)
    file = taken(os.eventfd(0))
    fill(channel, file, 5)
    again = taken(os.dup(channel.ours.fd))
    again.become_channel()
    channel.ours.release()
    channel.ours = again
    assert fill(channel, file, 1) == 0
    with suppress(BlockingIOError):
        while True:
            channel.receive()
    assert channel.send(file)
    file.release()


def test_who_reads_may_have_any_number_of_descriptors(channel: Channel) -> None:
    files = [pipe() for _ in range(16)]
    for _ in range(1000):
        assert channel.send(*files)
        assert len(channel.receive()[1]) == 16
    for file in files:
        file.release()


def made_large(channel: Channel) -> None:
    """As large as an ordinary user can make a send buffer, if not larger."""
    with channel.ours._socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 23)


def fill(channel: Channel, file: FileDescriptor, n: int) -> int:
    """How many packets of *n* descriptors it takes."""
    n_sent = 0
    while channel.send(*[file] * n):
        n_sent += 1
    return n_sent
