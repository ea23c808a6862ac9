# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the bus needs of the process that makes a call, and of a pool's memory.

`kdbusfs.peer` has the real ones, the tests have fakes. A peer is good for one call only: the
caller is held in its ioctl until the call is answered, so its memory and its credentials stay
put for so long.

What is asked of a caller, `Memory.publish` and the making of a pool's memory may raise `Stalled`:
the caller was too slow, and others have gone first. Any method may raise anything but for `hold`
and `release`; what ends something (`close`, the end of a watch) has ended it also if it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..abi.items import Buffer

if TYPE_CHECKING:
    from .metadata import PidNamespace, ProcessMetadata, UserNamespace


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who somebody is, as policy and accounting see it (credentials(7)); ids are those of the
    user namespace the daemon runs in."""

    uid: int
    euid: int
    gid: int
    egid: int
    groups: frozenset[int]
    ipc_owner: bool
    """Has CAP_IPC_OWNER over the domain's user namespace."""
    user_namespace: UserNamespace

    def in_group(self, gid: int) -> bool:
        return gid == self.egid or gid in self.groups


class Descriptor(Protocol):
    """A file of the sender, on its way to receivers.

    It has holders: who took it (`Peer.take`) is the first, and each message in a queue, each
    answer and each wait is another. The last one to release it closes it, in that very call; what
    is refused is closed before the caller hears so.
    """

    def hold(self) -> None:
        """One holder more."""

    def release(self) -> None:
        """One holder less."""

    def can_hold_files(self) -> bool:
        """Whether it is a node of a kdbusfs mount, an AF_UNIX socket or an io_uring: files that
        can hold others, and so, in its own queue, a connection for ever."""

    def become_channel(self) -> None:
        """From now on nothing can be sent to us on this socket. EBADF for an O_PATH descriptor,
        EINVAL unless it is an AF_UNIX socket of type SOCK_SEQPACKET whose other end is the
        caller's user's."""

    def is_path(self) -> bool:
        """Whether it was opened with O_PATH."""

    def sealed_size(self) -> int:
        """Bytes of the memfd; EMEDIUMTYPE for another file, ETXTBSY unless sealed in full."""

    def check_pollable(self) -> None:
        """EBADF for an O_PATH descriptor, EINVAL for what can't be polled."""

    def watch(self, callback: Callable[[], None]) -> Callable[[], None] | None:
        """Call *callback* once when it is readable; returns what ends the watch, or None if it
        is readable already. The watch is a holder."""


class Memory(Protocol):
    """The memory of a pool. The client may have scribbled over it: no size, number or offset is
    ever read back."""

    def write(self, offset: int, data: Buffer) -> None: ...

    def read(self, offset: int, size: int) -> bytes:
        """Payload that moves to another pool (`Connection.stage`); nothing else asks for it."""

    def publish(self, offset: int, size: int) -> None:
        """Let the client see this range: its offset is about to be told."""

    def seal(self) -> None:
        """The pool is in use: its size is final."""

    def close(self, gone: Callable[[], None]) -> None:
        """The pool is given up. *gone* is called when nobody has its memory mapped any more, which
        may be at once."""


class Peer(Protocol):
    """The thread inside a call."""

    tid: int
    uid: int
    """Filesystem user id, from the request itself."""
    gid: int

    def read(self, address: int, size: int) -> bytes:
        """Exactly *size* bytes of the caller's memory; Fault if one can't be read."""

    def read_some(self, address: int, size: int) -> bytearray:
        """Up to *size* bytes, at least one; Fault if the first can't be read."""

    def write(self, address: int, data: Buffer) -> None:
        """Write all of *data*; Fault if that is not possible."""

    def fill(self, memory: Memory, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        """Copy (address, size) segments into *memory*, back to back from *offset*; an address
        of 0 stands for zeros. Fault if one can't be read."""

    def credentials(self) -> Credentials:
        """Its credentials right now."""

    def gather(self, metadata: ProcessMetadata, kinds: int) -> None:
        """Fill in what *metadata* lacks of these kinds of metadata (AttachFlag)."""

    def pid_namespace(self) -> PidNamespace: ...

    def root(self) -> object:
        """Identity of its root directory: equal for two processes with the same one."""

    def find_process(self, pid: int) -> tuple[int, ...] | None:
        """The numbers, from the domain's PID namespace down, of what is process *pid* in the
        caller's; None if there is no such process."""

    def take(self, fd: int) -> Descriptor:
        """Its open file number *fd*, O_PATH ones too, held once.

        EBADF: there is none. EMFILE: the user has too many files on their way, or waiting to be
        closed. ENFILE, ENOMEM: nobody can have one just now.
        """


def release(descriptors: Iterable[Descriptor]) -> None:
    """Release each of *descriptors*."""
    for descriptor in descriptors:
        descriptor.release()
