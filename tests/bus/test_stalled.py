# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers whose memory stalls: others go first, and the command starts anew.

`Slow` lets something else happen at the moment the bus reads from it, and then tells the bus
that this took too long, as `kdbusfs.peer.stall` does. The command must leave no trace, whatever
happened meanwhile; tried again it does what it always does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EBADSLT, EBUSY, ECONNRESET, EFAULT, ENXIO, EPIPE, ESHUTDOWN, ESRCH, ETIMEDOUT

import pytest

from abi_client.building import bloom_parameter, item, text, u64
from abi_client.verbs import SECOND
from bus.fakes import Buffer, FakeMemory, FakePeer
from bus.harness import Bus, File
from kdbusfs.abi.errors import CommandError, Stalled
from kdbusfs.abi.numbers import ATTACH_ALL, AttachFlag, HelloFlag, ItemType
from kdbusfs.bus.metadata import ProcessMetadata

I = ItemType  # noqa: E741
A = "com.example.a"


class Slow(FakePeer):
    """A process that stalls when its payload or its metadata is read."""

    skip = 0
    """How many reads go well before that."""
    meanwhile: Callable[[], object] | None = None

    on_write = False
    """Whether it stalls where it is written to, instead."""

    def _read(self) -> None:
        if self.on_write:
            return
        self._stall()

    def _stall(self) -> None:
        if self.meanwhile is None:
            return
        if self.skip:
            self.skip -= 1
            return
        meanwhile, self.meanwhile = self.meanwhile, None
        meanwhile()
        raise Stalled

    def fill(self, memory: FakeMemory, offset: int, segments: list[tuple[int, int]]) -> None:  # type: ignore[override]
        self._read()
        super().fill(memory, offset, segments)

    def gather(self, metadata: ProcessMetadata, kinds: int) -> None:
        self._read()
        super().gather(metadata, kinds)

    def write(self, address: int, data: Buffer) -> None:
        if self.on_write:
            self._stall()
        super().write(address, data)


