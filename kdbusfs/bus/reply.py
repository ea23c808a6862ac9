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

All of that is one state and a table of moves (`_MOVES`); how a tracker comes to its end in each
state is said here, whoever ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from errno import ECANCELED, EINTR, EMLINK, EPIPE, ETIMEDOUT
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.numbers import ItemType, Limit
from .call import Call

if TYPE_CHECKING:
    from .bus import Bus
    from .connection import Connection, QueueEntry
    from .names import NameEntry
    from .peer import Descriptor

_REQUESTS = int(Limit.CONNECTION_REQUESTS)


class ReplyState(Enum):
    """How far a tracker has come."""

    NEW = auto()
    """Nobody knows of it yet."""
    PENDING = auto()
    """Somebody may answer, and nobody waits."""
    WAITING = auto()
    """Somebody may answer, and a call waits."""
    SUSPENDED = auto()
    """The same, but a signal has interrupted the call."""
    KEPT = auto()
    """It ended while it was suspended; the outcome is kept for the call that resumes."""
    ENDED = auto()


_NEW = ReplyState.NEW
_PENDING = ReplyState.PENDING
_WAITING = ReplyState.WAITING
_SUSPENDED = ReplyState.SUSPENDED
_KEPT = ReplyState.KEPT
_ENDED = ReplyState.ENDED

_MOVES: dict[ReplyState, tuple[ReplyState, ...]] = {
    _NEW: (_PENDING, _WAITING),
    _PENDING: (_ENDED,),
    _WAITING: (_SUSPENDED, _ENDED),
    _SUSPENDED: (_WAITING, _KEPT, _ENDED),
    _KEPT: (_ENDED,),
    _ENDED: (),
}


class Reply:
    """A tracker: *target* owes *requester* an answer to *cookie* until *deadline*, which is
    CLOCK_MONOTONIC in nanoseconds."""

    __slots__ = (
        "requester",
        "target",
        "cookie",
        "name",
        "deadline",
        "deadline_number",
        "state",
        "queued",
        "call",
        "answer",
        "error",
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
        self.deadline_number = 0
        """How the domain knows its deadline; 0 before and after."""
        self.state = _NEW
        self.queued = False
        """Whether the request still waits in the target's queue, whatever has become of this."""
        self.call: Call | None = None
        """The call that is WAITING."""
        self.answer: QueueEntry | None = None
        self.error = 0
        """What is KEPT."""
        self.unwatch: Callable[[], None] | None = None
        """Ends the watch on the cancel descriptor."""

    @property
    def bus(self) -> Bus:
        return self.requester.bus

    @property
    def answerable(self) -> bool:
        """Whether it is on its lists, for the target to answer."""
        state = self.state
        return state is _PENDING or state is _WAITING or state is _SUSPENDED

    def _move(self, state: ReplyState) -> None:
        """Go into another state, and off the lists that are not for it."""
        before = self.state
        assert state in _MOVES[before], f"{before} to {state}"
        was_answerable = self.answerable
        self.state = state
        requester = self.requester
        if was_answerable and not self.answerable:
            requester.requests.remove(self)
            del self.target.pending_replies[self]
            if not self.queued:
                requester.n_requests -= 1
        if state is _SUSPENDED:
            requester.suspended[self.cookie] = self
        elif (before is _SUSPENDED and state is not _KEPT) or before is _KEPT:
            del requester.suspended[self.cookie]
        if state is _ENDED:
            self.bus.domain.unwatch_deadline(self)

    def enlist(self, request: QueueEntry, call: Call | None) -> None:
        """Begin: *request* is about to be queued, and *call* waits, if one does."""
        self.queued = True
        request.reply = self
        self.requester.n_requests += 1
        self.requester.requests.append(self)
        self.target.pending_replies[self] = None
        self.bus.domain.watch_deadline(self)
        if call is None:
            self._move(_PENDING)
        else:
            self._wait(call)

    def _wait(self, call: Call) -> None:
        self.call = call
        call.wait = self
        self._move(_WAITING)

    def unqueue(self) -> None:
        """The request has left the target's queue."""
        if self.queued:
            self.queued = False
            if not self.answerable:
                self.requester.n_requests -= 1

    def retarget(self, target: Connection) -> None:
        """From now on *target* is to answer."""
        del self.target.pending_replies[self]
        self.target = target
        target.pending_replies[self] = None

    # --- its end

    def end(self, error: int, answer: QueueEntry | None = None) -> None:
        """The *answer* has come, or can't come any more; *error* is for a call that waits."""
        if self.state is _WAITING:
            call, self.call = self.call, None
            assert call is not None
            self._move(_ENDED)
            self._end_watch()
            self.requester.complete(call, error, answer)
        elif self.state is _SUSPENDED:
            self.answer, self.error = answer, error
            self._move(_KEPT)
        else:
            self._move(_ENDED)
            if answer is not None:
                answer.commit()

    def die(self) -> None:
        """The target can't answer any more."""
        if self.state is _PENDING:
            self._move(_ENDED)
            self.bus.announce_reply(ItemType.REPLY_DEAD, self)
        else:
            self.end(EPIPE)

    def expire(self) -> None:
        """The deadline has come."""
        bus = self.bus
        if self.state is _WAITING:
            self.end(ETIMEDOUT)
        elif self.state is _PENDING:
            self._move(_ENDED)
            if bus.alive:
                bus.announce_reply(ItemType.REPLY_TIMEOUT, self)
                bus.flush()
        else:
            self.forget()

    def forget(self) -> None:
        """The requester has no more interest in it."""
        if self.state is _ENDED:
            return
        answer, self.answer = self.answer, None
        self._move(_ENDED)
        if answer is not None:
            self.requester.discard(answer)

    # --- synchronous calls

    def watch(self, cancel: Descriptor) -> None:
        """Let *cancel* end the wait."""
        self.unwatch = cancel.watch(self._cancel)

    def cancel_if_due(self, cancel: Descriptor | None) -> None:
        """Being readable already, *cancel* could not be watched."""
        if cancel is not None and self.unwatch is None:
            self._cancel()

    def _cancel(self) -> None:
        if self.state is _WAITING:
            self.end(ECANCELED)

    def _end_watch(self) -> None:
        unwatch, self.unwatch = self.unwatch, None
        if unwatch is not None:
            try:
                unwatch()
            except Exception as error:
                self.bus.domain.report(error)

    def resume(self, call: Call, cancel: Descriptor | None) -> None:
        """*call* is the one that a signal interrupted, made again."""
        if self.state is _KEPT:
            answer, self.answer = self.answer, None
            self._move(_ENDED)
            self.requester.complete(call, self.error, answer)
            return
        if cancel is not None:
            self.watch(cancel)
        # Nothing below can fail.
        self._wait(call)
        self.cancel_if_due(cancel)

    def interrupt(self) -> None:
        """A signal ends the wait with EINTR; the same call again resumes it."""
        call, self.call = self.call, None
        assert call is not None
        self._end_watch()
        older = self.requester.suspended.get(self.cookie)
        if older is not None:
            older.forget()
        self._move(_SUSPENDED)
        self.requester.complete(call, EINTR)
