# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: which commands each takes, what becomes of it, what poll says."""

from errno import (
    EBADFD,
    EBUSY,
    ECONNRESET,
    EEXIST,
    EINVAL,
    EOPNOTSUPP,
    EPERM,
    ESHUTDOWN,
)

import pytest

from abi_client.building import (
    NEGOTIATE,
    access,
    bloom_parameter,
    command,
    hello,
    item,
    message,
    name,
    text,
    u64,
)
from bus.fakes import FakePeer
from bus.harness import Bus, Client, FakeDomain, File, fails
from kdbusfs.abi.numbers import Command, HelloFlag, ItemType, PolicyAccess, PolicyType
from kdbusfs.abi.specs import COMMAND_SPECS
from kdbusfs.bus.handle import HandleState

C = Command
SETUP = {C.BUS_MAKE, C.ENDPOINT_MAKE, C.HELLO}
OTHERS = set(C) - SETUP
STATES = (
    "control", "endpoint", "bus owner", "endpoint owner",
    "ordinary", "activator", "policy holder", "monitor",
)  # fmt: skip
KINDS = {"activator": 2, "policy holder": 4, "monitor": 8}
WORLD_TALK = access(PolicyType.WORLD, PolicyAccess.TALK)


def file_in(state: str, bus: Bus) -> File:
    if state == "control":
        return File(bus.domain, "control", bus.owner)
    if state == "endpoint":
        return bus.open()
    if state == "bus owner":
        return bus.file
    if state == "endpoint owner":
        return bus.endpoint()
    if state == "ordinary":
        return bus.hello()
    if state == "activator":
        return bus.activator("com.example.a")
    return bus.holder("com.example.a") if state == "policy holder" else bus.monitor()


def well_formed(code: Command, peer: FakePeer) -> bytes:
    """An argument that passes the parser."""
    return {
        C.BUS_MAKE: command(0, text(ItemType.MAKE_NAME, "1000-other"), bloom_parameter()),
        C.ENDPOINT_MAKE: command(0, text(ItemType.MAKE_NAME, "1000-other")),
        C.HELLO: hello(),
        C.FREE: command(fields=u64(1 << 20)),
        C.CONN_INFO: command(fields=u64(1, 0, 0, 0)),
        C.BUS_CREATOR_INFO: command(fields=u64(0, 0, 0, 0)),
        C.LIST: command(fields=u64(0, 0)),
        C.SEND: command(fields=u64(peer.put(message(1 << 40)), 0, 0, 0)),
        C.RECV: command(fields=u64(0, 0, 0, 0, 0)),
        C.NAME_ACQUIRE: command(0, name("com.example.b")),
        C.NAME_RELEASE: command(0, name("com.example.b")),
        C.MATCH_ADD: command(fields=u64(1)),
        C.MATCH_REMOVE: command(fields=u64(1)),
    }.get(code, command())


def refusal(state: str, code: Command) -> int | None:
    """The errno with which a handle refuses a command that is not for it (kdbus(7))."""
    if state == "control":
        return None if code == C.BUS_MAKE else EBADFD
    if state == "endpoint":
        return None if code in (C.ENDPOINT_MAKE, C.HELLO) else EBADFD
    if state == "bus owner":
        return EBADFD
    if state == "endpoint owner":
        return None if code == C.ENDPOINT_UPDATE else EBADFD
    if code in SETUP or code == C.ENDPOINT_UPDATE:
        return EBADFD
    if code in (C.BYEBYE, C.NAME_ACQUIRE, C.NAME_RELEASE, C.MATCH_ADD, C.MATCH_REMOVE, C.SEND):
        return None if state == "ordinary" else EOPNOTSUPP
    if code in (C.RECV, C.FREE):
        return EOPNOTSUPP if state == "policy holder" else None
    return None


TABLE = [(state, code, refusal(state, code)) for state in STATES for code in C]


def errno_of(file: File, code: Command, argument: bytes) -> int | None:
    pending = file.start(code, file.peer.put(argument))
    assert not pending.waiting
    return pending.error


