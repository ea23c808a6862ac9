# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers are held in their calls: nothing is done to one that has been let go."""

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import daemons
from abi_client.verbs import bus_items
from kdbusfs.abi import structs
from kdbusfs.abi.errors import CommandError, Fault, Stalled
from kdbusfs.abi.numbers import AttachFlag, Command, MsgFlag, SendFlag
from kdbusfs.bus.commands import COMMANDS, Row
from kdbusfs.bus.domain import Domain
from kdbusfs.bus.metadata import ProcessMetadata
from kdbusfs.fuse import wire
from kdbusfs.fuse.calls import Calls
from kdbusfs.fuse.device import Device
from kdbusfs.fuse.files import OpenFiles
from kdbusfs.peer import procfs
from kdbusfs.peer.memory import PoolMemory
from kdbusfs.peer.namespaces import OWN_USER
from kdbusfs.peer.process import NotHeld, Process
from kdbusfs.peer.stall import MAX_OF_CALL
from mount.processes import Child, wait_in_ioctl
from mount.raw import Bus, Memory, libc, make_message, monotonic_ns

ERESTARTSYS = 512
"""The kernel makes EINTR of it, or calls again."""
BEFORE = b"untouched" * 8


def _nobody(fd: int, callback: Callable[[], None]) -> None:
    """A watcher that watches nothing."""


def process(tid: int | None = None) -> Process:
    return Process(tid or os.getpid(), os.getuid(), os.getgid(), _nobody)


# --- the object that stands for a held caller

ACCESSES: dict[str, Callable[[Process, int], object]] = {
    "read": lambda p, address: p.read(address, 8),
    "a long read": lambda p, address: p.read(address, 1 << 20),
    "read_some": lambda p, address: p.read_some(address, 8),
    "write": lambda p, address: p.write(address, b"x"),
    "store": lambda p, address: p.store(address, b"x"),
    "fill": lambda p, address: p.fill(PoolMemory(-1, 4096), 0, [(address, 8)]),
    "fill in pieces": lambda p, address: p.fill(PoolMemory(-1, 4096), 0, [(address, 4), (0, 4)]),
    "status": lambda p, _: p.status,
    "credentials": lambda p, _: p.credentials(),
    "pid_namespace": lambda p, _: p.pid_namespace(),
    "root": lambda p, _: p.root(),
    "find_process": lambda p, _: p.find_process(1),
    "take": lambda p, _: p.take(0),
    "is_killed": lambda p, _: p.is_killed(),
    "thread": lambda p, _: p.thread(),
    **{
        f"gather {kind.name}": lambda p, _, kind=kind: p.gather(ProcessMetadata(), int(kind))
        for kind in AttachFlag
        # Those are not the process's.
        if kind not in (AttachFlag.TIMESTAMP, AttachFlag.NAMES, AttachFlag.CONN_DESCRIPTION)
    },
}


@pytest.mark.parametrize("access", ACCESSES)
def test_who_was_let_go_is_out_of_reach(access: str) -> None:
    memory = Memory(BEFORE)
    peer = process()
    # Also what it was asked before is not told any more.
    peer.credentials()
    peer.let_go()
    with pytest.raises(NotHeld):
        ACCESSES[access](peer, memory.address)
    assert bytes(memory) == BEFORE


@pytest.mark.parametrize("access", [a for a in ACCESSES if a != "status"])
def test_a_pinned_thread_that_ended_is_out_of_reach(access: str) -> None:
    device = os.eventfd(0)
    memory = Memory(BEFORE)
    with Child(lambda test: test.recv(1)) as child:
        peer = process(child.pid)
        peer.pin(device)
        assert peer.read(memory.address, len(BEFORE)) == BEFORE
        child.kill()
        with pytest.raises(Fault):
            ACCESSES[access](peer, memory.address)
    os.close(device)


def test_nobody_is_held_for_a_connection_that_was_aborted() -> None:
    """The device answers POLLERR then; so does a pipe whose reader has gone."""
    reader, writer = os.pipe()
    peer = process()
    peer.pin(writer)
    assert peer.thread() == os.getpid()
    os.close(reader)
    with pytest.raises(Fault):
        peer.thread()
    os.close(writer)


# --- requests without a kernel between


