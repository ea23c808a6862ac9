# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which strings may name a bus, an endpoint, a description, or be a well-known name.

Letters and digits are ASCII (kdbus.bus(7), kdbus.name(7)); the original's table let some
Latin-1 bytes pass as letters by accident.
"""

import re

from .numbers import Limit

# `-` and `.` neither first nor last; letters, digits and `_` anywhere.
_SYSNAME = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\Z")

_ELEMENT = rb"[A-Za-z_-][A-Za-z0-9_-]*"
_WELL_KNOWN = re.compile(rb"%b(?:\.%b)+\Z" % (_ELEMENT, _ELEMENT))
_WILDCARD = re.compile(rb"%b(?:\.%b)*\.\*\Z" % (_ELEMENT, _ELEMENT))


def is_sysname(name: bytes) -> bool:
    """Whether *name* may name a bus or endpoint, or be a connection's description."""
    return len(name) <= Limit.SYSNAME_LENGTH and _SYSNAME.match(name) is not None


def is_well_known(name: bytes) -> bool:
    """Whether *name* is a valid well-known name: two or more elements, at most 255 bytes."""
    return len(name) <= Limit.NAME_LENGTH and _WELL_KNOWN.match(name) is not None


def is_policy_name(name: bytes) -> bool:
    """Whether *name* is a well-known name or a wildcard, whose last element is `*`."""
    if name.endswith(b".*"):
        return len(name) <= Limit.NAME_LENGTH and _WILDCARD.match(name) is not None
    return is_well_known(name)
