# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has the kernel drop the names of nodes that are gone (FUSE_NOTIFY_INVAL_ENTRY).

It keeps a name that was looked up, and with it an inode here, until memory gets scarce: a bus that
came and went would leave both for long. To drop it, it takes the lock of the directory for
itself, and waits while somebody looks up or lists something there, who in turn waits for us. So a
thread of its own does this, one that nothing here waits for.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable

from ..bus.node import Node
from . import wire

log = logging.getLogger(__name__)

_MOST = 1 << 14
"""Names that wait to be dropped; what is more than that stays until the kernel wants memory."""


class Invalidator:
    """Tells the kernel behind *device*; *nodeid* says what it knows a directory by, if it does."""

    def __init__(self, device: int, nodeid: Callable[[Node], int | None]) -> None:
        self._device = device
        self._nodeid = nodeid
        self._gone: queue.Queue[Node | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._run, name="kdbusfs-names", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drop(self, node: Node) -> None:
        """Have the name of *node*, and all below it, dropped some time. Never waits."""
        try:
            self._gone.put_nowait(node)
        except queue.Full:
            log.debug("too many names to drop: %s stays", node.name)

    def close(self) -> None:
        """The mount is gone. The thread may be in a wait that only others can end."""
        try:
            self._gone.put_nowait(None)
        except queue.Full:
            log.debug("names are left to be dropped")

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (node := self._gone.get()) is not None:
            directory = node.parent
            nodeid = self._nodeid(directory) if directory is not None else None
            # Another one of that name is in its place: the kernel finds out by itself.
            if directory is None or nodeid is None or node.name in directory.children:
                continue
            name = node.name.encode() + b"\0"
            size = wire.NOTIFY_INVAL_ENTRY.size + len(name)
            try:
                os.write(
                    self._device,
                    wire.NOTIFY_INVAL_ENTRY.pack(
                        size, wire.NOTIFY_CODE_INVAL_ENTRY, 0, nodeid, len(name) - 1, 0
                    )
                    + name,
                )
            except OSError as error:
                # ENOENT: it does not know the name, or not any more.
                log.debug("name not dropped: %s", error)
