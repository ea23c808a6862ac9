# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Python client: against a real bus, and what needs none."""

import errno
import gc
import itertools
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from kdbus._kdbus import ffi, lib

import daemons
import kdbus
from kdbus import (
    DST_ID_BROADCAST,
    AttachFlag,
    Bloom,
    Bus,
    Connection,
    HelloFlag,
    ItemType,
    ListFlag,
    Match,
    MatchFlag,
    Memfd,
    MemfdPart,
    Message,
    MsgFlag,
    NameFlag,
    Policy,
    PolicyAccess,
    Zeros,
)
from kdbus.metadata import parse_notification
from mount.processes import in_child, wait_in_ioctl

HEADER = Path(__file__).parents[2] / "libkdbus/include/linux/kdbus.h"
PATIENCE = 20.0
MIB = 1 << 20

_numbers = itertools.count()


@pytest.fixture
def bus(mount: daemons.Mount) -> Iterator[Bus]:
    name = f"{os.geteuid()}-python-{os.getpid()}-{next(_numbers)}"
    with Bus(mount.path, name, attach_flags=AttachFlag.ALL) as bus:
        yield bus


@pytest.fixture
def pair(bus: Bus) -> Iterator[tuple[Connection, Connection]]:
    with connect(bus) as a, connect(bus) as b:
        yield a, b


def connect(
    bus: Bus, *, attach_recv: AttachFlag = AttachFlag.NONE, flags: HelloFlag = HelloFlag.ACCEPT_FD
) -> Connection:
    return Connection(
        bus.path,
        flags=flags,
        attach_send=AttachFlag.ALL,
        attach_recv=attach_recv,
        pool_size=MIB,
        description="python",
    )


def open_fds() -> set[str]:
    # without the one that listdir itself needs
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


# --- without a bus ---


def test_every_number_is_the_headers() -> None:
    pattern = r"^\t(_?KDBUS_\w+)\s*= (0x\w+|\d+|1ULL << \d+)[,\s]"
    values = dict(re.findall(pattern, HEADER.read_text(), re.MULTILINE))
    families = {
        "MAKE": kdbus.MakeFlag,
        "HELLO": kdbus.HelloFlag,
        "ATTACH": kdbus.AttachFlag,
        "MSG": kdbus.MsgFlag,
        "NAME": kdbus.NameFlag,
        "LIST": kdbus.ListFlag,
        "MATCH": kdbus.MatchFlag,
        "POLICY": kdbus.PolicyAccess,
        "ITEM": kdbus.ItemType,
    }
    for prefix, family in families.items():
        for name, member in family.__members__.items():
            if name not in ("NONE", "ALL"):
                text = values[f"KDBUS_{prefix}_{name}"]
                base, _, shift = text.partition("ULL << ")
                assert int(member) == int(base, 0) << int(shift or "0"), name


def test_bloom_masks_are_in_the_filters_they_should_pass() -> None:
    bloom = Bloom(size=32, n_hash=4)
    mask, both = bloom.bits(["a"]), bloom.bits(["b", b"a"])
    assert len(mask) == 32
    assert any(mask)
    assert all(m & f == m for m, f in zip(mask, both, strict=True))
    assert bloom.bits([]) == bytes(32)
    assert bloom.bits(["a"]) != bloom.bits(["b"])


def test_a_descriptor_is_closed_once() -> None:
    read, write = (kdbus.FileDescriptor(fd) for fd in os.pipe())
    number = read.fileno()
    read.close()
    assert read.closed
    # whoever gets the number next keeps it
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == number
    read.close()
    os.fstat(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read.fileno()
    os.close(other)
    with write:
        number = write.detach()
    os.close(number)


def test_a_forgotten_descriptor_warns_and_is_closed() -> None:
    read, write = os.pipe()
    forgotten = kdbus.FileDescriptor(read)
    with pytest.warns(ResourceWarning, match="unclosed descriptor"):  # noqa: PT031
        del forgotten
        gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)
    os.close(write)


