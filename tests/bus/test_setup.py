# SPDX-License-Identifier: LGPL-2.1-or-later
"""BUS_MAKE, ENDPOINT_MAKE, ENDPOINT_UPDATE, HELLO: each check, in its order."""

import struct
from errno import (
    EEXIST,
    EINVAL,
    EMFILE,
    ENAMETOOLONG,
    ENOMEM,
    EOPNOTSUPP,
    EPERM,
    errorcode,
)

import pytest

from abi_client.building import access, bloom_parameter, hello, item, name, parse_items, text, u64
from bus.fakes import HOME_USERS, FakeMemory, FakePeer, no_memory
from bus.harness import Bus, Client, FakeDomain, File, fails
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.numbers import Command, HelloFlag, ItemType, PolicyAccess, PolicyType
from kdbusfs.bus.handle import HandleState
from kdbusfs.bus.metadata import UserNamespace
from kdbusfs.bus.shares import Share

I = ItemType  # noqa: E741
ACTIVATOR, POLICY_HOLDER, MONITOR = (
    HelloFlag.ACTIVATOR,
    HelloFlag.POLICY_HOLDER,
    HelloFlag.MONITOR,
)
CREDS = item(I.CREDS, u64(*[1000] * 8))
PIDS = item(I.PIDS, u64(0, 0, 0))
SECLABEL = text(I.SECLABEL, "label")
OWN = access(PolicyType.WORLD, PolicyAccess.OWN)


def make_name(string: str) -> bytes:
    return text(I.MAKE_NAME, string)


# --- BUS_MAKE


@pytest.mark.parametrize(
    ("size", "n_hash", "valid"),
    [
        (8, 1, True),
        (4096, 1, True),
        (64, 1 << 40, True),
        (0, 1, False),
        (7, 1, False),
        (12, 1, False),
        (4104, 1, False),
        (64, 0, False),
    ],
)
def test_a_bus_has_a_sensible_bloom_filter(
    domain: FakeDomain, size: int, n_hash: int, valid: bool
) -> None:
    file = File(domain, "control", FakePeer(1000))
    items = make_name("1000-a"), bloom_parameter(size, n_hash)
    if valid:
        file.bus_make(*items)
    else:
        with fails(EINVAL):
            file.bus_make(*items)


@pytest.mark.parametrize("string", ["1000-a", "1000-a.b-c_D", "1000---a", "1000-" + "a" * 58])
def test_a_bus_name_starts_with_the_uid(domain: FakeDomain, string: str) -> None:
    File(domain, "control", FakePeer(1000)).bus_make(make_name(string), bloom_parameter())
    assert domain.paths() == {f"{string}/bus"}


BAD_NAMES = [
    ("1001-a", EINVAL),
    ("a", EINVAL),
    ("1000a", EINVAL),
    ("1000-", EINVAL),
    ("01000-a", EINVAL),
    ("1000-a.", EINVAL),
    ("1000-a/b", EINVAL),
    ("", EINVAL),
    ("1000-" + "a" * 59, ENAMETOOLONG),
]


@pytest.mark.parametrize(("string", "errno"), BAD_NAMES)
def test_other_bus_names_are_refused(domain: FakeDomain, string: str, errno: int) -> None:
    with fails(errno):
        File(domain, "control", FakePeer(1000)).bus_make(make_name(string), bloom_parameter())
    assert domain.paths() == set()


def test_the_uid_in_a_name_is_that_of_the_domains_user_namespace(domain: FakeDomain) -> None:
    outer = UserNamespace(7, HOME_USERS, 0, ((0, 100000, 10),), ((0, 100000, 10),))
    domain.core.user_namespace = outer
    file = File(domain, "control", FakePeer(100003))
    with fails(EINVAL):
        file.bus_make(make_name("100003-a"), bloom_parameter())
    file.bus_make(make_name("3-a"), bloom_parameter())
    unmapped = File(domain, "control", FakePeer(5))
    for prefix in ("5", "65534", "-1", "4294967295"):
        with fails(EINVAL):
            unmapped.bus_make(make_name(f"{prefix}-a"), bloom_parameter())


