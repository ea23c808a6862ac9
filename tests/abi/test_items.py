# SPDX-License-Identifier: LGPL-2.1-or-later
"""The walk over a chain of items, and what each type of item may hold."""

import struct
from errno import EBADF, EINVAL, ENAMETOOLONG

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdbusfs.abi import items
from kdbusfs.abi.errors import CommandError
from kdbusfs.abi.items import ItemRule, item_rules, walk
from kdbusfs.abi.numbers import ItemType
from kdbusfs.abi.specs import COMMAND_SPECS, MESSAGE
from kdbusfs.abi.valid_names import is_policy_name, is_sysname, is_well_known

I = ItemType  # noqa: E741
START = 24
"""Where the chains begin in these tests: behind a struct kdbus_cmd."""


def raw(type_: int, payload: bytes = b"") -> bytes:
    """An item without its padding."""
    return struct.pack("=QQ", 16 + len(payload), type_) + payload


def padded(type_: int, payload: bytes = b"", pad: bytes = b"\xaa") -> bytes:
    return raw(type_, payload) + pad * (-len(payload) & 7)


def walked(chain: bytes, accepted: dict[int, ItemRule]) -> list[tuple[int, bytes]]:
    data = b"\xff" * START + chain
    found = walk(data, START, len(data), accepted)
    return [(i.type, data[i.start : i.start + i.size]) for i in found]


def errno_of(chain: bytes, accepted: dict[int, ItemRule]) -> int:
    try:
        walked(chain, accepted)
    except CommandError as error:
        return error.errno
    return 0


ANY = item_rules(repeated=(I.BLOOM_MASK, I.ID), single=(I.NAME,))


def test_an_empty_chain_has_no_items() -> None:
    assert walked(b"", ANY) == []


def test_items_are_found_in_their_order_with_payloads_unpadded() -> None:
    chain = padded(I.BLOOM_MASK, b"abc") + padded(I.ID, bytes(8)) + raw(I.BLOOM_MASK, b"x")
    assert walked(chain, ANY) == [(I.BLOOM_MASK, b"abc"), (I.ID, bytes(8)), (I.BLOOM_MASK, b"x")]


@pytest.mark.parametrize("n_pad", range(8))
def test_the_last_item_comes_with_or_without_its_padding(n_pad: int) -> None:
    found = walked(raw(I.BLOOM_MASK, b"x") + bytes(n_pad), ANY)
    assert found == [(I.BLOOM_MASK, b"x")]


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(bytes(1), id="one stray byte"),
        pytest.param(bytes(15), id="less than a header"),
        pytest.param(struct.pack("=QQ", 15, I.ID), id="size below a header"),
        pytest.param(struct.pack("=QQ", 0, I.ID), id="size 0"),
        pytest.param(struct.pack("=QQ", 17, I.BLOOM_MASK), id="ends behind the chain"),
        pytest.param(struct.pack("=QQ", (1 << 64) - 1, I.BLOOM_MASK), id="size 2^64-1"),
        pytest.param(struct.pack("=QQ", (1 << 64) - 8, I.BLOOM_MASK), id="size 2^64-8"),
        pytest.param(struct.pack("=QQ", 1 << 63, I.BLOOM_MASK), id="size 2^63"),
        pytest.param(raw(I.BLOOM_MASK) + bytes(8), id="padding of a whole word"),
        pytest.param(padded(I.BLOOM_MASK, b"x") + bytes(1), id="a byte behind the padding"),
        pytest.param(padded(I.DST_NAME, b"a.b\0"), id="type of another command"),
        pytest.param(padded(0, b""), id="type 0"),
        pytest.param(padded(0x7777, b""), id="unknown type"),
        pytest.param(padded(I.NAME, b"a\0") * 2, id="single item twice"),
        pytest.param(padded(I.NEGOTIATE) * 2, id="NEGOTIATE twice"),
    ],
)
def test_a_malformed_chain_is_refused(chain: bytes) -> None:
    assert errno_of(chain, ANY) == EINVAL


def test_the_first_fault_in_the_chain_wins() -> None:
    memfd = padded(I.PAYLOAD_MEMFD, struct.pack("=QQiI", 0, 1, -1, 0))
    assert errno_of(memfd + raw(0x7777), MESSAGE.items) == EBADF
    assert errno_of(raw(0x7777) + memfd, MESSAGE.items) == EINVAL


def test_contents_are_validated_before_repetition() -> None:
    first = padded(I.MAKE_NAME, b"1-a\0")
    assert errno_of(first + padded(I.MAKE_NAME, b"a" * 64 + b"\0"), MAKE.items) == ENAMETOOLONG


