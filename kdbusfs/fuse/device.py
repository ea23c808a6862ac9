# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/fuse, as those see it who answer requests."""

from __future__ import annotations

import logging
import os

from ..abi.errors import CommandError
from ..abi.items import Buffer
from .trace import Trace
from .wire import OUT_HEADER, OUT_HEADER_SIZE, Ids

log = logging.getLogger(__name__)


class Device:
    """The descriptor *fd*, and where -d tells of each answer, if it does."""

    __slots__ = ("fd", "trace", "pending")

    def __init__(self, fd: int, trace: Trace | None = None) -> None:
        self.fd = fd
        self.trace = trace
        self.pending: Buffer = b""
        """An answer that is ready: the router writes it as it goes for the next request."""

    def reply(self, unique: int, error: int = 0, body: bytes = b"") -> None:
        """Answer request *unique*."""
        self.write(OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), -error, unique) + body)

    def write(self, data: Buffer) -> None:
        """An answer or a notification."""
        try:
            os.write(self.fd, data)
        except OSError as error:
            # ENOENT: the request was aborted (the mount is being torn down).
            log.debug("reply not taken: %s", error)

    def write_pending(self) -> None:
        """Write the answer that is ready now."""
        reply, self.pending = self.pending, b""
        if reply:
            self.write(reply)

    def traced(
        self, name: str, ids: Ids, error: int, text: str, why: CommandError | None = None
    ) -> None:
        """A request has been answered."""
        if self.trace is not None:
            self.trace.line(name, ids, error, text, why)