def test_the_effective_uid_names_a_bus_and_the_real_one_pays(domain: FakeDomain) -> None:
    domain.make_bus()
    peer = FakePeer(1).become(euid=1000)
    Bus(domain, peer, "other")
    assert domain.core.user(1).n_buses == 1


def test_a_bus_name_is_unique(domain: FakeDomain) -> None:
    domain.make_bus("a")
    with fails(EEXIST):
        domain.make_bus("a")
    domain.make_bus("b")


@pytest.mark.parametrize("flags", range(4))
def test_bus_flags_are_told_as_given(domain: FakeDomain, flags: int) -> None:
    client = domain.make_bus(flags=flags).hello()
    assert struct.unpack_from("=Q", client.said, 40) == (flags,)
    assert client.creator_info().flags == flags


def test_a_user_has_at_most_16_buses(domain: FakeDomain) -> None:
    buses = [domain.make_bus(f"b{n}") for n in range(16)]
    with fails(EMFILE):
        domain.make_bus("more")
    domain.make_bus(uid=1001)
    buses[3].file.close()
    domain.make_bus("more")


def test_the_name_is_looked_at_before_the_number_of_buses(domain: FakeDomain) -> None:
    for n in range(16):
        domain.make_bus(f"b{n}")
    with fails(EEXIST):
        domain.make_bus("b3")


# --- ENDPOINT_MAKE


@pytest.mark.parametrize(("string", "errno"), BAD_NAMES)
def test_other_endpoint_names_are_refused(bus: Bus, string: str, errno: int) -> None:
    with fails(errno):
        bus.open().endpoint_make(make_name(string))


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (FakePeer(1000), True),
        (FakePeer(5).become(euid=1000), True),
        (FakePeer(1000).become(euid=5), False),
        (FakePeer(5, ipc_owner=True), True),
        (FakePeer(0), False),
    ],
)
def test_the_owner_makes_endpoints(bus: Bus, peer: FakePeer, allowed: bool) -> None:
    file = bus.open(peer=peer)
    if allowed:
        file.endpoint_make(make_name(f"{peer.who.euid}-e"))
        assert file.handle.state is HandleState.ENDPOINT_OWNER
    else:
        with fails(EPERM):
            file.endpoint_make()


def test_nobody_makes_endpoints_on_a_custom_one(bus: Bus) -> None:
    bus.endpoint()
    with fails(EPERM):
        bus.open("1000-custom", FakePeer(1000, ipc_owner=True)).endpoint_make(make_name("1000-e"))


def test_an_endpoint_name_is_unique_on_its_bus(domain: FakeDomain) -> None:
    one, two = domain.make_bus("one"), domain.make_bus("two")
    one.endpoint("1000-e")
    two.endpoint("1000-e")
    with fails(EEXIST):
        one.endpoint("1000-e")


def test_policy_is_not_given_when_an_endpoint_is_made(bus: Bus) -> None:
    with fails(EINVAL):
        bus.open().endpoint_make(make_name("1000-e"), name("com.example.a"), OWN)


# --- HELLO


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 6144, (1 << 64) - 1])
def test_a_pool_is_a_whole_number_of_pages(bus: Bus, size: int) -> None:
    with fails(EINVAL):
        bus.open().hello(pool_size=size)


def test_a_pool_needs_memory(bus: Bus) -> None:
    file = File(bus.domain, f"{bus.name}/bus", bus.owner, no_memory)
    with fails(ENOMEM):
        file.hello()
    assert file.handle.state is HandleState.ENDPOINT