class Shell:
    """Open files, behind a socket in place of /dev/fuse. The caller of every request is this
    process: its memory is ours to look at."""

    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(daemons.DEADLINE_SECONDS)
        clock = SimpleNamespace(monotonic_ns=time.monotonic_ns, realtime_ns=time.time_ns)
        self.domain = Domain(clock, OWN_USER)
        self._device = device
        tree = SimpleNamespace(node=self._node, set_size=lambda nodeid, size: None)
        self._nodes: dict[int, Any] = {}
        self._answers = Device(device.fileno())
        self.files = OpenFiles(
            self._answers,
            self.domain,
            tree,  # type: ignore[arg-type]
            lambda nodeid, uid: _Backing(),
            _nobody,
        )
        self.calls = Calls(self._answers, self.domain, self.files, _nobody, self._put_back)
        self.interrupts = self.calls.interrupts
        self._unique = 0
        self._ioctls: set[int] = set()
        self.answers: dict[int, int] = {}
        """errno by unique."""

        self.put_back: list[bytes] = []
        """Requests that are to start anew."""

    def _put_back(self, request: bytes) -> None:
        self.put_back.append(request)

    def _node(self, nodeid: int) -> Any:
        return self._nodes.get(nodeid)

    def _header(self, opcode: int, body: bytes, nodeid: int = 0) -> bytearray:
        self._unique += 2
        size = wire.IN_HEADER_SIZE + len(body)
        fields = (size, opcode, self._unique, nodeid, os.getuid(), os.getgid(), os.getpid(), 0, 0)
        return bytearray(wire.IN_HEADER.pack(*fields) + body)

    def hear(self) -> None:
        """Take the answers that were written."""
        if self._answers.pending:
            self._note(self._answers.pending)
            self._answers.pending = b""
        while select.select([self.kernel], [], [], 0)[0]:
            self._note(self.kernel.recv(1 << 16))

    def _note(self, answer: bytes) -> None:
        _, error, unique = wire.OUT_HEADER.unpack_from(answer)
        if unique:
            assert unique not in self.answers, "answered twice"
            self.body = answer[wire.OUT_HEADER_SIZE :]
            if unique in self._ioctls and not error and self.body:
                (error,) = struct.unpack_from("=i", self.body)
            self.answers[unique] = -error

    def open(self, node: Any) -> int:
        nodeid = 100 + self._unique
        self._nodes[nodeid] = node
        request = self._header(wire.Opcode.OPEN, bytes(8), nodeid)
        ids = (os.getuid(), os.getgid(), os.getpid())
        self.files.open(wire.Opcode.OPEN, self._unique, nodeid, ids, request)
        self.hear()
        assert self.answers[self._unique] == 0
        return int(wire.OPEN_OUT.unpack_from(self.body)[0])

    def begin(self, fh: int, code: int, argument: Memory) -> int:
        """An ioctl; its unique."""
        inline = bytes(argument)[: code >> 16 & 0x3FFF] if code & 0x40000000 else b""
        fields = (fh, 0, code, argument.address, len(inline), 0)
        request = self._header(wire.Opcode.IOCTL, wire.IOCTL_IN.pack(*fields) + inline)
        unique = self._unique
        self._ioctls.add(unique)
        self.calls.ioctl(memoryview(request))
        self.finish()
        return unique

    def finish(self) -> None:
        while self.calls.completed:
            self.calls.finish()
        self.hear()

    def ioctl(self, fh: int, code: int, *words: int, items: bytes = b"", flags: int = 0) -> Memory:
        argument = command(*words, items=items, flags=flags)
        assert self.answers[self.begin(fh, code, argument)] == 0
        return argument

    def interrupt(self, unique: int) -> None:
        self._interrupt(self._header(wire.Opcode.INTERRUPT, struct.pack("=Q", unique)))

    def _interrupt(self, request: bytearray) -> None:
        self.interrupts.take(wire.Opcode.INTERRUPT, self._unique, 0, (0, 0, 0), request)

    def close(self) -> None:
        self.calls.close()
        self.kernel.close()
        self._device.close()


class _Backing:
    open_flags = reopen_flags = backing_id = 0

    def new_memory(self, size: int) -> PoolMemory:
        return PoolMemory(-1, size)

    def close(self) -> None:
        pass


def command(*words: int, items: bytes = b"", flags: int = 0) -> Memory:
    body = struct.pack(f"={len(words) + 2}Q", flags, 0, *words) + items
    return Memory(struct.pack("=Q", 8 + len(body)) + body)


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


