# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a command's argument is read, validated, negotiated and written back."""

import struct
from errno import EAGAIN, EBADSLT, EEXIST, EFAULT, EINVAL, EMSGSIZE, ENXIO, ESRCH

import pytest

from abi_client.building import (
    GARBAGE,
    NEGOTIATE,
    bloom,
    bloom_parameter,
    command,
    hello,
    item,
    mask,
    memfd,
    message,
    name,
    send_command,
    text,
    u64,
    vec,
)
from abi_client.building import fds as fds_item
from abi_client.verbs import return_flags
from bus.fakes import FakePeer
from bus.harness import Bus, File, fails
from kdbusfs.abi.numbers import ATTACH_ALL, Command, ItemType

C, I = Command, ItemType  # noqa: E741

WORLD = u64(3, 1, 0)
ITEMS = {
    I.NEGOTIATE: item(I.NEGOTIATE),
    I.PAYLOAD_VEC: vec(0, 8),
    I.PAYLOAD_MEMFD: memfd(0, 8),
    I.FDS: fds_item(),
    I.CANCEL_FD: item(I.CANCEL_FD, bytes(4)),
    I.BLOOM_PARAMETER: bloom_parameter(),
    I.BLOOM_FILTER: bloom(),
    I.BLOOM_MASK: mask([]),
    I.DST_NAME: text(I.DST_NAME, "com.example.a"),
    I.MAKE_NAME: text(I.MAKE_NAME, "1000-new"),
    I.ATTACH_FLAGS_SEND: item(I.ATTACH_FLAGS_SEND, u64(1)),
    I.ATTACH_FLAGS_RECV: item(I.ATTACH_FLAGS_RECV, u64(1)),
    I.ID: item(I.ID, u64(1)),
    I.NAME: name("com.example.a"),
    I.DST_ID: item(I.DST_ID, u64(1)),
    I.CREDS: item(I.CREDS, u64(*[1000] * 8)),
    I.PIDS: item(I.PIDS, u64(0, 0, 0)),
    I.SECLABEL: text(I.SECLABEL, "label"),
    I.CONN_DESCRIPTION: text(I.CONN_DESCRIPTION, "description"),
    I.POLICY_ACCESS: item(I.POLICY_ACCESS, WORLD),
    I.NAME_ADD: item(I.NAME_ADD, bytes(32)),
    I.NAME_REMOVE: item(I.NAME_REMOVE, bytes(32)),
    I.NAME_CHANGE: item(I.NAME_CHANGE, bytes(32)),
    I.ID_ADD: item(I.ID_ADD, bytes(16)),
    I.ID_REMOVE: item(I.ID_REMOVE, bytes(16)),
}
"""One well-formed item of each type that users give."""

CASES = {
    # command: (bytes between return_flags and items, allowed flags, {item: repeatable}, mandatory)
    C.BUS_MAKE: (0, 3, {I.MAKE_NAME: 0, I.BLOOM_PARAMETER: 0, I.ATTACH_FLAGS_SEND: 0},
                 {I.MAKE_NAME, I.BLOOM_PARAMETER}),
    C.ENDPOINT_MAKE: (0, 3, {I.MAKE_NAME: 0}, {I.MAKE_NAME}),
    C.ENDPOINT_UPDATE: (0, 0, {I.NAME: 1, I.POLICY_ACCESS: 1}, set()),
    C.HELLO: (72, 0xF, {I.NAME: 0, I.CREDS: 0, I.PIDS: 0, I.SECLABEL: 0, I.CONN_DESCRIPTION: 0,
                        I.POLICY_ACCESS: 1}, set()),
    C.UPDATE: (0, 0, {I.ATTACH_FLAGS_SEND: 0, I.ATTACH_FLAGS_RECV: 0, I.NAME: 1,
                      I.POLICY_ACCESS: 1}, set()),
    C.BYEBYE: (0, 0, {}, set()),
    C.FREE: (8, 0, {}, set()),
    C.CONN_INFO: (32, 0, {I.NAME: 0}, set()),
    C.BUS_CREATOR_INFO: (32, 0, {}, set()),
    C.LIST: (16, 0xF, {}, set()),
    C.SEND: (32, 1, {I.CANCEL_FD: 0}, set()),
    C.RECV: (40, 7, {}, set()),
    C.NAME_ACQUIRE: (0, 7, {I.NAME: 0}, {I.NAME}),
    C.NAME_RELEASE: (0, 0, {I.NAME: 0}, {I.NAME}),
    C.MATCH_ADD: (8, 1, {I.BLOOM_MASK: 1, I.NAME: 1, I.ID: 1, I.DST_ID: 1, I.NAME_ADD: 1,
                         I.NAME_REMOVE: 1, I.NAME_CHANGE: 1, I.ID_ADD: 1, I.ID_REMOVE: 1}, set()),
    C.MATCH_REMOVE: (8, 0, {}, set()),
}  # fmt: skip
MESSAGE_ITEMS = {I.PAYLOAD_VEC: 1, I.PAYLOAD_MEMFD: 1, I.FDS: 0, I.BLOOM_FILTER: 0, I.DST_NAME: 0}