NAMED = name("com.example.a")
OWNER, STRANGER, ROOT = FakePeer(1000), FakePeer(2000), FakePeer(0, ipc_owner=True)
CHECKS = [
    # who, flags, items, errno (0: fine), in the order of the checks
    (OWNER, ACTIVATOR | MONITOR, (), EINVAL),
    (OWNER, ACTIVATOR | POLICY_HOLDER, (NAMED,), EINVAL),
    (OWNER, POLICY_HOLDER | MONITOR, (NAMED,), EINVAL),
    (OWNER, 0, (NAMED,), EINVAL),
    (OWNER, MONITOR, (NAMED,), EINVAL),
    (OWNER, ACTIVATOR, (), EINVAL),
    (OWNER, POLICY_HOLDER, (), EINVAL),
    (OWNER, ACTIVATOR, (name("nodot"),), EINVAL),
    (OWNER, POLICY_HOLDER, (name("a.b*"),), EINVAL),
    (STRANGER, ACTIVATOR, (name("nodot"),), EINVAL),
    (STRANGER, ACTIVATOR, (NAMED,), EPERM),
    (STRANGER, POLICY_HOLDER, (NAMED,), EPERM),
    (STRANGER, MONITOR, (), EPERM),
    (STRANGER, 0, (CREDS,), EPERM),
    (STRANGER, 0, (PIDS,), EPERM),
    (STRANGER, 0, (SECLABEL,), EPERM),
    (STRANGER, 0, (text(I.CONN_DESCRIPTION, "me"),), 0),
    (STRANGER, 1, (), 0),
    (STRANGER, 0, (OWN,), 0),
    (OWNER, MONITOR | 1, (OWN,), 0),
    (OWNER, ACTIVATOR | 1, (NAMED,), 0),
    (OWNER, POLICY_HOLDER | 1, (name("a.*"),), 0),
    (OWNER, ACTIVATOR, (name("a.*"),), EINVAL),
    (OWNER, ACTIVATOR, (OWN, NAMED), EINVAL),
    (OWNER, POLICY_HOLDER, (OWN, NAMED), EINVAL),
    (OWNER, 0, (CREDS, PIDS, SECLABEL), 0),
    (ROOT, MONITOR, (), 0),
    (ROOT, POLICY_HOLDER, (NAMED, OWN, OWN), 0),
]


@pytest.mark.parametrize(("peer", "flags", "items", "errno"), CHECKS)
def test_what_hello_asks_of_kinds_names_and_claims(
    bus: Bus, peer: FakePeer, flags: int, items: tuple[bytes, ...], errno: int
) -> None:
    file = bus.open(peer=peer)
    if errno:
        with fails(errno):
            file.hello(*items, flags=flags)
        assert not bus.core.connections
    else:
        file.hello(*items, flags=flags)


@pytest.mark.parametrize(
    ("flags", "items", "errno"),
    [
        (MONITOR, (), EOPNOTSUPP),
        (ACTIVATOR, (NAMED,), EPERM),
        (POLICY_HOLDER, (NAMED,), EPERM),
        (0, (SECLABEL,), EPERM),
        (0, (), 0),
    ],
)
def test_on_a_custom_endpoint_nobody_is_owner(
    bus: Bus, flags: int, items: tuple[bytes, ...], errno: int
) -> None:
    bus.endpoint()
    file = bus.open("1000-custom", ROOT)
    if errno:
        with fails(errno):
            file.hello(*items, flags=flags)
    else:
        file.hello(*items, flags=flags)
        assert not file.handle.connection.owner


def test_hello_hands_out_a_slice_that_holds_the_bloom_parameters(bus: Bus) -> None:
    client = bus.hello(free=False)
    offset, size = struct.unpack_from("=QQ", client.said, 64)
    assert (offset, size) == (0, 32)
    (parameter,) = parse_items(client.visible(offset, size))
    assert parameter == (I.BLOOM_PARAMETER, u64(64, 1))
    client.free(0)
    client.send(client)
    assert client.recv().offset == 0


def test_a_pool_is_sealed_once_it_is_in_use(bus: Bus) -> None:
    assert bus.hello().memory.sealed


