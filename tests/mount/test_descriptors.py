# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors in messages, from any process to any: FDS and PAYLOAD_MEMFD of kdbus.message(7)."""

import errno
import fcntl
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import daemons
import kdbus
from abi_client.building import Memfd
from abi_client.building import fds as fds_item
from kdbusfs.abi.items import build
from kdbusfs.abi.numbers import (
    HelloFlag,
    ItemType,
    RecvFlag,
    RecvReturnFlag,
)
from mount.processes import Child, fds_of
from mount.raw import (
    MIB,
    SEALS,
    Bus,
    Connection,
    File,
    Mapping,
    fails,
    libc,
    outcome,
    sealed_memfd,
    succeeds,
)

INCOMPLETE = RecvReturnFlag.INCOMPLETE_FDS
PTRACE_TRACEME = 0
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


@pytest.fixture(autouse=True)
def _no_descriptor_stays_in_the_daemon(mount: daemons.Mount) -> Iterator[None]:
    """The daemon has as many open files after a test as before it."""
    before = fds_of(mount.pid), fds_of()
    yield
    daemons.wait_until(
        lambda: fds_of(mount.pid) <= before[0], f"the daemon had {before[0]} descriptors"
    )
    assert fds_of() == before[1]


def same_file(a: int, b: int) -> bool:
    return os.path.sameopenfile(a, b)


# --- what arrives


def test_a_descriptor_is_the_same_open_file(bus: Bus) -> None:
    read, write = os.pipe()
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, fds=[write])
        message = receiver.recv()
        (fd,) = message.fds
        assert message.msg_return_flags == 0
        assert fd not in (read, write)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert same_file(fd, write)
        os.write(fd, b"through")
        assert os.read(read, 10) == b"through"
        for number in (read, write, fd):
            os.close(number)


def test_offset_and_mode_are_shared_with_the_sender(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, fds=[fd])
        (copy,) = receiver.recv().fds
        os.lseek(fd, 5, os.SEEK_SET)
        assert os.read(copy, 10) == b"56789"
        with fails(errno.EBADF):
            os.write(copy, b"x")
        os.close(copy)
    os.close(fd)


def test_descriptors_reach_another_process(bus: Bus) -> None:
    def receive(test: socket.socket) -> tuple[bytes, int, int]:
        with bus.connect() as conn:
            before = fds_of()
            test.send(conn.id.to_bytes(8, "little"))
            message = conn.take()
            gained = fds_of() - before
            return os.pread(message.fds[0], 100, 0), message.msg_return_flags, gained

    with bus.connect() as sender, Child(receive) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        fd = sealed_memfd(b"from the other one")
        sender.send(to, b"with data", fds=[fd])
        assert child.result() == (b"from the other one", 0, 1)
        os.close(fd)


def test_every_kind_of_file_passes(bus: Bus, tmp_path: Path) -> None:
    pair = socket.socketpair()
    inet = socket.socket(socket.AF_INET)
    files = [
        os.open("/dev/null", os.O_RDWR),
        os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY),
        os.open("/proc/self/status", os.O_RDONLY),
        os.eventfd(0),
        os.pidfd_open(os.getpid()),
        os.open(tmp_path, os.O_PATH),
        inet.detach(),
    ]
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, fds=files)
        message = receiver.recv()
        assert [same_file(a, b) for a, b in zip(files, message.fds, strict=True)] == [True] * 7
        message.close_fds()
        # An O_PATH descriptor passes whatever it is of.
        path = os.open(bus.path, os.O_PATH)
        sender.send(receiver.id, fds=[path])
        receiver.recv().close_fds()
        os.close(path)
    for fd in files:
        os.close(fd)
    for end in pair:
        end.close()


def test_what_must_not_pass_does_not(mount: daemons.Mount, bus: Bus) -> None:
    unix = socket.socketpair()
    with bus.connect() as sender, bus.connect() as receiver, File(bus.path) as unbound:
        for fd, expected in (
            (-1, errno.EBADF),
            (1000, errno.EBADF),
            (unix[0].fileno(), errno.EOPNOTSUPP),
            (sender.fd, errno.EOPNOTSUPP),
            (bus.fd, errno.EOPNOTSUPP),
            (unbound.fd, errno.EOPNOTSUPP),
        ):
            with fails(expected):
                sender.send(receiver.id, items=fds_item(fd))
            with fails(expected):
                sender.send(receiver.id, items=fds_item(0, fd))
        # Refused before anybody looks for the destination.
        with fails(errno.EBADF):
            sender.send(1 << 40, items=fds_item(-1))
        with fails(errno.EAGAIN):
            receiver.recv()
    for end in unix:
        end.close()


