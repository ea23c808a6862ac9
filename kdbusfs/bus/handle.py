# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handles: our side of an open file, from open() to the last close().

A handle starts on the control file or on an endpoint and is bound, once and for good, by one
successful BUS_MAKE, ENDPOINT_MAKE or HELLO (`_MOVES`). What fails, or only negotiates, leaves it as
it was. While one of these commands is under way, which may take its time if the caller's memory
stalls, the handle takes no other. It has stored its results before anybody else can see any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from errno import (
    EBADFD,
    EBUSY,
    ECONNRESET,
    EOPNOTSUPP,
    EPERM,
    ESHUTDOWN,
)
from functools import partial
from typing import NamedTuple

from ..abi.errors import CommandError, Stalled
from ..abi.numbers import Command
from ..abi.specs import COMMAND_SPECS
from .bus import Bus
from .call import CONTINUE, Call, Step
from .commands import COMMANDS
from .connection import Connection
from .domain import Domain
from .endpoint import Endpoint
from .node import Node
from .peer import Credentials, Memory
from .pool import Inode
from .set_up import hello, make_bus, make_endpoint, update_endpoint

_SETUP = frozenset({Command.BUS_MAKE, Command.ENDPOINT_MAKE, Command.HELLO})


class HandleState(Enum):
    """What an open file is bound to."""

    CONTROL = auto()
    ENDPOINT = auto()
    SETTING_UP = auto()
    BUS_OWNER = auto()
    ENDPOINT_OWNER = auto()
    CONNECTION = auto()


class Binding(Step):
    """A handle on its way into another *state*."""

    __slots__ = ("handle", "before", "state")

    def __init__(self, handle: Handle, state: HandleState) -> None:
        self.handle = handle
        self.before = handle.state
        self.state = state
        handle.state = HandleState.SETTING_UP

    def commit(self) -> None:
        self.handle.state = self.state

    def undo(self) -> None:
        self.handle.state = self.before


