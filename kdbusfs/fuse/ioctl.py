# SPDX-License-Identifier: LGPL-2.1-or-later
"""ioctl(2) requests, from their arrival to their answer.

While a request is in `Ioctls`, the kernel holds its caller, and only so long. Whoever wants to
answer it has to `settle` it first: that is granted once, and lets go of the caller's process, so
that nothing can be done to that any more. It does not matter which way the answer is given: as the
command's result, as EIO after an unexpected exception, by a thread that stalled, by a
tracer, for a caller that is killed, or not at all, since the mount has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..abi.items import Buffer
from ..abi.specs import CommandSpec
from ..bus.call import Call
from ..peer.process import Process

if TYPE_CHECKING:
    from .files import OpenFile


class Ioctl(Call):
    """A command that came as the request *unique* on *file*."""

    __slots__ = (
        "block",
        "completed",
        "file",
        "interrupted",
        "n_stalls",
        "process",
        "unique",
        "waits",
    )

    def __init__(
        self,
        unique: int,
        file: OpenFile,
        code: int,
        spec: CommandSpec,
        process: Process,
        address: int,
        complete: Callable[[Call, int], None],
    ) -> None:
        super().__init__(code, spec, process, address, complete)
        self.unique = unique
        self.file = file
        self.process = process
        """The same as `peer`: the thread that is held."""
        self.block: Buffer | None = None
        """What its argument is by now, if it has been begun before."""
        self.n_stalls = 0
        self.interrupted = False
        """Whether a signal came while it did not wait yet: its wait is to end at once."""
        self.waits = False
        """Whether it is PENDING, for good."""
        self.completed = False
        """Whether the bus has ended its wait; it is finished soon."""


class Ioctls:
    """The requests that are not answered yet."""

    def __init__(self) -> None:
        self._held: dict[int, Ioctl] = {}

    def __iter__(self) -> Iterator[Ioctl]:
        return iter(list(self._held.values()))

    def enter(self, ioctl: Ioctl) -> None:
        self._held[ioctl.unique] = ioctl

    def get(self, unique: int) -> Ioctl | None:
        """The request, unless it has been answered, or is none of ours."""
        return self._held.get(unique)

    def settle(self, ioctl: Ioctl) -> bool:
        """Whether *ioctl* has not been answered yet, and the answer is the caller's to give. Its
        process is let go. This may be asked by several threads."""
        if self._held.pop(ioctl.unique, None) is None:
            return False
        ioctl.process.let_go()
        return True
