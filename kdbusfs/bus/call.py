# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command's argument: fetched from the caller, validated against its spec, written back.

The steps and their order are those of kdbus's own parser; the same one serves commands and the
message that SEND points at. What fails before the struct was read in full leaves the caller's
memory alone; from then on return_flags is always stored, also with an error.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL, EMSGSIZE
from typing import TYPE_CHECKING, Any

from ..abi.errors import CommandError, Fault
from ..abi.items import Buffer, Item, walk
from ..abi.numbers import FLAG_NEGOTIATE, ItemType, Limit
from ..abi.specs import RETURN_FLAGS, CommandSpec
from ..abi.structs import (
    CMD_EXCHANGE,
    CMD_EXCHANGE_N_RECEIVED,
    CMD_FLAGS,
    CMD_RETURN_FLAGS,
    CMD_SEND_REPLY,
    MSG_INFO,
    U32,
    U64,
)
from .peer import Peer

if TYPE_CHECKING:
    from .bus import Bus

_MAX_SIZE = int(Limit.COMMAND_SIZE)
_NEGOTIATE = int(ItemType.NEGOTIATE)
_unpack_u64 = U64.unpack_from
_pack_u64 = U64.pack_into
_NO_ITEMS: list[Item] = []
_NO_DATA = bytearray()
NOTHING = (0, 0)
"""What a call stores that has stored all by itself."""


class Step:
    """Something that a command has begun: done by `commit`, taken back by `undo`. A commit does
    not fail."""

    __slots__ = ()

    def commit(self) -> None:
        raise NotImplementedError

    def undo(self) -> None:
        raise NotImplementedError


_NO_STEPS: list[Step] = []


class Held(Step):
    """What is kept for a call that has been completed, until it is finished."""

    __slots__ = ()

    def hand_over(self, call: Call) -> None:
        """Hand it to user space and say in `call.data` where it is. May fail, and be tried
        again: nothing is changed then."""
        raise NotImplementedError


class Waiter(Held):
    """What a call waits for, until *deadline* (CLOCK_MONOTONIC, ns) at the latest."""

    __slots__ = ("deadline", "deadline_number")

    def __init__(self) -> None:
        self.deadline = 0
        self.deadline_number = 0
        """How the domain knows its deadline while that means something; 0 before and after."""

    @property
    def bus(self) -> Bus:
        raise NotImplementedError

    def interrupt(self) -> None:
        """A signal is pending for the caller."""
        raise NotImplementedError

    def expire(self) -> None:
        """The deadline has come."""
        raise NotImplementedError


class Argument:
    """A struct with items behind it, in the caller's memory at *address*."""

    __slots__ = ("spec", "peer", "address", "data", "flags", "items", "negotiating")

    def __init__(self, spec: CommandSpec, peer: Peer, address: int) -> None:
        self.spec = spec
        self.peer = peer
        self.address = address
        self.data = _NO_DATA
        """The struct and its items, as read once; results are put here, too."""
        self.flags = 0
        self.items: list[Item] = _NO_ITEMS
        self.negotiating = False

    def load(self, inline: Buffer, prefetch: int = 0) -> None:
        """Fetch all of the argument. *inline* is what came with the request, if anything;
        *prefetch* how much to read at once in the hope that it is all."""
        address, spec = self.address, self.spec
        if address & 7:
            raise CommandError(EFAULT, "argument is not aligned to 8 bytes")
        if len(inline) >= spec.size:
            data = bytearray(inline)
        else:
            data = self.peer.read_some(address, prefetch or spec.size)
            if len(data) < 8:
                raise Fault()
        (size,) = _unpack_u64(data, 0)
        if size < spec.size:
            raise CommandError(EINVAL, "size is less than the struct's")
        if size > _MAX_SIZE:
            raise CommandError(EMSGSIZE, f"size {size}")
        if size > len(data):
            if spec.is_block and inline:
                raise CommandError(EINVAL, "the block is larger than the command's number says")
            data = bytearray(self.peer.read(address, size))
            if _unpack_u64(data, 0)[0] != size:
                raise CommandError(EINVAL, "size changed while it was read")
        elif size < len(data):
            del data[size:]
        self.data = data

    def validate(self) -> None:
        """Check flags and items, and negotiate where that is asked for."""
        spec, data = self.spec, self.data
        (flags,) = _unpack_u64(data, CMD_FLAGS)
        if flags & ~(spec.flags | spec.tolerated):
            if flags & ~(spec.flags | spec.tolerated | FLAG_NEGOTIATE):
                raise CommandError(EINVAL, "unknown flags")
            self.negotiating = True
        self.flags = flags & spec.flags
        if len(data) > spec.size and not spec.is_block:
            self.items = walk(data, spec.size, len(data), spec.items)
            for item in self.items:
                if item[0] == _NEGOTIATE:
                    self._negotiate_items(item)
        if self.negotiating:
            U64.pack_into(data, CMD_FLAGS, spec.flags)
            self.peer.write(self.address + CMD_FLAGS, data[CMD_FLAGS:CMD_RETURN_FLAGS])
        elif spec.mandatory:
            missing = spec.mandatory - {item.type for item in self.items}
            if missing:
                raise CommandError(EINVAL, f"{spec.name} lacks item {min(missing):#x}")

    def _negotiate_items(self, item: Item) -> None:
        for at in range(item.start, item.start + item.size, U64.size):
            if _unpack_u64(self.data, at)[0] not in self.spec.items:
                U64.pack_into(self.data, at, 0)
                self.peer.write(self.address + at, bytes(U64.size))

    def u64(self, offset: int) -> int:
        """The field of the struct at *offset*."""
        value: int = _unpack_u64(self.data, offset)[0]
        return value

    def payload(self, item: Item) -> bytes:
        """The payload of one of the items."""
        return bytes(self.data[item.start : item.start + item.size])

    def find(self, type_: int) -> bytes | None:
        """The payload of the only item of *type_*, or None."""
        for item in self.items:
            if item.type == type_:
                return self.payload(item)
        return None

    def string(self, type_: int) -> bytes | None:
        """The string in the only item of *type_*, without its NUL, or None."""
        payload = self.find(type_)
        return None if payload is None else payload[:-1]


