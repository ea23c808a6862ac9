# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that names the version: of the daemon, the C library and the Python client."""

VERSION = "0.1.0"
