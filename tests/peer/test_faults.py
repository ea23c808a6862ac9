# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever /proc and a caller's namespaces answer is expected: each system call that looks at a
caller fails in turn, with each errno, or brings what nobody would write there."""

from __future__ import annotations

import builtins
import fcntl
import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import (
    EACCES,
    EBADF,
    EINVAL,
    EIO,
    EMFILE,
    ENAMETOOLONG,
    ENFILE,
    ENOENT,
    ENOMEM,
    ENOTDIR,
    ENOTTY,
    EPERM,
    ESRCH,
    errorcode,
)
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import daemons
from bus.harness import fails
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import AttachFlag
from kdbusfs.bus.metadata import PidNamespace, ProcessMetadata, Viewer
from kdbusfs.native import ffi
from kdbusfs.peer import descriptors, namespaces, process, procfs
from kdbusfs.peer.fd_table import FD_TABLE
from kdbusfs.peer.process import Process

EXHAUSTED = (EMFILE, ENFILE, ENOMEM)
ERRNOS = (ENAMETOOLONG, ESRCH, EACCES, EPERM, ENOENT, ENOTDIR, EIO, EINVAL, *EXHAUSTED)
UID = 4321

Operation = Callable[[Process], object]


def gather(kinds: int) -> Operation:
    def operation(peer: Process) -> object:
        metadata = ProcessMetadata()
        peer.gather(metadata, kinds)
        metadata.gathered |= kinds
        viewer = Viewer(namespaces.OWN_USER, namespaces.OWN_PID, peer.root())
        return metadata.items(kinds, viewer, peer)

    return operation


def take(peer: Process) -> object:
    taken = peer.take(0)
    try:
        return taken.can_hold_files()
    finally:
        taken.release()


def find_by_search(peer: Process) -> object:
    return process._search_process(1, peer.pid_namespace(), UID)


OPERATIONS: dict[str, Operation] = {
    "credentials": Process.credentials,
    "ids of the user namespace": lambda peer: peer.credentials().user_namespace.uid(0),
    "pid_namespace": Process.pid_namespace,
    "root": Process.root,
    "find_process": lambda peer: peer.find_process(1),
    "find_process by a number that is none": lambda peer: peer.find_process((1 << 64) - 1),
    "find_process by search": find_by_search,
    "take": take,
    **{f"gather {flag.name}": gather(int(flag)) for flag in AttachFlag},
    "gather all": gather(int(sum(AttachFlag))),
}


class Injector:
    """Lets the *n*-th system call of those that look at a caller fail with *errno*."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n = -1
        self.errno = 0
        self.count = 0
        for name in ("open", "read", "pread", "readlink", "listdir", "fstat"):
            patch.setattr(os, name, self._wrapped(getattr(os, name)))
        patch.setattr(fcntl, "ioctl", self._wrapped(fcntl.ioctl))
        patch.setattr(process, "_pidfd_info", _Library(self, process.lib).kdbusfs_pidfd_info)
        for module in (process, descriptors, procfs):
            patch.setattr(module, "lib", _Library(self, module.lib))
        patch.setattr(builtins, "open", self._wrapped(builtins.open))

    def strikes(self) -> bool:
        self.count += 1
        return self.count - 1 == self.n

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.strikes():
                raise OSError(self.errno, os.strerror(self.errno))
            return function(*args, **kwargs)

        return wrapper


class _Library:
    """The C functions that answer with a negative errno."""

    def __init__(self, injector: Injector, library: Any) -> None:
        self._injector = injector
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not any(part in name for part in ("pidfd", "stat", "proc_")):
            return function

        def wrapper(*args: Any) -> Any:
            return -self._injector.errno if self._injector.strikes() else function(*args)

        return wrapper


@pytest.fixture(scope="module")
def stranger() -> Iterator[int]:
    """A process in a user and a PID namespace of its own."""
    daemons.need_mounting()
    command = ["unshare", "--user", "--pid", "--fork", "--map-root-user", "sleep", "infinity"]
    with subprocess.Popen(command) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        pid = int(daemons.wait_until(children.read_text, "no child"))
        comm = Path(f"/proc/{pid}/comm")
        daemons.wait_until(lambda: comm.read_text() == "sleep\n", "no namespaces")
        yield pid
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["here", "elsewhere"])
def tid(request: pytest.FixtureRequest) -> int:
    return os.getpid() if request.param == "here" else request.getfixturevalue("stranger")


def peer(tid: int) -> Process:
    status = procfs.Status(tid)
    uid, gid = status.uids()[3], status.gids()[3]
    found = Process(tid, uid, gid, lambda fd, callback: None)
    assert found.uid == uid
    return found