def file_for(bus: Bus, code: Command) -> File:
    if code == C.BUS_MAKE:
        return File(bus.domain, "control", bus.owner)
    if code in (C.ENDPOINT_MAKE, C.HELLO):
        return bus.open()
    return bus.endpoint() if code == C.ENDPOINT_UPDATE else bus.hello()


def argument(code: Command, *items: bytes, flags: int = 0) -> bytes:
    fields = bytes(CASES[code][0])
    if code == C.HELLO:
        fields = u64(ATTACH_ALL, 0, 0, 0, 4096, 0, 0, 0, 0)
    if code == C.CONN_INFO:
        fields = u64(1, 0, 0, 0)
    return command(flags, *items, fields=fields)


class Outcome:
    def __init__(self, file: File, code: Command, given: bytes) -> None:
        address = file.peer.put(given)
        pending = file.start(code, address)
        self.error = pending.error
        self.after = file.peer.read(address, len(given))

    @property
    def return_flags(self) -> int:
        return return_flags(self.after)

    @property
    def flags(self) -> int:
        return int(struct.unpack_from("=Q", self.after, 8)[0])


@pytest.fixture(params=sorted(C), ids=lambda code: code.name)
def code(request: pytest.FixtureRequest) -> Command:
    return request.param


# --- reading the argument


@pytest.mark.parametrize("shift", [1, 4, 7])
def test_an_unaligned_argument_is_a_fault(bus: Bus, code: Command, shift: int) -> None:
    file = file_for(bus, code)
    address = file.peer.map(256) + shift
    file.peer.write(address, argument(code))
    assert file.start(code, address).error == EFAULT
    assert return_flags(file.peer.read(address, 24)) == GARBAGE


def test_an_unmapped_argument_is_a_fault(bus: Bus, code: Command) -> None:
    assert file_for(bus, code).start(code, 0).error == EFAULT


def test_a_size_below_the_struct_is_refused_and_nothing_written(bus: Bus, code: Command) -> None:
    given = bytearray(argument(code))
    given[:8] = u64(len(given) - 1)
    outcome = Outcome(file_for(bus, code), code, given)
    assert outcome.error == EINVAL
    assert outcome.after == given


@pytest.mark.parametrize("size", [32769, 1 << 32, (1 << 64) - 1])
def test_a_size_beyond_32_kib_is_refused_and_nothing_written(
    bus: Bus, code: Command, size: int
) -> None:
    given = bytearray(argument(code))
    given[:8] = u64(size)
    outcome = Outcome(file_for(bus, code), code, given)
    assert outcome.error == EMSGSIZE
    assert outcome.after == given


def test_items_that_can_not_be_read_are_a_fault_and_nothing_is_written(
    bus: Bus, code: Command
) -> None:
    given = bytearray(argument(code))
    given[:8] = u64(len(given) + 16)
    outcome = Outcome(file_for(bus, code), code, given)
    assert outcome.error == EFAULT
    assert outcome.after == given


