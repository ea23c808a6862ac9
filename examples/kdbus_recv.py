#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbus_recv.py ENDPOINT NAME: receive one message over kdbus, as kdbus-recv.c does."""

import sys

from kdbus import AttachFlag, Connection


def main(endpoint: str, name: str) -> None:
    with Connection(endpoint, attach_recv=AttachFlag.CREDS | AttachFlag.PIDS) as conn:
        conn.acquire_name(name)
        print(f"ready: {name}", flush=True)
        with conn.recv() as message:
            print(f"message: {message.payload().decode()}")
            print(f"length: {message.size}")
            print(f"sender: connection {message.src_id}")
            creds, pids = message.metadata.creds, message.metadata.pids
            if creds and pids:
                print(f"credentials: pid {pids.pid}, uid {creds.euid}, gid {creds.egid}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: kdbus_recv.py ENDPOINT NAME")
    main(*sys.argv[1:])
