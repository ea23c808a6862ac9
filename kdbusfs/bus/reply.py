# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests that wait for a reply.

A message with EXPECT_REPLY makes a *tracker*. It hangs on the requester and names the one
connection that may answer. It ends exactly once: by a reply (even one that then fails), its
deadline, the death of either side, or the target dropping the request. A requester is held to
128 trackers; one counts until it is off the list *and* its request has left the target's
queue, so that timed-out requests nobody has read still count.

A synchronous call waits on its tracker. If a signal interrupts it, the tracker is suspended:
the same call again resumes it, and what ended the wait in the meantime is kept until then, or
until the deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EMLINK
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.numbers import Limit
from .call import Call, Waiter

if TYPE_CHECKING:
    from .bus import Bus
    from .connection import Connection, QueueEntry
    from .names import NameEntry

_REQUESTS = int(Limit.CONNECTION_REQUESTS)


class Reply:
    """A tracker: *target* owes *requester* an answer to *cookie* until *deadline*, which is
    CLOCK_MONOTONIC in nanoseconds."""

    __slots__ = (
        "requester",
        "target",
        "cookie",
        "name",
        "deadline",
        "sync",
        "call",
        "listed",
        "queued",
        "suspended",
        "answer",
        "error",
        "watch",
        "unwatch",
    )

    def __init__(
        self,
        requester: Connection,
        target: Connection,
        cookie: int,
        name: NameEntry | None,
        deadline: int,
    ) -> None:
        """EMLINK: too many requests of *requester* are pending."""
        if requester.n_requests >= _REQUESTS:
            raise CommandError(EMLINK, f"{requester.n_requests} requests pending")
        self.requester = requester
        self.target = target
        self.cookie = cookie
        self.name = name
        """The name entry the request was addressed to; it follows that name (message migration)."""
        self.deadline = deadline
        self.sync = False
        self.call: Call | None = None
        """The call that waits, None while it is suspended or for an asynchronous request."""
        self.listed = False
        self.queued = False
        """Whether the request still waits in the target's queue."""
        self.suspended = False
        self.answer: QueueEntry | None = None
        """The reply that came while suspended."""
        self.error = 0
        """What ended the wait while suspended."""
        self.watch: list[Waiter | Reply] = []
        """How the domain knows it while its deadline means something; empty before and after."""
        self.unwatch: Callable[[], None] | None = None
        """Ends the watch on the cancel descriptor."""

    def enlist(self, request: QueueEntry) -> None:
        """Put it on its lists: *request* is about to be queued."""
        self.listed = self.queued = True
        self.watch.append(self)
        request.reply = self
        self.requester.n_requests += 1
        self.requester.requests.append(self)
        self.target.pending_replies[self] = None

    def unlist(self) -> None:
        """Take it off the requester's list: nobody may answer any more."""
        if self.listed:
            self.listed = False
            self.requester.requests.remove(self)
            del self.target.pending_replies[self]
            if not self.queued:
                self.requester.n_requests -= 1
            self._ended()

    def resume(self) -> None:
        """Take it out of the requester's suspended ones."""
        if self.suspended:
            self.suspended = False
            del self.requester.suspended[self.cookie]
            self._ended()

    @property
    def bus(self) -> Bus:
        return self.requester.bus

    def interrupt(self) -> None:
        """A signal is pending for the caller that waits: let go of its call, which may resume."""
        assert self.call is not None
        self.bus.suspend(self, self.call)

    def expire(self) -> None:
        """The deadline has come."""
        self.bus.time_out(self)

    def end_watch(self) -> None:
        """End the watch on the cancel descriptor, if there is one."""
        unwatch, self.unwatch = self.unwatch, None
        if unwatch is not None:
            try:
                unwatch()
            except Exception as error:
                self.requester.bus.domain.report(error)

    def unqueue(self) -> None:
        """The request has left the target's queue."""
        if self.queued:
            self.queued = False
            if not self.listed:
                self.requester.n_requests -= 1

    def _ended(self) -> None:
        if not self.listed and not self.suspended:
            self.requester.bus.domain.unwatch_deadline(self)

    def retarget(self, target: Connection) -> None:
        """From now on *target* is to answer."""
        del self.target.pending_replies[self]
        self.target = target
        target.pending_replies[self] = None
