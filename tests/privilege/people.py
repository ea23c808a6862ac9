# SPDX-License-Identifier: LGPL-2.1-or-later
"""People: processes with credentials and namespaces of their own that do what a test tells them.

No account is needed for them: a uid is a number. A person starts with the mount's root as its
working directory, so that paths such as `0-bus/bus` work for those who may not walk the test's
own directories, too. What they hold (files, connections) is kept in their process; the test has
a `Remote` for each, whose methods run over there. A `fork` inherits it all.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

import daemons
from mount.processes import become
from mount.raw import Connection, File, Memory

LIFETIME_SECONDS = 120
"""After which SIGALRM ends a person that hangs."""

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

CAP_IPC_OWNER = 15

_MAX_REQUEST = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def unshare(flags: int) -> None:
    """unshare(2)"""
    _check(_libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)"""
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            fstype.encode() or None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        )
    )


def bind(source: str, target: str, read_only: bool = False) -> None:
    """A bind mount, in a mount namespace of one's own."""
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    mount(source, target, flags=MS_BIND)
    if read_only:
        # In a user namespace of one's own, what is locked has to stay (mount_namespaces(7)).
        kept = MS_NOSUID | MS_NODEV
        mount(source, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def drop_capability(number: int) -> None:
    """Take one capability out of the permitted and effective sets (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets))
    at, bit = 3 * (number // 32), 1 << number % 32
    for i in range(3):
        sets[at + i] &= ~bit
    _check(_libc.capset(header, sets))


def _write(path: str, content: str) -> None:
    Path(path).write_text(content)


@dataclass(frozen=True)
class _Key:
    """Stands for an object that is kept in a person's process."""

    number: int


class Remote:
    """An object in a person's process: its methods run there, attributes come from there."""

    def __init__(self, person: Person, key: _Key) -> None:
        self.person = person
        self.key = key

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.person.ask("call", self.key, name, args, kwargs)

    def get(self, name: str) -> Any:
        """The value of an attribute."""
        return self.person.ask("get", self.key, name)

    @property
    def id(self) -> int:
        return int(self.get("id"))

    def held_by(self, person: Person) -> Remote:
        """The same object as a fork inherited it."""
        return Remote(person, self.key)


class Person:
    """A process that is *uid*, *gid* with *groups*, in new namespaces of the kinds *unshared*;
    without a *uid* it stays who it is.

    The maps of a new user namespace are written by the test; without them it stays unmapped. With
    *inside* the person then becomes that uid and gid of its namespace. In a new PID namespace it
    is process 1.
    """

    def __init__(
        self,
        directory: Path | str | int,
        uid: int | None = None,
        gid: int | None = None,
        groups: Sequence[int] = (),
        *,
        without: Sequence[int] = (),
        unshared: int = 0,
        uid_map: str = "",
        gid_map: str = "",
        inside: int | None = None,
        parent: Person | None = None,
    ) -> None:
        self.uid, self.gid, self.groups = uid, gid, groups
        self._without, self._unshared, self._inside = without, unshared, inside
        self._parent = parent
        self._pids: list[int] = []
        self._forks: list[Person] = []
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Every answer tells who gave it, as the test sees it, whatever namespace that is in.
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
        if parent is not None:
            parent.ask("fork", (self, theirs.fileno()), fds=[theirs.fileno()])
        elif not os.fork():
            # What the test holds must end when the test ends it.
            os.closerange(3, theirs.fileno())
            os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
            self._live(theirs, directory)
        theirs.close()
        try:
            self._receive()
            if unshared & CLONE_NEWUSER:
                self.write_maps(uid_map, gid_map)
            self._send(("go",))
            self._receive()
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Its process, as the test sees it."""
        return self._pids[-1]

    def write_maps(self, uid_map: str, gid_map: str) -> None:
        """Write the maps of its user namespace, each once."""
        for name, content in (("uid_map", uid_map), ("gid_map", gid_map)):
            if content:
                path = f"/proc/{self.pid}/{name}"
                # Only somebody of the namespace above may do so.
                if self._parent is not None:
                    self._parent.run(_write, path, content)
                else:
                    _write(path, content)

    def __getstate__(self) -> dict[str, Any]:
        """What a fork needs to know."""
        names = ("uid", "gid", "groups", "_without", "_unshared", "_inside")
        return {name: getattr(self, name) for name in names}

    # --- the test's side

    def _send(self, request: object, fds: Sequence[int] = ()) -> None:
        data = pickle.dumps(request)
        assert len(data) < _MAX_REQUEST
        socket.send_fds(self._channel, [data], list(fds))

    def _receive(self) -> Any:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        if not poller.poll(daemons.DEADLINE_SECONDS * 1000):
            pytest.fail(f"the process of {self.uid} does not answer")
        data, control, _, _ = self._channel.recvmsg(_MAX_REQUEST, 64)
        if not data:
            pytest.fail(f"the process of {self.uid} has ended")
        for _, kind, credentials in control:
            if kind == socket.SCM_CREDENTIALS:
                pid = struct.unpack_from("=i", credentials)[0]
                if pid not in self._pids:
                    self._pids.append(pid)
        value, error, trace = pickle.loads(data)
        if error is not None:
            error.add_note(trace)
            raise error
        return value

    def start(self, *request: object, fds: Sequence[int] = ()) -> None:
        """Ask, and let `finish` hear the answer."""
        self._send(request, fds)

    def finish(self) -> Any:
        return self._receive()

    def ask(self, *request: object, fds: Sequence[int] = ()) -> Any:
        self._send(request, fds)
        return self._receive()

    def run(self, function: Callable[..., Any], *args: object) -> Any:
        """Run a function that can be imported; a Remote of its own may be an argument."""
        keys = [arg.key if isinstance(arg, Remote) else arg for arg in args]
        return self.ask("run", function, keys)

    def make(self, function: Callable[..., Any], *args: object, **kwargs: object) -> Remote:
        """Keep what *function* returns over there."""
        return Remote(self, self.ask("make", function, args, kwargs))

    def open(self, path: str) -> Remote:
        return self.make(File, path)

    def connect(self, path: str, **options: Any) -> Remote:
        return self.make(Connection, path, **options)

    def fork(
        self,
        uid: int | None = None,
        gid: int | None = None,
        groups: Sequence[int] = (),
        **options: Any,
    ) -> Person:
        """A child that inherits everything and then becomes somebody else."""
        child = Person("", uid, gid, groups, parent=self, **options)
        self._forks.append(child)
        return child

    def end(self) -> None:
        """Kill it and its forks, and see that they are gone."""
        for child in self._forks:
            child.end()
        self._channel.close()
        for pid in reversed(self._pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pid in self._pids:
            daemons.wait_until(lambda pid=pid: not _is_alive(pid), f"{pid} can't be killed")  # type: ignore[misc]
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._pids.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # --- the person's side

    def _live(self, channel: socket.socket, directory: Path | str | int) -> None:
        """All of the forked process's life."""
        try:
            signal.alarm(LIFETIME_SECONDS)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if directory:
                os.chdir(directory)
            if self.uid is not None:
                become(self.uid, self.uid if self.gid is None else self.gid, self.groups)
            for capability in self._without:
                drop_capability(capability)
            if self._unshared:
                unshare(self._unshared)
            _answer(channel, None)
            channel.recv(_MAX_REQUEST)
            if self._inside is not None:
                become(self._inside, self._inside)
            if self._unshared & CLONE_NEWPID and (inner := os.fork()):
                channel.close()
                os.waitpid(inner, 0)
                os._exit(0)
            _answer(channel, None)
            signal.alarm(LIFETIME_SECONDS)
            _obey(channel)
        except BaseException as error:
            _answer(channel, None, error)
        finally:
            os._exit(1)


def _answer(channel: socket.socket, value: object, error: BaseException | None = None) -> None:
    if isinstance(value, Memory):
        value = bytes(value)
    trace = "".join(traceback.format_exception(error)) if error else ""
    try:
        data = pickle.dumps((value, error, trace))
        pickle.loads(data)
    except Exception:
        problem = RuntimeError(f"can't be handed over: {value!r} {error!r}")
        data = pickle.dumps((None, problem, trace))
    channel.send(data)


_kept: list[Any] = []
"""What a person holds."""


def _obey(channel: socket.socket) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(channel, _MAX_REQUEST, 4)
        if not data:
            os._exit(0)
        verb, *rest = pickle.loads(data)
        try:
            _answer(channel, _do(channel, verb, rest, fds))
        except BaseException as error:
            _answer(channel, None, error)


def _do(channel: socket.socket, verb: str, rest: list[Any], fds: list[int]) -> object:
    if verb == "run":
        function, args = rest
        return function(*(_kept[a.number] if isinstance(a, _Key) else a for a in args))
    if verb == "make":
        function, args, kwargs = rest
        _kept.append(function(*args, **kwargs))
        return _Key(len(_kept) - 1)
    if verb == "call":
        key, name, args, kwargs = rest
        return getattr(_kept[key.number], name)(*args, **kwargs)
    if verb == "get":
        key, name = rest
        return getattr(_kept[key.number], name)
    assert verb == "fork"
    ((child, _),) = rest
    theirs = socket.socket(fileno=fds[0])
    # Who forks does not wait for its children: init, or the test's end, does.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not os.fork():
        channel.close()
        child._live(theirs, "")
    theirs.close()
    return None


def _is_alive(pid: int) -> bool:
    try:
        # Bytes: what the process calls itself need not be text.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
