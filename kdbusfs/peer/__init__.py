# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calling process as the system shows it: memory, descriptors, credentials, namespaces."""
