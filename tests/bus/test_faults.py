# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every call that the bus makes to the world around it fails, one after the other, in every way,
in every shape of every command.

A command that is ended by such an exception leaves everything as it was, and the same command then
does what it would have done. What can't be undone (the end of a connection, a deadline) goes on
to its end. In any case all invariants hold.
"""

from collections.abc import Callable, Iterator
from errno import EAGAIN, EBUSY, ECOMM, EEXIST, ENXIO
from itertools import count
from typing import Any

import pytest

from abi_client.building import (
    NEGOTIATE,
    access,
    bloom,
    bloom_parameter,
    command,
    fds,
    item,
    mask,
    memfd,
    name,
    send_command,
    text,
    u64,
    vec,
)
from abi_client.verbs import SECOND
from bus.fakes import FakeFile, FakeMemory, FakePeer
from bus.faults import KINDS, Faults, snapshot
from bus.harness import Client, FakeDomain, File, Pending
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import (
    ATTACH_ALL,
    Command,
    ExtensionCommand,
    HelloFlag,
    ItemType,
    MatchFlag,
    NameFlag,
    PolicyAccess,
    PolicyType,
    RecvFlag,
)
from kdbusfs.bus.call import Call
from kdbusfs.bus.metadata import PidNamespace

I = ItemType  # noqa: E741
POOL = 1 << 15
WORLD_OWNS = access(PolicyType.WORLD, PolicyAccess.OWN)
FAULTS = Faults()


@pytest.fixture(autouse=True, scope="module")
def points() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        FAULTS.install(patch)
        yield


class Faulty:
    """In the place of a handle: each command fails at one point after the other, and then is
    carried out."""

    def __init__(self, world: "World", handle: Any, kind: str) -> None:
        self._world = world
        self._handle = handle
        self._kind = kind
        self.used = False

    def __getattr__(self, what: str) -> Any:
        return getattr(self._handle, what)

    def execute(self, call: Call, inline: bytes) -> int:
        assert not self.used, "one command at a time"
        self.used = True
        complete = call.complete
        pending: Pending = complete.__self__  # type: ignore[union-attr]
        before = self._world.state()
        for at in count():
            attempt = Call(call.code, call.spec, call.peer, call.address, complete)
            pending.call = attempt
            with FAULTS.armed(self._kind, at):
                try:
                    return self._handle.execute(attempt, inline)  # type: ignore[no-any-return]
                except BaseException as error:
                    if error is not FAULTS.raised:
                        raise
            assert not pending.completed
            assert self._world.state() == before, f"{FAULTS.where} left a trace"
            self._world.domain.check()
        raise AssertionError


class World:
    """A bus with a bit of everything, and things under way."""

    def __init__(self) -> None:
        domain = self.domain = FakeDomain()
        check, domain.check = domain.check, lambda: None  # type: ignore[method-assign]
        self.reported: list[BaseException] = []
        self.file: File
        """The one that the scene is about."""
        domain.core.report = self.reported.append
        bus = self.bus = domain.make_bus()
        bus.holder("d.*", WORLD_OWNS, pool_size=POOL)
        self.endpoint = bus.endpoint(
            "1000-custom", name("a.a"), WORLD_OWNS, name("d.e"), WORLD_OWNS
        )
        everything = {"recv": ATTACH_ALL, "flags": HelloFlag.ACCEPT_FD, "pool_size": POOL}
        peer = self.peer = FakePeer(1000)
        self.pipe = peer.open(FakeFile())
        self.memfd = peer.open(FakeFile(size=100))
        self.cancel = peer.open(FakeFile())
        self.ready = peer.open(FakeFile(readable=True))
        self.channel = peer.open(FakeFile(own_channel=True))
        self.sender = bus.hello(peer=peer, **everything)
        self.target = bus.hello(**everything)
        self.other = bus.hello(**everything)
        self.inner = bus.hello(pool_size=POOL, recv=ATTACH_ALL)
        self.inner.connection.viewer = self.inner.connection.viewer._replace(
            pid_namespace=PidNamespace((1, 2))
        )
        self.watcher = bus.hello(pool_size=POOL)
        self.monitors = [bus.monitor(recv=ATTACH_ALL, pool_size=POOL) for _ in range(2)]
        self.activator = bus.activator("b.b", recv=ATTACH_ALL, pool_size=POOL, flags=1)
        self.owner = bus.hello(pool_size=POOL, flags=1)
        self.second_activator = bus.activator("c.c", pool_size=POOL, flags=1)
        self.custom = bus.hello(endpoint="1000-custom", pool_size=POOL)
        self.faker = bus.hello(item(I.CREDS, u64(*[7] * 8)), pool_size=POOL)
        for client in (self.owner, self.second_activator, self.activator):
            client.memory.may_read = True
        self.target.acquire("a.a")
        self.target.match()
        self.other.match(mask([3]))
        self.watcher.match()
        self.inner.match(cookie=2)
        self.owner.acquire("c.c", NameFlag.ALLOW_REPLACEMENT)
        self.owner.acquire("c.d", NameFlag.ALLOW_REPLACEMENT | NameFlag.QUEUE)
        self.other.acquire("c.d", NameFlag.QUEUE)
        for client in (self.target, self.owner, self.sender):
            client.peer.open(FakeFile())
        for to in ("b.b", "c.c"):
            self.sender.send(to, fds(self.pipe), memfd(self.memfd, 8), data=b"mail", cookie=11)
            self.sender.request(to, data=b"more", cookie=12)
        self.sender.request(self.target, cookie=21)
        self.call_ = self.sender.call(
            self.target, cookie=22, command_items=(item(I.CANCEL_FD, u64(self.cancel)[:4]),)
        )
        self.target.call(self.other, cookie=23).interrupt()
        self.target.send(self.sender, cookie=31, priority=5)
        self.target.peer.open(FakeFile())
        self.target.send(self.sender, fds(0), data=b"received", cookie=32, priority=-5)
        self.target.send(self.sender, cookie=33)
        self.sender.connection.count_lost()
        domain.check = check  # type: ignore[method-assign]
        domain.check()

    @property
    def clients(self) -> list[Client]:
        return [f for f in self.domain.files if isinstance(f, Client)]

    def state(self) -> list[Any]:
        files = [file for c in self.domain.files for file in c.peer.files.values()]
        return snapshot(
            self.domain.core,
            [
                f.handle._handle if isinstance(f.handle, Faulty) else f.handle
                for f in self.domain.files
            ],
            files,
        )

    def outcome(self) -> list[Any]:
        """What everybody has got, as far as it is the same in two worlds alike."""
        found: list[Any] = [sorted(self.domain.paths())]
        for client in self.clients:
            connection = client.connection
            if not connection.alive or connection.kind == HelloFlag.POLICY_HOLDER:
                found.append(connection.kind)
                continue
            client.peer.n_files_max = 0
            mail = [(m.cookie, m.data, m.types, m.priority, m.fds) for m in client.inbox()]
            found.append((mail, connection.lost, connection.owned_names(), connection.n_requests))
            found.append([m.cookie for m in connection.matches])
        return found

    def end(self) -> None:
        self.domain.finish()
        self.domain.check()
        taken = [file for f in self.domain.files for file in f.peer.taken]
        self.domain.end()
        assert not any(file.holders for file in taken), "a file is held for ever"


def open_at(world: World, path: str = "1000-test/bus", peer: FakePeer | None = None) -> File:
    def new_memory(size: int) -> FakeMemory:
        FAULTS.hit("new_memory", may_stall=True)
        return FakeMemory(size)

    return File(world.domain, path, peer or FakePeer(1000), new_memory)


def cancelled_by(fd: int) -> tuple[bytes, ...]:
    return (item(I.CANCEL_FD, u64(fd)[:4]),)


def resume(world: World) -> Pending:
    return world.target.call(world.other, cookie=23, command_items=cancelled_by(0))


Do = Callable[[World], Any]
Scene = tuple[Callable[[World], File], Do]
"""Who makes a command, and the command; what it returns is compared, too."""


SENDERS: dict[str, Do] = {
    "to an id": lambda w: w.sender.send(w.target, data=b"data", cookie=5),
    "to an id in pieces": lambda w: w.sender.send(
        w.target, vec(0, 3), vec(w.sender.peer.put(b"x" * 99), 99), data=b"data", cookie=5
    ),
    "to a name": lambda w: w.sender.send("a.a", data=b"data", cookie=5),
    "to an inner namespace": lambda w: w.sender.send(w.inner, data=b"data", cookie=5),
    "files": lambda w: w.sender.send(
        w.target, fds(w.pipe, w.pipe), memfd(w.memfd, 16), data=b"data", cookie=5
    ),
    "files to an activator": lambda w: w.sender.send(
        "b.b", fds(w.pipe), memfd(w.memfd, 16), data=b"data", cookie=5
    ),
    "files to who takes none": lambda w: w.sender.send(w.inner, fds(w.pipe), cookie=5),
    "to nobody": lambda w: w.sender.send(99, fds(w.pipe), cookie=5),
    "a request": lambda w: w.sender.request(w.target, data=b"data", cookie=5),
    "a request to an activator": lambda w: w.sender.request("b.b", data=b"data", cookie=5),
    "a call": lambda w: w.sender.call(w.target, cookie=5).waiting,
    "a call that can be cancelled": lambda w: (
        w.sender.call(w.target, fds(w.pipe), cookie=5, command_items=cancelled_by(w.cancel)).waiting
    ),
    "a call that is cancelled": lambda w: (
        w.sender.call(w.target, cookie=5, command_items=cancelled_by(w.ready)).error
    ),
    "a broadcast": lambda w: w.sender.broadcast(
        memfd(w.memfd, 16), filter_=bloom([3]), data=b"data", cookie=5
    ),
    "a signal": lambda w: w.sender.signal(w.target, data=b"data", cookie=5),
    "a signal that is not wanted": lambda w: w.sender.signal(w.faker, data=b"data", cookie=5),
    "negotiation": lambda w: w.sender.ioctl(Command.SEND, send_command(0, flags=NEGOTIATE)),
    "by the extension": lambda w: w.sender.ioctl(
        ExtensionCommand.SEND, send_command(0, flags=NEGOTIATE)
    ),
}
OTHERS: dict[str, Scene] = {
    "a reply": (lambda w: w.target, lambda w: w.target.reply(w.sender, 21, data=b"data", cookie=5)),
    "the answer to a call": (
        lambda w: w.target,
        lambda w: (w.target.reply(w.sender, 22, fds(0), data=b"data", cookie=5), w.call_.error)[1],
    ),
    "a call resumed": (lambda w: w.target, lambda w: resume(w).waiting),
    "an answer to a call that was interrupted": (
        lambda w: w.other,
        lambda w: w.other.reply(w.target, 23, data=b"data", cookie=5),
    ),
    "from a custom endpoint": (
        lambda w: w.custom,
        lambda w: w.custom.send("a.a", data=b"data", cookie=5),
    ),
    "by a stranger": (
        lambda w: w.faker,
        lambda w: w.faker.broadcast(filter_=bloom(), data=b"data", cookie=5),
    ),
    "RECV": (lambda w: w.sender, lambda w: w.sender.recv(free=False).cookie),
    "RECV of files": (
        lambda w: w.sender,
        lambda w: w.sender.recv(RecvFlag.USE_PRIORITY, -5, free=False).cookie,
    ),
    "PEEK of files": (
        lambda w: w.sender,
        lambda w: w.sender.recv(RecvFlag.PEEK | RecvFlag.USE_PRIORITY, -5, free=False).cookie,
    ),
    "DROP of a request": (
        lambda w: w.target,
        lambda w: (w.target.recv(RecvFlag.DROP, free=False), w.call_.error)[1],
    ),
    "RECV without mail": (lambda w: w.custom, lambda w: w.custom.recv()),
    "FREE": (lambda w: w.sender, lambda w: w.sender.free(w.sender.pool_size)),
    "LIST": (
        lambda w: w.sender,
        lambda w: w.sender.ioctl(Command.LIST, command(0xF, fields=u64(0, 0))) and None,
    ),
    "LIST on a custom endpoint": (
        lambda w: w.custom,
        lambda w: w.custom.ioctl(Command.LIST, command(0xF, fields=u64(0, 0))) and None,
    ),
    "CONN_INFO of a name": (
        lambda w: w.inner,
        lambda w: w.inner.info(0, name("a.a"), free=False).types,
    ),
    "CONN_INFO of an id": (
        lambda w: w.sender,
        lambda w: w.sender.info(w.target.id, free=False).types,
    ),
    "CONN_INFO on a custom endpoint": (
        lambda w: w.custom,
        lambda w: w.custom.info(0, name("a.a"), free=False).types,
    ),
    "BUS_CREATOR_INFO": (
        lambda w: w.sender,
        lambda w: (
            w.sender.ioctl(Command.BUS_CREATOR_INFO, command(0, fields=u64(0, ATTACH_ALL, 0, 0)))
            and None
        ),
    ),
    "UPDATE": (lambda w: w.sender, lambda w: w.sender.update(item(I.ATTACH_FLAGS_RECV, u64(1)))),
    "UPDATE of a policy": (
        lambda w: w.clients[0],
        lambda w: w.clients[0].update(name("f.f"), access(PolicyType.USER, 2, 7)),
    ),
    "ENDPOINT_UPDATE": (
        lambda w: w.endpoint,
        lambda w: w.endpoint.endpoint_update(name("f.f"), access(PolicyType.USER, 2, 7)),
    ),
    "NAME_ACQUIRE": (lambda w: w.sender, lambda w: w.sender.acquire("g.g")),
    "NAME_ACQUIRE on a custom endpoint": (lambda w: w.custom, lambda w: w.custom.acquire("d.e")),
    "NAME_ACQUIRE of a taken one": (lambda w: w.sender, lambda w: w.sender.acquire("a.a")),
    "NAME_ACQUIRE from an activator": (lambda w: w.owner, lambda w: w.owner.acquire("b.b")),
    "NAME_ACQUIRE by replacement": (
        lambda w: w.sender,
        lambda w: w.sender.acquire("c.d", NameFlag.REPLACE_EXISTING),
    ),
    "NAME_RELEASE to an activator": (lambda w: w.owner, lambda w: w.owner.release("c.c")),
    "NAME_RELEASE to the next": (lambda w: w.owner, lambda w: w.owner.release("c.d")),
    "NAME_RELEASE": (lambda w: w.target, lambda w: w.target.release("a.a")),
    "MATCH_ADD": (lambda w: w.sender, lambda w: w.sender.match(mask([1, 2]), cookie=4)),
    "MATCH_ADD with REPLACE": (
        lambda w: w.target,
        lambda w: w.target.match(mask([1]), flags=MatchFlag.REPLACE),
    ),
    "MATCH_REMOVE": (lambda w: w.target, lambda w: w.target.unmatch()),
    "BYEBYE": (lambda w: w.faker, lambda w: w.faker.byebye()),
    "BYEBYE with mail": (lambda w: w.sender, lambda w: w.sender.byebye()),
    "FD_SOCKET": (
        lambda w: w.sender,
        lambda w: (
            w.sender.ioctl(ExtensionCommand.FD_SOCKET, command(fields=u64(w.channel))) and None
        ),
    ),
}
SETUPS: dict[str, Scene] = {
    "HELLO": (open_at, lambda w: w.file.hello(recv=ATTACH_ALL, pool_size=POOL) and None),
    "HELLO with a description": (
        open_at,
        lambda w: w.file.hello(text(I.CONN_DESCRIPTION, "me"), pool_size=POOL) and None,
    ),
    "HELLO on a custom endpoint": (
        lambda w: open_at(w, "1000-test/1000-custom"),
        lambda w: w.file.hello(pool_size=POOL) and None,
    ),
    "HELLO of a privileged one that fakes": (
        lambda w: open_at(w, peer=FakePeer(0).become(ipc_owner=True)),
        lambda w: (
            w.file.hello(item(I.CREDS, u64(*[7] * 8)), item(I.PIDS, u64(0, 0, 0)), pool_size=POOL)
            and None
        ),
    ),
    "HELLO of an activator": (
        open_at,
        lambda w: (
            w.file.hello(name("h.h"), WORLD_OWNS, flags=HelloFlag.ACTIVATOR, pool_size=POOL)
            and None
        ),
    ),
    "HELLO of an activator too many": (
        open_at,
        lambda w: w.file.hello(name("b.b"), flags=HelloFlag.ACTIVATOR, pool_size=POOL),
    ),
    "HELLO of a policy holder": (
        open_at,
        lambda w: (
            w.file.hello(name("h.*"), WORLD_OWNS, flags=HelloFlag.POLICY_HOLDER, pool_size=POOL)
            and None
        ),
    ),
    "HELLO of a monitor": (
        open_at,
        lambda w: w.file.hello(flags=HelloFlag.MONITOR, pool_size=POOL) and None,
    ),
    "BUS_MAKE": (
        lambda w: open_at(w, "control"),
        lambda w: w.file.bus_make(text(I.MAKE_NAME, "1000-new"), bloom_parameter()) and None,
    ),
    "ENDPOINT_MAKE": (
        open_at,
        lambda w: w.file.endpoint_make(text(I.MAKE_NAME, "1000-new")) and None,
    ),
}
SCENES: dict[str, Scene] = {
    **{f"SEND: {what}": (lambda w: w.sender, do) for what, do in SENDERS.items()},
    **{f"SEND: {what}": scene for what, scene in OTHERS.items() if what[:2].islower()},
    **{what: scene for what, scene in OTHERS.items() if not what[:2].islower()},
    **SETUPS,
}


def play(scene: Scene, kind: str | None) -> tuple[Any, World]:
    """Have the command carried out, after all the faults of this *kind*, if any."""
    world = World()
    file, do = scene
    actor = world.file = file(world)
    real = actor.handle
    if kind is not None:
        actor.handle = Faulty(world, real, kind)  # type: ignore[assignment]
    try:
        result = do(world)
    except CommandError as error:
        result = "fails", error.errno
    actor.handle = real
    world.domain.check()
    return result, world


_EXPECTED: dict[str, Any] = {}


def expected(what: str) -> Any:
    """The result of a scene in which nothing fails, and what everybody has got by it."""
    if what not in _EXPECTED:
        result, world = play(SCENES[what], None)
        _EXPECTED[what] = result, world.outcome()
        world.end()
    return _EXPECTED[what]


@pytest.mark.parametrize("what", SCENES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "command error"])
def test_a_command_that_fails_leaves_no_trace_and_succeeds_when_tried_again(
    what: str, kind: str
) -> None:
    result, world = play(SCENES[what], kind)
    if world.reported:
        # It was a notification that could not be delivered: lost to that receiver, and no more.
        assert [error for error in world.reported if error is FAULTS.raised]
    else:
        assert (result, world.outcome()) == expected(what)
    world.end()


REFUSED = {
    "SEND: files to who takes none": ECOMM,
    "SEND: to nobody": ENXIO,
    "RECV without mail": EAGAIN,
    "NAME_ACQUIRE of a taken one": EEXIST,
    "BYEBYE with mail": EBUSY,
    "HELLO of an activator too many": EEXIST,
}


@pytest.mark.parametrize("what", SCENES)
def test_commands_end_as_they_should_when_nothing_fails(what: str) -> None:
    result, _ = expected(what)
    refusal = result[1] if isinstance(result, tuple) and result[0] == "fails" else 0
    assert refusal == REFUSED.get(what, 0)


@pytest.mark.parametrize("what", SCENES)
def test_a_refusal_at_any_point_breaks_nothing(what: str) -> None:
    """A CommandError may be the end of the command, or mean that one of its receivers gets
    nothing; what it means is tested elsewhere."""
    for at in count():
        world = World()
        file, do = SCENES[what]
        actor = world.file = file(world)
        execute = actor.handle.execute
        was_hit = False

        def faulty(call: Call, inline: bytes, at: int = at, execute: Any = execute) -> int:
            nonlocal was_hit
            with FAULTS.armed("command error", at):
                try:
                    return execute(call, inline)  # type: ignore[no-any-return]
                finally:
                    was_hit = FAULTS.raised is not None

        real = actor.handle
        actor.handle = Stand(real, faulty)  # type: ignore[assignment]
        try:
            do(world)
        except CommandError:
            pass
        actor.handle = real
        world.domain.check()
        # The watch on a cancel descriptor that ends can only tell.
        assert not world.reported or FAULTS.where == "unwatch"
        world.end()
        if not was_hit:
            return


class Stand:
    """In the place of a handle, with an `execute` of its own."""

    def __init__(self, real: Any, execute: Any) -> None:
        self.real = real
        self.execute = execute

    def __getattr__(self, what: str) -> Any:
        return getattr(self.real, what)


# --- what can't be undone


def wakers(world: World) -> None:
    """All who poll are woken by something that may fail."""
    for client in world.clients:
        client.connection.waker = lambda: FAULTS.hit("wake")


def finish(world: World) -> None:
    world.domain.finish()


ENDS: dict[str, Do] = {
    "close of a sender": lambda w: w.sender.handle.close(),
    "close of a target": lambda w: w.target.handle.close(),
    "close of an owner, whose mail goes back": lambda w: w.owner.handle.close(),
    "close of an activator": lambda w: w.activator.handle.close(),
    "close of a custom endpoint": lambda w: w.endpoint.handle.close(),
    "close of the bus": lambda w: (w.bus.file.handle.close(), finish(w)),
    "deadlines": lambda w: w.domain.core.expire(),
    "an interrupt": lambda w: w.call_.call.interrupt(),
    "a cancel descriptor": lambda w: w.peer.files[w.cancel].become_readable(),
    "an answer that is handed over": lambda w: w.sender.handle.finish(w.call_.call),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stalled"])
def test_what_ends_goes_on_to_its_end(end: str, kind: str) -> None:
    for at in count():
        world = World()
        wakers(world)
        if end == "an answer that is handed over":
            complete = world.domain.finish
            world.domain.finish = lambda: None  # type: ignore[method-assign]
            world.target.reply(world.sender, 22, fds(0), data=b"data", cookie=5)
            world.domain.finish = complete  # type: ignore[method-assign]
        if end == "deadlines":
            world.domain.clock.now += 9 * SECOND
        with FAULTS.armed(kind, at):
            try:
                ENDS[end](world)
            except BaseException as error:
                if error is not FAULTS.raised:
                    raise
        raised = FAULTS.raised
        for file in world.domain.files:
            ended = file.handle.new_memory.__name__ == "_no_memory"
            file.closed = file.closed or ended
        while world.domain.core.work:
            world.domain.core.work.proceed()
        if world.call_.call.fds is not None:
            world.call_.call.fds.release()
        world.domain.completed.clear()
        world.domain.check()
        world.end()
        if raised is None:
            return
