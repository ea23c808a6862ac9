# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Python can't do, or not fast enough: `lib` and `ffi` of the C helper."""

from ._native import ffi, lib

__all__ = ["ffi", "lib"]
