# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that wait are completed in one step and finished in another: what ends the wait happens in
somebody else's command, and there nothing of the caller's is touched."""

from collections.abc import Callable
from errno import ECONNRESET, EPIPE, ETIMEDOUT

import pytest

from abi_client.building import command
from abi_client.verbs import SECOND
from bus.fakes import FakePeer
from bus.harness import Bus, Client, Pending
from kdbusfs.abi.errors import CommandError, Stalled
from kdbusfs.abi.numbers import Command


class Careful(FakePeer):
    """A process that counts what is written into its memory."""

    n_writes = 0

    def write(self, address: int, data: bytes) -> None:  # type: ignore[override]
        self.n_writes += 1
        super().write(address, data)


class Scene:
    """A call that has been answered, and not been finished."""

    def __init__(self, bus: Bus) -> None:
        self.peer = Careful(1000)
        self.client, self.server = bus.hello(peer=self.peer), bus.hello()
        self.pending: Pending = self.client.call(self.server, cookie=7)
        (request,) = self.server.inbox()
        assert request.cookie == 7
        # Only the commands of this test finish nothing.
        self.finish, bus.domain.finish = bus.domain.finish, lambda: None  # type: ignore[method-assign]
        self.pool_before = bytes(self.client.memory.visible)
        self.peer.n_writes = 0

    def answer(self) -> None:
        self.server.reply(self.client, 7, data=b"answer")

    @property
    def is_completed(self) -> bool:
        return self.pending.completed and self.pending.call.wait is None


@pytest.fixture
def scene(bus: Bus) -> Scene:
    return Scene(bus)


def nothing_is_left(client: Client) -> None:
    connection = client.connection
    assert not connection.completed
    assert not connection.quota.accounts
    assert not connection.n_requests
    assert not any(s.kernel or s.user for s in connection.pool.slices())


def test_the_one_who_answers_touches_nothing_of_the_one_who_asked(scene: Scene) -> None:
    scene.answer()
    assert scene.is_completed
    assert scene.peer.n_writes == 0
    assert scene.client.memory.visible == scene.pool_before
    scene.finish()
    assert scene.pending.reply.data == b"answer"


@pytest.mark.parametrize("how", ["close", "byebye", "the bus"])
def test_a_connection_that_ends_before_its_call_is_finished_leaves_nothing(
    scene: Scene, bus: Bus, how: str
) -> None:
    scene.answer()
    if how == "byebye":
        scene.client.ioctl(Command.BYEBYE, command())
    elif how == "close":
        scene.client.handle.connection.bus.disconnect(scene.client.connection)
    else:
        bus.file.close()
        while bus.domain.core.work:
            bus.domain.core.work.proceed()
    nothing_is_left(scene.client)
    scene.finish()
    assert scene.pending.error == ECONNRESET
    assert scene.client.memory.visible == scene.pool_before


def test_a_call_whose_pool_stalls_is_finished_later(
    scene: Scene, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.answer()

    def stall(offset: int, size: int) -> None:
        raise Stalled

    with monkeypatch.context() as patch:
        patch.setattr(scene.client.memory, "publish", stall)
        for _ in range(2):
            with pytest.raises(Stalled):
                scene.client.handle.finish(scene.pending.call)
            bus.domain.check()
            assert scene.client.connection.completed
    scene.finish()
    assert scene.pending.reply.data == b"answer"
    scene.client.free(scene.pending.reply.offset)
    nothing_is_left(scene.client)


@pytest.mark.parametrize("error", [CommandError(12), OSError(24), MemoryError()])
def test_a_call_that_can_not_be_finished_is_abandoned(
    scene: Scene, bus: Bus, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    scene.answer()

    def fail(offset: int, size: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(scene.client.memory, "publish", fail)
        with pytest.raises(type(error)):
            scene.client.handle.finish(scene.pending.call)
    bus.domain.check()
    nothing_is_left(scene.client)


def test_who_can_not_be_answered_is_given_up(scene: Scene, bus: Bus) -> None:
    scene.answer()
    scene.client.handle.abandon(scene.pending.call)
    bus.domain.check()
    nothing_is_left(scene.client)


ENDS: dict[str, tuple[Callable[[Scene], object], int]] = {
    "its deadline": (lambda s: s.client.domain.advance(9 * SECOND), ETIMEDOUT),
    "the end of the other": (lambda s: s.server.close(), EPIPE),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("first", [True, False])
def test_a_call_ends_once(scene: Scene, end: str, first: bool) -> None:
    do, errno = ENDS[end]
    if first:
        scene.answer()
    do(scene)
    assert scene.is_completed
    assert scene.pending.call.error == (0 if first else errno)
    scene.finish()
    assert scene.pending.error == scene.pending.call.error
