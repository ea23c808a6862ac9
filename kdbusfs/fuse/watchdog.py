# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has the router overtaken when a caller's memory holds it up (peer/turn.py)."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from ..native import lib


class Watchdog:
    """Sees to it that no caller's memory holds up the bus: when the same operation is under way at
    two looks, and *is_blocked* says that its thread waits for more than a CPU, it is overtaken
    and *take_over* called. It sleeps while there are no operations."""

    PERIOD = 0.02
    _QUIET_LOOKS = 50

    def __init__(self, is_blocked: Callable[[], bool], take_over: Callable[[], None]) -> None:
        self._is_blocked = is_blocked
        self._take_over = take_over
        self._awake = threading.Event()
        self._closed = False
        self.asleep = False
        self._thread = threading.Thread(target=self._run, name="kdbusfs-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self.asleep = False
        self._awake.set()

    def close(self) -> None:
        self._closed = True
        self.wake()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        seen, n_quiet = 0, 0
        while not self._closed:
            time.sleep(self.PERIOD)
            number = lib.kdbusfs_operation()
            if number != seen:
                seen, n_quiet = number, 0
            elif number & 1:
                if self._is_blocked() and lib.kdbusfs_operation_overtake(number) == 0:
                    self._take_over()
            elif n_quiet < self._QUIET_LOOKS:
                n_quiet += 1
            else:
                self._awake.clear()
                self.asleep = True
                self._awake.wait()
                n_quiet = 0
