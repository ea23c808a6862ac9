# SPDX-License-Identifier: LGPL-2.1-or-later
"""What filter.c says about system calls, against filters written by hand."""

import struct

import pytest

from kdbusfs.native import ffi, lib

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x50000, 0
X86_64, I386 = 0xC000003E, 0x40000003
LD_ABS, LD_MEM, LD_LEN, LDX_IMM, ST = 0x20, 0x60, 0x80, 0x01, 0x02
JEQ, JGT, JGE, JSET, JA = 0x15, 0x25, 0x35, 0x45, 0x05
RET_K, RET_A, TAX, TXA = 0x06, 0x16, 0x07, 0x87
ADD_K, ADD_X, DIV_X, AND_K, NEG, LSH_K = 0x04, 0x0C, 0x3C, 0x54, 0x84, 0x64

Instruction = tuple[int, int, int, int]


def run(*program: Instruction, nr: int = 41, args: tuple[int, ...] = ()) -> int:
    words = struct.pack("=" + "HBBI" * len(program), *(n for i in program for n in i))
    six = ffi.new("uint64_t[6]", list(args) + [0] * (6 - len(args)))
    pointer = ffi.from_buffer("uint64_t[]", words)
    return int(lib.kdbusfs_filter_run(pointer, len(program), nr, X86_64, 0x1234, six))


def ret(value: int) -> Instruction:
    return RET_K, 0, 0, value


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ([ret(ALLOW)], ALLOW),
        # by number, the way most filters do it
        ([(LD_ABS, 0, 0, 0), (JEQ, 0, 1, 41), ret(ERRNO | 1), ret(ALLOW)], ERRNO | 1),
        ([(LD_ABS, 0, 0, 0), (JEQ, 0, 1, 42), ret(ERRNO | 1), ret(ALLOW)], ALLOW),
        # architecture, instruction pointer, halves of an argument
        ([(LD_ABS, 0, 0, 4), (JEQ, 1, 0, I386), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 8), (JEQ, 0, 1, 0x1234), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 16), (JEQ, 0, 1, 7), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 20), (JEQ, 0, 1, 1), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 0), (JGT, 0, 1, 40), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 0), (JGT, 0, 1, 41), ret(ALLOW), ret(KILL)], KILL),
        ([(LD_ABS, 0, 0, 0), (JGE, 0, 1, 41), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 0), (JSET, 0, 1, 8), ret(ALLOW), ret(KILL)], ALLOW),
        ([(LD_ABS, 0, 0, 0), (JSET, 0, 1, 6), ret(ALLOW), ret(KILL)], KILL),
        ([(JA, 0, 0, 1), ret(KILL), ret(ALLOW)], ALLOW),
        # arithmetic, registers, memory
        ([(LD_LEN, 0, 0, 0), (RET_A, 0, 0, 0)], 64),
        ([(LD_ABS, 0, 0, 0), (ADD_K, 0, 0, 1), (RET_A, 0, 0, 0)], 42),
        ([(LD_ABS, 0, 0, 0), (TAX, 0, 0, 0), (ADD_X, 0, 0, 0), (RET_A, 0, 0, 0)], 82),
        ([(LDX_IMM, 0, 0, 9), (TXA, 0, 0, 0), (RET_A, 0, 0, 0)], 9),
        ([(LD_ABS, 0, 0, 0), (ST, 0, 0, 15), (LD_LEN, 0, 0, 0), (LD_MEM, 0, 0, 15),
          (RET_A, 0, 0, 0)], 41),
        ([(LD_ABS, 0, 0, 0), (AND_K, 0, 0, 0xF), (NEG, 0, 0, 0), (RET_A, 0, 0, 0)], 2**32 - 9),
        ([(LD_ABS, 0, 0, 0), (LSH_K, 0, 0, 4), (RET_A, 0, 0, 0)], 656),
        # what the kernel would not have taken
        ([], KILL),
        ([(LD_ABS, 0, 0, 0)], KILL),
        ([(JA, 0, 0, 2**32 - 1), ret(ALLOW)], KILL),
        ([(LD_ABS, 0, 0, 64), ret(ALLOW)], KILL),
        ([(LD_ABS, 0, 0, 2), ret(ALLOW)], KILL),
        ([(ST, 0, 0, 16), ret(ALLOW)], KILL),
        ([(LD_MEM, 0, 0, 2**32 - 1), ret(ALLOW)], KILL),
        ([(LDX_IMM, 0, 0, 0), (DIV_X, 0, 0, 0), ret(ALLOW)], KILL),
        ([(0xF4, 0, 0, 0), ret(ALLOW)], KILL),
    ],
)  # fmt: skip
def test_a_filter_says_what_the_kernel_makes_of_it(
    program: list[Instruction], expected: int
) -> None:
    assert run(*program, args=(7 | 1 << 32,)) == expected
