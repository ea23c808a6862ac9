# SPDX-License-Identifier: LGPL-2.1-or-later
"""One global order of messages and notifications, on every connection of the bus."""

import errno
import socket
import struct
from collections.abc import Callable

import daemons
from abi_client.received import Received
from kdbusfs.abi.numbers import AttachFlag
from kdbusfs.abi.structs import U64
from mount.processes import Child
from mount.raw import MIB, Bus, succeeds

N_SENDERS, N_RECEIVERS, N_ROUNDS = 5, 4, 60

Seen = tuple[int, int, bytes]
"""Sequence number, src_id, and what a message says."""


def said(message: Received) -> bytes:
    """The payload, or of a notification all that it tells."""
    if message.src_id:
        return message.data
    type_, payload = message.items[0]
    return struct.pack("=Q", type_) + payload


def receive(bus: Bus, test: socket.socket) -> tuple[list[Seen], int]:
    """Everything until each sender has said that it is done, and how much of it was lost."""
    seen: list[Seen] = []
    lost = 0
    with bus.connect(recv=AttachFlag.TIMESTAMP, pool_size=16 * MIB) as conn:
        conn.match()
        test.sendall(U64.pack(conn.id))
        n_left = N_SENDERS
        while n_left:
            conn.wait()
            result = conn.recv_raw()
            offset, size = result.u64(40), result.u64(48)
            lost += result.u64(32)
            message = Received(offset, conn.pool.read(offset, size))
            conn.free(offset)
            n_left -= message.data == b"done"
            seen.append((message.seqnum, message.src_id, said(message)))
    return seen, lost


def send(bus: Bus, test: socket.socket, number: int) -> int:
    """Broadcasts, unicasts, and names that come and go."""
    with bus.connect() as conn:
        test.sendall(U64.pack(conn.id))
        to = struct.unpack(f"={N_RECEIVERS}Q", test.recv(8 * N_RECEIVERS))
        name = f"com.example.sender{number}"
        for n in range(N_ROUNDS):
            conn.broadcast(b"broadcast %d" % n)
            for id_ in to:
                patiently(lambda id_=id_, n=n: conn.send(id_, b"unicast %d" % n))
            conn.acquire(name)
            conn.release(name)
        for id_ in to:
            patiently(lambda id_=id_: conn.send(id_, b"done"))
        # Nobody leaves before all have heard everything.
        test.sendall(b"ready")
        test.recv(2)
        return conn.id


def patiently(attempt: Callable[[], object]) -> None:
    """Do it, again and again while the receiver's queue is full."""

    daemons.wait_until(
        lambda: succeeds(attempt, errno.ENOBUFS, errno.EXFULL), "a receiver does not receive"
    )


def test_everybody_sees_one_order(bus: Bus) -> None:
    receivers = [Child(lambda test: receive(bus, test)) for _ in range(N_RECEIVERS)]
    ids = [child.socket.recv(8) for child in receivers]
    senders = [Child(lambda test, n=n: send(bus, test, n)) for n in range(N_SENDERS)]
    sender_ids = [int(U64.unpack(child.socket.recv(8))[0]) for child in senders]
    for child in senders:
        child.say(b"".join(ids))
    for child in senders:
        child.hear()
    results = [child.result() for child in receivers]
    for child in senders:
        child.say()
        child.result()

    of_number: dict[int, tuple[int, bytes]] = {}
    for seen, lost in results:
        numbers = [seqnum for seqnum, _, _ in seen]
        # In the order in which the bus took them, none twice.
        assert numbers == sorted(set(numbers))
        # A number means the same message wherever it is seen.
        for seqnum, src_id, what in seen:
            assert of_number.setdefault(seqnum, (src_id, what)) == (src_id, what)
        for sender in sender_ids:
            mine = [what for _, src_id, what in seen if src_id == sender]
            unicasts = [what for what in mine if what.startswith(b"unicast")]
            assert unicasts == [b"unicast %d" % n for n in range(N_ROUNDS)]
            broadcasts = [what for what in mine if what.startswith(b"broadcast")]
            # What was lost was counted, and the rest is in order.
            order = [int(what.split()[1]) for what in broadcasts]
            assert order == sorted(set(order))
        n_sent = N_SENDERS * N_ROUNDS * 3 + N_SENDERS
        n_shared = len([1 for _, _, what in seen if not what.startswith((b"unicast", b"done"))])
        assert n_shared + lost >= n_sent - N_SENDERS
    # Names that came went again, and nobody saw it the other way round.
    for seen, lost in results:
        if not lost:
            names = [what for _, src_id, what in seen if not src_id and b"com.example" in what]
            for number in range(N_SENDERS):
                mine = [what[:8] for what in names if b"sender%d" % number in what]
                assert mine == [struct.pack("=Q", t) for t in (0x8000, 0x8001)] * N_ROUNDS


def test_a_message_is_there_when_send_returns(bus: Bus) -> None:
    with bus.connect() as a, bus.connect() as b:
        for n in range(300):
            a.send(b.id, b"%d" % n)
            assert b.recv().data == b"%d" % n
            b.free(0)


def test_sequence_numbers_are_counted_per_bus(mount: daemons.Mount, bus: Bus) -> None:
    with Bus(mount.path) as other, other.connect(recv=AttachFlag.TIMESTAMP) as far:
        with bus.connect(recv=AttachFlag.TIMESTAMP) as near:
            for _ in range(10):
                near.send(near.id)
            # The first number went to our own ID_ADD.
            assert [m.seqnum for m in near.inbox()] == list(range(2, 12))
        far.send(far.id)
        assert far.take().seqnum == 2