def test_descriptors_of_a_foreign_number_are_the_senders_not_the_daemons(
    mount: daemons.Mount, bus: Bus
) -> None:
    # Numbers that are open in the daemon, but not here.
    with bus.connect() as conn:
        foreign = list(map(int, os.listdir(f"/proc/{mount.pid}/fd")))
        mine = set(map(int, os.listdir("/proc/self/fd")))
        for number in sorted(set(foreign) - mine)[:5] or [999]:
            with fails(errno.EBADF):
                conn.send(conn.id, items=fds_item(number))


def test_sixteen_descriptors_and_sixteen_memfds_at_once(bus: Bus) -> None:
    plain = [sealed_memfd(b"fd %d" % n) for n in range(16)]
    parts = [sealed_memfd(b"memfd %d" % n) for n in range(16)]
    with bus.connect() as sender, bus.connect() as receiver:
        sender.send(receiver.id, *[Memfd(fd, 6) for fd in parts], fds=plain)
        message = receiver.recv()
        assert message.msg_return_flags == 0
        assert [os.pread(fd, 9, 0) for fd in message.fds] == [b"fd %d" % n for n in range(16)]
        assert [os.pread(m.fd, 9, 0) for m in message.memfds] == [
            b"memfd %d" % n for n in range(16)
        ]
        assert len({*message.fds, *(m.fd for m in message.memfds)}) == 32
        message.close_fds()
        with fails(errno.EMFILE):
            sender.send(receiver.id, fds=[plain[0]] * 17)
        with fails(errno.E2BIG):
            sender.send(receiver.id, *[Memfd(parts[0], 6)] * 17)
    for fd in plain + parts:
        os.close(fd)


