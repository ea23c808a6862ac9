# SPDX-License-Identifier: LGPL-2.1-or-later
"""Message migration (kdbus.name(7)): what was sent to a name follows it between its activator and
an implementer, either way. Like a SEND, it is staged as a whole before anything moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from .connection import Connection, QueueEntry

if TYPE_CHECKING:
    from .names import NameEntry
    from .pool import Slice


class Migration:
    """What moves with the name *entry* from *old* to *new*. A message that finds no room there is
    lost, and its sender learns nothing."""

    __slots__ = ("entry", "old", "new", "_moves")

    def __init__(self, entry: NameEntry, old: Connection, new: Connection) -> None:
        self.entry = entry
        self.old = old
        self.new = new
        self._moves: list[tuple[QueueEntry, Slice | None]] = []
        try:
            for queued in old.addressed_to(entry):
                self._moves.append((queued, self._stage(queued)))
        except BaseException:
            self.undo()
            raise

    def _stage(self, queued: QueueEntry) -> Slice | None:
        try:
            return self.new.stage_moved(queued, self.old)
        except CommandError:
            return None
        except Exception as error:
            if self.old.alive:
                raise
            # The end of a connection can't be undone.
            self.old.bus.domain.report(error)
            return None

    def commit(self) -> None:
        entry, old, new = self.entry, self.old, self.new
        for reply in [r for r in old.pending_replies if r.name is entry]:
            if reply.requester is not old and reply.requester is not new:
                reply.retarget(new)
        for queued, slice_ in self._moves:
            old.queue.remove(queued)
            if slice_ is None:
                old.discard(queued)
                new.count_lost()
                continue
            old.quota.discharge(queued.user, queued.size, len(queued.fds))
            old.pool.release(queued.slice)
            queued.receiver, queued.slice = new, slice_
            new.queue.append(queued)
        new.wake()

    def undo(self) -> None:
        for queued, slice_ in self._moves:
            if slice_ is not None:
                self.new.unstage_moved(queued, slice_)