class Calling:
    """A requester and a target on a bus of *shell*."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        owner = shell.open(shell.domain.root.children["control"])
        name = f"{os.getuid()}-held"
        shell.ioctl(owner, Command.BUS_MAKE, items=bus_items(name))
        endpoint = shell.domain.root.children[name].children["bus"]
        self.requester, self.target = shell.open(endpoint), shell.open(endpoint)
        self.requester_id, self.target_id = (
            self._hello(fh) for fh in (self.requester, self.target)
        )

    def _hello(self, fh: int) -> int:
        self.shell.ioctl(fh, Command.HELLO, 0, 0, 0, 0, 1 << 20, 0, 0, 0, 0)
        (id_,) = struct.unpack_from("=Q", self.shell.body, wire.IOCTL_OUT.size - 16 + 48)
        return int(id_)

    def call(self) -> tuple[int, Memory]:
        """A synchronous SEND: its unique and its struct."""
        content, self._kept = make_message(
            self.target_id, [b"x"], flags=MsgFlag.EXPECT_REPLY, cookie=7, last=monotonic_ns(60)
        )
        self._message = Memory(content)
        argument = command(self._message.address, 0, 0, 0, flags=SendFlag.SYNC_REPLY)
        return self.shell.begin(self.requester, Command.SEND, argument), argument

    def answer(self) -> int:
        content, kept = make_message(self.requester_id, [b"y"], last=7)
        message = Memory(content)
        unique = self.shell.begin(self.target, Command.SEND, command(message.address, 0, 0, 0))
        del kept
        return self.shell.answers[unique]


def _scribble(memory: Memory) -> bytes:
    """The caller has its struct back, and has put something else there."""
    data = (BEFORE * 10)[: memory.size]
    ctypes.memmove(memory.address, data, len(data))
    return data


def test_an_answer_is_stored_while_the_caller_is_held(shell: Shell) -> None:
    calling = Calling(shell)
    unique, argument = calling.call()
    assert unique not in shell.answers
    assert calling.answer() == 0
    assert shell.answers[unique] == 0
    assert structs.MSG_INFO.unpack_from(bytes(argument), 32)[1] > 0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after it waits"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENAMETOOLONG, "x"), OSError(errno.EMFILE, "x"), RuntimeError()]
)
def test_a_call_that_failed_unexpectedly_gets_nothing_later(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, after: bool
) -> None:
    row = COMMANDS[Command.SEND]

    def fail(connection: Any, call: Any) -> int:
        if after:
            row.handler(connection, call)
        raise error

    calling = Calling(shell)
    monkeypatch.setitem(COMMANDS, int(Command.SEND), Row(fail, row.kinds))
    unique, argument = calling.call()
    monkeypatch.undo()
    assert shell.answers[unique] == errno.EIO
    data = _scribble(argument)
    calling.answer()
    shell.interrupt(unique)
    assert bytes(argument) == data


def test_a_mount_that_ends_lets_go_of_who_waits_and_stores_nothing(shell: Shell) -> None:
    calling = Calling(shell)
    unique, argument = calling.call()
    data = _scribble(argument)
    shell.calls.close()
    shell.hear()
    assert bytes(argument) == data
    assert unique not in shell.answers


def test_an_interruption_of_what_is_no_call_of_ours_is_forgotten(shell: Shell) -> None:
    calling = Calling(shell)
    unique, _ = calling.call()
    calling.answer()
    for strange in (1, 2, unique, 1 << 40):
        shell.interrupt(strange)
    assert not shell.interrupts.pending


@pytest.mark.parametrize(
    "trouble", [Fault("it has gone"), OSError(errno.EMFILE, "x"), CommandError(errno.ENFILE, "x")]
)
def test_one_that_can_not_be_looked_at_keeps_no_other_from_its_end(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """Two callers stall and are killed; what the first is can't be known."""
    calling = Calling(shell)

    def stall(connection: Any, call: Any) -> int:
        raise Stalled

    monkeypatch.setitem(COMMANDS, int(Command.SEND), Row(stall, COMMANDS[Command.SEND].kinds))
    requests = [calling.call()[0] for _ in range(2)]
    looked: list[int] = []

    def is_killed(tid: int) -> bool:
        looked.append(tid)
        if len(looked) == 1:
            raise trouble
        return True

    for unique in requests:
        shell.interrupts.expect(unique)
    monkeypatch.setattr(procfs, "is_killed", is_killed)
    shell.interrupts.look_for_killed()
    shell.hear()
    answered = [shell.answers.get(unique) for unique in requests]
    assert sorted(answered, key=str) == [errno.EINTR, None]
    assert len(looked) == 2


