# SPDX-License-Identifier: LGPL-2.1-or-later
"""-d: each request and its answer as one line, in words."""

from __future__ import annotations

import errno
import logging
from enum import IntFlag
from typing import TYPE_CHECKING

from ..abi.errors import CommandError
from ..abi.numbers import (
    Command,
    ExtensionCommand,
    HelloFlag,
    ListFlag,
    MakeFlag,
    MatchFlag,
    NameFlag,
    RecvFlag,
    SendFlag,
)
from ..abi.structs import CMD_RETURN_FLAGS, U64
from .ioctl import Ioctl

if TYPE_CHECKING:
    from ..bus.call import Call

log = logging.getLogger("kdbusfs.trace")

_FLAGS: dict[int, type[IntFlag]] = {
    Command.BUS_MAKE: MakeFlag,
    Command.ENDPOINT_MAKE: MakeFlag,
    Command.HELLO: HelloFlag,
    Command.LIST: ListFlag,
    Command.SEND: SendFlag,
    Command.RECV: RecvFlag,
    Command.NAME_ACQUIRE: NameFlag,
    Command.MATCH_ADD: MatchFlag,
    ExtensionCommand.SEND: SendFlag,
    ExtensionCommand.RECV: RecvFlag,
}


def errno_name(error: int) -> str:
    """`0`, or the name of an errno."""
    return errno.errorcode.get(error, str(error)) if error else "0"


class Trace:
    """Writes the lines, to the log."""

    def line(
        self,
        name: str,
        ids: tuple[int, int, int],
        error: int,
        text: str = "",
        why: CommandError | None = None,
    ) -> None:
        """One request: who asked (uid, gid, tid), for what, and what came of it."""
        uid, _, tid = ids
        reason = f" ({why.why})" if why is not None and why.why else ""
        log.debug("%s tid=%d uid=%d %s = %s%s", name, tid, uid, text, errno_name(error), reason)

    def call(self, call: Call, error: int, why: CommandError | None = None) -> None:
        """One command."""
        assert isinstance(call, Ioctl)
        file = call.file
        words = [f"fh={file.fh}"]
        connection = file.handle.connection
        if connection is not None:
            words.append(f"id={connection.id}")
        family = _FLAGS.get(call.code)
        if call.negotiating:
            words.append("flags=NEGOTIATE")
        elif call.flags and family is not None:
            words.append(f"flags={family(call.flags).name or hex(call.flags)}")
        if call.read and not error:
            (returned,) = U64.unpack_from(call.data, CMD_RETURN_FLAGS)
            if returned:
                words.append(f"return_flags={returned:#x}")
        peer = call.peer
        self.line(call.spec.name, (peer.uid, peer.gid, peer.tid), error, " ".join(words), why)
