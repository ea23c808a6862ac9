# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus and the clients of bus/harness.py on a real mount, for tests that need no fakes."""

from pathlib import Path
from typing import Any

from abi_client.received import Received
from abi_client.verbs import MakingConnections, Sending
from kdbusfs.abi.errors import CommandError
from mount import raw


class Client(Sending, raw.Connection):
    """A connection that fails, sends and receives as those of the harness do."""

    def failure(self, number: int) -> CommandError:  # type: ignore[override]
        return CommandError(number)

    def recv(self, flags: int = 0, priority: int = 0, *, free: bool = True) -> Received:
        return super().recv(flags, priority, free=free)


class Bus(MakingConnections):
    """A bus of whoever runs the tests, and its connections."""

    def __init__(self, root: Path) -> None:
        self._bus = raw.Bus(root, attach=None)
        self._clients: list[Client] = []

    def hello(self, *items: bytes, flags: int = 0, **options: Any) -> Client:
        client = Client(self._bus.path, flags=flags, items=b"".join(items), **options)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for file in (*self._clients, self._bus):
            file.close()