def test_a_signal_that_comes_before_the_wait_ends_it(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = COMMANDS[Command.SEND]
    calling = Calling(shell)

    def interrupt(connection: Any, call: Any) -> int:
        # As the router does that took over while the payload stalls.
        request = struct.pack("=Q", call.unique)
        shell._interrupt(shell._header(wire.Opcode.INTERRUPT, request))
        return row.handler(connection, call)

    monkeypatch.setitem(COMMANDS, int(Command.SEND), Row(interrupt, row.kinds))
    unique, _ = calling.call()

    def is_answered() -> bool:
        shell.hear()
        return unique in shell.answers

    daemons.wait_until(is_answered, "ERESTARTSYS")
    assert shell.answers[unique] == ERESTARTSYS


def test_a_call_that_stalls_again_and_again_is_a_fault(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = COMMANDS[Command.SEND]
    calling = Calling(shell)

    def stall(connection: Any, call: Any) -> int:
        shell.calls.note_stall()
        raise Stalled

    monkeypatch.setitem(COMMANDS, int(Command.SEND), Row(stall, row.kinds))
    unique, _ = calling.call()
    n = 1
    while shell.put_back:
        assert unique not in shell.answers
        shell.calls.again(memoryview(shell.put_back.pop()))
        shell.hear()
        n += 1
    assert n == MAX_OF_CALL
    assert shell.answers[unique] == errno.EFAULT


def test_a_call_that_stalled_starts_anew_unless_its_caller_has_been_let_go(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = COMMANDS[Command.SEND]
    calling = Calling(shell)

    def stall(connection: Any, call: Any) -> int:
        raise Stalled

    for aborted in (False, True):
        monkeypatch.setitem(COMMANDS, int(Command.SEND), Row(stall, row.kinds))
        unique, argument = calling.call()
        monkeypatch.undo()
        (request,) = shell.put_back
        shell.put_back.clear()
        before = bytes(argument)
        if aborted:
            shell.calls.close()
        shell.calls.again(memoryview(request))
        shell.finish()
        assert unique not in shell.answers
        if aborted:
            assert bytes(argument) == before
        else:
            assert calling.answer() == 0
            assert shell.answers[unique] == 0


def test_a_signal_that_came_while_the_request_was_queued_ends_the_wait(shell: Shell) -> None:
    calling = Calling(shell)
    shell.interrupts.expect(shell._unique + 2)
    unique, _ = calling.call()

    def is_answered() -> bool:
        shell.hear()
        return unique in shell.answers

    daemons.wait_until(is_answered, "ERESTARTSYS")
    assert shell.answers[unique] == ERESTARTSYS


# --- the kernel lets all of them go

N_CALLERS = 12


def _wait_for_the_end(bus: Bus, to: int, test: socket.socket) -> bool:
    """Call; when the call ends, take the struct back, and tell whether anybody writes to it after
    that, until the daemon has ended."""
    with bus.connect() as conn:
        content, kept = make_message(
            to, [b"x"], flags=MsgFlag.EXPECT_REPLY, cookie=7, last=monotonic_ns(60)
        )
        message = Memory(content)
        argument = command(message.address, 0, 0, 0, flags=SendFlag.SYNC_REPLY)
        data = (BEFORE * 10)[: argument.size]
        test.send(b"ready")
        result = libc.ioctl(conn.fd, Command.SEND, argument.address)
        ctypes.memmove(argument.address, data, len(data))
        assert result < 0
        del kept
        test.recv(1)
        return bytes(argument) == data


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
@pytest.mark.parametrize("how", ["SIGTERM", "abort", "umount"])
def test_nothing_is_stored_when_the_mount_ends_under_calls(
    tmp_path: Path, pool: str, how: str
) -> None:
    with daemons.running(tmp_path, pool) as mount:
        with Bus(mount.path) as bus, bus.connect() as target:
            callers = [
                Child(lambda test: _wait_for_the_end(bus, target.id, test))
                for _ in range(N_CALLERS)
            ]
            for caller in callers:
                caller.hear()
                wait_in_ioctl(caller.pid)
            for _ in callers:
                target.take()
            _end(mount, how, tmp_path)
        mount.wait()
        for caller in callers:
            caller.say(b"x")
        assert [caller.result() for caller in callers] == [True] * N_CALLERS


def _end(mount: daemons.Mount, how: str, directory: Path) -> None:
    if how == "SIGTERM":
        mount.process.send_signal(signal.SIGTERM)
    elif how == "abort":
        number = os.minor(os.stat(mount.path).st_dev)
        connections = directory / "connections"
        connections.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", connections], check=True)
        try:
            (connections / f"{number}" / "abort").write_text("1")
        finally:
            subprocess.run(["umount", connections], check=True)
    else:
        subprocess.run(["umount", "--force", "--lazy", mount.path], check=True)