def test_a_size_that_changes_while_it_is_read_is_refused(bus: Bus) -> None:
    class Fickle(FakePeer):
        def read(self, address: int, size: int) -> bytes:
            found = bytearray(super().read(address, size))
            if size > 24:
                found[:8] = u64(size + 8)
            return bytes(found)

    client = bus.hello()
    with client.used_by(Fickle(1000)):
        outcome = Outcome(client, C.NAME_RELEASE, command(0, name("com.example.a")))
    assert outcome.error == EINVAL
    assert outcome.return_flags == GARBAGE


def test_unknown_flags_are_refused_with_return_flags_cleared(bus: Bus, code: Command) -> None:
    allowed, file = CASES[code][1], file_for(bus, code)
    for bit in range(63):
        if not allowed & 1 << bit and not (code == C.NAME_ACQUIRE and bit in (5, 6)):
            outcome = Outcome(file, code, argument(code, flags=1 << bit))
            assert outcome.error == EINVAL, bit
            assert outcome.return_flags == 0


def test_items_of_other_commands_are_refused(bus: Bus, code: Command) -> None:
    file = file_for(bus, code)
    everything = {0, I.PAYLOAD_OFF, *ITEMS, I.TIMESTAMP, I.OWNED_NAME, I.REPLY_DEAD, 0x9999}
    for type_ in everything - {I.NEGOTIATE, *CASES[code][2]}:
        given = argument(code, ITEMS.get(type_, item(type_)))
        outcome = Outcome(file, code, given)
        assert outcome.error == EINVAL, type_
        assert outcome.return_flags == 0


def test_single_items_are_single_and_others_repeat(bus: Bus, code: Command) -> None:
    # Negotiating, the items are walked but nothing else is asked of them.
    file = file_for(bus, code)
    for type_, repeatable in CASES[code][2].items():
        given = argument(code, ITEMS[type_] * 2, flags=NEGOTIATE)
        outcome = Outcome(file, code, given)
        assert outcome.error == (0 if repeatable else EINVAL), type_


def test_mandatory_items_are_asked_for_unless_negotiating(bus: Bus, code: Command) -> None:
    mandatory = CASES[code][3]
    for missing in mandatory:
        given = [ITEMS[type_] for type_ in mandatory - {missing}]
        outcome = Outcome(file_for(bus, code), code, argument(code, *given))
        assert outcome.error == EINVAL
        assert outcome.return_flags == 0
        negotiating = argument(code, *given, flags=NEGOTIATE)
        assert Outcome(file_for(bus, code), code, negotiating).error == 0


@pytest.mark.parametrize("n_pad", range(3))
def test_a_size_need_not_be_a_multiple_of_8(bus: Bus, n_pad: int) -> None:
    given = command(0, name("com.example.a")[: 16 + 14 + n_pad])
    assert Outcome(bus.hello(), C.NAME_ACQUIRE, given).error == 0


def test_a_string_that_counts_its_padding_is_refused(bus: Bus) -> None:
    given = command(0, item(I.NAME, b"com.example.a\0\0\0"))
    assert Outcome(bus.hello(), C.NAME_ACQUIRE, given).error == EINVAL


def test_the_padding_of_items_is_not_looked_at(bus: Bus) -> None:
    given = command(0, item(I.NAME, b"com.example.a\0", pad=b"\xff"))
    assert Outcome(bus.hello(), C.NAME_ACQUIRE, given).error == 0


def test_a_command_of_just_32_kib_is_read(bus: Bus) -> None:
    given = command(0, item(I.ID, u64(1)) * 1364, fields=u64(1))
    assert len(given) == 32768
    assert Outcome(bus.hello(), C.MATCH_ADD, given).error == 0


# --- negotiation


def test_negotiation_tells_the_allowed_flags_and_does_nothing(bus: Bus, code: Command) -> None:
    file = file_for(bus, code)
    state = file.handle.state
    outcome = Outcome(file, code, argument(code, flags=NEGOTIATE | CASES[code][1]))
    assert outcome.error == 0
    assert outcome.flags == CASES[code][1]
    assert outcome.return_flags in (0, GARBAGE)
    assert file.handle.state is state
    # Nothing but flags and return_flags was written.
    untouched = argument(code, flags=CASES[code][1])
    assert outcome.after[24:] == untouched[24:]