def left_open() -> tuple[list[str], dict[int, int]]:
    gc.collect()
    shares = FD_TABLE._share
    return sorted(os.listdir("/proc/self/fd")), dict(shares._taken) if shares else {}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_system_call_may_fail_with_each_errno(
    name: str, tid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, operation = peer(tid), OPERATIONS[name]
    with suppress(CommandError):
        # What is looked up once and for all is no part of it.
        operation(caller)
    before = left_open()
    for errno in ERRNOS:
        n, struck = 0, True
        while struck:
            caller._status = None
            with monkeypatch.context() as patch:
                injector = Injector(patch)
                injector.n, injector.errno = n, errno
                try:
                    operation(caller)
                    result = 0
                except CommandError as error:
                    result = error.errno
                struck = injector.count > n
            where = f"call {n} with {errorcode[errno]}"
            if result == ENOMEM:
                assert errno == ENOMEM, where
            elif result == ENFILE:
                assert errno in (EMFILE, ENFILE), where
            else:
                assert result in (0, EPERM, EBADF), where
            n += 1
        assert n > 1 or "number that is none" in name
    assert left_open() == before


def test_what_the_daemon_is_short_of_is_never_told_as_something_missing(
    tid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata that was left out would look like a caller without it."""
    for operation in OPERATIONS.values():
        for errno in EXHAUSTED:
            caller = peer(tid)
            with monkeypatch.context() as patch:
                injector = Injector(patch)
                injector.n, injector.errno = 0, errno
                with fails(ENOMEM if errno == ENOMEM else ENFILE):
                    operation(caller)


TEXTS = {
    "empty": b"",
    "a line end": b"\n",
    "no number": b"x" * 40,
    "no text": bytes(range(256)),
    "zeros": bytes(4096),
    "colons": b":" * 100 + b"\n::\n:\n1:\n2:x\n",
    "a number too large": b"9" * 5000,
    "a number of 64 bits": b"18446744073709551615",
    "a negative number": b"-1",
    "fields without values": b"Name:\nUid:\nGid:\nGroups:\nCapEff:\nNSpid:\nTgid:\nPPid:\nState:\n",
    "fields with too many values": b"".join(
        b"\n%b:\t%b" % (field, b"1 " * 100)
        for field in (b"Uid", b"Gid", b"Tgid", b"Pid", b"PPid", b"NSpid", b"NStgid", b"CapEff")
    ),
    "fields with words": b"".join(
        b"\n%b:\tx y z w" % field
        for field in (b"Uid", b"Gid", b"Groups", b"Tgid", b"Pid", b"PPid", b"NSpid", b"CapInh")
    ),
    "a megabyte": b"1234567 " * (1 << 17),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", OPERATIONS)
def test_files_may_hold_anything(
    name: str, text: bytes, tid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, operation = peer(tid), OPERATIONS[name]
    remaining = text

    def read(fd: int, size: int, *_: int) -> bytes:
        nonlocal remaining
        piece, remaining = remaining[:size], remaining[size:]
        return piece

    def open_(*args: Any, **kwargs: Any) -> int:
        nonlocal remaining
        remaining = text
        return opened(*args, **kwargs)

    def read_at_once(tid: int, name: bytes, to: Any, size: int) -> int:
        ffi.buffer(to)[: len(text[:size])] = text[:size]
        return min(len(text), size)

    with monkeypatch.context() as patch:
        library = SimpleNamespace(
            kdbusfs_proc_read=read_at_once,
            kdbusfs_proc_link=read_at_once,
            kdbusfs_proc_root=lambda tid, to, size: read_at_once(tid, b"root", to, size),
        )
        patch.setattr(procfs, "lib", library)
        opened = os.open
        patch.setattr(os, "open", open_)
        patch.setattr(os, "read", read)
        patch.setattr(os, "pread", read)
        patch.setattr(procfs, "_last_capability", None)
        with suppress(CommandError):
            operation(caller)


def test_a_file_without_an_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda fd, size: bytes(size))
        patch.setattr(procfs, "_ROOM", 16)
        text = procfs.read(os.getpid(), "status")
    assert text is not None
    assert len(text) <= 1 << 22


@pytest.mark.parametrize(
    "text", [b"", b"99", b"-1", b"x", b"\xff"], ids=["empty", "large", "negative", "word", "byte"]
)
def test_capabilities_are_left_out_where_the_last_one_is_unknown(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cap_last_cap"
    path.write_bytes(text)
    monkeypatch.setattr(procfs, "_LAST_CAPABILITY", path)
    monkeypatch.setattr(procfs, "_last_capability", None)
    metadata = ProcessMetadata()
    peer(os.getpid()).gather(metadata, AttachFlag.CAPS)
    assert metadata.caps is None


def test_mounts_may_be_named_by_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        b"20 1 0:7 / /mnt/\xff\xfe rw - tmpfs \xff rw\n"
        b"21 1 0:9 / /a\\040-\\040b rw shared:1 - fuse.kdbusfs kdbusfs rw\n"
    )
    read, write = os.pipe()
    os.write(write, lines)
    os.close(write)
    opened = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda path, mode="r", **_: opened(read, mode, closefd=False)
    )
    assert descriptors.is_kdbusfs_device((0, 9))
    os.close(read)
    monkeypatch.undo()
    # The largest minor number that the kernel has.
    assert not descriptors.is_kdbusfs_device((0, (1 << 20) - 1))


def test_a_namespace_is_charged_to_who_is_in_it(stranger: int) -> None:
    caller = peer(stranger)
    before = FD_TABLE.taken(caller.uid)
    users, pids = caller.credentials().user_namespace, caller.pid_namespace()
    assert isinstance(pids, PidNamespace)
    assert FD_TABLE.taken(caller.uid) == before + 3
    assert caller.credentials().user_namespace is users
    del users, pids
    gc.collect()
    assert FD_TABLE.taken(caller.uid) == before


def test_ids_are_told_alike_with_and_without_proc(
    tid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = int(AttachFlag.CREDS | AttachFlag.PIDS)
    with monkeypatch.context() as patch:
        patch.setattr(process, "_pidfd_info", lambda *_: -ENOTTY)
        slow = ProcessMetadata()
        peer(tid).gather(slow, kinds)
    # The second time it is known where the thread is.
    for _ in range(2):
        quick = ProcessMetadata()
        peer(tid).gather(quick, kinds)
        assert (quick.creds, quick.pids) == (slow.creds, slow.pids)
        assert (quick.pid_namespace is None) == (slow.pid_namespace is None)
    assert slow.creds is not None
    assert slow.pids is not None