class Handle:
    """One open file. *opener* is who opened it; *new_memory* makes a pool's memory for it, unless
    another handle on the same *inode* has one already."""

    __slots__ = (
        "domain",
        "node",
        "opener",
        "new_memory",
        "inode",
        "state",
        "endpoint",
        "bus",
        "connection",
    )

    def __init__(
        self,
        domain: Domain,
        node: Node,
        opener: Credentials,
        new_memory: Callable[[int], Memory],
        inode: Inode | None = None,
    ) -> None:
        if not node.alive:
            raise CommandError(ESHUTDOWN, "the node has gone")
        self.inode = inode or Inode()
        self.inode.n_handles += 1
        self.domain = domain
        self.node = node
        self.opener = opener
        self.new_memory = new_memory
        subject = node.subject
        self.endpoint: Endpoint | None = subject if isinstance(subject, Endpoint) else None
        self.state = HandleState.ENDPOINT if self.endpoint else HandleState.CONTROL
        self.bus: Bus | None = None
        """The bus this handle made."""
        self.connection: Connection | None = None

    def execute(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        """Carry out *call*. *inline* is what of its argument came with the request.

        Returns 0, or PENDING if `call.complete` will be called later (or has been), and then
        `finish` is due, or CONTINUE; raises CommandError.
        """
        try:
            if self._has_to_wait():
                return CONTINUE
            return self._execute(call, inline)
        except BaseException:
            # Whatever went wrong, expected or not, and also if the caller's memory stalled.
            if call.begun:
                call.undo()
            raise

    def _has_to_wait(self) -> bool:
        """Whether the bus is busy with what came earlier."""
        endpoint = self.endpoint
        return endpoint is not None and endpoint.bus.busy and endpoint.bus.alive

    def _execute(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        connection = self.connection
        if connection is None:
            return self._set_up(call, inline)
        row = COMMANDS.get(call.code)
        if row is None:
            if call.code in _SETUP:
                raise CommandError(EBADFD, "connected already")
            if not connection.alive:
                raise CommandError(ECONNRESET, "disconnected")
            raise CommandError(EBADFD, "ENDPOINT_UPDATE on a connection")
        if not connection.alive:
            raise CommandError(ECONNRESET, "disconnected")
        if connection.kind not in row.kinds:
            raise CommandError(EOPNOTSUPP, "not for this kind of connection")
        call.fetch(inline)
        if call.negotiating and call.code not in _NEGOTIATES_MORE:
            return 0
        return row.handler(connection, call)

    def finish(self, call: Call) -> int:
        """Give a call that has been completed its results: what is held for it becomes visible in
        the pool, `call.data` and `call.fds` tell of it. Returns the call's errno, or WAITS_AGAIN.

        Stalled: nothing has happened, to be tried again. Any other exception: the call has been
        abandoned.
        """
        connection = self.connection
        assert connection is not None
        try:
            return connection.finish(call)
        except Stalled:
            raise
        except BaseException:
            connection.abandon(call)
            raise

    def abandon(self, call: Call) -> None:
        """Give up what is held for a completed call instead: nobody is there to get it."""
        assert self.connection is not None
        self.connection.abandon(call)

    def _set_up(self, call: Call, inline: bytes | bytearray | memoryview) -> int:
        code, state = call.code, self.state
        if state is HandleState.SETTING_UP and code in _SETUP:
            raise CommandError(EBUSY, "another command is setting it up")
        if (state is HandleState.ENDPOINT and code in _SETUP) or (
            state is HandleState.ENDPOINT_OWNER and code not in _SETUP
        ):
            self._check_endpoint()
        move = _MOVES.get((state, code))
        if move is None:
            raise CommandError(EBADFD, f"not on a {state.name.lower()} handle")
        if code == Command.ENDPOINT_MAKE:
            self._check_may_make_endpoint()
        call.fetch(inline)
        if not call.negotiating:
            call.begin(Binding(self, move.state))
            move.action(self, call)
        return 0

    def _check_endpoint(self) -> Endpoint:
        endpoint = self.endpoint
        assert endpoint is not None
        if not endpoint.alive or not endpoint.bus.alive:
            raise CommandError(ESHUTDOWN, "the endpoint has gone")
        return endpoint

    def _check_may_make_endpoint(self) -> None:
        endpoint = self.endpoint
        assert endpoint is not None
        if not endpoint.is_owner(self.opener):
            raise CommandError(EPERM, "only the bus's owner makes endpoints, on the default one")

    def _make_bus(self, call: Call) -> None:
        """The bus lives as long as this handle."""
        self.bus = make_bus(self.domain, call)

    def _make_endpoint(self, call: Call) -> None:
        """The endpoint lives as long as this handle."""
        assert self.endpoint is not None
        self.endpoint = make_endpoint(self.endpoint, call)

    def _update_endpoint(self, call: Call) -> None:
        assert self.endpoint is not None
        update_endpoint(self.endpoint, self.opener, call)

    def _hello(self, call: Call) -> None:
        assert self.endpoint is not None
        self.connection = hello(self.endpoint, self.opener, self.inode, self.new_memory, call)

    # --- poll and close

    @property
    def hung_up(self) -> bool:
        """Whether poll says POLLERR|POLLHUP: no connection, or one that has ended."""
        return self.connection is None or not self.connection.alive

    @property
    def readable(self) -> bool:
        return self.connection is not None and self.connection.readable

    def close(self) -> None:
        """The last close of the file."""
        # It belongs to the file, which refers to this handle; a ring would keep both.
        self.new_memory = _no_memory
        if self.state is HandleState.BUS_OWNER:
            self._end_bus()
        elif self.state is HandleState.ENDPOINT_OWNER:
            assert self.endpoint is not None
            if self.endpoint.alive:
                self.endpoint.bus.end_endpoint(self.endpoint)
        elif self.connection is not None:
            if self.connection.alive:
                self.connection.bus.disconnect(self.connection)
            self._close_pool(self.connection)
        self.inode.leave()

    def _close_pool(self, connection: Connection) -> None:
        """Give the pool up. The last connection of an inode goes on to count as long as anybody has
        the memory mapped: else nobody would be charged for it."""
        user, pool = connection.user, connection.pool
        arena = pool.arena
        if self.inode.n_handles > 1:
            work = pool.close()
            if work is not None:
                self.domain.work.add(user, work)
        else:
            # All of it goes at once.
            arena.n_pools -= 1
        if arena.n_pools or arena.lease is None:
            user.n_connections -= 1
        else:
            arena.lease.user = user

    def _end_bus(self) -> None:
        bus = self.bus
        assert bus is not None
        directory = next(iter(bus.endpoints)).node.parent
        assert directory is not None
        bus.end(partial(self.domain.root.unlink, directory))
        bus.creator.n_buses -= 1


class Move(NamedTuple):
    """A command that a handle without a connection takes, and the state it leads to."""

    action: Callable[[Handle, Call], None]
    state: HandleState


_MOVES: dict[tuple[HandleState, int], Move] = {
    (HandleState.CONTROL, Command.BUS_MAKE): Move(Handle._make_bus, HandleState.BUS_OWNER),
    (HandleState.ENDPOINT, Command.ENDPOINT_MAKE): Move(
        Handle._make_endpoint, HandleState.ENDPOINT_OWNER
    ),
    (HandleState.ENDPOINT, Command.HELLO): Move(Handle._hello, HandleState.CONNECTION),
    (HandleState.ENDPOINT_OWNER, Command.ENDPOINT_UPDATE): Move(
        Handle._update_endpoint, HandleState.ENDPOINT_OWNER
    ),
}

_NEGOTIATES_MORE = frozenset(
    code for code, spec in COMMAND_SPECS.items() if spec.name.startswith("SEND")
)
"""SEND has the message to negotiate about, too."""


def _no_memory(size: int) -> Memory:
    raise CommandError(EBADFD, "closed")
