# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbusfs's own commands: a socket for descriptors, and RECV and SEND that use it."""

import struct
from errno import EBADF, EBADFD, ECONNRESET, EINVAL, EOPNOTSUPP

import pytest

from abi_client.building import command, message, send_command, u64
from bus.fakes import FakeFile
from bus.harness import Bus, File, fails
from kdbusfs.abi.numbers import ExtensionCommand

E = ExtensionCommand


def fd_socket(fd: int) -> bytes:
    return command(fields=struct.pack("=iI", fd, 0))


def test_a_connection_takes_a_socket_of_its_caller(bus: Bus) -> None:
    for client in (bus.hello(), bus.monitor(), bus.activator("com.example.a")):
        file = FakeFile(own_channel=True)
        client.ioctl(E.FD_SOCKET, fd_socket(client.peer.open(file)))
        assert client.connection.fd_socket is file


@pytest.mark.parametrize(
    ("file", "errno"),
    [(None, EBADF), (FakeFile(), EINVAL), (FakeFile(own_channel=True, path=True), EBADF)],
)
def test_other_descriptors_are_refused(bus: Bus, file: FakeFile | None, errno: int) -> None:
    client = bus.hello()
    with fails(errno):
        client.ioctl(E.FD_SOCKET, fd_socket(client.peer.open(file) if file else 99))
    assert client.connection.fd_socket is None


def test_the_extension_sends_and_receives_as_kdbus_does(bus: Bus) -> None:
    client = bus.hello()
    with client.peer.holding(message(client.id, cookie=7)) as address:
        client.ioctl(E.SEND, send_command(address))
    result = client.ioctl(E.RECV, command(fields=u64(0, 0, 0, 0, 0)))
    offset, size = struct.unpack_from("=QQ", result, 40)
    assert client.visible(offset, size)[48:56] == u64(7)


@pytest.mark.parametrize("code", list(E))
def test_the_extension_is_for_connections(bus: Bus, code: ExtensionCommand) -> None:
    argument = bytes(128)
    for file in (File(bus.domain, "control", bus.owner), bus.open(), bus.file, bus.endpoint()):
        with fails(EBADFD):
            file.ioctl(code, argument)
    client = bus.hello()
    client.byebye()
    with fails(ECONNRESET):
        client.ioctl(code, argument)


def test_the_extension_follows_the_kinds_of_connections(bus: Bus) -> None:
    with fails(EOPNOTSUPP):
        bus.monitor().ioctl(E.SEND, send_command(0))
    with fails(EOPNOTSUPP):
        bus.holder("com.example.a").ioctl(E.RECV, command(fields=u64(0, 0, 0, 0, 0)))
