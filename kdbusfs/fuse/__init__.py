# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that knows the FUSE protocol: wire structs, router, handle requests, tree, pool backing.

Handle requests (OPEN, RELEASE, IOCTL, POLL, INTERRUPT, READ, WRITE) are answered in the router's
thread, to the end; this thread alone changes the state of buses. Tree requests are relayed to an
unmodified pyfuse3, which only reads the tree of nodes.
"""