@pytest.mark.parametrize(("state", "code", "errno"), TABLE)
def test_a_handle_takes_its_commands_only(
    bus: Bus, state: str, code: Command, errno: int | None
) -> None:
    file = file_in(state, bus)
    seen = errno_of(file, code, well_formed(code, file.peer))
    if errno is not None:
        assert seen == errno
    else:
        assert seen not in (EBADFD, EOPNOTSUPP)


@pytest.mark.parametrize(("state", "code", "errno"), [row for row in TABLE if row[2] is not None])
def test_a_command_on_the_wrong_handle_is_refused_before_its_argument_is_looked_at(
    bus: Bus, state: str, code: Command, errno: int
) -> None:
    file = file_in(state, bus)
    malformed = u64(1, ~NEGOTIATE, 5) + bytes(80)
    address = file.peer.put(malformed)
    assert file.start(code, address).error == errno
    assert file.peer.read(address, len(malformed)) == malformed


@pytest.mark.parametrize(("state", "errno"), [("activator", EOPNOTSUPP), ("ordinary", None)])
def test_of_update_only_the_items_are_refused_by_kind(
    bus: Bus, state: str, errno: int | None
) -> None:
    client = file_in(state, bus)
    assert isinstance(client, Client)
    client.update()
    with fails(EINVAL):
        client.ioctl(C.UPDATE, command(1))


SEND_MASK = (ItemType.ATTACH_FLAGS_SEND, u64(1))
RECV_MASK = (ItemType.ATTACH_FLAGS_RECV, u64(1))
POLICY = (ItemType.NAME, b"com.example.b\0")


@pytest.mark.parametrize(
    ("state", "given", "allowed"),
    [
        ("ordinary", SEND_MASK, True),
        ("activator", SEND_MASK, False),
        ("policy holder", SEND_MASK, False),
        ("monitor", SEND_MASK, True),
        ("ordinary", RECV_MASK, True),
        ("activator", RECV_MASK, True),
        ("policy holder", RECV_MASK, False),
        ("monitor", RECV_MASK, True),
        ("ordinary", POLICY, False),
        ("activator", POLICY, False),
        ("policy holder", POLICY, True),
        ("monitor", POLICY, False),
    ],
)
def test_what_each_kind_of_connection_may_update(
    bus: Bus, state: str, given: tuple[int, bytes], allowed: bool
) -> None:
    client = file_in(state, bus)
    assert isinstance(client, Client)
    if allowed:
        client.update(item(*given))
    else:
        with fails(EOPNOTSUPP):
            client.update(item(*given))


def test_only_kdbus_numbers_are_commands() -> None:
    assert all(code in COMMAND_SPECS for code in C)
    for code in C:
        assert code ^ 0x40000000 not in COMMAND_SPECS
        assert code + (8 << 16) not in COMMAND_SPECS
        assert code & 0xFFFF not in COMMAND_SPECS


@pytest.mark.parametrize("state", ["bus owner", "endpoint owner", "ordinary", "monitor"])
@pytest.mark.parametrize("code", sorted(SETUP))
def test_a_handle_is_bound_once(bus: Bus, state: str, code: Command) -> None:
    file = file_in(state, bus)
    assert errno_of(file, code, well_formed(code, file.peer)) == EBADFD


def test_a_failed_or_negotiating_setup_leaves_the_handle_as_it_was(bus: Bus) -> None:
    file = bus.open()
    with fails(EINVAL):
        file.hello(pool_size=1)
    assert file.handle.state is HandleState.ENDPOINT
    file.hello(flags=1 << 63)
    assert file.handle.state is HandleState.ENDPOINT
    file.hello()
    assert file.handle.state is HandleState.CONNECTION


# --- ids


def test_buses_and_connections_share_one_counter_of_the_domain(domain: FakeDomain) -> None:
    first = domain.make_bus("one")
    assert first.core.id == 1
    assert [first.hello().id, first.hello().id] == [2, 3]
    second = domain.make_bus("two")
    assert second.core.id == 4
    assert [second.hello().id, first.hello().id] == [5, 6]