MAKE = COMMAND_SPECS[0x40189500]
STRING = [
    (b"a\0", 0),
    (b"\0", 0),
    (b"", EINVAL),
    (b"a", EINVAL),
    (b"a\0b\0", EINVAL),
    (b"a\0\0", EINVAL),
]


def exactly(n: int) -> list[tuple[bytes, int]]:
    return [(bytes(n), 0), (bytes(n - 1), EINVAL), (bytes(n + 1), EINVAL), (b"", EINVAL)]


SYSNAME = [
    (b"a\0", 0),
    (b"a-._Z9\0", 0),
    (b"a" * 63 + b"\0", 0),
    (b"a" * 64 + b"\0", ENAMETOOLONG),
    (b"a" * 100, ENAMETOOLONG),
    (b"\0", EINVAL),
    (b"", EINVAL),
    (b"a", EINVAL),
    (b"ab", EINVAL),
    (b"a\0\0", EINVAL),
    (b"a\0b\0", EINVAL),
    (b"-a\0", EINVAL),
    (b"a-\0", EINVAL),
    (b".a\0", EINVAL),
    (b"a.\0", EINVAL),
    (b"a b\0", EINVAL),
    (b"a/b\0", EINVAL),
    (b"\xe9t\xe9\0", EINVAL),
]
NAME_CHANGE = [
    (bytes(32), 0),
    (bytes(31), EINVAL),
    (b"", EINVAL),
    (bytes(32) + b"a.b\0", 0),
    (bytes(32) + b"\0", 0),
    (bytes(32) + b"a.b", EINVAL),
    (bytes(32) + b"a\0b\0", EINVAL),
]


def memfd_payload(size: int, fd: int) -> bytes:
    return struct.pack("=QQiI", 0, size, fd, 0)


CONTENTS: dict[ItemType, list[tuple[bytes, int]]] = {
    I.NEGOTIATE: [(b"", 0), (bytes(8), 0), (bytes(24), 0), (bytes(7), EINVAL), (bytes(9), EINVAL)],
    I.PAYLOAD_VEC: [
        (struct.pack("=QQ", 1, 0), 0),
        (struct.pack("=QQ", 0, 8), EINVAL),
        (struct.pack("=Q", 1), EINVAL),
        (struct.pack("=QQQ", 1, 1, 1), EINVAL),
    ],
    I.PAYLOAD_MEMFD: [
        (memfd_payload(1, 0), 0),
        (memfd_payload(0, 0), EINVAL),
        (memfd_payload(0, -1), EINVAL),
        (memfd_payload(1, -1), EBADF),
        (memfd_payload(1, 0)[:-4], EINVAL),
        (memfd_payload(1, 0) + bytes(4), EINVAL),
    ],
    I.FDS: [(b"", 0), (bytes(4), 0), (bytes(12), 0), (bytes(6), EINVAL)],
    I.CANCEL_FD: exactly(4),
    I.BLOOM_PARAMETER: exactly(16),
    I.BLOOM_FILTER: [(bytes(8), 0), (bytes(9), 0), (bytes(7), EINVAL), (b"", EINVAL)],
    I.BLOOM_MASK: [(b"", 0), (bytes(3), 0)],
    I.MAKE_NAME: SYSNAME,
    I.CONN_DESCRIPTION: SYSNAME,
    I.ATTACH_FLAGS_SEND: exactly(8),
    I.ATTACH_FLAGS_RECV: exactly(8),
    I.ID: exactly(8),
    I.DST_ID: exactly(8),
    I.CREDS: exactly(64),
    I.PIDS: exactly(24),
    I.NAME: STRING,
    I.DST_NAME: STRING,
    I.SECLABEL: STRING,
    I.POLICY_ACCESS: exactly(24),
    I.NAME_ADD: NAME_CHANGE,
    I.NAME_REMOVE: NAME_CHANGE,
    I.NAME_CHANGE: NAME_CHANGE,
    I.ID_ADD: exactly(16),
    I.ID_REMOVE: exactly(16),
}


@pytest.mark.parametrize(
    ("type_", "payload", "errno"),
    [(t, payload, errno) for t, cases in CONTENTS.items() for payload, errno in cases],
    ids=lambda value: value.name if isinstance(value, ItemType) else repr(value)[:24],
)
def test_an_item_holds_what_its_type_asks_for(type_: ItemType, payload: bytes, errno: int) -> None:
    assert errno_of(padded(type_, payload), item_rules(single=(type_,))) == errno


def test_every_item_a_command_takes_is_in_the_table() -> None:
    taken = {t for spec in (*COMMAND_SPECS.values(), MESSAGE) for t in spec.items}
    assert taken == set(CONTENTS)


# --- the walk against a plain reading of the rules


