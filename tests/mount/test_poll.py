# SPDX-License-Identifier: LGPL-2.1-or-later
"""poll(2), select(2) and epoll(7) on handles of every kind."""

import errno
import select
import socket
from collections.abc import Callable

import pytest

import daemons
from kdbusfs.abi.items import build, build_string
from kdbusfs.abi.numbers import Command, HelloFlag, ItemType, MsgFlag, NameFlag
from kdbusfs.abi.structs import U64x2
from mount.processes import Child
from mount.raw import PAGE, Bus, Connection, File, fails, poll, succeeds

pytestmark = pytest.mark.one_pool

IDLE = select.POLLOUT | select.POLLWRNORM
READABLE = IDLE | select.POLLIN | select.POLLRDNORM
DEAD = select.POLLERR | select.POLLHUP
ANY_ID = (1 << 64) - 1


def test_unbound_and_owner_handles_hang_up(mount: daemons.Mount, bus: Bus) -> None:
    with File(mount.path / "control") as control, File(bus.path) as endpoint:
        assert [poll(file) for file in (control, endpoint, bus)] == [DEAD] * 3
        item = build_string(ItemType.MAKE_NAME, b"0-custom")
        endpoint.command(Command.ENDPOINT_MAKE, items=item)
        assert poll(endpoint) == DEAD


def test_a_queue_is_what_makes_readable(bus: Bus) -> None:
    with bus.connect() as conn:
        assert poll(conn) == IDLE
        conn.send(conn.id, b"1")
        conn.send(conn.id, b"2")
        assert poll(conn) == READABLE
        conn.recv()
        assert poll(conn) == READABLE
        conn.recv()
        assert poll(conn) == IDLE


def test_lost_messages_alone_make_readable(bus: Bus) -> None:
    with bus.connect(pool_size=PAGE) as conn, bus.connect() as sender:
        conn.match()
        sender.broadcast(bytes(8000))
        assert poll(conn) == READABLE
        with fails(errno.EAGAIN):
            conn.recv()
        assert poll(conn) == IDLE


