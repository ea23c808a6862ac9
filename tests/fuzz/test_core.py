# SPDX-License-Identifier: LGPL-2.1-or-later
"""The core under fire, without a mount: bytes that were never meant as commands.

tests/bus/test_machine.py does sensible things in senseless order. Here the arguments themselves
are nonsense, or nearly right; whatever comes of them, no invariant breaks and nothing is left.
"""

import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abi_client.building import u64
from bus.fakes import FakeFile, FakePeer
from bus.harness import FakeDomain, File
from kdbusfs.abi.numbers import ItemType
from kdbusfs.abi.specs import COMMAND_SPECS

CODES = sorted(COMMAND_SPECS)
TYPES = [int(type_) for type_ in ItemType]
EDGES = [0, 1, 7, 8, 16, 24, 4096, 32768, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 8, (1 << 64) - 1]
STRINGS = [b"a.b\0", b"a.*\0", b"1000-x\0", b"a.b", b"\0", b"a\0b\0", b"com.example." + b"x" * 250]
PATHS = ["control", "1000-test/bus", "1000-x/bus", "1000-test/1000-x"]

numbers = st.one_of(st.integers(0, 12), st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1))
payloads = st.one_of(
    st.sampled_from(STRINGS),
    st.lists(numbers, max_size=9).map(lambda words: u64(*words)),
    st.binary(max_size=40),
)


@st.composite
def items(draw: st.DrawFn) -> bytes:
    """An item; mostly of the size that it says, and padded."""
    payload = draw(payloads)
    size = draw(st.one_of(st.just(16 + len(payload)), st.just(16 + len(payload)), numbers))
    raw = u64(size, draw(st.sampled_from(TYPES))) + payload
    return raw + bytes(-len(raw) & 7 if draw(st.integers(0, 7)) else 0)


@st.composite
def structs(draw: st.DrawFn, fixed: int) -> bytes:
    """A struct of *fixed* bytes with items; mostly of the size that it says, with known flags."""
    chain = b"".join(draw(st.lists(items(), max_size=4)))
    fields = draw(st.lists(numbers, min_size=fixed // 8 - 2, max_size=fixed // 8 - 2))
    total = fixed + len(chain)
    size = draw(st.one_of(st.just(total), st.just(total), numbers))
    flags = draw(st.one_of(st.integers(0, 15), st.just(0), numbers))
    return u64(size, flags, *fields) + chain


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, int, int, bytes, bytes]:
    """What to do, with which file, by which command, with which argument and message."""
    what = draw(st.sampled_from(["open", "close", "poll", *["command"] * 8]))
    code = draw(st.sampled_from(CODES))
    spec = COMMAND_SPECS[code]
    argument = draw(st.one_of(structs(spec.size), structs(spec.size), st.binary()))
    is_send = spec.name.startswith("SEND")
    message = draw(structs(64)) if is_send and draw(st.integers(0, 7)) else b""
    return what, draw(st.integers(0, 15)), code, argument, message


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps(), max_size=40))
def test_nothing_that_a_caller_passes_breaks_an_invariant(
    todo: list[tuple[str, int, int, bytes, bytes]],
) -> None:
    domain = FakeDomain()
    bus = domain.make_bus()
    files: list[File] = [bus.hello(), bus.hello(flags=1), File(domain, PATHS[1], bus.owner)]
    bus.owner.open(FakeFile())
    for what, index, code, argument, message in todo:
        file = files[index % len(files)]
        if what == "open":
            path = PATHS[index % len(PATHS)]
            if path == PATHS[0] or path in domain.paths():
                files.append(File(domain, path, FakePeer()))
        elif what == "close":
            if len(files) > 1:
                files.remove(file)
                file.close()
        elif what == "poll":
            assert file.readable in (False, True)
            assert file.hung_up in (False, True)
        else:
            if message and len(argument) >= 32:
                address = struct.pack("=Q", file.peer.put(message))
                argument = argument[:24] + address + argument[32:]
            file.start(code, file.peer.put(argument))
    for file in files:
        file.close()
    domain.end()


def test_a_far_deadline_keeps_nobody_who_has_gone() -> None:
    domain = FakeDomain()
    bus = domain.make_bus()
    first, second = bus.hello(), bus.hello()
    first.request(second, timeout=(1 << 63) - 1)
    assert domain.core._watched
    first.close()
    assert not domain.core._watched
    domain.end()