@pytest.mark.parametrize(
    ("flags", "kept"), [(0, 0), (1, 1), (MONITOR, 8), (MONITOR | 1, 9), (ACTIVATOR | 1, 3)]
)
def test_hello_flags_are_told_as_given(bus: Bus, flags: int, kept: int) -> None:
    items = (NAMED,) if flags & ACTIVATOR else ()
    client = bus.special(0, *items, flags=flags)
    assert client.info(client.id).flags == kept


def test_a_hello_that_fails_is_seen_by_nobody(bus: Bus) -> None:
    watcher = bus.hello()
    bus.activator("com.example.a")
    watcher.match()
    with fails(EEXIST):
        bus.activator("com.example.a")
    with fails(EINVAL):
        bus.activator("com.example.b", access(1, 9))
    assert watcher.notifications() == []
    assert bus.owner_of("com.example.b") is None


def test_a_name_has_one_policy_whoever_holds_it(bus: Bus) -> None:
    bus.holder("com.example.a")
    with fails(EEXIST):
        bus.holder("com.example.a")
    with fails(EEXIST):
        bus.activator("com.example.a")
    bus.activator("com.example.b")
    with fails(EEXIST):
        bus.holder("com.example.b")
    bus.holder("com.example.*")


def test_policy_lines_of_ordinary_connections_and_monitors_are_ignored(bus: Bus) -> None:
    bus.hello(OWN)
    bus.monitor(send=0)
    assert bus.core.policy.names() == []


def test_a_failed_hello_gives_its_pool_back(bus: Bus) -> None:
    made: list[FakeMemory] = []

    def keep(size: int) -> FakeMemory:
        made.append(FakeMemory(size))
        return made[-1]

    bus.activator("com.example.a")
    file = File(bus.domain, f"{bus.name}/bus", bus.owner, keep)
    with fails(EEXIST):
        file.hello(name("com.example.a"), flags=ACTIVATOR)
    assert [memory.closed for memory in made] == [True]


# --- who pays for a connection


def space_of(bus: Bus) -> Share:
    """Address space for 16 small pools, of which a user may have three."""
    space = bus.domain.core.budget.addresses
    space.total, space.most = 16 * 4096, 3 * 4096
    return space


def test_pools_of_a_user_have_a_share_of_the_address_space(bus: Bus) -> None:
    space = space_of(bus)
    mine = [bus.hello(peer=FakePeer(2000), pool_size=4096, free=False) for _ in range(3)]
    with fails(ENOMEM):
        bus.hello(peer=FakePeer(2000), pool_size=4096)
    # Not by another of its connections either, nor as somebody else who pays for messages.
    assert space.taken(2000) == 3 * 4096
    bus.hello(peer=FakePeer(3000), pool_size=4096)
    # The mapping stays until the file is closed.
    mine[0].byebye()
    with fails(ENOMEM):
        bus.hello(peer=FakePeer(2000), pool_size=4096)
    mine[0].close()
    bus.hello(peer=FakePeer(2000), pool_size=4096)


def test_a_pool_that_is_closed_and_still_mapped_counts_as_a_connection(bus: Bus) -> None:
    space = space_of(bus)
    bus.domain.core.user(2000).n_connections = 1023
    client = bus.hello(peer=FakePeer(2000), pool_size=4096)
    client.memory.mapped = True
    memory = client.memory
    client.close()
    with fails(EMFILE):
        bus.hello(peer=FakePeer(2000), pool_size=4096)
    assert space.taken(2000) == 4096
    memory.unmap()
    assert space.taken(2000) == 0
    bus.hello(peer=FakePeer(2000), pool_size=4096)
    bus.domain.core.user(2000).n_connections -= 1023


def test_many_users_leave_address_space_to_root(bus: Bus) -> None:
    space = space_of(bus)
    for uid in range(2000, 2100):
        try:
            while True:
                bus.hello(peer=FakePeer(uid), pool_size=4096)
        except CommandError as error:
            assert errorcode[error.errno] == "ENOMEM"  # noqa: PT017
    assert sum(space.taken(uid) for uid in range(2000, 2100)) <= 12 * 4096
    for _ in range(4):
        bus.hello(peer=FakePeer(0, ipc_owner=True), pool_size=4096)


