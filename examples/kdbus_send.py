#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbus_send.py ENDPOINT NAME: send "foobar" over kdbus, as kdbus-send.c does."""

import sys

from kdbus import Connection, Message


def main(endpoint: str, name: str) -> None:
    with Connection(endpoint) as conn:
        conn.send(Message(b"foobar", dst_name=name))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: kdbus_send.py ENDPOINT NAME")
    main(*sys.argv[1:])