def test_an_unknown_flag_is_refused_while_negotiating_too(bus: Bus, code: Command) -> None:
    outcome = Outcome(file_for(bus, code), code, argument(code, flags=NEGOTIATE | 1 << 40))
    assert outcome.error == EINVAL
    assert outcome.flags == NEGOTIATE | 1 << 40


def test_bad_items_are_refused_while_negotiating_too(bus: Bus, code: Command) -> None:
    outcome = Outcome(file_for(bus, code), code, argument(code, item(0x77), flags=NEGOTIATE))
    assert outcome.error == EINVAL
    assert outcome.flags == NEGOTIATE


def test_a_negotiate_item_keeps_the_types_a_command_takes(bus: Bus, code: Command) -> None:
    types = [*range(20), *range(0x1000, 0x1010), 0x2000, *range(0x8000, 0x8008), GARBAGE]
    given = argument(code, item(I.NEGOTIATE, u64(*types)), flags=NEGOTIATE)
    outcome = Outcome(file_for(bus, code), code, given)
    assert outcome.error == 0
    found = struct.unpack(f"={len(types)}Q", outcome.after[-8 * len(types) :])
    taken = {1, *CASES[code][2]}
    assert list(found) == [t if t in taken else 0 for t in types]


def test_a_negotiate_item_is_honoured_while_the_command_runs(bus: Bus) -> None:
    given = command(0, item(I.NEGOTIATE, u64(I.NAME, I.ID)), name("com.example.a"))
    client = bus.hello()
    outcome = Outcome(client, C.NAME_ACQUIRE, given)
    assert outcome.error == 0
    assert outcome.after[40:56] == u64(I.NAME, 0)
    assert bus.owner_of("com.example.a") == client.id


def test_negotiation_into_memory_that_can_not_be_written_is_a_fault(bus: Bus) -> None:
    client = bus.hello()
    address = client.peer.put(command(NEGOTIATE), writable=False)
    assert client.start(C.BYEBYE, address).error == EFAULT
    client.list(0)


def send_both(bus: Bus, flags: int, given: bytes) -> tuple[int | None, bytes, int, bytes]:
    """errno, and flags and return_flags of the command, and the message afterwards."""
    client = bus.hello()
    at = client.peer.put(given)
    outcome = Outcome(client, C.SEND, send_command(at, flags=flags))
    return (
        outcome.error,
        u64(outcome.flags, outcome.return_flags),
        at,
        client.peer.read(at, len(given)),
    )


def test_send_negotiates_alone(bus: Bus) -> None:
    outcome = Outcome(bus.hello(), C.SEND, send_command(0, flags=NEGOTIATE))
    assert outcome.error == 0
    assert outcome.flags == 1
    assert outcome.return_flags == 0


def test_send_negotiates_together_with_its_message(bus: Bus) -> None:
    types = [*range(20), 0x8000]
    given = message(1 << 40, item(I.NEGOTIATE, u64(*types)), flags=NEGOTIATE)
    error, flags, _, after = send_both(bus, NEGOTIATE, given)
    assert error == 0
    assert flags == u64(1, 0)
    assert after[8:16] == u64(7)
    taken = {1, *MESSAGE_ITEMS}
    assert after[-8 * len(types) :] == u64(*[t if t in taken else 0 for t in types])


def test_the_message_of_a_negotiating_send_is_validated_but_not_sent(bus: Bus) -> None:
    client = bus.hello()
    with client.peer.holding(message(client.id)) as address:
        outcome = Outcome(client, C.SEND, send_command(address, flags=NEGOTIATE))
    assert outcome.error == 0
    assert client.inbox() == []
    error, *_ = send_both(bus, NEGOTIATE, message(1, item(0x77)))
    assert error == EINVAL


def test_a_message_can_not_negotiate_without_its_command(bus: Bus) -> None:
    error, _, _, after = send_both(bus, 0, message(1, flags=NEGOTIATE))
    assert error == EINVAL
    assert after[8:16] == u64(7)


