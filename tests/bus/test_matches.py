# SPDX-License-Identifier: LGPL-2.1-or-later
"""Matches: which rules pass what, and that the index finds what asking every match would."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_client.building import access, bloom, item, mask, name, u64
from bus.fakes import FakePeer
from bus.harness import Bus, Client
from kdbusfs.abi.numbers import (
    ID_ANY,
    AttachFlag,
    ItemType,
    NameFlag,
    PolicyAccess,
    PolicyType,
)
from kdbusfs.bus.match import Change, Match, MatchIndex, Rule, Signal

I = ItemType  # noqa: E741
A, B = "com.example.a", "com.example.b"


def id_rule(type_: int, id_: int) -> bytes:
    return item(type_, u64(id_, 0xFF) if type_ in (I.ID_ADD, I.ID_REMOVE) else u64(id_))


def name_rule(type_: int, old: int, new: int, string: str | None = None) -> bytes:
    text = b"" if string is None else string.encode() + b"\0"
    return item(type_, u64(old, 0xFF, new, 0xFF) + text)


def hears(client: Client) -> bool:
    return bool(client.inbox())


# --- rules for messages


@pytest.mark.parametrize(
    ("filter_", "wanted", "passes"),
    [
        ([], [], True),
        ([1, 2], [], True),
        ([1, 2], [1], True),
        ([1, 2], [1, 2], True),
        ([1], [1, 2], False),
        ([], [511], False),
        ([511], [511], True),
        (range(512), range(512), True),
        ([], range(512), False),
        ([*range(511)], range(512), False),
    ],
)
@pytest.mark.also_mounted
def test_the_bits_of_the_mask_must_all_be_in_the_filter(
    bus: Bus, filter_: list[int], wanted: list[int], passes: bool
) -> None:
    client = bus.hello()
    client.match(mask(wanted))
    client.broadcast(filter_=bloom(filter_))
    assert hears(client) == passes


@pytest.mark.parametrize(
    ("generation", "used"), [(0, 0), (1, 1), (2, 2), (3, 2), ((1 << 64) - 1, 2)]
)
@pytest.mark.also_mounted
def test_a_mask_has_a_part_for_each_generation_and_the_last_serves_the_rest(
    bus: Bus, generation: int, used: int
) -> None:
    clients = []
    for n in range(3):
        parts: list[list[int]] = [[9], [9], [9]]
        parts[n] = [1]
        clients.append(bus.hello())
        clients[n].match(mask(*parts))
    clients[0].broadcast(filter_=bloom([1], generation))
    assert [hears(c) for c in clients] == [n == used for n in range(3)]


@pytest.mark.parametrize("size", [8, 4096])
def test_bloom_filters_have_the_size_of_the_bus(bus: Bus, size: int) -> None:
    client = bus.domain.make_bus("other", bloom_size=size).hello()
    client.match(mask([size * 8 - 1], size=size))
    client.broadcast(filter_=bloom([size * 8 - 1], size=size))
    client.broadcast(filter_=bloom([0], size=size))
    assert len(client.inbox()) == 1


@pytest.mark.also_mounted
def test_a_rule_for_the_sender(bus: Bus) -> None:
    one, two, client = bus.hello(), bus.hello(), bus.hello()
    client.match(id_rule(I.ID, one.id))
    one.broadcast(cookie=1)
    two.broadcast(cookie=2)
    assert client.cookies() == [1]
    client.match(id_rule(I.ID, ID_ANY))
    two.broadcast(cookie=3)
    assert client.cookies() == [3]


@pytest.mark.parametrize(
    ("wanted", "heard"),
    [("any", ["broadcast", "id", "name"]), ("own", ["id"]), ("zero", ["name"]), ("none", [])],
)
@pytest.mark.also_mounted
def test_a_rule_for_the_destination_looks_at_the_field_as_sent(
    bus: Bus, wanted: str, heard: list[str]
) -> None:
    sender, client = bus.hello(), bus.hello()
    client.acquire(A)
    ids = {"any": ID_ANY, "own": client.id, "zero": 0, "none": 12345}
    client.match(id_rule(I.DST_ID, ids[wanted]))
    sender.broadcast(cookie=1)
    sender.signal(client, cookie=2)
    sender.signal(A, cookie=3)
    names = {1: "broadcast", 2: "id", 3: "name"}
    assert [names[c] for c in client.cookies()] == heard


@pytest.mark.also_mounted
def test_a_rule_for_a_name_is_about_its_owner_now(bus: Bus) -> None:
    owner, queued, client = bus.hello(), bus.hello(), bus.hello()
    owner.acquire(A)
    queued.acquire(A, NameFlag.QUEUE)
    client.match(name(A))
    queued.broadcast(cookie=1)
    owner.broadcast(cookie=2)
    owner.release(A)
    owner.broadcast(cookie=3)
    queued.broadcast(cookie=4)
    assert client.cookies() == [2, 4]


@pytest.mark.also_mounted
def test_all_rules_of_a_match_and_any_match(bus: Bus) -> None:
    sender, client = bus.hello(), bus.hello()
    client.match(mask([1]), mask([2]), id_rule(I.ID, sender.id))
    client.broadcast(cookie=1, filter_=bloom([1, 2]))
    sender.broadcast(cookie=2, filter_=bloom([1]))
    sender.broadcast(cookie=3, filter_=bloom([1, 2]))
    assert client.cookies() == [3]
    client.match(id_rule(I.ID, client.id), mask([1]))
    client.match(id_rule(I.ID, client.id))
    client.broadcast(cookie=4, filter_=bloom([1, 2]))
    assert client.cookies() == [4], "once, however many matches pass"


@pytest.mark.also_mounted
def test_a_match_without_rules_passes_everything(bus: Bus) -> None:
    client = bus.hello()
    client.match()
    client.broadcast(filter_=bloom(range(512)))
    client.acquire(A)
    bus.hello()
    assert [bool(m.src_id) for m in client.inbox()] == [True, False, False]


RULES = {
    "all": b"",
    "id": id_rule(I.ID, ID_ANY),
    "dst_id": id_rule(I.DST_ID, ID_ANY),
    "name": name(A),
    "mask": mask([]),
    "id_add": id_rule(I.ID_ADD, ID_ANY),
    "id_remove": id_rule(I.ID_REMOVE, ID_ANY),
    "name_add": name_rule(I.NAME_ADD, ID_ANY, ID_ANY),
    "name_remove": name_rule(I.NAME_REMOVE, ID_ANY, ID_ANY),
    "name_change": name_rule(I.NAME_CHANGE, ID_ANY, ID_ANY),
}


@pytest.mark.also_mounted
def test_each_rule_is_about_one_kind_of_message(bus: Bus) -> None:
    clients = {}
    for kind, rule in RULES.items():
        clients[kind] = bus.hello()
        clients[kind].match(rule)
    one, two = bus.hello(), bus.hello()
    for client in clients.values():
        client.inbox()
    newcomer = bus.hello()
    assert [k for k, c in clients.items() if hears(c)] == ["all", "id_add"]
    newcomer.close()
    assert [k for k, c in clients.items() if hears(c)] == ["all", "id_remove"]
    one.acquire(A)
    assert [k for k, c in clients.items() if hears(c)] == ["all", "name_add"]
    two.acquire(A, NameFlag.QUEUE)
    one.broadcast()
    assert [k for k, c in clients.items() if hears(c)] == ["all", "id", "dst_id", "name", "mask"]
    one.release(A)
    assert [k for k, c in clients.items() if hears(c)] == ["all", "name_change"]
    two.release(A)
    assert [k for k, c in clients.items() if hears(c)] == ["all", "name_remove"]


@pytest.mark.parametrize("other", [k for k in RULES if k not in ("all", "id_add")])
@pytest.mark.also_mounted
def test_a_match_does_not_mix_what_can_not_both_be_true(bus: Bus, other: str) -> None:
    client = bus.hello()
    client.match(RULES["id_add"], RULES[other])
    client.acquire(A)
    newcomer = bus.hello()
    newcomer.broadcast()
    newcomer.close()
    client.release(A)
    assert client.inbox() == []


# --- rules for notifications


@pytest.mark.parametrize(("delta", "heard"), [(0, True), (1, False), (None, True)])
@pytest.mark.also_mounted
def test_a_rule_for_an_id_that_comes_or_goes(bus: Bus, delta: int | None, heard: bool) -> None:
    client = bus.hello()
    next_id = client.id + 1
    for type_ in (I.ID_ADD, I.ID_REMOVE):
        client.match(id_rule(type_, ID_ANY if delta is None else next_id + delta))
    bus.hello().close()
    assert len(client.inbox()) == (2 if heard else 0)


NAME_RULES = [
    (I.NAME_ADD, "any", "any", None, True),
    (I.NAME_ADD, "zero", "one", A, True),
    (I.NAME_ADD, "any", "one", A, True),
    (I.NAME_ADD, "any", "two", None, False),
    (I.NAME_ADD, "one", "any", None, False),
    (I.NAME_ADD, "any", "any", B, False),
    (I.NAME_ADD, "any", "any", "", False),
    (I.NAME_CHANGE, "one", "two", A, True),
    (I.NAME_CHANGE, "any", "two", None, True),
    (I.NAME_CHANGE, "two", "one", None, False),
    (I.NAME_CHANGE, "zero", "any", None, False),
    (I.NAME_CHANGE, "any", "any", B, False),
    (I.NAME_REMOVE, "two", "zero", A, True),
    (I.NAME_REMOVE, "any", "any", None, True),
    (I.NAME_REMOVE, "any", "two", None, False),
    (I.NAME_REMOVE, "one", "any", None, False),
    (I.NAME_REMOVE, "any", "any", B, False),
]


@pytest.mark.parametrize(("type_", "old", "new", "string", "heard"), NAME_RULES)
@pytest.mark.also_mounted
def test_a_rule_for_a_name_that_changes_hands(
    bus: Bus, type_: int, old: str, new: str, string: str | None, heard: bool
) -> None:
    client, one, two = bus.hello(), bus.hello(), bus.hello()
    ids = {"any": ID_ANY, "zero": 0, "one": one.id, "two": two.id}
    client.match(name_rule(type_, ids[old], ids[new], string))
    one.acquire(A)
    two.acquire(A, NameFlag.QUEUE)
    one.release(A)
    two.release(A)
    assert [n[0] for n in client.notifications()] == ([type_] if heard else [])


@pytest.mark.also_mounted
def test_whoever_causes_a_notification_gets_it_too(bus: Bus) -> None:
    client = bus.hello()
    client.match()
    client.acquire(A)
    assert [n[0] for n in client.notifications()] == [I.NAME_ADD]


# --- who gets what


def test_monitors_see_everything_without_a_match(bus: Bus) -> None:
    monitor, second = bus.monitor(), bus.monitor()
    client, stranger = bus.hello(), bus.hello(peer=FakePeer(2000))
    client.acquire(A)
    client.broadcast(cookie=1)
    client.send(stranger, cookie=2)
    client.signal(stranger, cookie=3)
    client.request(stranger, cookie=4)
    stranger.reply(client, 4, cookie=5)
    client.request(stranger, cookie=6)
    stranger.close()
    seen = [(m.src_id, m.cookie or m.notification[0]) for m in monitor.inbox()]
    assert seen == [
        (0, I.ID_ADD),
        (0, I.ID_ADD),
        (0, I.NAME_ADD),
        *((client.id, n) for n in (1, 2, 3, 4)),
        (stranger.id, 5),
        (client.id, 6),
        (0, I.REPLY_DEAD),
        (0, I.ID_REMOVE),
    ]
    assert len(second.inbox()) == len(seen)


@pytest.mark.also_mounted
def test_monitors_are_heard_and_seen_by_nobody(bus: Bus) -> None:
    client = bus.hello()
    client.match()
    monitor = bus.monitor()
    assert monitor.id not in [entry[0] for entry in client.entries(0xF)]
    monitor.close()
    assert client.inbox() == []


@pytest.mark.also_mounted
def test_monitors_get_their_own_metadata_and_count_their_losses(bus: Bus) -> None:
    client = bus.hello()
    monitor = bus.monitor(recv=AttachFlag.CREDS, pool_size=4096)
    client.send(client)
    client.send(client, data=bytes(4096))
    got = monitor.recv()
    assert (got.types, got.lost) == ([I.CREDS], 1)
    assert [m.types for m in client.inbox()] == [[], [I.PAYLOAD_OFF]]


def test_name_notifications_on_a_custom_endpoint_are_for_those_who_may_see_the_name(
    bus: Bus,
) -> None:
    see = access(PolicyType.WORLD, PolicyAccess.SEE)
    bus.endpoint("1000-custom", name(A), see)
    guest, client = Client(bus, endpoint="1000-custom"), bus.hello()
    guest.match()
    client.acquire(A)
    client.acquire(B)
    newcomer = bus.hello()
    newcomer.close()
    assert [n[:2] for n in guest.notifications()] == [
        (I.NAME_ADD, A),
        (I.ID_ADD, newcomer.id),
        (I.ID_REMOVE, newcomer.id),
    ]


# --- the index against asking every rule of every match


def is_true_of_signal(rule: Rule, signal: Signal) -> bool:
    """Rule for rule, as kdbus.match(7) says it."""
    if rule.type == I.BLOOM_MASK:
        wanted = rule.masks[min(signal.generation, len(rule.masks) - 1)]
        return signal.bloom & wanted == wanted
    if rule.type == I.ID:
        return rule.id in (signal.src_id, ID_ANY)
    if rule.type == I.NAME:
        return rule.name in signal.names
    return rule.type == I.DST_ID and rule.id in (signal.dst_id, ID_ANY)


def is_true_of_change(rule: Rule, change: Change) -> bool:
    if rule.type != change.type:
        return False
    if rule.type in (I.ID_ADD, I.ID_REMOVE):
        return rule.id in (change.id, ID_ANY)
    return (
        rule.old_id in (change.old_id, ID_ANY)
        and rule.id in (change.new_id, ID_ANY)
        and rule.name in (None, change.name)
    )


IDS = st.sampled_from([1, 2, 3, ID_ANY])
NAMES = st.sampled_from([b"a.a", b"b.b", b""])
MASKS = st.integers(0, 15).map(lambda bits: bits << 4)
rules = st.one_of(
    st.builds(Rule, st.sampled_from([int(I.ID), int(I.DST_ID)]), IDS),
    st.builds(lambda n: Rule(int(I.NAME), name=n), NAMES),
    st.builds(
        lambda masks: Rule(int(I.BLOOM_MASK), masks=tuple(masks)),
        st.lists(MASKS, min_size=1, max_size=3),
    ),
    st.builds(Rule, st.sampled_from([int(I.ID_ADD), int(I.ID_REMOVE)]), IDS),
    st.builds(
        Rule,
        st.sampled_from([int(I.NAME_ADD), int(I.NAME_REMOVE), int(I.NAME_CHANGE)]),
        IDS,
        IDS,
        st.one_of(st.none(), NAMES),
    ),
)
signals = st.builds(
    Signal,
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, ID_ANY]),
    st.sets(NAMES, max_size=2),
    MASKS,
    st.integers(0, 3),
)
changes = st.one_of(
    st.builds(Change, st.sampled_from([int(I.ID_ADD), int(I.ID_REMOVE)]), st.integers(1, 3)),
    st.builds(
        Change,
        st.sampled_from([int(I.NAME_ADD), int(I.NAME_REMOVE), int(I.NAME_CHANGE)]),
        st.just(0),
        st.integers(0, 3),
        st.integers(0, 3),
        NAMES,
    ),
)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(rules, max_size=3)), max_size=12),
    st.sets(st.integers(0, 11)),
    st.lists(signals, max_size=4),
    st.lists(changes, max_size=4),
)
def test_the_index_finds_what_asking_every_match_would(
    filed: list[tuple[int, list[Rule]]],
    gone: set[int],
    asked: list[Signal],
    happened: list[Change],
) -> None:
    index = MatchIndex()
    owners = [object() for _ in range(4)]
    matches = [Match(owners[who], n, found) for n, (who, found) in enumerate(filed)]  # type: ignore[arg-type]
    rules_of = {match: found for match, (_, found) in zip(matches, filed, strict=True)}
    for match in matches:
        index.add(match)
    index.check(matches)
    for match in matches:
        if match.cookie in gone:
            index.remove(match)
    left = [m for m in matches if m.cookie not in gone]
    index.check(left)
    for signal in asked:
        found = index.takers_of_signal(signal)
        assert len(found) == len(set(found))
        assert set(found) == {
            m.connection for m in left if all(is_true_of_signal(r, signal) for r in rules_of[m])
        }
    for change in happened:
        taken = index.takers_of_change(change)
        assert len(taken) == len(set(taken))
        assert set(taken) == {
            m.connection for m in left if all(is_true_of_change(r, change) for r in rules_of[m])
        }
    for match in left:
        index.remove(match)
    index.check([])


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(int(I.ID), 1), Rule(int(I.ID), 2)],
        [Rule(int(I.DST_ID), 1), Rule(int(I.DST_ID), 2)],
        [Rule(int(I.ID), 1), Rule(int(I.ID_ADD), 1)],
        [Rule(int(I.ID_ADD), 1), Rule(int(I.ID_REMOVE), 1)],
        [Rule(int(I.NAME_ADD), ID_ANY, ID_ANY, b"a.a"), Rule(int(I.NAME_ADD), 1, 1, b"b.b")],
    ],
)
def test_rules_that_contradict_each_other_pass_nothing_and_are_filed_nowhere(
    rules: list[Rule],
) -> None:
    index = MatchIndex()
    match = Match(object(), 0, rules)  # type: ignore[arg-type]
    index.add(match)
    assert match.keys == ()
    assert not match.passes_signal(Signal(1, 1, [], 0, 0))
    assert not match.passes_change(Change(int(I.ID_ADD), 1))


def test_what_a_match_costs_does_not_grow_with_its_rules() -> None:
    many = [Rule(int(I.BLOOM_MASK), masks=(1 << n % 64,)) for n in range(1000)]
    few = [Rule(int(I.BLOOM_MASK), masks=((1 << 64) - 1,))]
    one, other = Match(object(), 0, many), Match(object(), 0, few)  # type: ignore[arg-type]
    assert one.masks == other.masks == ((1 << 64) - 1,)
    assert one.size == other.size


def test_a_mask_of_many_generations_takes_few_places_in_the_index() -> None:
    index = MatchIndex()
    masks = tuple(1 << n for n in range(512))
    match = Match(object(), 0, [Rule(int(I.BLOOM_MASK), masks=masks)])  # type: ignore[arg-type]
    index.add(match)
    assert len(match.keys) == 1
    assert index.takers_of_signal(Signal(1, ID_ANY, [], 1 << 7, 7)) == [match.connection]
    assert index.takers_of_signal(Signal(1, ID_ANY, [], 1 << 7, 8)) == []


def test_bits_are_numbered_from_the_lowest_of_the_first_byte() -> None:
    assert bloom([0, 15])[24:27] == b"\x01\x80\x00"
    assert struct.unpack_from("=Q", bloom([], 7), 16) == (7,)
