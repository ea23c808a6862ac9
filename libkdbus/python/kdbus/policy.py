# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies: who may see, talk to and own names (kdbus.policy(7))."""

from __future__ import annotations

import os
from typing import Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import check
from kdbus.numbers import PolicyAccess


class Policy:
    """A list of names, each followed by who may do what with it.

    >>> Policy().name("org.example.a").user(1000, PolicyAccess.OWN).world(PolicyAccess.TALK)
    """

    def __init__(self) -> None:
        p = ffi.new("struct kdbus_policy **")
        check(lib.kdbus_policy_new(p))
        self._policy = ffi.gc(p[0], lib.kdbus_policy_free)

    def name(self, name: str) -> Self:
        """Start the entry of *name*; with .* at its end, of all names with one more element."""
        check(lib.kdbus_policy_add_name(self._policy, os.fsencode(name)))
        return self

    def _access(self, type_: int, id_: int, access: PolicyAccess) -> Self:
        check(lib.kdbus_policy_add_access(self._policy, type_, id_, access))
        return self

    def user(self, uid: int, access: PolicyAccess) -> Self:
        """Allow *access* to a user."""
        return self._access(lib.KDBUS_POLICY_ACCESS_USER, uid, access)

    def group(self, gid: int, access: PolicyAccess) -> Self:
        """Allow *access* to a group."""
        return self._access(lib.KDBUS_POLICY_ACCESS_GROUP, gid, access)

    def world(self, access: PolicyAccess) -> Self:
        """Allow *access* to everybody."""
        return self._access(lib.KDBUS_POLICY_ACCESS_WORLD, 0, access)