def test_an_id_is_never_used_twice(bus: Bus) -> None:
    gone = bus.hello()
    gone.close()
    assert bus.hello().id == gone.id + 1


def test_failing_calls_burn_ids_once_their_first_checks_have_passed(domain: FakeDomain) -> None:
    bus = domain.make_bus()
    with fails(EEXIST):
        domain.make_bus()
    before = bus.hello()
    assert before.id == 3, "a name that exists is found after the id is taken"
    with fails(EINVAL):
        bus.hello(pool_size=0)
    with fails(EINVAL):
        bus.hello(recv=1 << 40)
    assert bus.hello().id == 4
    activator = bus.activator("com.example.a")
    with fails(EEXIST):
        bus.activator("com.example.a")
    assert bus.hello().id == activator.id + 2


def test_a_bus_has_a_random_uuid_of_version_4(domain: FakeDomain) -> None:
    ids = {domain.make_bus(s).hello().said[80:96] for s in "abc"}
    assert len(ids) == 3
    for id128 in ids:
        assert id128[6] >> 4 == 4
        assert id128[8] >> 6 == 2


# --- the tree


@pytest.mark.parametrize(
    ("flags", "directory", "file"), [(0, 0o500, 0o600), (1, 0o550, 0o660), (2, 0o555, 0o666),
                                     (3, 0o555, 0o666)],
)  # fmt: skip
def test_access_flags_become_mode_bits(
    domain: FakeDomain, flags: int, directory: int, file: int
) -> None:
    bus = domain.make_bus(flags=flags)
    custom = bus.open()
    custom.endpoint_make(text(ItemType.MAKE_NAME, "1000-e"), flags=flags)
    assert domain.node(bus.name).mode & 0o7777 == directory
    assert domain.node(f"{bus.name}/bus").mode & 0o7777 == file
    assert domain.node(f"{bus.name}/1000-e").mode & 0o7777 == file


def test_nodes_belong_to_the_effective_ids_of_who_made_them(domain: FakeDomain) -> None:
    peer = FakePeer(5, 6).become(euid=1000, egid=1001)
    bus = Bus(domain, peer, "mine")
    for path in (bus.name, f"{bus.name}/bus"):
        node = domain.node(path)
        assert (node.uid, node.gid) == (1000, 1001)


def test_inode_numbers_are_the_lowest_that_are_free(domain: FakeDomain) -> None:
    first, second = domain.make_bus("one"), domain.make_bus("two")
    held = first.open()
    paths = [first.name, f"{first.name}/bus", second.name, f"{second.name}/bus"]
    assert [domain.node(path).ino for path in paths] == [3, 4, 5, 6]
    first.file.close()
    # They are in use as long as somebody has a file open there.
    third = domain.make_bus("three")
    assert [domain.node(p).ino for p in (third.name, f"{third.name}/bus")] == [7, 8]
    held.close()
    domain.files.remove(held)
    del held
    fourth = domain.make_bus("four")
    assert [domain.node(p).ino for p in (fourth.name, f"{fourth.name}/bus")] == [3, 4]


def test_a_node_that_died_between_lookup_and_open_is_shut_down(bus: Bus) -> None:
    node = bus.domain.node(f"{bus.name}/bus")
    bus.file.close()
    bus.domain.node = lambda path: node  # type: ignore[method-assign]
    with fails(ESHUTDOWN):
        bus.open()


# --- whose credentials


def test_being_owner_is_decided_when_the_file_is_opened(bus: Bus) -> None:
    stranger, owner = FakePeer(2000), FakePeer(1000)
    file = bus.open(peer=stranger)
    file.peer = owner
    with fails(EPERM):
        file.hello(flags=HelloFlag.MONITOR)
    file = bus.open(peer=owner)
    file.peer = stranger
    file.hello(flags=HelloFlag.MONITOR)


