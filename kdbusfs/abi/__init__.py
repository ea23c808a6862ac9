# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kdbus ABI: numbers, struct layouts, and reading and building items.

`libkdbus/include/linux/kdbus.h` is the source of every number here; a test compiles it and
holds this package against it.
"""