@pytest.mark.parametrize("fails_by", ["memory", "store", "quota"])
def test_a_hello_that_fails_gives_its_address_space_back(bus: Bus, fails_by: str) -> None:
    space = space_of(bus)
    peer = FakePeer(2000)
    if fails_by == "quota":
        bus.domain.core.user(2000).n_connections = 1024
    file = bus.open("bus", peer)
    if fails_by == "memory":
        file.handle.new_memory = no_memory
    argument = peer.put(hello(pool_size=4096), writable=fails_by != "store")
    with pytest.raises(CommandError):
        file.ioctl(Command.HELLO, argument)
    assert space.taken(2000) == 0
    bus.domain.core.user(2000).n_connections = 0


def test_connections_count_for_the_real_uid_at_open(bus: Bus) -> None:
    bus.hello(peer=FakePeer(7).become(euid=1000))
    assert bus.domain.core.user(7).n_connections == 1


def test_a_user_has_at_most_1024_connections(bus: Bus) -> None:
    bus.domain.core.user(2000).n_connections = 1023
    last = bus.hello(peer=FakePeer(2000))
    with fails(EMFILE):
        bus.hello(peer=FakePeer(2000))
    bus.hello()
    last.byebye()
    with fails(EMFILE):
        bus.hello(peer=FakePeer(2000))
    last.close()
    bus.hello(peer=FakePeer(2000))
    bus.domain.core.user(2000).n_connections -= 1023


def test_connections_of_a_custom_endpoint_count_for_it(bus: Bus) -> None:
    endpoint = bus.endpoint()
    core = endpoint.handle.endpoint
    assert core is not None
    core.user.n_connections = 1024
    bus.hello()
    with fails(EMFILE):
        Client(bus, endpoint="1000-custom")


def user_of(client: Client) -> int | None:
    return client.connection.user.uid


def test_a_privileged_opener_may_have_another_user_pay(bus: Bus) -> None:
    claim = item(I.CREDS, u64(*range(70, 78)))
    assert user_of(bus.hello(claim, peer=FakePeer(0, ipc_owner=True))) == 70
    assert user_of(bus.hello(claim)) == 1000, "being the bus's owner does not suffice"
    for other in (PIDS, SECLABEL):
        assert user_of(bus.hello(other, peer=FakePeer(0, ipc_owner=True))) == 0
    unset = item(I.CREDS, u64(*[0xFFFFFFFF] * 8))
    assert user_of(bus.hello(unset, peer=FakePeer(0, ipc_owner=True))) == 0


# --- ENDPOINT_UPDATE


def test_an_endpoints_policy_has_many_names_and_wildcards(bus: Bus) -> None:
    endpoint = bus.endpoint()
    endpoint.endpoint_update(
        *(part for n in range(300) for part in (name(f"com.example.n{n}"), OWN)),
        name("com.example.*"),
        OWN,
    )
    core = endpoint.handle.endpoint
    assert core is not None
    assert len(core.policy.names()) == 301
    endpoint.endpoint_update()
    assert core.policy.names() == []


def test_an_endpoints_policy_acts_at_once_on_those_who_are_there(bus: Bus) -> None:
    endpoint = bus.endpoint()
    guest = Client(bus, endpoint="1000-custom", peer=FakePeer(0))
    with fails(EPERM):
        guest.acquire("com.example.a")
    bus.holder("com.example.a", OWN)
    with fails(EPERM):
        guest.acquire("com.example.a")
    endpoint.endpoint_update(name("com.example.a"), OWN)
    guest.acquire("com.example.a")


def test_an_endpoints_policy_names_each_name_once(bus: Bus) -> None:
    endpoint = bus.endpoint("1000-custom", name("com.example.a"))
    with fails(EEXIST):
        endpoint.endpoint_update(name("com.example.b"), name("com.example.b"))
    core = endpoint.handle.endpoint
    assert core is not None
    assert core.policy.names() == [b"com.example.a"]