class Stage:
    """A sender that is slow, and whom it deals with."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.slow = Slow(1000)
        self.sender = bus.hello(peer=self.slow)
        self.target, self.other = bus.hello(), bus.hello()
        self.target.acquire(A)

    @contextmanager
    def stalled(self, meanwhile: Callable[[], object], skip: int = 0) -> Iterator[None]:
        """What is inside stalls, and *meanwhile* goes first. Invariants need not hold then."""
        check, self.bus.domain.check = self.bus.domain.check, lambda: None  # type: ignore[method-assign]
        self.slow.meanwhile, self.slow.skip = meanwhile, skip
        try:
            yield
        finally:
            self.bus.domain.check = check  # type: ignore[method-assign]
            assert self.slow.meanwhile is None, "nothing stalled"
        check()


@pytest.fixture
def stage(bus: Bus) -> Stage:
    return Stage(bus)


COMMANDS: dict[str, Callable[[Stage], object]] = {
    "unicast": lambda s: s.sender.send(s.target, data=b"data", cookie=5),
    "by name": lambda s: s.sender.send(A, data=b"data", cookie=5),
    "request": lambda s: s.sender.request(s.target, data=b"data", cookie=5),
    "request by name": lambda s: s.sender.request(A, data=b"data", cookie=5),
    "broadcast": lambda s: s.sender.broadcast(data=b"data", cookie=5),
    "signal": lambda s: s.sender.signal(s.target, data=b"data", cookie=5),
    "reply": lambda s: s.sender.reply(s.target, 1, data=b"data", cookie=5),
}
MEANWHILE: dict[str, Callable[[Stage], object]] = {
    "nothing": lambda s: None,
    "mail": lambda s: s.other.send(s.target, cookie=4),
    "a newcomer": lambda s: s.bus.hello(),
    "a monitor": lambda s: s.bus.monitor(),
    "time": lambda s: s.bus.domain.advance(2 * SECOND),
    "the name goes": lambda s: s.target.release(A),
    "an activator": lambda s: s.bus.activator(A),
    "the target goes": lambda s: s.target.close(),
    "the bus goes": lambda s: s.bus.file.close(),
}
OTHERWISE = {
    "the target goes": {0, ENXIO, ESRCH},
    "the bus goes": {ECONNRESET, ESHUTDOWN},
    "the name goes": {0, ESRCH},
    "time": {0, EBADSLT},
    # The payload is kept then, and not read in the way that is slow here.
    "an activator": {0},
}
"""How a command may end that others made impossible."""


def errno_of(do: Callable[[], object]) -> int:
    try:
        do()
    except CommandError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_command_that_stalled_starts_anew(stage: Stage, what: str, meanwhile: str) -> None:
    stage.target.match()
    stage.target.request(stage.sender, cookie=1)
    with stage.stalled(lambda: MEANWHILE[meanwhile](stage)):
        errno = errno_of(lambda: COMMANDS[what](stage))
    assert errno in OTHERWISE.get(meanwhile, {0})
    if stage.target.connection.alive:
        got = [m.data for m in stage.target.inbox() if m.cookie == 5]
        assert got == ([] if errno else [b"data"])
        assert stage.sender.connection.n_requests == (what.startswith("request") and not errno)


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_what_stalls_again_and_again_is_a_fault_without_a_trace(
    stage: Stage, what: str, meanwhile: str
) -> None:
    stage.target.match()
    stage.target.request(stage.sender, cookie=1)

    def again() -> None:
        MEANWHILE[meanwhile](stage)
        stage.slow.meanwhile = lambda: None

    with stage.stalled(again):
        errno = errno_of(lambda: COMMANDS[what](stage))
        stage.slow.meanwhile = None
    assert errno in {EFAULT, *OTHERWISE.get(meanwhile, ())}
    if stage.target.connection.alive and errno:
        assert 5 not in [m.cookie for m in stage.target.inbox()]
        assert stage.sender.connection.n_requests == 0


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_call_that_stalled_starts_anew(stage: Stage, meanwhile: str) -> None:
    stage.target.update(item(I.ATTACH_FLAGS_RECV, u64(AttachFlag.CREDS)))
    with stage.stalled(lambda: MEANWHILE[meanwhile](stage)):
        waiting = stage.sender.call(A, cookie=5)
    if waiting.waiting:
        assert [m.cookie for m in stage.target.inbox()].count(5) + (meanwhile == "an activator")
        assert stage.sender.connection.n_requests == 1
        stage.bus.domain.advance(9 * SECOND)
        assert waiting.error == ETIMEDOUT
    else:
        expected = {"time": ETIMEDOUT, "the bus goes": ECONNRESET}
        assert waiting.error == expected.get(meanwhile, ESRCH)
    assert stage.sender.connection.n_requests == 0


@pytest.mark.parametrize("sync", [False, True])
def test_a_reply_that_stalled_finds_its_request_again(stage: Stage, sync: bool) -> None:
    if sync:
        waiting = stage.target.call(stage.sender, cookie=1)
    else:
        stage.target.request(stage.sender, cookie=1)
    with stage.stalled(lambda: None):
        stage.sender.reply(stage.target, 1, data=b"answer")
    got = waiting.reply if sync else stage.target.recv()
    assert got.data == b"answer"


@pytest.mark.parametrize(
    ("meanwhile", "ends"),
    [("time", ETIMEDOUT), ("the target goes", ECONNRESET), ("the bus goes", EPIPE)],
)
def test_a_reply_comes_too_late_for_a_call_that_ended_meanwhile(
    stage: Stage, meanwhile: str, ends: int
) -> None:
    waiting = stage.target.call(stage.sender, cookie=1)
    with stage.stalled(lambda: MEANWHILE[meanwhile](stage)):
        errno = errno_of(lambda: stage.sender.reply(stage.target, 1, data=b"answer"))
    assert waiting.error == ends
    assert errno in (EBADSLT, ENXIO, ECONNRESET)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("skip", [0, 1, 2, 3])
@pytest.mark.parametrize("what", COMMANDS)
def test_all_get_a_message_that_stalled_once_or_nobody_does(
    stage: Stage, what: str, meanwhile: str, skip: int
) -> None:
    if skip == 3 and what != "broadcast":
        return
    monitors = [stage.bus.monitor() for _ in range(2)]
    everybody = [*monitors, stage.target]
    if what == "broadcast":
        everybody.append(stage.other)
        stage.other.match()
    stage.target.match()
    stage.target.request(stage.sender, cookie=1)
    with stage.stalled(lambda: MEANWHILE[meanwhile](stage), skip=skip):
        errno = errno_of(lambda: COMMANDS[what](stage))
    assert errno in OTHERWISE.get(meanwhile, {0})
    for client in everybody:
        if client.connection.alive:
            assert not client.connection.lost
            seen = [m.cookie for m in client.inbox() if m.src_id == stage.sender.id]
            assert seen.count(5) == (not errno)


@pytest.mark.parametrize(
    ("meanwhile", "errno"), [("nothing", 0), ("a newcomer", 0), ("the bus goes", ESHUTDOWN)]
)
def test_a_hello_that_stalled_starts_anew(stage: Stage, meanwhile: str, errno: int) -> None:
    file = stage.bus.open(peer=stage.slow)
    with stage.stalled(lambda: MEANWHILE[meanwhile](stage)):
        assert errno_of(file.hello) == errno
    assert file.hung_up == bool(errno)


SETUPS: dict[str, tuple[Callable[[Stage], File], Callable[[File], object]]] = {
    "HELLO": (lambda s: s.bus.open(peer=s.slow), lambda file: file.hello()),
    "BUS_MAKE": (
        lambda s: File(s.bus.domain, "control", s.slow),
        lambda file: file.bus_make(text(I.MAKE_NAME, "1000-new"), bloom_parameter()),
    ),
    "ENDPOINT_MAKE": (
        lambda s: s.bus.open(peer=s.slow),
        lambda file: file.endpoint_make(text(I.MAKE_NAME, "1000-new")),
    ),
}


@pytest.mark.parametrize("what", SETUPS)
def test_a_file_that_is_being_set_up_takes_no_other_setup_and_is_seen_by_nobody(
    stage: Stage, what: str
) -> None:
    opened, do = SETUPS[what]
    file, fast = opened(stage), FakePeer(1000)
    watcher = stage.bus.hello()
    watcher.match()
    before = stage.bus.domain.paths()
    seen: list[object] = []

    def meanwhile() -> None:
        slow, file.peer = file.peer, fast
        for _, other in SETUPS.values():
            seen.append(errno_of(lambda o=other: o(file)))  # type: ignore[misc]
        file.peer = slow
        assert stage.bus.domain.paths() == before
        assert watcher.notifications() == []

    stage.slow.on_write = True
    with stage.stalled(meanwhile):
        do(file)
    assert seen == [EBUSY] * 3
    assert file.handle.state.name in ("CONNECTION", "BUS_OWNER", "ENDPOINT_OWNER")
    assert (stage.bus.domain.paths() != before) == (what != "HELLO")
    assert len(watcher.notifications()) == (what == "HELLO")


def test_a_hello_that_stalled_has_given_its_pool_back_before_the_next(stage: Stage) -> None:
    made: list[FakeMemory] = []

    def new_memory(size: int) -> FakeMemory:
        assert all(memory.closed for memory in made)
        made.append(FakeMemory(size))
        return made[-1]

    file = File(stage.bus.domain, f"{stage.bus.name}/bus", stage.slow, new_memory)
    stage.slow.on_write = True
    with stage.stalled(lambda: None):
        file.hello()
    assert [memory.closed for memory in made] == [True, False]
    assert stage.bus.domain.core.user(1000).n_connections == 4


def test_a_file_that_is_closed_while_it_is_being_set_up_leaves_nothing(stage: Stage) -> None:
    file = stage.bus.open(peer=stage.slow)
    stage.slow.on_write = True
    with stage.stalled(file.close), pytest.raises(CommandError):
        file.hello()
    assert stage.bus.domain.core.user(1000).n_connections == 3


def test_metadata_is_gathered_anew(stage: Stage) -> None:
    curious = stage.bus.hello(recv=ATTACH_ALL, flags=HelloFlag.ACCEPT_FD)

    def change() -> None:
        stage.slow.metadata.tid_comm = b"changed"

    with stage.stalled(change):
        stage.sender.send(curious)
    (got,) = curious.inbox()
    assert got.one(I.TID_COMM) == b"changed\0"
