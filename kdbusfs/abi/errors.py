# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception that is part of a command's contract."""

import errno as _errno


class CommandError(Exception):
    """CommandError(errno, why): a command ends with *errno*, as its man page says; *why* is for
    the debug log only. Made by BaseException alone, for refusing is a hot path as well."""

    @property
    def errno(self) -> int:
        number: int = self.args[0]
        return number

    @property
    def why(self) -> str:
        return str(self.args[1]) if len(self.args) > 1 else ""

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno, str(self.errno))
        return f"{name}: {self.why}" if self.why else name


class Fault(CommandError):
    """The caller's memory could not be read or written: EFAULT."""

    def __init__(self, why: str = "memory of the caller") -> None:
        super().__init__(_errno.EFAULT, why)


class Stalled(BaseException):
    """An access to the caller's memory took so long that others went first: no error of the
    command, which is undone and starts anew. Like trio.Cancelled it is no `Exception`, so that it
    passes through whatever handles errors."""