def test_a_disconnected_one_hangs_up(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.byebye()
        assert poll(conn) == DEAD


def test_a_dead_bus_hangs_up_and_is_not_readable(mount: daemons.Mount) -> None:
    with Bus(mount.path) as bus:
        conn, unbound = bus.connect(), File(bus.path)
        conn.send(conn.id, b"unread")
        bus.close()
        assert poll(conn) == poll(unbound) == DEAD
        conn.close()
        unbound.close()


@pytest.mark.parametrize("flags", [HelloFlag.ACTIVATOR, HelloFlag.POLICY_HOLDER, HelloFlag.MONITOR])
def test_special_connections_poll_like_any_other(bus: Bus, flags: int) -> None:
    named = flags != HelloFlag.MONITOR
    items = build_string(ItemType.NAME, b"com.example.special") if named else b""
    with bus.connect() as sender, bus.connect(flags=flags, items=items) as conn:
        assert poll(conn) == IDLE
        if flags == HelloFlag.ACTIVATOR:
            sender.send(0, b"x", name="com.example.special")
        elif flags == HelloFlag.MONITOR:
            sender.send(sender.id, b"x")
        else:
            return
        assert poll(conn) == READABLE


# --- waking up


def wakes(bus: Bus, conn: Connection, event: Callable[[], object], expected: int) -> None:
    """Somebody who sleeps in poll(2) on *conn* is woken by *event*."""

    def sleep(test: socket.socket) -> int:
        conn.close_others(bus.root)
        test.send(b"ready")
        poller = select.poll()
        poller.register(conn, select.POLLIN)
        found = dict(poller.poll(daemons.DEADLINE_SECONDS * 1000))
        return found.get(conn.fd, 0)

    with Child(sleep) as child:
        child.hear()
        daemons.wait_until(lambda: _in_poll(child.pid), "the child does not poll")
        event()
        assert child.result() & ~IDLE == expected


def _in_poll(pid: int) -> bool:
    with open(f"/proc/{pid}/wchan") as file:
        return "poll" in file.read()


def test_a_message_wakes(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as sender:
        wakes(bus, conn, lambda: sender.send(conn.id, b"x"), select.POLLIN)


def test_a_lost_message_wakes(bus: Bus) -> None:
    with bus.connect(pool_size=PAGE) as conn, bus.connect() as sender:
        conn.match()
        wakes(bus, conn, lambda: sender.broadcast(bytes(8000)), select.POLLIN)


def test_a_notification_wakes(bus: Bus) -> None:
    with bus.connect() as conn:
        conn.match(build(ItemType.ID_ADD, U64x2.pack(ANY_ID, 0)))
        made = []
        wakes(bus, conn, lambda: made.append(bus.connect()), select.POLLIN)
        made[0].close()


def test_the_timeout_of_a_request_wakes(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as target:
        wakes(bus, conn, lambda: conn.request(target.id, timeout=0.05), select.POLLIN)
        (timeout,) = conn.inbox()
        assert timeout.types[0] == ItemType.REPLY_TIMEOUT


def test_the_death_of_whom_was_asked_wakes(bus: Bus) -> None:
    with bus.connect() as conn:
        target = bus.connect()
        conn.request(target.id)
        wakes(bus, conn, target.close, select.POLLIN)
        (dead,) = conn.inbox()
        assert dead.types[0] == ItemType.REPLY_DEAD


def test_migrated_messages_wake(bus: Bus) -> None:
    items = build_string(ItemType.NAME, b"com.example.activated")
    with bus.connect(flags=HelloFlag.ACTIVATOR, items=items), bus.connect() as service:
        service.send(0, b"x", name="com.example.activated")

        def acquire() -> None:
            assert service.acquire("com.example.activated") & NameFlag.ACQUIRED

        wakes(bus, service, acquire, select.POLLIN)


def test_messages_that_go_back_to_the_activator_wake_it(bus: Bus) -> None:
    items = build_string(ItemType.NAME, b"com.example.activated")
    with (
        bus.connect(flags=HelloFlag.ACTIVATOR, items=items) as activator,
        bus.connect() as service,
    ):
        service.acquire("com.example.activated")
        service.send(0, b"x", name="com.example.activated")
        wakes(bus, activator, service.close, select.POLLIN)


def test_byebye_wakes_with_a_hang_up(bus: Bus) -> None:
    with bus.connect() as conn:
        wakes(bus, conn, conn.byebye, DEAD)


def test_the_end_of_the_bus_wakes_with_a_hang_up(mount: daemons.Mount) -> None:
    with Bus(mount.path) as bus, bus.connect() as conn:
        wakes(bus, conn, bus.close, DEAD)


def test_select_says_the_same(mount: daemons.Mount) -> None:
    with Bus(mount.path) as bus, bus.connect() as conn:
        assert select.select([conn], [conn], [conn], 0) == ([], [conn], [])
        conn.send(conn.id, b"x")
        assert select.select([conn], [], [conn], 5) == ([conn], [], [])
        conn.recv()
        bus.close()
        assert select.select([conn], [], [], 5)[0] == [conn]


def test_level_triggered_epoll_repeats_itself(bus: Bus) -> None:
    with bus.connect() as conn, select.epoll() as epoll:
        epoll.register(conn, select.EPOLLIN)
        assert epoll.poll(0) == []
        for n in range(1, 4):
            conn.send(conn.id, b"x")
            assert epoll.poll(5) == epoll.poll(5) == [(conn.fd, select.EPOLLIN)], n
        for _ in range(3):
            assert epoll.poll(5) == [(conn.fd, select.EPOLLIN)]
            conn.recv()
        assert epoll.poll(0) == []


def test_edge_triggered_epoll_reports_each_arrival_once(bus: Bus) -> None:
    with bus.connect() as conn, select.epoll() as epoll:
        epoll.register(conn, select.EPOLLIN | select.EPOLLET)
        assert epoll.poll(0) == []
        for _ in range(5):
            conn.send(conn.id, b"x")
            assert epoll.poll(5) == [(conn.fd, select.EPOLLIN)]
            assert epoll.poll(0) == []
        # Nothing was received meanwhile: it is the arrival that counts.
        assert len(conn.inbox()) == 5


def test_edge_triggered_epoll_loses_no_wake_up(bus: Bus) -> None:
    count = 300

    def receive(test: socket.socket) -> int:
        with bus.connect() as conn, select.epoll() as epoll:
            epoll.register(conn, select.EPOLLIN | select.EPOLLET)
            test.send(conn.id.to_bytes(8, "little"))
            received = 0
            while received < count:
                if not epoll.poll(daemons.DEADLINE_SECONDS):
                    break
                received += len(conn.inbox())
            return received

    with bus.connect() as sender, Child(receive) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        for n in range(count):
            while not succeeds(lambda n=n: sender.send(to, b"%d" % n), errno.ENOBUFS):
                pass
        assert child.result() == count


def test_one_shot_epoll_waits_to_be_armed_again(bus: Bus) -> None:
    with bus.connect() as conn, select.epoll() as epoll:
        events = select.EPOLLIN | select.EPOLLONESHOT
        epoll.register(conn, events)
        conn.send(conn.id, b"1")
        assert epoll.poll(5) == [(conn.fd, select.EPOLLIN)]
        assert epoll.poll(0) == []
        epoll.modify(conn, events)
        assert epoll.poll(5) == [(conn.fd, select.EPOLLIN)]


def test_many_pollers_of_one_connection_all_wake(bus: Bus) -> None:
    def sleep(test: socket.socket) -> int:
        test.send(b"ready")
        return poll(conn, daemons.DEADLINE_SECONDS)

    with bus.connect() as conn:
        children = [Child(sleep) for _ in range(4)]
        for child in children:
            child.hear()
            daemons.wait_until(lambda child=child: _in_poll(child.pid), "no poll")
        conn.send(conn.id, b"x")
        assert [child.result() for child in children] == [READABLE] * 4


def test_an_epoll_of_many_connections_names_the_right_ones(bus: Bus) -> None:
    connections = [bus.connect(pool_size=16 * PAGE) for _ in range(30)]
    with select.epoll() as epoll:
        for conn in connections:
            epoll.register(conn, select.EPOLLIN)
        assert epoll.poll(0) == []
        chosen = connections[3::7]
        for conn in chosen:
            connections[0].send(conn.id, b"x")
        found = {fd for fd, _ in epoll.poll(5)}
        assert found == {conn.fd for conn in chosen}
    for conn in connections:
        conn.close()


def test_a_closed_file_leaves_the_epoll(bus: Bus) -> None:
    with bus.connect() as conn, select.epoll() as epoll:
        gone = bus.connect()
        epoll.register(gone, select.EPOLLIN)
        gone.close()
        assert epoll.poll(0) == []
        conn.send(conn.id, b"x")
        assert conn.take().data == b"x"


def test_polls_and_messages_from_many_sides_at_once(bus: Bus) -> None:
    def chatter(test: socket.socket) -> int:
        with bus.connect() as conn:
            test.send(conn.id.to_bytes(8, "little"))
            peer = int.from_bytes(test.recv(8), "little")
            for _ in range(150):
                conn.send(peer, b"ping")
                conn.take()
            return 150

    for _ in range(2):
        a, b = Child(chatter), Child(chatter)
        ids = [child.socket.recv(8) for child in (a, b)]
        a.say(ids[1])
        b.say(ids[0])
        assert (a.result(), b.result()) == (150, 150)


def test_a_request_that_is_timed_out_long_ago_is_polled_for_at_once(bus: Bus) -> None:
    with bus.connect() as conn, bus.connect() as target:
        conn.send(target.id, flags=MsgFlag.EXPECT_REPLY, last=1, cookie=7)
        message = conn.take()
        assert (message.types[0], message.cookie_reply) == (ItemType.REPLY_TIMEOUT, 7)
