# SPDX-License-Identifier: LGPL-2.1-or-later
"""One mount being served: the router's threads, and pyfuse3 under trio."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pyfuse3
import trio

from ..bus.domain import Domain
from ..bus.principals import PRINCIPALS
from ..bus.shares import Budget
from ..peer.namespaces import OWN_USER
from ..peer.subordinate import read_ranges
from ..user_error import UserError
from .relay import tree_pair
from .router import Router
from .trace import Trace
from .tree import Tree

log = logging.getLogger(__name__)

DEFAULT_SPIN_US = 50
"""How long the router polls before it sleeps, where there is more than one CPU."""


class _Clock:
    """The system's clocks."""

    monotonic_ns = staticmethod(time.monotonic_ns)
    realtime_ns = staticmethod(time.time_ns)


class Session:
    """Serves the mount behind *device* (an open /dev/fuse that has been mounted).

    *pool* is `auto`, `passthrough` or `cache`; *trace* logs each request; *spin_us* None means
    `DEFAULT_SPIN_US` on several CPUs, else none.
    """

    def __init__(
        self, device: int, *, pool: str = "auto", trace: bool = False, spin_us: int | None = None
    ) -> None:
        if spin_us is None:
            spin_us = DEFAULT_SPIN_US if len(os.sched_getaffinity(0)) > 1 else 0
        memory_size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        PRINCIPALS.replace(read_ranges())
        domain = Domain(_Clock(), OWN_USER, Budget(memory_size))
        self._tree = Tree(domain.root)
        ours, self._theirs = tree_pair()
        self._router = Router(
            device,
            domain,
            self._tree,
            ours,
            pool=pool,
            spin_us=spin_us,
            trace=Trace() if trace else None,
        )
        self._initialised = trio.Event()
        self._ended = trio.Event()

    def start(self) -> None:
        """Start to answer requests."""
        # Objects of the bus are freed by their counts; the collector need not look so often.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        sys.setswitchinterval(0.0005)
        relay = self._router.relay.run
        threading.Thread(target=relay, name="kdbusfs-relay", daemon=True).start()
        # From here on the descriptor is pyfuse3's, which closes it.
        pyfuse3.init(self._tree, f"/dev/fd/{self._theirs.detach()}", {"fsname=kdbusfs"})

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until the mount is gone; call *ready* once it answers. UserError if the kernel
        can't do the kind of pool that was asked for."""
        token = trio.lowlevel.current_trio_token()

        def soon(action: Callable[[], None]) -> None:
            # A router that outlives this, as after the error below, has nobody to tell.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(action)

        self._router.start(lambda: soon(self._initialised.set), lambda: soon(self._end))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            await self._initialised.wait()
            if not self._router.has_pools:
                raise UserError(
                    "this kernel has no FUSE passthrough (Linux 6.9): use --pool=cache",
                    os.EX_UNAVAILABLE,
                )
            if not self._ended.is_set():
                ready()
            await self._ended.wait()
            nursery.cancel_scope.cancel()

    def give_up(self) -> None:
        """The mount is gone, but the router does not come back from where it stalls."""
        log.warning("the router is stuck in a caller's memory: ending without it")
        self._end()

    def _end(self) -> None:
        self._ended.set()
        self._initialised.set()

    def close(self) -> None:
        """Give up what `start` took; the mount is gone by now."""
        pyfuse3.close(unmount=False)
