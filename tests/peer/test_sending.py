# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files a socket takes."""

import ctypes
import os

import pytest

from kdbusfs.peer.descriptors import can_be_sent


def test_an_io_uring_can_not_be_sent_and_a_pipe_can() -> None:
    ring = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))
    if ring < 0:
        pytest.skip("no io_uring here")
    read, write = os.pipe()
    assert [can_be_sent(fd) for fd in (read, ring, write)] == [True, False, True]
    for fd in (read, write, ring):
        os.close(fd)
