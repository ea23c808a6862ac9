# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages: what is sent, and what was received."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import check
from kdbus.fds import FileDescriptor, HasFileno, Memfd, fileno
from kdbus.metadata import Metadata, Notification, parse_metadata, parse_notification
from kdbus.numbers import DST_ID_NAME, MsgFlag, PayloadType


@dataclass(frozen=True, slots=True)
class Zeros:
    """A part of a payload: *size* zero bytes, which take no room on their way."""

    size: int


@dataclass(frozen=True, slots=True)
class MemfdPart:
    """A part of a payload: *size* bytes of a sealed memfd, from *start* on."""

    memfd: int | HasFileno
    start: int
    size: int


Part = bytes | bytearray | memoryview | Zeros | Memfd | MemfdPart


class Message:
    """A message to be sent.

    *parts* make up the payload. Buffers and descriptors are not copied: a change
    to a bytearray shows, and descriptors stay the caller's. The same message can
    be sent many times.

    *dst_id* is a connection or `DST_ID_BROADCAST`, *dst_name* a well-known name;
    with both, that connection has to own the name. *cookie* 0 gives each sending
    a fresh one. *bloom_filter* (with its *generation*) makes it a signal.
    """

    def __init__(
        self,
        *parts: Part,
        dst_id: int = DST_ID_NAME,
        dst_name: str | None = None,
        fds: Iterable[int | HasFileno] = (),
        flags: MsgFlag = MsgFlag.NONE,
        priority: int = 0,
        cookie: int = 0,
        payload_type: int = PayloadType.DBUS,
        bloom_filter: bytes | bytearray | None = None,
        generation: int = 0,
    ) -> None:
        p = ffi.new("struct kdbus_message **")
        check(lib.kdbus_message_new(p))
        self._message = ffi.gc(p[0], lib.kdbus_message_free)
        # what the message refers to
        self._kept: list[Any] = []

        for part in parts:
            self._append(part)
        fds = list(fds)
        self._kept.append(fds)
        numbers = [fileno(fd) for fd in fds]
        check(lib.kdbus_message_append_fds(self._message, numbers, len(numbers)))
        check(lib.kdbus_message_set_dst_id(self._message, dst_id))
        if dst_name is not None:
            check(lib.kdbus_message_set_dst_name(self._message, os.fsencode(dst_name)))
        check(lib.kdbus_message_set_flags(self._message, flags))
        check(lib.kdbus_message_set_priority(self._message, priority))
        check(lib.kdbus_message_set_cookie(self._message, cookie))
        check(lib.kdbus_message_set_payload_type(self._message, payload_type))
        if bloom_filter is not None:
            bits = ffi.from_buffer(bloom_filter)
            check(lib.kdbus_message_set_bloom_filter(self._message, generation, bits, len(bits)))

    def _append(self, part: Part) -> None:
        if isinstance(part, Zeros):
            check(lib.kdbus_message_append_zeros(self._message, part.size))
        elif isinstance(part, Memfd | MemfdPart):
            if isinstance(part, Memfd):
                part = MemfdPart(part, 0, part.size())
            self._kept.append(part.memfd)
            fd = fileno(part.memfd)
            check(lib.kdbus_message_append_memfd(self._message, fd, part.start, part.size))
        else:
            buffer = ffi.from_buffer(part)
            self._kept.append(buffer)
            check(lib.kdbus_message_append_data(self._message, buffer, len(buffer)))

    @property
    def cookie(self) -> int:
        """The cookie it was sent with last."""
        return int(lib.kdbus_message_get_cookie(self._message))


