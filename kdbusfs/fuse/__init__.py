# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that knows the FUSE protocol: wire structs, router, files, calls, tree, pool backing.

Requests on open files are answered in the router's thread, but for what `calls` says; whoever
changes the state of buses holds the turn (`peer.stall.TURN`). What is rare in the tree of nodes is
relayed to an unmodified pyfuse3.
"""