def test_errors_are_oserrors_with_a_class() -> None:
    with pytest.raises(kdbus.NoNode) as caught:
        Connection("/nonexistent/bus")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == "/nonexistent/bus"
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, kdbus.KdbusError)


@pytest.mark.parametrize("type_", ["ID_ADD", "NAME_CHANGE", "IDMAP"])
def test_a_notification_that_makes_no_sense(type_: str) -> None:
    item = ffi.new("struct kdbus_item *", {"size": 16})
    item.type = getattr(lib, f"KDBUS_ITEM_{type_}", 0x9000)
    with pytest.raises(kdbus.KdbusError) as caught:
        parse_notification(item)
    assert caught.value.errno == errno.EBADMSG


# --- with one ---


def test_hello(bus: Bus) -> None:
    with connect(bus) as a, connect(bus) as b:
        assert 0 < a.id < b.id
        assert a.bus_id == b.bus_id
        assert a.bus_id.version == 4
        assert a.bloom == Bloom(64, 8)
        assert a.pool_size == MIB
        assert a.flags == HelloFlag.ACCEPT_FD
        assert a.has_fd_socket
    with pytest.raises(ValueError, match="closed"):
        a.recv_nowait()
    a.close()
    with pytest.raises(kdbus.NameTaken):
        Bus(Path(bus.path).parents[1], Path(bus.path).parent.name)