def test_an_empty_list_of_descriptors_is_no_descriptors(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect(flags=0) as receiver:
        sender.send(receiver.id, b"none", items=build(ItemType.FDS, b""))
        message = receiver.recv()
        assert (message.fds, message.msg_return_flags) == ([], 0)


def test_a_receiver_that_accepts_none_gets_no_message(bus: Bus) -> None:
    memfd = sealed_memfd(b"content")
    with bus.connect() as sender, bus.connect(flags=0) as receiver:
        with fails(errno.ECOMM):
            sender.send(receiver.id, fds=[memfd])
        # Memfds are payload, and need no consent.
        sender.send(receiver.id, Memfd(memfd, 7))
        message = receiver.recv()
        assert message.msg_return_flags == 0
        assert os.pread(message.memfds[0].fd, 10, 0) == b"content"
        message.close_fds()
    os.close(memfd)


def test_monitors_get_descriptors_only_if_they_accept_them(bus: Bus) -> None:
    memfd = sealed_memfd(b"content")
    read, write = os.pipe()
    monitor = HelloFlag.MONITOR
    with (
        bus.connect() as conn,
        bus.connect(flags=monitor) as refusing,
        bus.connect(flags=monitor | HelloFlag.ACCEPT_FD) as accepting,
    ):
        conn.send(conn.id, Memfd(memfd, 7), fds=[write])
        without, with_, own = refusing.recv(), accepting.recv(), conn.recv()
        assert without.fds == [-1]
        assert without.msg_return_flags == INCOMPLETE
        assert same_file(without.memfds[0].fd, memfd)
        for message in (with_, own):
            assert message.msg_return_flags == 0
            assert same_file(message.fds[0], write)
        assert len({m.memfds[0].fd for m in (without, with_, own)}) == 3
        for message in (without, with_, own):
            message.close_fds()
    for fd in (memfd, read, write):
        os.close(fd)


def test_a_broadcast_memfd_is_everybodys_own(bus: Bus) -> None:
    memfd = sealed_memfd(b"to all")
    receivers = [bus.connect() for _ in range(4)]
    with bus.connect() as sender:
        for conn in receivers:
            conn.match()
        sender.broadcast(Memfd(memfd, 6))
        with fails(errno.ENOTUNIQ):
            sender.broadcast(fds=[memfd])
        numbers = []
        for conn in receivers:
            message = conn.recv()
            assert same_file(message.memfds[0].fd, memfd)
            numbers.append(message.memfds[0].fd)
        assert len(set(numbers)) == 4
        for number in numbers:
            os.close(number)
    for conn in receivers:
        conn.close()
    os.close(memfd)


def test_looking_installs_nothing(bus: Bus) -> None:
    read, write = os.pipe()
    with bus.connect() as conn:
        conn.send(conn.id, fds=[write])
        assert conn.pool
        before = fds_of()
        for _ in range(3):
            conn.recv(RecvFlag.PEEK)
            assert fds_of() == before
        message = conn.recv()
        assert same_file(message.fds[0], write)
        assert fds_of() == before + 1
        message.close_fds()
    os.close(read)
    os.close(write)


def test_dropped_and_forgotten_messages_close_their_descriptors(bus: Bus) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    sender = bus.connect()
    receiver = bus.connect()
    for _ in range(3):
        sender.send(receiver.id, fds=[write])
    os.close(write)
    with fails(errno.EAGAIN):
        os.read(read, 1)
    receiver.drop()
    with fails(errno.EAGAIN):
        os.read(read, 1)
    # The rest goes with the connection, and with it the pipe's last writer.
    receiver.close()
    daemons.wait_until(lambda: _at_end(read), "somebody still has the pipe")
    os.close(read)
    sender.close()


def _at_end(fd: int) -> bool:
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False


def test_a_user_may_queue_sixteen_descriptors_at_one_receiver(bus: Bus) -> None:
    with bus.connect() as sender, bus.connect() as receiver:
        fd = os.open("/dev/null", os.O_RDONLY)
        for _ in range(8):
            sender.send(receiver.id, fds=[fd, fd])
        with fails(errno.EMFILE):
            sender.send(receiver.id, fds=[fd])
        sender.send(receiver.id, b"no descriptors")
        receiver.recv().close_fds()
        sender.send(receiver.id, fds=[fd, fd])
        with fails(errno.EMFILE):
            sender.send(receiver.id, fds=[fd])
        for message in receiver.inbox():
            message.close_fds()
        os.close(fd)


# --- memfds


def test_a_memfd_is_mapped_without_a_copy(bus: Bus) -> None:
    size = 8 * MIB
    content = random.Random(8).randbytes(size)
    memfd = sealed_memfd(content)
    with bus.connect() as sender, bus.connect(pool_size=16384) as receiver:
        sender.send(receiver.id, Memfd(memfd, size))
        message = receiver.recv()
        assert message.slice_size == 64 + 40
        (part,) = message.memfds
        assert (part.start, part.size) == (0, size)
        assert os.fstat(part.fd).st_ino == os.fstat(memfd).st_ino
        mapping = Mapping(part.fd, size)
        assert mapping.read(0, size) == content
        mapping.unmap()
        with fails(errno.EPERM):
            Mapping(part.fd, size, mmap.PROT_READ | mmap.PROT_WRITE)
        message.close_fds()
    os.close(memfd)


def test_a_part_of_a_memfd_is_fine(bus: Bus) -> None:
    memfd = sealed_memfd(b"0123456789")
    with bus.connect() as conn:
        conn.send(conn.id, Memfd(memfd, 4, 3), Memfd(memfd, 10), Memfd(memfd, 1, 9))
        message = conn.recv()
        assert [(m.start, m.size) for m in message.memfds] == [(3, 4), (0, 10), (9, 1)]
        message.close_fds()
        for size, start in ((11, 0), (1, 10), (8, 3)):
            with fails(errno.EFAULT):
                conn.send(conn.id, Memfd(memfd, size, start))
        with fails(errno.EMSGSIZE):
            conn.send(conn.id, Memfd(memfd, 2, (1 << 64) - 1))
        with fails(errno.EINVAL):
            conn.send(conn.id, Memfd(memfd, 0))
        with fails(errno.EBADF):
            conn.send(conn.id, Memfd(-1, 4))
    os.close(memfd)


def test_a_memfd_must_have_all_four_seals(bus: Bus) -> None:
    with bus.connect() as conn:
        for missing in (0x1, 0x2, 0x4, 0x8, SEALS):
            fd = sealed_memfd(b"content", SEALS & ~missing)
            with fails(errno.ETXTBSY):
                conn.send(conn.id, Memfd(fd, 7))
            os.close(fd)
        unsealable = os.memfd_create("unsealable", os.MFD_CLOEXEC)
        os.write(unsealable, b"content")
        with fails(errno.ETXTBSY):
            conn.send(conn.id, Memfd(unsealable, 7))
        os.close(unsealable)


def test_what_is_no_memfd_is_refused(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    read, write = os.pipe()
    memfd = sealed_memfd(b"content")
    disk = os.open(__file__, os.O_RDONLY)
    path = os.open(f"/proc/self/fd/{memfd}", os.O_PATH)
    with bus.connect() as conn:
        for fd, expected in (
            (read, errno.EMEDIUMTYPE),
            (disk, errno.EMEDIUMTYPE),
            (conn.fd, errno.EMEDIUMTYPE),
            (path, errno.EBADF),
            (1000, errno.EBADF),
        ):
            with fails(expected):
                conn.send(conn.id, Memfd(fd, 7))
    for fd in (read, write, memfd, disk, path):
        os.close(fd)


# --- receivers in all circumstances


def receive_in(
    bus: Bus, prepare: Callable[[], object], count: int = 1
) -> tuple[list[int], int, int]:
    """A child that has *prepare*d itself receives *count* descriptors and as many memfds: their
    numbers, msg.return_flags, and how many descriptors it has more than before."""

    def receive(test: socket.socket) -> tuple[list[int], int, int]:
        with bus.connect() as conn:
            assert conn.pool
            prepare()
            before = _open_numbers()
            test.send(conn.id.to_bytes(8, "little"))
            conn.wait()
            message = conn.recv()
            assert message.data == b"payload"
            gained = len(_open_numbers()) - len(before)
            numbers = [*message.fds, *(m.fd for m in message.memfds)]
            for number in numbers:
                assert number < 0 or os.pread(number, 4, 0) == b"file"
            return numbers, message.msg_return_flags, gained

    fds = [sealed_memfd(b"file") for _ in range(2 * count)]
    with bus.connect() as sender, Child(receive) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        sender.send(to, b"payload", *[Memfd(fd, 4) for fd in fds[count:]], fds=fds[:count])
        for fd in fds:
            os.close(fd)
        return child.result()


def _open_numbers() -> list[int]:
    """The descriptors that are open; no directory is read for that, which may not be allowed."""
    return [n for n in range(512) if _is_open(n)]


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def unshare(flags: int) -> None:
    if libc.unshare(flags):
        pytest.fail(f"unshare({flags:#x})")


@pytest.mark.parametrize(
    "flags",
    [
        CLONE_NEWNET,
        CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC,
        CLONE_NEWUSER,
        CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID,
    ],
)
def test_the_receivers_namespaces_do_not_matter(bus: Bus, flags: int) -> None:
    numbers, return_flags, gained = receive_in(bus, lambda: unshare(flags), 3)
    assert min(numbers) >= 0
    assert (return_flags, gained) == (0, 6)


def test_a_receiver_without_rights_gets_its_descriptors(bus: Bus) -> None:
    def drop() -> None:
        os.setgroups([])
        os.setresgid(4711, 4711, 4711)
        os.setresuid(4711, 4711, 4711)

    numbers, return_flags, gained = receive_in(bus, drop, 16)
    assert min(numbers) >= 0
    assert (return_flags, gained) == (0, 32)


def test_signals_that_wait_for_the_receiver_come_after_its_descriptors(bus: Bus) -> None:
    seen: list[int] = []

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
        signal.signal(signal.SIGCHLD, lambda *_: seen.append(2))
        pid = os.getpid()
        if not os.fork():
            # Bothers its parent until that is gone.
            while os.getppid() == pid:
                os.kill(pid, signal.SIGUSR1)
                os.sched_yield()
            os._exit(0)

    for _ in range(5):
        numbers, return_flags, gained = receive_in(bus, prepare, 2)
        assert min(numbers) >= 0
        assert (return_flags, gained) == (0, 4)


def limit_descriptors(n_more: int, *, hard: bool = False) -> None:
    """Leave room for so many descriptors more."""
    taken = _open_numbers()
    for _ in set(range(max(taken) + 1)) - set(taken):
        os.dup(0)
    limit = max(taken) + 1 + n_more
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit if hard else most))


