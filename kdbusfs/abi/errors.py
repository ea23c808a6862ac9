# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception that is part of a command's contract."""

import errno as _errno


class CommandError(Exception):
    """A command ends with *errno*, as its man page says; *why* is for the debug log only."""

    def __init__(self, errno: int, why: str = "") -> None:
        # No super().__init__: BaseException.__new__ has kept the arguments, and this is a hot path.
        self.errno = errno
        self.why = why

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno, str(self.errno))
        return f"{name}: {self.why}" if self.why else name


class Fault(CommandError):
    """The caller's memory could not be read or written: EFAULT."""

    def __init__(self, why: str = "memory of the caller") -> None:
        super().__init__(_errno.EFAULT, why)


class Overtaken(Fault):
    """Reading the caller's memory took so long that others went first; the command may be tried
    again from its start, unless it has had an effect."""

    def __init__(self) -> None:
        super().__init__("memory of the caller that does not fault in")
