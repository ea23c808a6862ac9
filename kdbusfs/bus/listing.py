# SPDX-License-Identifier: LGPL-2.1-or-later
"""KDBUS_CMD_LIST (kdbus.name(7)): connections and names, as records in a slice.

A bus may have hundreds of thousands of names, so the records are made in pieces (`work`) and the
call waits meanwhile. What is told is nevertheless how things were at one moment: a `NamesView` of
each connection is taken when the call comes, which copies nothing unless the names change.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import ECONNRESET, EIO

from ..abi.errors import CommandError
from ..abi.numbers import ListFlag, NameFlag
from ..abi.structs import CMD_LIST_OFFSET, INFO, U64x2
from .call import PENDING, Call
from .connection import MONITOR, Connection, Result, owned_name_item
from .names import NamesView

_IN_QUEUE = int(NameFlag.IN_QUEUE)
_ACTIVATOR = int(NameFlag.ACTIVATOR)
_PIECE = 256
"""Names, or connections without any, that are looked at in one piece."""
_WRITE = 1 << 18
"""Bytes that are written in one piece."""


class Listing:
    """A LIST on its way: *call*, made on *connection*."""

    __slots__ = ("connection", "call", "result", "_views", "_flags", "_who", "_ended")

    def __init__(self, connection: Connection, call: Call) -> None:
        self.connection = connection
        self.call = call
        self.result: Result | None = None
        """Where the records go, once it is known how much room they need."""
        self._flags = call.flags
        endpoint = connection.endpoint
        self._who = call.peer.credentials() if endpoint.custom else connection.opener
        self._views = [
            NamesView.of(other)
            for other in connection.bus.connections.values()
            if other.kind != MONITOR
        ]
        self._ended = False

    def start(self) -> int:
        """Do the first piece. Returns 0 if that was all, and else has the rest done later."""
        call, connection = self.call, self.connection
        work = self._fill()
        try:
            next(work)
        except StopIteration:
            if self.result is not None:
                self.result.hand_over(call)
                # Nothing below can fail.
                call.commit()
            return 0
        connection.listings[self] = None
        connection.bus.domain.work.add(connection.user, self._proceed(work))
        return PENDING

    def _proceed(self, work: Iterator[None]) -> Iterator[None]:
        """The rest of the *work*, up to the call's completion."""
        try:
            while not self._ended:
                yield
                if not self.connection.alive:
                    self.abort()
                elif not self._ended:
                    next(work)
        except StopIteration:
            self._complete(0)
        except CommandError as error:
            self._complete(error.errno)
        except Exception as error:
            self.connection.bus.domain.report(error)
            self._complete(EIO)

    def _complete(self, error: int) -> None:
        connection = self.connection
        del connection.listings[self]
        self._ended = True
        result, self.result = self.result, None
        if error:
            self.call.undo()
            result = None
        else:
            self.call.commit()
        connection.complete(self.call, error, result)

    def abort(self) -> None:
        """The connection has ended."""
        if not self._ended:
            self._complete(ECONNRESET)

    def _fill(self) -> Iterator[None]:
        """Put the records into a slice, in pieces. EXFULL: there is no room."""
        pool = self.connection.pool
        chunks: list[bytes] = []
        size = n_seen = 0
        for view in self._views:
            records, n_names = self._records(view)
            if records:
                chunks.append(records)
                size += len(records)
            n_seen += n_names or 1
            if n_seen >= _PIECE:
                n_seen = 0
                yield
        self._views = []
        U64x2.pack_into(self.call.data, CMD_LIST_OFFSET, pool.size, size)
        if not size:
            return
        self.result = Result(pool, size)
        self.call.begin(self.result)
        at = self.result.slice.offset
        U64x2.pack_into(self.call.data, CMD_LIST_OFFSET, at, size)
        n_written = 0
        for chunk in chunks:
            pool.memory.write(at, chunk)
            at += len(chunk)
            n_written += len(chunk)
            if n_written >= _WRITE:
                n_written = 0
                yield

    def _records(self, view: NamesView) -> tuple[bytes, int]:
        """The records of one connection, and how many names were looked at."""
        flags, endpoint, who = self._flags, self.connection.endpoint, self._who
        id_, hello_flags = view.connection.id, view.connection.flags
        names = view.names()
        records: list[bytes] = []
        wanted = False
        for name, name_flags in names:
            if _is_listed(name_flags, flags):
                wanted = True
                if endpoint.may_see_name(who, name):
                    item = owned_name_item(name, name_flags)
                    records.append(INFO.pack(INFO.size + len(item), id_, hello_flags) + item)
        if not wanted and flags & ListFlag.UNIQUE:
            records.append(INFO.pack(INFO.size, id_, hello_flags))
        return b"".join(records), len(names)


def _is_listed(name_flags: int, list_flags: int) -> bool:
    """Whether a name record with these flags is asked for."""
    if name_flags & _ACTIVATOR:
        return bool(list_flags & ListFlag.ACTIVATORS)
    if name_flags & _IN_QUEUE:
        return bool(list_flags & ListFlag.QUEUED)
    return bool(list_flags & ListFlag.NAMES)