@pytest.mark.parametrize("room", [0, 1, 2, 5, 6])
def test_a_full_table_takes_what_there_is_room_for(bus: Bus, room: int) -> None:
    numbers, return_flags, gained = receive_in(bus, lambda: limit_descriptors(room), 3)
    assert [n >= 0 for n in numbers] == [n < room for n in range(6)]
    assert return_flags == (0 if room == 6 else INCOMPLETE)
    assert gained == room


def test_a_table_that_cannot_grow_is_filled_as_far_as_possible(bus: Bus) -> None:
    # Without CAP_SYS_RESOURCE the daemon needs one of the places itself, for a moment.
    numbers, return_flags, gained = receive_in(bus, lambda: limit_descriptors(3, hard=True), 3)
    assert gained in (2, 3)
    assert [n >= 0 for n in numbers] == [n < gained for n in range(6)]
    assert return_flags == INCOMPLETE


def test_a_hard_limit_is_not_raised_beside_threads_that_could_fork(bus: Bus) -> None:
    """Their children would keep it. So the daemon needs one of the places itself."""

    def prepare() -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        limit_descriptors(3, hard=True)

    numbers, return_flags, gained = receive_in(bus, prepare, 3)
    assert [n >= 0 for n in numbers] == [True, True, False, False, False, False]
    assert (return_flags, gained) == (INCOMPLETE, 2)