def test_the_right_to_make_endpoints_is_decided_when_the_file_is_opened(bus: Bus) -> None:
    stranger = FakePeer(2000)
    file = bus.open(peer=stranger)
    file.peer = FakePeer(1000)
    with fails(EPERM):
        file.endpoint_make(text(ItemType.MAKE_NAME, "1000-e"))
    file = bus.open(peer=FakePeer(1000))
    file.peer = stranger
    with fails(EINVAL):
        file.endpoint_make(text(ItemType.MAKE_NAME, "1000-e"))
    file.endpoint_make(text(ItemType.MAKE_NAME, "2000-e"))
    assert bus.domain.node(f"{bus.name}/2000-e").uid == 2000


def test_talk_is_decided_by_who_sends(bus: Bus) -> None:
    friend, stranger = FakePeer(2000), FakePeer(3000)
    target = bus.hello(peer=FakePeer(2000))
    sender = bus.hello(peer=stranger)
    with fails(EPERM):
        sender.send(target)
    with sender.used_by(friend):
        sender.send(target)
    assert len(target.inbox()) == 1


def test_an_owner_connection_keeps_its_rights_in_other_hands(bus: Bus) -> None:
    owner = bus.hello()
    target = bus.hello(peer=FakePeer(2000))
    with owner.used_by(FakePeer(3000)):
        owner.send(target)
        owner.acquire("com.example.a")
    assert len(target.inbox()) == 1


def test_talk_compares_the_effective_uid_with_the_targets_real_uid(bus: Bus) -> None:
    target = bus.hello(peer=FakePeer(2000).become(euid=2001))
    with fails(EPERM):
        bus.hello(peer=FakePeer(2000).become(euid=2001)).send(target)
    bus.hello(peer=FakePeer(9).become(euid=2000)).send(target)


def test_metadata_of_a_connection_is_that_of_who_said_hello(bus: Bus) -> None:
    file_opener, greeter, user = FakePeer(1000), FakePeer(1000), FakePeer(1000)
    greeter.metadata.tid_comm = b"greeter"
    client = Client(bus, peer=file_opener, free=False)
    file = bus.open(peer=file_opener)
    file.peer = greeter
    id_ = int.from_bytes(file.hello()[48:56], "little")
    file.peer = user
    assert client.info(id_).one(ItemType.TID_COMM) == b"greeter\0"


# --- poll


@pytest.mark.parametrize("state", ["control", "endpoint", "bus owner", "endpoint owner"])
def test_a_file_without_a_connection_polls_as_hung_up(bus: Bus, state: str) -> None:
    file = file_in(state, bus)
    assert file.hung_up
    assert not file.readable


@pytest.mark.parametrize("state", ["ordinary", "activator", "policy holder", "monitor"])
def test_an_empty_connection_is_neither_hung_up_nor_readable(bus: Bus, state: str) -> None:
    client = file_in(state, bus)
    assert not client.hung_up
    assert not client.readable


def wakes(client: Client) -> list[int]:
    """Gets one entry for each time that poll is woken."""
    seen: list[int] = []
    client.connection.waker = lambda: seen.append(1)
    return seen


def test_a_message_wakes_poll_and_makes_it_readable(bus: Bus) -> None:
    client = bus.hello()
    woken = wakes(client)
    client.send(client)
    assert woken
    assert client.readable
    client.recv()
    assert not client.readable


def test_lost_messages_alone_make_it_readable_and_wake_once(bus: Bus) -> None:
    client = bus.hello(pool_size=4096)
    client.match()
    woken = wakes(client)
    for _ in range(3):
        client.broadcast(data=bytes(4096))
    assert len(woken) == 1
    assert client.readable
    assert client.lost() == 3
    assert not client.readable


def test_a_disconnected_connection_is_only_hung_up(bus: Bus) -> None:
    client = bus.hello()
    woken = wakes(client)
    client.send(client)
    client.recv()
    del woken[:]
    client.byebye()
    assert woken
    assert client.hung_up
    assert not client.readable


# --- ends


@pytest.mark.parametrize("code", sorted(OTHERS))
def test_every_command_of_a_disconnected_connection_is_reset(bus: Bus, code: Command) -> None:
    client = bus.hello()
    client.byebye()
    assert errno_of(client, code, b"x" * 96) == ECONNRESET