def test_one_message(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    text = bytearray(b"foo")
    message = Message(text, Zeros(2), memoryview(b"bar"), dst_id=b.id, priority=-3)
    text[:] = b"FOO"
    assert a.send(message) == 1
    assert a.send(message) == 2
    with b.recv(PATIENCE) as received:
        assert [bytes(part) for part in received.parts] == [b"FOO", b"\0\0", b"bar"]
        assert received.payload() == b"FOO\0\0bar"
        assert received.size == 8
        assert (received.src_id, received.dst_id, received.cookie) == (a.id, b.id, 1)
        assert received.priority == -3
        assert received.payload_type == kdbus.PayloadType.DBUS
        assert received.notification is None
        assert received.dst_name is None
        assert not received.incomplete
        with pytest.raises(TypeError):
            received.parts[0][0] = 0
    with pytest.raises(ValueError, match="closed"):
        received.payload()
    b.drop()
    with pytest.raises(kdbus.NoMessage):
        b.recv_nowait()
    with pytest.raises(kdbus.TimedOut):
        b.recv(0.01)


def test_views_outlive_message_and_connection(bus: Bus) -> None:
    with connect(bus) as a, connect(bus) as b, Memfd.new(b"and here") as memfd:
        a.send(Message(b"still here", memfd, dst_id=b.id))
        with b.recv(PATIENCE) as received:
            parts = received.parts
        # the slice is not free yet, so this goes elsewhere
        a.send(Message(b"other data", dst_id=b.id))
        b.recv(PATIENCE).close()
    assert [bytes(part) for part in parts] == [b"still here", b"and here"]


def test_slices_are_freed(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    message = Message(bytes(100_000), dst_id=b.id)
    for _ in range(64):
        a.send(message)
        with b.recv(PATIENCE) as received:
            assert received.size == 100_000
    a.send(message)
    with pytest.raises(kdbus.NoRoom):
        a.send(message)


def test_peek_drop_and_priority(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    for priority, text in ((3, b"0"), (-2, b"1"), (1, b"2")):
        a.send(Message(text, dst_id=b.id, priority=priority))
    assert b.peek().payload() == b"0"
    assert b.peek(priority=0).payload() == b"1"
    with pytest.raises(kdbus.NoMessage):
        b.recv_nowait(priority=-3)
    assert b.recv_nowait(priority=2).payload() == b"1"
    b.drop()
    assert b.recv_nowait().payload() == b"2"


def test_descriptors(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    before = open_fds()
    read, write = os.pipe()
    with Memfd.new(b"0123456789") as memfd:
        assert memfd.size() == 10
        a.send(Message(b"x", MemfdPart(memfd, 2, 5), dst_id=b.id, fds=[read, write]))
    os.close(read)
    os.close(write)
    assert open_fds() == before

    peeked = b.peek()
    assert peeked.incomplete
    assert list(peeked.fds) == [None, None]
    with pytest.raises(OSError, match="Bad file descriptor"):
        peeked.take_memfd(1)

    with b.recv(PATIENCE) as received:
        assert received.payload() == b"x23456"
        reader, writer = received.fds
        assert reader is not None
        assert writer is not None
        assert not os.get_inheritable(writer.fileno())
        os.write(writer.fileno(), b"!")
        kept = reader.detach()
        part = received.take_memfd(1)
        assert (part.start, part.size) == (2, 5)
        assert isinstance(part.memfd, Memfd)
        assert os.pread(part.memfd.fileno(), 10, 0) == b"0123456789"
        assert received.payload() == b"x23456"
        with pytest.raises(kdbus.KdbusError) as caught:
            received.take_memfd(0)
        assert caught.value.errno == errno.EMEDIUMTYPE
    assert writer.closed
    assert part.memfd.closed
    with open(kept, "rb") as file:
        assert file.read() == b"!"
    assert open_fds() == before


def test_descriptors_are_refused_by_who_takes_none(bus: Bus) -> None:
    with connect(bus) as a, connect(bus, flags=HelloFlag(0)) as b:
        with pytest.raises(kdbus.KdbusError) as caught:
            a.send(Message(dst_id=b.id, fds=[0]))
        assert caught.value.errno == errno.ECOMM
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(kdbus.KdbusError) as caught:
            a.send(Message(dst_id=a.id, fds=[ours]))
        assert caught.value.errno == errno.EOPNOTSUPP


def test_metadata(bus: Bus) -> None:
    with connect(bus) as a, connect(bus, attach_recv=AttachFlag.ALL) as b:
        a.acquire_name("com.example.a")
        a.send(Message(b"x", dst_id=b.id))
        with b.recv(PATIENCE) as received:
            metadata = received.metadata
    assert metadata.creds is not None
    assert metadata.creds.euid == os.geteuid()
    assert metadata.pids == kdbus.Pids(os.getpid(), threading.get_native_id(), os.getppid())
    assert metadata.auxgroups is not None
    assert sorted(metadata.auxgroups) == sorted(os.getgroups())
    assert metadata.pid_comm == Path("/proc/self/comm").read_text().rstrip("\n")
    assert metadata.exe == os.readlink("/proc/self/exe")
    assert metadata.cmdline == Path("/proc/self/cmdline").read_text().split("\0")[0]
    assert metadata.caps is not None
    status = Path("/proc/self/status").read_text()
    for name, value in (("Prm", metadata.caps.permitted), ("Eff", metadata.caps.effective)):
        assert f"Cap{name}:\t{value:016x}\n" in status
    assert metadata.names == [kdbus.OwnedName("com.example.a", NameFlag.PRIMARY)]
    assert metadata.description == "python"
    assert metadata.timestamp is not None
    assert abs(metadata.timestamp.realtime_ns - time.time_ns()) < 60 * 10**9


def test_call_and_reply(pair: tuple[Connection, Connection]) -> None:
    a, b = pair

    def answer() -> None:
        with b.recv(PATIENCE) as request:
            assert request.flags == MsgFlag.EXPECT_REPLY
            assert request.deadline_ns > 0
            b.reply(request, Message(request.payload()[::-1]))
            with pytest.raises(kdbus.NotWaiting):
                b.reply(request, Message())

    thread = threading.Thread(target=answer)
    thread.start()
    with a.call(Message(b"foobar", dst_id=b.id), timeout=PATIENCE) as reply:
        assert reply.payload() == b"raboof"
        assert reply.cookie_reply == 1
    thread.join()

    with pytest.raises(kdbus.TimedOut):
        a.call(Message(dst_id=b.id), timeout=0.02)
    b.drop()
    ours, theirs = os.pipe()
    os.write(theirs, b"x")
    with pytest.raises(kdbus.NoReply) as caught:
        a.call(Message(dst_id=b.id), cancel=ours)
    assert caught.value.errno == errno.ECANCELED
    os.close(ours)
    os.close(theirs)
    b.drop()


def test_many_messages_at_once(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    messages = [Message(b"%d" % n, dst_id=b.id) for n in range(100)]
    a.send_many(messages)
    received: list[bytes] = []
    while len(received) < 100:
        got = b.recv_many(64, timeout=PATIENCE)
        assert 1 <= len(got) <= 64
        received += [bytes(message.payload()) for message in got]
    assert received == [b"%d" % n for n in range(100)]
    with pytest.raises(kdbus.TimedOut):
        b.recv_many(1, timeout=0.01)
    messages[3] = Message(b"?", dst_id=1 << 40)
    with pytest.raises(kdbus.NoDestination) as caught:
        a.send_many(messages)
    assert caught.value.n_sent == 3
    assert len(b.recv_many(64)) == 3


def test_a_service_answers_and_waits_in_one_call(pair: tuple[Connection, Connection]) -> None:
    a, b = pair

    def serve() -> None:
        request = b.recv()
        while bytes(request.payload()) != b"end":
            reply = Message(bytes(request.payload()).upper())
            request = b.reply_recv(request, reply)

    thread = threading.Thread(target=serve)
    thread.start()
    for n in range(50):
        reply = a.call(Message(b"ping%d" % n, dst_id=b.id), timeout=PATIENCE)
        assert bytes(reply.payload()) == b"PING%d" % n
    a.send(Message(b"end", dst_id=b.id))
    thread.join(PATIENCE)
    assert not thread.is_alive()
    a.send(Message(b"no request", dst_id=b.id))
    message = b.recv()
    with pytest.raises(kdbus.NotWaiting):
        b.reply_recv(message, Message(b"!"))


def test_byebye_wakes_who_waits_for_a_message(pair: tuple[Connection, Connection]) -> None:
    a, _ = pair
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            a.recv()
        except kdbus.Disconnected as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_in_ioctl(os.getpid(), thread.native_id)
    a.byebye()
    thread.join(PATIENCE)
    assert raised


def test_a_request_that_nobody_waits_for(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    cookie = a.send(Message(b"1", dst_id=b.id), timeout=PATIENCE)
    b.reply(b.recv(PATIENCE), Message(b"2"))
    reply = a.recv(PATIENCE)
    assert (reply.cookie_reply, reply.payload()) == (cookie, b"2")

    cookie = a.send(Message(b"1", dst_id=b.id), timeout=0.01)
    failed = a.recv(PATIENCE)
    assert failed.cookie_reply == cookie
    assert failed.notification == kdbus.ReplyFailure(ItemType.REPLY_TIMEOUT)
    b.drop()
    cookie = a.send(Message(b"1", dst_id=b.id), timeout=PATIENCE)
    b.drop()
    failed = a.recv(PATIENCE)
    assert failed.cookie_reply == cookie
    assert failed.notification == kdbus.ReplyFailure(ItemType.REPLY_DEAD)


def test_a_signal_handler_runs_and_the_call_goes_on(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    handled = threading.Event()
    main = threading.get_ident()

    def answer() -> None:
        b.wait(PATIENCE)
        signal.pthread_kill(main, signal.SIGUSR1)
        assert handled.wait(PATIENCE)
        b.reply(b.recv_nowait(), Message(b"late"))

    previous = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    thread = threading.Thread(target=answer)
    try:
        thread.start()
        assert a.call(Message(dst_id=b.id), timeout=PATIENCE).payload() == b"late"
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, previous)
    with pytest.raises(kdbus.NoMessage):
        b.recv_nowait()


def test_a_signal_handler_may_end_the_wait(bus: Bus) -> None:
    class Enough(Exception):
        pass

    def handler(*_: object) -> None:
        raise Enough

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with connect(bus) as a:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Enough):
                a.recv(PATIENCE)
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_closing_wakes_who_waits_in_a_call(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    failures: list[BaseException] = []

    def call() -> None:
        try:
            a.call(Message(dst_id=b.id), timeout=PATIENCE)
        except OSError as failure:
            failures.append(failure)

    thread = threading.Thread(target=call)
    thread.start()
    b.wait(PATIENCE)
    a.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [type(failure) for failure in failures] == [kdbus.Disconnected]
    with pytest.raises(kdbus.NoDestination):
        b.send(Message(dst_id=a.id))


def test_names(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    name = "com.example.name"
    assert a.acquire_name(name) == NameFlag.PRIMARY | NameFlag.ACQUIRED
    with pytest.raises(kdbus.NameTaken):
        b.acquire_name(name)
    assert NameFlag.IN_QUEUE in b.acquire_name(name, NameFlag.QUEUE)
    records = a.list(ListFlag.NAMES | ListFlag.QUEUED)
    assert {(r.id, r.metadata.names[0].name) for r in records} == {(a.id, name), (b.id, name)}
    assert {r.id for r in a.list(ListFlag.UNIQUE)} == {a.id, b.id}

    b.send(Message(b"x", dst_name=name))
    received = a.recv(PATIENCE)
    assert (received.dst_id, received.dst_name) == (kdbus.DST_ID_NAME, name)
    with pytest.raises(kdbus.NoDestination) as caught:
        b.send(Message(dst_name=name, dst_id=b.id))
    assert caught.value.errno == errno.EREMCHG
    a.release_name(name)
    b.release_name(name)
    with pytest.raises(kdbus.NoDestination) as caught:
        b.send(Message(dst_name=name))
    assert caught.value.errno == errno.ESRCH


def test_info(pair: tuple[Connection, Connection], bus: Bus) -> None:
    a, b = pair
    b.acquire_name("com.example.b")
    by_id, by_name = a.info(b.id), a.info(name="com.example.b")
    assert by_id == by_name
    assert (by_id.id, by_id.flags) == (b.id, HelloFlag.ACCEPT_FD)
    assert by_id.metadata.description == "python"
    assert [owned.name for owned in by_id.metadata.names] == ["com.example.b"]
    with pytest.raises(kdbus.NoDestination):
        a.info(1 << 40)
    creator = a.creator_info()
    assert creator.metadata.bus_name == Path(bus.path).parent.name
    assert creator.metadata.creds is not None
    assert creator.metadata.creds.uid == os.getuid()


def test_signals_pass_by_bloom_mask(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    b.add_match(Match().bloom_mask(b.bloom.bits(["wanted"])).src_id(a.id), cookie=5)
    for topics in (["other"], ["wanted", "more"]):
        filter_ = a.bloom.bits(topics)
        a.send(Message(topics[0].encode(), dst_id=DST_ID_BROADCAST, bloom_filter=filter_))
    received = b.recv(PATIENCE)
    assert received.payload() == b"wanted"
    assert received.flags == MsgFlag.SIGNAL
    with pytest.raises(kdbus.NoMessage):
        b.recv_nowait()
    b.remove_matches(5)
    with pytest.raises(kdbus.NotWaiting):
        b.remove_matches(5)


def test_notifications(bus: Bus) -> None:
    with connect(bus) as a, connect(bus) as b:
        b.add_match(Match().id_change(ItemType.ID_ADD), cookie=1)
        b.add_match(Match().name_change(ItemType.NAME_ADD, "com.example.n"), cookie=1)
        with connect(bus) as c:
            added = b.recv_nowait()
            assert added.src_id == kdbus.SRC_ID_KERNEL
            assert added.notification == kdbus.IdChange(ItemType.ID_ADD, c.id, HelloFlag.ACCEPT_FD)
            assert added.metadata.timestamp is not None
        b.add_match(Match().name_change(ItemType.NAME_REMOVE), cookie=1, flags=MatchFlag.REPLACE)
        a.acquire_name("com.example.n")
        a.release_name("com.example.n")
        assert b.recv_nowait().notification == kdbus.NameChange(
            ItemType.NAME_REMOVE, "com.example.n", a.id, NameFlag.PRIMARY, 0, NameFlag(0)
        )
        with pytest.raises(kdbus.NoMessage):
            b.recv_nowait()


def test_lost_messages_are_counted(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    b.add_match()
    message = Message(dst_id=DST_ID_BROADCAST, bloom_filter=bytes(64))
    for _ in range(260):
        a.send(message)
    for _ in range(256):
        b.recv_nowait().close()
    with pytest.raises(kdbus.NoMessage):
        b.recv_nowait()
    assert b.take_lost() == 4
    assert b.take_lost() == 0


def test_activator_monitor_and_holder(bus: Bus) -> None:
    policy = Policy().name("com.example.*").world(PolicyAccess.TALK)
    with (
        Connection(bus.path, flags=HelloFlag.ACTIVATOR, name="com.example.a") as activator,
        Connection(bus.path, flags=HelloFlag.MONITOR) as monitor,
        Connection(bus.path, flags=HelloFlag.POLICY_HOLDER, policy=policy) as holder,
        connect(bus) as a,
    ):
        a.send(Message(b"start", dst_name="com.example.a"))
        assert activator.peek().payload() == b"start"
        watched = [monitor.recv_nowait() for _ in range(3)]
        assert [message.notification for message in watched] == [
            kdbus.IdChange(ItemType.ID_ADD, holder.id, HelloFlag.POLICY_HOLDER),
            kdbus.IdChange(ItemType.ID_ADD, a.id, HelloFlag.ACCEPT_FD),
            None,
        ]
        assert watched[-1].payload() == b"start"
        with pytest.raises(kdbus.NoDestination) as caught:
            a.send(Message(dst_name="com.example.a", flags=MsgFlag.NO_AUTO_START))
        assert caught.value.errno == errno.EADDRNOTAVAIL
        holder.update(policy=Policy().name("com.example.x"))
        with pytest.raises(kdbus.NameTaken):
            Connection(bus.path, flags=HelloFlag.POLICY_HOLDER, name="com.example.x")


def test_endpoint(bus: Bus) -> None:
    with (
        kdbus.Endpoint(bus.path, f"{os.geteuid()}-custom") as endpoint,
        connect(bus) as a,
        Connection(endpoint.path) as b,
    ):
        a.acquire_name("com.example.e")
        with pytest.raises(kdbus.NotPermitted):
            b.send(Message(dst_name="com.example.e"))
        endpoint.update(Policy().name("com.example.e").user(os.geteuid(), PolicyAccess.TALK))
        b.send(Message(b"through", dst_name="com.example.e"))
        assert a.recv(PATIENCE).payload() == b"through"
        endpoint.close()
        with pytest.raises(kdbus.Disconnected):
            b.wait(PATIENCE)


def test_byebye(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    a.send(Message(dst_id=b.id))
    with pytest.raises(kdbus.KdbusError) as caught:
        b.byebye()
    assert caught.value.errno == errno.EBUSY
    b.drop()
    b.byebye()
    with pytest.raises(kdbus.Disconnected):
        b.recv(PATIENCE)


def test_a_forked_child_leaves_everything_to_its_parent(mount: daemons.Mount) -> None:
    name = f"{os.geteuid()}-python-fork"
    with Bus(mount.path, name) as bus, connect(bus) as a, connect(bus) as b:
        a.send(Message(b"kept", dst_id=b.id))
        received = b.recv(PATIENCE)
        view = received.parts[0]

        def child() -> tuple[bytes, bytes]:
            # as it leaves the with statements that it is in
            with bus, a, b, received:
                seen = received.payload(), bytes(view)
            with pytest.raises(ValueError, match="closed"):
                b.recv_nowait()
            return seen

        assert in_child(child) == (b"kept", b"kept")
        assert in_child(child) == (b"kept", b"kept")
        a.send(Message(b"next", dst_id=b.id))
        with b.recv(PATIENCE) as second:
            assert second.payload() == b"next"
        assert bytes(view) == b"kept"
        received.close()


def test_what_a_forked_child_can_not_do(bus: Bus) -> None:
    with (
        kdbus.Endpoint(bus.path, f"{os.geteuid()}-python-fork") as endpoint,
        connect(bus) as a,
        connect(bus) as b,
    ):
        a.send(Message(dst_id=b.id), timeout=PATIENCE)
        request = b.recv(PATIENCE)
        calls: dict[str, Callable[[], object]] = {
            "send": lambda: b.send(Message(dst_id=a.id)),
            "call": lambda: b.call(Message(dst_id=a.id), timeout=0),
            "reply": lambda: b.reply(request, Message()),
            "wait": lambda: b.wait(0),
            "recv": lambda: b.recv(0),
            "recv_nowait": b.recv_nowait,
            "peek": b.peek,
            "drop": b.drop,
            "take_lost": b.take_lost,
            "acquire_name": lambda: b.acquire_name("com.example.fork"),
            "release_name": lambda: b.release_name("com.example.fork"),
            "list": b.list,
            "info": lambda: b.info(a.id),
            "creator_info": b.creator_info,
            "add_match": b.add_match,
            "remove_matches": b.remove_matches,
            "update": lambda: b.update(attach_recv=AttachFlag.NONE),
            "byebye": b.byebye,
            "endpoint.update": lambda: endpoint.update(None),
        }

        def child() -> dict[str, int | None]:
            errors = {}
            for name, call in calls.items():
                with pytest.raises(ChildProcessError) as caught:
                    call()
                assert type(caught.value) is kdbus.Inherited
                errors[name] = caught.value.errno
            assert b.fileno() >= 0
            assert repr(b) == f"<Connection {b.id} on {bus.path}>"
            with connect(bus) as own:
                own.send(Message(b"mine", dst_id=b.id))
            return errors

        assert in_child(child) == dict.fromkeys(calls, errno.ECHILD)
        with b.recv(PATIENCE) as received:
            assert received.payload() == b"mine"
        b.reply(request, Message(b"done"))
        assert a.recv(PATIENCE).payload() == b"done"
        request.close()


# Python 3.12 and later say that it is dangerous. That is what is looked at here.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_closes_disturbs_no_thread_of_its_parent(
    pair: tuple[Connection, Connection],
) -> None:
    a, b = pair
    received: list[bytes] = []

    def receive() -> None:
        with b.recv(PATIENCE) as message:
            received.append(message.payload())

    thread = threading.Thread(target=receive)
    thread.start()
    daemons.wait_until(lambda: b._n_calls, "nobody receives")
    in_child(b.close)
    # a thread that is not in the child may be anywhere, also where it holds the lock
    with b._lock:
        in_child(b.close)
    a.send(Message(b"heard", dst_id=b.id))
    thread.join(PATIENCE)
    assert received == [b"heard"]


def test_what_is_gone_with_its_daemon(tmp_path: Path) -> None:
    """ECONNABORTED for the call that it was in, ENOTCONN for all that come later."""
    failures: list[OSError] = []

    def failure(function: Callable[[], object]) -> None:
        try:
            function()
        except OSError as raised:
            failures.append(raised)

    with daemons.running(tmp_path, "cache") as mount:
        bus = Bus(mount.path, f"{os.geteuid()}-gone")
        a, b = connect(bus), connect(bus)
        endpoint = kdbus.Endpoint(bus.path, f"{os.geteuid()}-gone")
        inside = [
            threading.Thread(target=failure, args=(function,))
            for function in (lambda: a.call(Message(dst_id=b.id)), lambda: a.recv(PATIENCE))
        ]
        for thread in inside:
            thread.start()
        b.wait(PATIENCE)
        daemons.wait_until(lambda: a._n_calls == 2, "nobody receives")
        mount.end()
        for thread in inside:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert {raised.errno for raised in failures} >= {errno.ECONNABORTED}
        calls: list[Callable[[], object]] = [
            lambda: a.send(Message(dst_id=b.id)),
            a.recv_nowait,
            lambda: a.recv(PATIENCE),
            lambda: a.wait(PATIENCE),
            a.peek,
            a.drop,
            a.list,
            a.byebye,
            lambda: endpoint.update(None),
        ]
        for call in calls:
            failure(call)
        assert [type(raised) for raised in failures] == [kdbus.Disconnected] * (2 + len(calls))
        assert errno.ENOTCONN in {raised.errno for raised in failures}
        for node in (a, b, endpoint, bus):
            node.close()


def test_a_bus_that_ends_takes_all_with_it(bus: Bus) -> None:
    with connect(bus) as conn, kdbus.Endpoint(bus.path, f"{os.geteuid()}-orphan") as endpoint:
        bus.close()
        with pytest.raises(kdbus.Disconnected) as caught:
            conn.list()
        assert caught.value.errno == errno.ECONNRESET
        with pytest.raises(kdbus.Disconnected) as caught:
            endpoint.update(None)
        assert caught.value.errno == errno.ESHUTDOWN


def test_the_bus_ends_when_it_is_closed(mount: daemons.Mount) -> None:
    with Bus(mount.path, f"{os.geteuid()}-python-end") as bus:
        conn = connect(bus)
    assert not os.path.exists(bus.path)
    with conn, pytest.raises(kdbus.Disconnected):
        conn.recv(PATIENCE)
    with pytest.raises(kdbus.NoNode):
        connect(bus)


def test_select(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    assert select.select([b], [], [], 0) == ([], [], [])
    a.send(Message(dst_id=b.id))
    assert select.select([b], [], [], PATIENCE) == ([b], [], [])


def test_trio(pair: tuple[Connection, Connection]) -> None:
    a, b = pair

    async def receive() -> bytes:
        while True:
            try:
                with b.recv_nowait() as message:
                    return message.payload()
            except kdbus.NoMessage:
                await trio.lowlevel.wait_readable(b)

    async def main() -> None:
        received: list[bytes] = []

        async def receiver() -> None:
            received.append(await receive())

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver)
                await trio.testing.wait_all_tasks_blocked()
                assert received == []
                a.send(Message(b"woken", dst_id=b.id))
        assert received == [b"woken"]

    trio.run(main)


def test_many_threads_on_one_connection(bus: Bus) -> None:
    before = open_fds()
    seen: list[int] = []
    lock = threading.Lock()
    n_senders, n_messages = 3, 60

    with connect(bus) as conn:

        def send(first: int) -> None:
            for number in range(first, first + n_messages):
                data = number.to_bytes(4, "little")
                with Memfd.new(data) as memfd:
                    message = Message(data, memfd, dst_id=conn.id, fds=[memfd])
                    while True:
                        try:
                            conn.send(message)
                            break
                        except kdbus.KdbusError as full:
                            # 16 descriptors at a time
                            if full.errno != errno.EMFILE:
                                raise

        def receive() -> None:
            while len(seen) < n_senders * n_messages:
                try:
                    with conn.recv(0.01) as message:
                        data, again = (bytes(part) for part in message.parts)
                        (fd,) = message.fds
                        assert fd is not None
                        assert data == again == os.pread(fd.fileno(), 4, 0)
                        with lock:
                            seen.append(int.from_bytes(data, "little"))
                except kdbus.TimedOut:
                    pass

        threads = [
            threading.Thread(target=send, args=(i * n_messages,)) for i in range(n_senders)
        ] + [threading.Thread(target=receive) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(seen) == list(range(n_senders * n_messages))
    assert open_fds() == before
