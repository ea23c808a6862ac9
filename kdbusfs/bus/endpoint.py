# SPDX-License-Identifier: LGPL-2.1-or-later
"""Endpoints (kdbus.endpoint(7)): the files on a bus through which connections are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..abi.numbers import PolicyAccess
from .node import Node
from .policy import PolicyDatabase
from .quota import User

if TYPE_CHECKING:
    from .bus import Bus
    from .connection import Connection
    from .peer import Credentials


class Endpoint:
    """The default endpoint `bus`, or a custom one with a policy and an accounting user of its own.

    The decisions of kdbus.policy(7) are taken here: which database is asked, and what being an
    owner or the same user is worth, depends on the endpoint a connection came through.
    """

    __slots__ = ("bus", "node", "custom", "policy", "user", "connections", "alive")

    def __init__(self, bus: Bus, node: Node, custom: bool) -> None:
        self.bus = bus
        self.node = node
        self.custom = custom
        self.policy = PolicyDatabase(bus.domain.budget.memory)
        """Empty and unused on the default endpoint."""
        self.user = User()
        self.connections: dict[Connection, None] = {}
        """In order of HELLO."""
        self.alive = True

    def is_privileged(self, opener: Credentials) -> bool:
        """Whether a connection of *opener* through here is privileged."""
        return not self.custom and opener.ipc_owner

    def is_owner(self, opener: Credentials) -> bool:
        """Whether a connection of *opener* through here counts as the bus's owner."""
        return not self.custom and (opener.ipc_owner or opener.euid == self.bus.uid)

    def may_own(self, connection: Connection, who: Credentials, name: bytes) -> bool:
        if self.custom and self.policy.query(who, name) < PolicyAccess.OWN:
            return False
        return connection.owner or self.bus.policy.query(who, name) >= PolicyAccess.OWN

    def may_talk(self, connection: Connection, who: Credentials, to: Connection) -> bool:
        """Whether *connection*, used by *who*, may talk to *to*."""
        if self.custom and not self.policy.grants(who, to.owned_names(), PolicyAccess.TALK):
            return False
        if connection.owner or who.euid == to.opener.uid:
            return True
        return self.bus.policy.grants(who, to.owned_names(), PolicyAccess.TALK)

    def may_see_name(self, who: Credentials, name: bytes) -> bool:
        return not self.custom or self.policy.query(who, name) >= PolicyAccess.SEE

    def may_see(self, who: Credentials, other: Connection) -> bool:
        return not self.custom or self.policy.grants(who, other.owned_names(), PolicyAccess.SEE)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for connection in self.connections:
            assert connection.alive and connection.endpoint is self
            assert self.bus.connections[connection.id] is connection
