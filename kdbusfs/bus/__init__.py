# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus itself: plain objects, no FUSE, no system calls.

What the bus needs of the world is handed in: a `Peer` (the process that makes a call: its
memory, credentials and descriptors), a pool's memory, a clock. What it wants done it says
through callbacks (`Connection.waker`, `Call.complete`). One thread drives it; that is where
the one order of messages and notifications comes from.
"""