class Call(Argument):
    """One command on its way through the bus.

    The handler puts results into `data`; the shell writes back what the command returns by its spec
    (`store`). A handler that has to wait (SYNC_REPLY) returns PENDING; whoever
    ends the wait calls `complete(call, errno)`, which does nothing but remember that: it comes in
    the middle of somebody else's command, or at the end of a connection. Some time after that the
    shell calls `Handle.finish`, and answers.
    """

    __slots__ = (
        "code",
        "read",
        "store",
        "store_on_error",
        "complete",
        "error",
        "held",
        "begun",
        "wait",
        "fds",
    )

    def __init__(
        self,
        code: int,
        spec: CommandSpec,
        peer: Peer,
        address: int,
        complete: Callable[[Call, int], None] | None = None,
    ) -> None:
        # Argument's part, said again: a call of super().__init__ would cost as much as it does.
        self.spec = spec
        self.peer = peer
        self.address = address
        self.data = _NO_DATA
        self.flags = 0
        self.items = _NO_ITEMS
        self.negotiating = False
        self.code = code
        self.read = False
        """Whether the argument was read in full, so that return_flags is stored from here on."""
        self.store = spec.returns
        """Which bytes of the struct the caller gets back when the command succeeds."""
        self.store_on_error = RETURN_FLAGS
        self.complete = complete
        self.error = 0
        """The errno it was completed with."""
        self.held: Held | None = None
        """What it was completed with, while it is not finished."""
        self.begun = _NO_STEPS
        """What the command has begun and will commit, in this order, or undo."""
        self.wait: Any = None
        """The reply this call waits for, while it is PENDING."""
        self.fds: Any = None
        """An FdTransfer: descriptors to install in the caller before it returns; or None."""

    def fetch(self, inline: Buffer) -> None:
        """Load and validate the argument. Whatever return_flags held, it is 0 from here on."""
        self.load(inline)
        _pack_u64(self.data, CMD_RETURN_FLAGS, 0)
        self.read = True
        self.validate()
        if self.negotiating:
            self.store = RETURN_FLAGS

    def interrupt(self) -> None:
        """A signal is pending for the caller. A LIST, which waits for nothing, is not for long, and
        goes on to its end."""
        if self.wait is not None:
            self.wait.interrupt()

    def begin(self, step: Step) -> None:
        """Leave *step* to `commit` or `undo`, whichever comes."""
        if self.begun is _NO_STEPS:
            self.begun = [step]
        else:
            self.begun.append(step)

    def commit(self) -> None:
        """Carry out what was begun."""
        begun, self.begun = self.begun, _NO_STEPS
        for step in begun:
            step.commit()

    def undo(self) -> None:
        """Take back what was begun, the latest first. One that fails keeps none from it."""
        begun, self.begun = self.begun, _NO_STEPS
        failure: Exception | None = None
        for step in reversed(begun):
            try:
                step.undo()
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure

    def answered(self, offset: int, size: int) -> None:
        """Say in which slice the reply to this synchronous call lies."""
        if self.spec.is_block:
            U32.pack_into(self.data, CMD_EXCHANGE_N_RECEIVED, 1)
            MSG_INFO.pack_into(self.data, CMD_EXCHANGE.size, offset, size, 0)
            self.store = (0, CMD_EXCHANGE.size + MSG_INFO.size)
        else:
            MSG_INFO.pack_into(self.data, CMD_SEND_REPLY, offset, size, 0)

    def store_results(self) -> None:
        """Store what the command returns already now, while it can still fail."""
        start, end = self.store
        self.peer.write(self.address + start, self.data[start:end])

    def returns(self, flags: int) -> None:
        """Set return_flags."""
        _pack_u64(self.data, CMD_RETURN_FLAGS, flags)


PENDING = 1
"""What a handler returns that will complete its call later."""
WAITS_AGAIN = -1
"""What `Handle.finish` returns for a call that has to wait on."""
CONTINUE = 2
"""What it returns if the same call is to be made again, with `Call.data` as its argument, when
others have had their turn."""
