# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m kdbusfs: the same as the command kdbusfs."""

from kdbusfs.cli import main

raise SystemExit(main())