class ReceivedMessage:
    """A message that was received.

    It holds a slice of the connection's pool until `close`, or the end of a with
    statement; `parts` are views of it and keep it as long as there are any. Its
    descriptors are closed with it, unless detached before.
    """

    def __init__(self, message: Any) -> None:
        self._message: Any = ffi.gc(message, lib.kdbus_message_free)
        self._fds: list[FileDescriptor | None] | None = None
        self._memfds: dict[int, MemfdPart] = {}
        self.src_id: int = lib.kdbus_message_get_src_id(message)
        self.dst_id: int = lib.kdbus_message_get_dst_id(message)
        self.flags = MsgFlag(lib.kdbus_message_get_flags(message))
        self.priority: int = lib.kdbus_message_get_priority(message)
        self.payload_type: int = lib.kdbus_message_get_payload_type(message)
        self.cookie: int = lib.kdbus_message_get_cookie(message)
        self.cookie_reply: int = lib.kdbus_message_get_cookie_reply(message)
        self.deadline_ns: int = lib.kdbus_message_get_deadline(message)
        self.incomplete: bool = lib.kdbus_message_is_incomplete(message)

    def _get(self) -> Any:
        if self._message is None:
            raise ValueError("the message is closed")
        return self._message

    def _items(self) -> Iterator[Any]:
        message = self._get()
        item = lib.kdbus_message_next_item(message, ffi.NULL)
        while item:
            yield item
            item = lib.kdbus_message_next_item(message, item)

    @property
    def size(self) -> int:
        """Bytes of payload."""
        return int(lib.kdbus_message_get_size(self._get()))

    @property
    def parts(self) -> list[memoryview]:
        """The payload in the pieces it was sent in, not copied, read-only.

        Memfds are mapped for it; OSError EBADF for one that did not arrive or was
        taken (`take_memfd`).
        """
        message = self._get()
        views = []
        for i in range(lib.kdbus_message_get_n_parts(message)):
            datap, sizep = ffi.new("const void **"), ffi.new("size_t *")
            check(lib.kdbus_message_get_part(message, i, datap, sizep))
            # The view keeps `data`, and `data` by its destructor keeps the message.
            data = ffi.gc(ffi.cast("char *", datap[0]), lambda _, kept=message: None)
            views.append(memoryview(ffi.buffer(data, sizep[0])).toreadonly())
        return views

    def payload(self) -> bytes:
        """A copy of the whole payload."""
        message = self._get()
        size = lib.kdbus_message_get_size(message)
        buffer, copied = bytearray(size), ffi.new("size_t *")
        check(lib.kdbus_message_copy(message, 0, ffi.from_buffer(buffer), size, copied))
        return bytes(buffer)

    @property
    def fds(self) -> Sequence[FileDescriptor | None]:
        """Descriptors sent along; None for one that did not arrive."""
        message = self._get()
        if self._fds is None:
            fdp = ffi.new("int *")
            self._fds = []
            for i in range(lib.kdbus_message_get_n_fds(message)):
                result = lib.kdbus_message_take_fd(message, i, fdp)
                if result == -errno.EBADF:
                    self._fds.append(None)
                else:
                    check(result)
                    self._fds.append(FileDescriptor(fdp[0]))
        return self._fds

    def take_memfd(self, part: int) -> MemfdPart:
        """The memfd that part number *part* came as; its `memfd` is a `Memfd`.

        It is closed with the message, unless detached before. OSError EMEDIUMTYPE
        if the part came another way, EBADF if the memfd did not arrive.
        """
        message = self._get()
        if part not in self._memfds:
            fdp, startp, sizep = ffi.new("int *"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
            datap = ffi.new("const void **")
            check(lib.kdbus_message_get_memfd(message, part, fdp, startp, sizep))
            # mapped first: parts stay readable
            check(lib.kdbus_message_get_part(message, part, datap, ffi.NULL))
            check(lib.kdbus_message_take_memfd(message, part, fdp))
            self._memfds[part] = MemfdPart(Memfd(fdp[0]), startp[0], sizep[0])
        return self._memfds[part]

    @property
    def dst_name(self) -> str | None:
        """The well-known name it was sent to."""
        name = lib.kdbus_message_get_dst_name(self._get())
        return os.fsdecode(ffi.string(name)) if name else None

    @property
    def notification(self) -> Notification | None:
        """What the bus has to tell, if the message is from the bus."""
        item = lib.kdbus_message_get_notification(self._get())
        return parse_notification(item) if item else None

    @cached_property
    def metadata(self) -> Metadata:
        """What the bus says about the sender, as far as it was asked for."""
        return parse_metadata(self._items())

    def close(self) -> None:
        """Free the slice (once no view of `parts` is left), close descriptors."""
        if self._message is None:
            return
        self._message = None
        for fd in self._fds or ():
            if fd is not None:
                fd.close()
        for part in self._memfds.values():
            assert isinstance(part.memfd, Memfd)
            part.memfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._message is None else f"{self.size} bytes"
        return f"<ReceivedMessage from {self.src_id} cookie {self.cookie}: {state}>"