@pytest.mark.parametrize("state", ["activator", "policy holder", "monitor"])
def test_of_a_dead_special_connection_everything_is_reset(domain: FakeDomain, state: str) -> None:
    bus = domain.make_bus()
    client = file_in(state, bus)
    bus.file.close()
    assert errno_of(client, C.BYEBYE, command()) == ECONNRESET
    assert errno_of(client, C.HELLO, hello()) == EBADFD


def test_the_end_of_a_bus_ends_all_that_hangs_on_it(bus: Bus) -> None:
    unbound, endpoint, client = bus.open(), bus.endpoint(), bus.hello()
    guest = Client(bus, endpoint="1000-custom")
    unbound_there = bus.open("1000-custom")
    bus.file.close()
    assert bus.domain.paths() == set()
    for file in (unbound, unbound_there):
        for code in (C.HELLO, C.ENDPOINT_MAKE, C.BUS_MAKE):
            assert errno_of(file, code, well_formed(code, file.peer)) == ESHUTDOWN
    assert errno_of(endpoint, C.ENDPOINT_UPDATE, command()) == ESHUTDOWN
    assert errno_of(endpoint, C.BYEBYE, command()) == ESHUTDOWN
    assert client.hung_up
    assert guest.hung_up
    assert errno_of(guest, C.LIST, command(fields=u64(0, 0))) == ECONNRESET


@pytest.mark.parametrize("code", sorted(SETUP))
def test_setup_on_an_endpoint_that_has_gone_is_shut_down(bus: Bus, code: Command) -> None:
    file = bus.open()
    bus.file.close()
    assert errno_of(file, code, bytes(96)) == ESHUTDOWN


def test_the_name_of_a_bus_is_free_again_after_its_end(domain: FakeDomain) -> None:
    domain.make_bus().file.close()
    assert domain.make_bus().core.id == 2


def test_the_end_of_an_endpoint_leaves_the_bus_alone(bus: Bus) -> None:
    endpoint = bus.endpoint()
    guest, client = Client(bus, endpoint="1000-custom"), bus.hello()
    endpoint.close()
    assert guest.hung_up
    assert not client.hung_up
    assert bus.domain.paths() == {f"{bus.name}/bus"}
    with fails(ECONNRESET):
        guest.byebye()


def test_the_connections_of_an_endpoint_end_in_order_of_hello(bus: Bus) -> None:
    watcher = bus.hello()
    endpoint = bus.endpoint()
    guests = [Client(bus, endpoint="1000-custom") for _ in range(4)]
    watcher.match()
    endpoint.close()
    assert watcher.notifications() == [(ItemType.ID_REMOVE, g.id, 0) for g in guests]


def test_the_last_close_disconnects_with_messages_unread(bus: Bus) -> None:
    watcher, client = bus.hello(), bus.hello()
    watcher.match()
    watcher.send(client)
    with fails(EBUSY):
        client.byebye()
    client.close()
    assert watcher.notifications() == [(ItemType.ID_REMOVE, client.id, 0)]


def test_byebye_looks_at_the_queue_alone(bus: Bus) -> None:
    client, other = bus.hello(pool_size=8192), bus.hello()
    client.match()
    client.send(client)
    client.recv(free=False)
    client.request(other)
    other.broadcast(data=bytes(8192))
    assert client.connection.lost == 1
    client.byebye()
    with fails(ECONNRESET):
        client.byebye()
    with fails(ECONNRESET):
        client.free(0)


def test_a_refused_byebye_changes_nothing(bus: Bus) -> None:
    client, other = bus.hello(), bus.hello()
    client.acquire("com.example.a")
    other.match()
    other.send(client, cookie=5)
    with fails(EBUSY):
        client.byebye()
    assert other.inbox() == []
    assert bus.owner_of("com.example.a") == client.id
    assert client.cookies() == [5]
    client.byebye()


def test_a_pool_outlives_its_connection(bus: Bus) -> None:
    client = bus.hello()
    client.send(client, data=b"still here")
    got = client.recv(free=False)
    client.byebye()
    assert client.visible(got.offset, len(got.raw)) == got.raw
    assert not client.memory.closed
    memory = client.memory
    client.close()
    assert memory.closed