@pytest.mark.parametrize("type_", ITEMS)
def test_a_message_takes_its_own_items(bus: Bus, type_: int) -> None:
    for n in (1, 2):
        error, *_ = send_both(bus, NEGOTIATE, message(1, ITEMS[type_] * n))
        if type_ in MESSAGE_ITEMS:
            fine = n == 1 or MESSAGE_ITEMS[type_]
        else:
            fine = n == 1 and type_ == I.NEGOTIATE
        assert error == (0 if fine else EINVAL)


# --- what is written back


def changed(outcome: Outcome, given: bytes) -> set[int]:
    """Offsets of the words that differ."""
    return {
        at for at in range(0, len(given), 8) if outcome.after[at : at + 8] != given[at : at + 8]
    }


def test_hello_writes_its_outputs_and_keeps_its_inputs(bus: Bus) -> None:
    given = hello(send=(1 << 64) - 1, recv=(1 << 64) - 1, pool_size=8192, flags=1)
    outcome = Outcome(bus.open(), C.HELLO, given)
    assert outcome.error == 0
    assert changed(outcome, given) == {16, 40, 48, 64, 72, 80, 88}
    _, bus_flags, id_, pool_size, offset, n = struct.unpack_from("=6Q", outcome.after, 32)
    assert (bus_flags, id_, pool_size, offset, n) == (0, 2, 8192, 0, 32)


@pytest.mark.parametrize(
    ("code", "fields", "written"),
    [
        (C.CONN_INFO, u64(2, 0, GARBAGE, GARBAGE), {16, 40, 48}),
        (C.BUS_CREATOR_INFO, u64(GARBAGE, 0, GARBAGE, GARBAGE), {16, 40, 48}),
        (C.LIST, u64(GARBAGE, GARBAGE), {16, 24, 32}),
        (C.MATCH_ADD, u64(1), {16}),
        (C.FREE, u64(1 << 20), {16}),
        (C.BYEBYE, b"", {16}),
        (C.UPDATE, b"", {16}),
    ],
)
def test_a_command_that_succeeds_writes_its_outputs_only(
    bus: Bus, code: Command, fields: bytes, written: set[int]
) -> None:
    given = command(0, fields=fields)
    outcome = Outcome(bus.hello(), code, given)
    assert outcome.error == 0
    assert changed(outcome, given) == written
    assert outcome.return_flags == 0


def test_send_writes_an_empty_reply(bus: Bus) -> None:
    client = bus.hello()
    given = send_command(client.peer.put(message(client.id)))
    outcome = Outcome(client, C.SEND, given)
    assert outcome.error == 0
    assert outcome.after[16:] == u64(0, *struct.unpack_from("=Q", given, 24), 1 << 20, 0, 0)


def test_recv_writes_message_and_losses(bus: Bus) -> None:
    client = bus.hello()
    client.send(client)
    given = command(0, fields=u64(-5, *[GARBAGE] * 4))
    outcome = Outcome(client, C.RECV, given)
    assert outcome.after == given[:16] + u64(0, -5, 0, 0, 64, 0)


def test_recv_without_a_message_writes_the_same_fields(bus: Bus) -> None:
    outcome = Outcome(bus.hello(), C.RECV, command(0, fields=u64(-5, *[GARBAGE] * 4)))
    assert outcome.error == EAGAIN
    _, returned, priority, lost, _, size, flags = struct.unpack_from("=QQqQQQQ", outcome.after, 8)
    assert (returned, priority, lost, size, flags) == (0, -5, 0, 0, 0)


FAILING = [
    (C.HELLO, hello(pool_size=1), EINVAL),
    (C.CONN_INFO, command(fields=u64(1 << 40, 0, GARBAGE, GARBAGE)), ENXIO),
    (C.BUS_CREATOR_INFO, command(fields=u64(1, 1 << 40, GARBAGE, GARBAGE)), EINVAL),
    (C.LIST, command(1 << 5, fields=u64(GARBAGE, GARBAGE)), EINVAL),
    (C.SEND, send_command(0), EFAULT),
    (C.RECV, command(6, fields=u64(0, *[GARBAGE] * 4)), EINVAL),
    (C.FREE, command(fields=u64(8)), ENXIO),
    (C.MATCH_REMOVE, command(fields=u64(8)), EBADSLT),
    (C.NAME_RELEASE, command(0, name("com.example.a")), ESRCH),
]


