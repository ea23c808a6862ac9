# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes for tests: forked from the test, as another user if need be, none left behind."""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import pytest

import daemons

T = TypeVar("T")

LIFETIME_SECONDS = 60
"""After which SIGALRM ends a child that hangs, so that its test fails instead."""


class Child(Generic[T]):
    """A forked process that runs *function* and hands back what that returns or raises.

    *function* may talk to the test over `self.socket` (the child's end is its argument).
    """

    def __init__(
        self,
        function: Callable[[socket.socket], T],
        *,
        uid: int | None = None,
        gid: int | None = None,
        groups: Sequence[int] = (),
    ) -> None:
        self.socket, theirs = socket.socketpair()
        result, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self.socket.close()
            os.close(result)
            _run(lambda: function(theirs), write, uid, gid, groups)
        theirs.close()
        os.close(write)
        self.socket.settimeout(daemons.DEADLINE_SECONDS)
        self._result = result
        self.status: int | None = None

    def hear(self, text: bytes = b"ready") -> None:
        """Wait until it has said *text*."""
        heard = b""
        while len(heard) < len(text):
            more = self.socket.recv(len(text) - len(heard))
            if not more:
                self.result()
                pytest.fail(f"the child ended before it said {text!r}")
            heard += more
        assert heard == text

    def say(self, text: bytes = b"go") -> None:
        self.socket.sendall(text)

    def result(self) -> T:
        """What *function* returned, raised again if it raised."""
        data = b""
        poller = select.poll()
        poller.register(self._result, select.POLLIN)
        while True:
            if not poller.poll(LIFETIME_SECONDS * 1000):
                self.kill()
                pytest.fail("the child does not end")
            piece = os.read(self._result, 65536)
            if not piece:
                break
            data += piece
        status = self.wait()
        if not data:
            pytest.fail(f"the child ended with status {status}")
        value, error, trace = pickle.loads(data)
        if error is not None:
            error.add_note(trace)
            raise error
        return value  # type: ignore[no-any-return]

    def wait(self, seconds: float = LIFETIME_SECONDS) -> int:
        """Its exit code, negative for a signal (as in subprocess)."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self._close()
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"the child is still there after {seconds} s")
            else:
                time.sleep(0.001)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, and with SIGKILL wait for the end."""
        if self.status is None:
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                self.wait()

    def _close(self) -> None:
        self.socket.close()
        if self._result >= 0:
            os.close(self._result)
            self._result = -1

    def __enter__(self) -> Child[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _run(
    function: Callable[[], object],
    write: int,
    uid: int | None,
    gid: int | None,
    groups: Sequence[int],
) -> None:
    code = 1
    try:
        signal.alarm(LIFETIME_SECONDS)
        # Some are meant to crash, and need leave no trace of it.
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        value: Any = None
        error: BaseException | None = None
        trace = ""
        try:
            if uid is not None:
                become(uid, uid if gid is None else gid, groups)
            value = function()
        except BaseException as raised:
            error, trace = raised, traceback.format_exc()
        try:
            data = pickle.dumps((value, error, trace))
        except Exception:
            data = pickle.dumps((None, RuntimeError(f"{value!r} {error!r}"), trace))
        with open(write, "wb") as pipe:
            pipe.write(data)
        code = 0
    finally:
        os._exit(code)


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Be that user from here on, with no capability left."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def in_child(
    function: Callable[[], T],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] = (),
) -> T:
    """Run *function* in a forked process, as another user if one is given."""
    with Child(lambda _: function(), uid=uid, gid=gid, groups=groups) as child:
        return child.result()


def fds_of(pid: int | str = "self") -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def state_of(pid: int) -> str:
    """One letter, as in proc(5): S is asleep, t stopped by a tracer, Z dead."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def wait_in_ioctl(pid: int, tid: int | None = None) -> None:
    """Wait until a thread sleeps in ioctl(2)."""
    path = f"/proc/{pid}/task/{tid or pid}/syscall"

    def is_there() -> bool:
        with open(path) as file:
            return file.read().split()[0] == str(_SYS_IOCTL)

    daemons.wait_until(is_there, f"{pid} is in no ioctl")


_SYS_IOCTL = {"x86_64": 16, "aarch64": 29}[os.uname().machine]
