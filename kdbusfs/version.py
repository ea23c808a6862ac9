# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that names the version."""

VERSION = "0.1.0"
