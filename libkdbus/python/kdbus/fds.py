# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors as objects that are closed exactly once."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import check

# A number that can't be a descriptor: after close() nothing can hit whoever got
# the old number next.
_CLOSED = -1


class HasFileno(Protocol):
    """Anything select() takes."""

    def fileno(self) -> int: ...


def fileno(fd: int | HasFileno) -> int:
    """The number behind *fd*."""
    return fd if isinstance(fd, int) else fd.fileno()


class FileDescriptor:
    """One open descriptor with one owner.

    It can be closed, used (`fileno`), or turned into something else once
    (`detach`, `open`). Left alone, it warns and closes itself.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number; the descriptor stays with this object.

        Raises OSError EBADF if it was closed or detached.
        """
        if self._fd == _CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._fd

    def detach(self) -> int:
        """The number; closing it is up to the caller from now on."""
        fd, self._fd = self.fileno(), _CLOSED
        return fd

    def open(self, mode: str = "rb", **kwargs: Any) -> Any:
        """A file object that owns the descriptor, as open() makes it."""
        file = open(self.fileno(), mode, **kwargs)  # noqa: SIM115
        self._fd = _CLOSED
        return file

    def close(self) -> None:
        """Close it, unless that was done before or it was detached."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)

    @property
    def closed(self) -> bool:
        return self._fd == _CLOSED

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(
        self, _warn: Callable[..., None] = warnings.warn, _close: Callable[[int], None] = os.close
    ) -> None:
        fd, self._fd = getattr(self, "_fd", _CLOSED), _CLOSED
        if fd != _CLOSED:
            _warn(f"unclosed descriptor {fd}", ResourceWarning, source=self)
            _close(fd)

    def __repr__(self) -> str:
        state = "closed" if self._fd == _CLOSED else self._fd
        return f"<{type(self).__name__} {state}>"


class Memfd(FileDescriptor):
    """A memfd, sealed so that it can be sent (memfd_create(2), kdbus.message(7))."""

    __slots__ = ()

    @classmethod
    def new(cls, data: bytes | bytearray | memoryview, name: str = "kdbus-memfd") -> Self:
        """A sealed memfd that holds *data*."""
        fdp = ffi.new("int *")
        buffer = ffi.from_buffer(data)
        check(lib.kdbus_memfd_new_data(fdp, os.fsencode(name), buffer, len(buffer)))
        return cls(fdp[0])

    def seal(self) -> None:
        """Seal it; OSError EBUSY while somebody has it mapped for writing."""
        check(lib.kdbus_memfd_seal(self.fileno()))

    def size(self) -> int:
        """Its size in bytes."""
        return os.fstat(self.fileno()).st_size
