# SPDX-License-Identifier: LGPL-2.1-or-later
"""kdbusfs: the kdbus message bus as a FUSE filesystem."""

from kdbusfs.user_error import UserError
from kdbusfs.version import VERSION as __version__

__all__ = ["UserError", "__version__"]