@pytest.mark.parametrize(("code", "given", "errno"), FAILING)
def test_a_command_that_fails_writes_return_flags_only(
    bus: Bus, code: Command, given: bytes, errno: int
) -> None:
    outcome = Outcome(file_for(bus, code), code, given)
    assert outcome.error == errno
    assert outcome.return_flags == 0
    assert changed(outcome, given) == {16}


def test_a_result_that_can_not_be_stored_is_a_fault_and_the_effect_stands(bus: Bus) -> None:
    client = bus.hello()
    client.send(client)
    address = client.peer.put(command(0, fields=u64(0, 0, 0, 0, 0)), writable=False)
    assert client.start(C.RECV, address).error == EFAULT
    assert client.inbox() == []
    client.free(0)


@pytest.mark.parametrize("code", [C.BUS_MAKE, C.ENDPOINT_MAKE, C.HELLO])
def test_a_setup_whose_result_can_not_be_stored_is_undone(bus: Bus, code: Command) -> None:
    watcher = bus.hello()
    watcher.match()
    file = file_for(bus, code)
    state, paths = file.handle.state, bus.domain.paths()
    items = [ITEMS[type_] for type_ in CASES[code][3]]
    address = file.peer.put(argument(code, *items), writable=False)
    assert file.start(code, address).error == EFAULT
    assert file.handle.state is state
    assert bus.domain.paths() == paths
    assert watcher.notifications() == []
    file.ioctl(code, argument(code, *items))


# --- attach flags

EVERYWHERE = [
    lambda bus, value: bus.open().hello(send=value),
    lambda bus, value: bus.open().hello(recv=value),
    lambda bus, value: bus.hello().update(item(I.ATTACH_FLAGS_SEND, u64(value))),
    lambda bus, value: bus.hello().update(item(I.ATTACH_FLAGS_RECV, u64(value))),
    lambda bus, value: bus.hello().info(2, kinds=value),
    lambda bus, value: bus.hello().creator_info(kinds=value),
    lambda bus, value: bus.domain.make_bus("x", item(I.ATTACH_FLAGS_SEND, u64(value))),
]


@pytest.mark.parametrize("use", EVERYWHERE)
@pytest.mark.parametrize("value", [0, 1, ATTACH_ALL, (1 << 64) - 1])
def test_attach_flags_are_known_bits_or_all_of_them(bus: Bus, use: object, value: int) -> None:
    use(bus, value)  # type: ignore[operator]


@pytest.mark.parametrize("use", EVERYWHERE)
@pytest.mark.parametrize("value", [ATTACH_ALL + 1, 1 << 63, (1 << 64) - 2])
def test_other_attach_flags_are_refused(bus: Bus, use: object, value: int) -> None:
    with fails(EINVAL):
        use(bus, value)  # type: ignore[operator]


def test_all_bits_stand_for_all_kinds(bus: Bus) -> None:
    client = bus.hello(recv=(1 << 64) - 1, send=(1 << 64) - 1)
    assert client.connection.attach_flags_recv == ATTACH_ALL
    assert client.connection.attach_flags_send == ATTACH_ALL


def test_acquired_flags_may_be_handed_in_again(bus: Bus) -> None:
    client = bus.hello()
    assert client.acquire("com.example.a", 0x60) == 0x60
    for flag in (8, 0x10):
        with fails(EINVAL):
            client.acquire("com.example.a", flag)


def test_return_flags_may_come_with_an_error(bus: Bus) -> None:
    bus.hello().acquire("com.example.a")
    outcome = Outcome(bus.hello(), C.NAME_ACQUIRE, command(2, name("com.example.a")))
    assert outcome.error == EEXIST
    assert outcome.return_flags == 2