def test_a_traced_receiver_gets_the_message_without_descriptors(bus: Bus) -> None:
    def trace_me() -> None:
        assert libc.ptrace(PTRACE_TRACEME, 0, None, None) == 0

    numbers, return_flags, gained = receive_in(bus, trace_me, 2)
    assert (numbers, return_flags, gained) == ([-1] * 4, INCOMPLETE, 0)


@pytest.mark.parametrize("how", ["0", "8", "seccomp", "strict"])
def test_programs_of_any_kind_receive(bus: Bus, programs: Path, how: str) -> None:
    """One thread, many that share a connection, one that may make no other calls than receiving
    takes, and one that may make no call but its own: that does without the descriptors."""
    count = 200
    expected = [0, count, count, 0] if how == "strict" else [count, 0, 0, 0]
    command = [str(programs / "receiver"), str(bus.path), str(count), how]
    with (
        bus.connect() as sender,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver,
    ):
        assert receiver.stdout is not None
        to = int(receiver.stdout.readline())
        for cookie in range(1, count + 1):
            fd = sealed_memfd(cookie.to_bytes(8, "little"))
            send_patiently(sender, to, Memfd(fd, 8), cookie=cookie, fds=[fd])
            os.close(fd)
        assert list(map(int, receiver.stdout.readline().split())) == expected
        assert receiver.wait(daemons.DEADLINE_SECONDS) == 0


def send_patiently(sender: Connection, to: int, *parts: Memfd, **message: object) -> None:
    """SEND, again and again while the receiver's queue is full."""

    full = (errno.EMFILE, errno.ENOBUFS, errno.EXFULL)
    daemons.wait_until(
        lambda: succeeds(lambda: sender.send(to, *parts, **message), *full),
        "the receiver does not receive",
    )


def test_descriptors_come_with_the_reply_of_a_call(bus: Bus) -> None:
    def answer(test: socket.socket) -> None:
        with bus.connect() as conn:
            test.send(conn.id.to_bytes(8, "little"))
            for _ in range(2):
                request = conn.take()
                fd = sealed_memfd(b"answer")
                conn.reply(request, b"look", Memfd(fd, 6), fds=[fd])
                request.close_fds()

    with bus.connect() as conn, Child(answer) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        memfd = sealed_memfd(b"question")
        for cookie in (1, 2):
            reply = conn.call(to, b"?", Memfd(memfd, 8), fds=[memfd], cookie=cookie)
            assert (reply.data, reply.msg_return_flags) == (b"look", 0)
            assert os.pread(reply.fds[0], 9, 0) == os.pread(reply.memfds[0].fd, 9, 0) == b"answer"
            reply.close_fds()
        os.close(memfd)
        child.result()


def test_a_reply_with_descriptors_nobody_accepts_fails_on_both_sides(bus: Bus) -> None:
    def answer(test: socket.socket) -> str:
        with bus.connect() as conn:
            test.send(conn.id.to_bytes(8, "little"))
            request = conn.take()
            return outcome(lambda: conn.reply(request, fds=[0]))

    with bus.connect(flags=0) as conn, Child(answer) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        with fails(errno.EREMOTEIO):
            conn.call(to)
        assert child.result() == "ECOMM"