def reference(chain: bytes, accepted: dict[int, ItemRule]) -> list[tuple[int, bytes]] | None:
    """The items of *chain*, or None if it is malformed; written for plainness."""
    found: list[tuple[int, bytes]] = []
    cursor = 0
    while cursor < len(chain):
        header = chain[cursor : cursor + 16]
        if len(header) < 16:
            return None
        size = int.from_bytes(header[:8], "little")
        type_ = int.from_bytes(header[8:], "little")
        if size < 16 or cursor + size > len(chain) or type_ not in accepted:
            return None
        payload = chain[cursor + 16 : cursor + size]
        if type_ in (I.ID, I.DST_ID) and len(payload) != 8:
            return None
        if type_ == I.NEGOTIATE and len(payload) % 8:
            return None
        if type_ == I.NAME and (not payload or payload.find(0) != len(payload) - 1):
            return None
        if not accepted[type_].repeatable and any(t == type_ for t, _ in found):
            return None
        found.append((type_, payload))
        cursor += -(-size // 8) * 8
    return found if cursor == -(-len(chain) // 8) * 8 else None


plausible_items = st.builds(
    lambda type_, payload, lie, pad: (
        struct.pack("=QQ", max(0, 16 + len(payload) + lie), type_)
        + payload
        + bytes(-len(payload) & 7 if pad else 0)
    ),
    st.sampled_from([I.NEGOTIATE, I.BLOOM_MASK, I.ID, I.NAME, I.FDS, 0x7777]),
    st.one_of(
        st.binary(max_size=20),
        st.just(b"a.b\0"),
        st.integers(0, 3).map(lambda n: bytes(8 * n)),
    ),
    st.sampled_from([0, 0, 0, 0, 0, 1, -1, 8, -8, 1 << 40]),
    st.sampled_from([True, True, True, False]),
)
chains = st.one_of(
    st.binary(max_size=100),
    st.builds(
        lambda parts, cut: b"".join(parts)[: -cut or None],
        st.lists(plausible_items, max_size=6),
        st.integers(0, 9),
    ),
)


@given(chains)
def test_any_bytes_are_walked_as_a_plain_reading_would(chain: bytes) -> None:
    expected = reference(chain, ANY)
    if expected is None:
        with pytest.raises(CommandError) as caught:
            walked(chain, ANY)
        assert caught.value.errno == EINVAL
    else:
        assert walked(chain, ANY) == expected


@given(chains, st.binary(min_size=1, max_size=40))
def test_what_lies_behind_the_chain_is_never_looked_at(chain: bytes, behind: bytes) -> None:
    def walk_in(data: bytes) -> object:
        try:
            return walk(data, 0, len(chain), ANY)
        except CommandError as error:
            return error.errno

    assert walk_in(chain + behind) == walk_in(chain)


@given(st.lists(st.tuples(st.sampled_from([I.BLOOM_MASK]), st.binary(max_size=30)), max_size=8))
def test_what_was_built_is_what_is_walked(parts: list[tuple[ItemType, bytes]]) -> None:
    chain = b"".join(items.build(t, payload) for t, payload in parts)
    assert len(chain) % 8 == 0
    assert walked(chain, ANY) == parts


def test_a_built_string_ends_with_its_only_nul() -> None:
    assert items.build_string(I.NAME, b"a.b") == raw(I.NAME, b"a.b\0") + bytes(4)


# --- names


@pytest.mark.parametrize(
    "name", ["a.b", "a.b.c", "_a._b", "-a.-b", "a1.b2", "A-b.c_d", "a" * 127 + "." + "b" * 127]
)
def test_a_well_known_name(name: str) -> None:
    assert is_well_known(name.encode())
    assert is_policy_name(name.encode())


@pytest.mark.parametrize(
    "name",
    ["", "a", ".", "a.", ".a", "a..b", ".a.b", "a.b.", "1a.b", "a.1b", "a b.c", "a.b\n", "a/b.c",
     "a.*", "*", "a.b*", "é.b", "a" * 128 + "." + "b" * 127],
)  # fmt: skip
def test_not_a_well_known_name(name: str) -> None:
    assert not is_well_known(name.encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a.*", True),
        ("a.b.*", True),
        ("*", False),
        (".*", False),
        ("a.b*", False),
        ("a*.b", False),
        ("a.*.b", False),
        ("a.*.*", False),
        ("*.a", False),
        ("1.*", False),
        ("a.**", False),
        ("a" * 253 + ".*", True),
        ("a" * 254 + ".*", False),
    ],
)
def test_a_wildcard_is_the_whole_last_element(name: str, valid: bool) -> None:
    assert is_policy_name(name.encode()) == valid


@pytest.mark.parametrize("name", [b"a\n", b"a.b\n"])
def test_a_newline_is_in_no_name(name: bytes) -> None:
    assert not is_sysname(name)
    assert not is_well_known(name)