# --- libkdbus, whose descriptors come over a socket of its own


def test_libkdbus_and_raw_clients_exchange_descriptors_both_ways(bus: Bus) -> None:
    with bus.connect() as raw, kdbus.Connection(bus.path) as library:
        assert library.has_fd_socket
        fds = [sealed_memfd(b"%02d" % n) for n in range(32)]
        raw.send(library.id, *[Memfd(fd, 2) for fd in fds[16:]], fds=fds[:16])
        with library.recv(5) as message:
            assert not message.incomplete
            received = [os.pread(fd.fileno(), 2, 0) for fd in message.fds]
            assert received == [b"%02d" % n for n in range(16)]
            assert message.payload() == b"".join(b"%02d" % n for n in range(16, 32))
        library.send(kdbus.Message(b"data", dst_id=raw.id, fds=fds[:3]))
        back = raw.take()
        assert [os.pread(fd, 2, 0) for fd in back.fds] == [b"00", b"01", b"02"]
        back.close_fds()
        for fd in fds:
            os.close(fd)


def test_libkdbus_gets_what_there_is_room_for(bus: Bus) -> None:
    def receive(test: socket.socket) -> tuple[bool, bytes]:
        with kdbus.Connection(bus.path) as conn:
            test.send(conn.id.to_bytes(8, "little"))
            conn.wait(daemons.DEADLINE_SECONDS)
            limit_descriptors(1)
            with conn.recv(5) as message:
                return message.incomplete, message.payload()

    with bus.connect() as sender, Child(receive) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        sender.send(to, b"payload", fds=[0, 0, 0])
        assert child.result() == (True, b"payload")


# --- nothing leaks, whoever dies


@pytest.mark.parametrize("client", ["raw", "libkdbus"])
def test_thousands_of_descriptors_leave_none_behind(
    mount: daemons.Mount, bus: Bus, client: str
) -> None:
    count = 3000

    def receive(test: socket.socket) -> int:
        read_, write_ = os.pipe()
        os.close(read_)
        os.close(write_)
        if client == "raw":
            conn = bus.connect()
            assert conn.pool
            before = fds_of()
            test.send(conn.id.to_bytes(8, "little"))
            for _ in range(count):
                message = conn.take()
                assert message.msg_return_flags == 0
                message.close_fds()
            return fds_of() - before
        library = kdbus.Connection(bus.path)
        before = fds_of()
        test.send(library.id.to_bytes(8, "little"))
        for _ in range(count):
            with library.recv(daemons.DEADLINE_SECONDS) as received:
                assert not received.incomplete
        return fds_of() - before

    with bus.connect() as sender, Child(receive) as child:
        to = int.from_bytes(child.socket.recv(8), "little")
        fd = sealed_memfd(b"file")
        before = fds_of()
        for _ in range(count):
            send_patiently(sender, to, Memfd(fd, 4), fds=[fd])
        assert fds_of() == before
        os.close(fd)
        assert child.result() == 0


def test_peers_killed_in_between_leave_no_descriptor_behind(mount: daemons.Mount, bus: Bus) -> None:
    chance = random.Random(3)

    def receive(test: socket.socket) -> None:
        with bus.connect() as conn:
            test.send(conn.id.to_bytes(8, "little"))
            while True:
                conn.take(1e6).close_fds()

    def send(to: int, test: socket.socket) -> None:
        with bus.connect() as conn:
            fd = sealed_memfd(b"file")
            test.send(b"ready")
            while outcome(lambda: conn.send(to, Memfd(fd, 4), fds=[fd, fd])) != "ENXIO":
                pass

    for _ in range(60):
        with Child(receive) as receiver:
            to = int.from_bytes(receiver.socket.recv(8), "little")
            with Child(lambda test, to=to: send(to, test)) as sender:
                sender.hear()
                first, second = (receiver, sender) if chance.random() < 0.5 else (sender, receiver)
                # Somewhere in the middle of a call, more often than not.
                os.sched_yield()
                for _ in range(chance.randrange(2000)):
                    pass
                first.kill()
                second.kill()
    with bus.connect() as conn:
        conn.send(conn.id, b"still fine", fds=[0])
        message = conn.take()
        assert message.data == b"still fine"
        message.close_fds()
