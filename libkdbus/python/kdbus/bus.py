# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buses and custom endpoints: nodes that are there as long as somebody keeps them."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import check
from kdbus.match import Bloom
from kdbus.numbers import AttachFlag, MakeFlag
from kdbus.policy import Policy

_DEFAULT_BLOOM = Bloom()


class _Node:
    """What a bus and an endpoint have in common: a path, an owner, an end."""

    def __init__(self, node: Any, path: Any) -> None:
        self._node = node
        self.path: str = os.fsdecode(ffi.string(path))

    def _get(self) -> Any:
        if self._node is None:
            raise ValueError(f"{self.path} is closed")
        return self._node

    def close(self) -> None:
        """End it; its connections are disconnected. Where a process was forked meanwhile, it
        ends when both have closed it."""
        if self._node is not None:
            ffi.release(self._node)
            self._node = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self._node is None else ""
        return f"<{type(self).__name__} {self.path}{state}>"


class Bus(_Node):
    """A bus (kdbus.bus(7)), there until it is closed.

    *root* is the directory kdbusfs is mounted on, *name* has to start with the
    effective uid and a hyphen. *attach_flags* is what may be told about us, its
    creator. `path` is the default endpoint, for `Connection`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str,
        *,
        flags: MakeFlag = MakeFlag.NONE,
        attach_flags: AttachFlag = AttachFlag.NONE,
        bloom: Bloom = _DEFAULT_BLOOM,
    ) -> None:
        busp = ffi.new("struct kdbus_bus **")
        options = ffi.new("struct kdbus_bus_options *")
        options.flags, options.attach_flags = flags, attach_flags
        options.bloom.size, options.bloom.n_hash = bloom.size, bloom.n_hash
        result = lib.kdbus_bus_new(busp, os.fsencode(root), os.fsencode(name), options)
        check(result, os.path.join(root, name))
        bus = ffi.gc(busp[0], lib.kdbus_bus_free)
        super().__init__(bus, lib.kdbus_bus_get_path(bus))

    def fileno(self) -> int:
        """The descriptor that keeps the bus."""
        return int(lib.kdbus_bus_get_fd(self._get()))


class Endpoint(_Node):
    """A custom endpoint (kdbus.endpoint(7)) of the bus at *bus_path*, there until it is
    closed. Nothing may be seen through it until `update`. `path` is for `Connection`."""

    def __init__(
        self, bus_path: str | os.PathLike[str], name: str, *, flags: MakeFlag = MakeFlag.NONE
    ) -> None:
        endpointp = ffi.new("struct kdbus_endpoint **")
        path, encoded = os.fsencode(bus_path), os.fsencode(name)
        check(lib.kdbus_endpoint_new(endpointp, path, encoded, flags), os.fspath(bus_path))
        endpoint = ffi.gc(endpointp[0], lib.kdbus_endpoint_free)
        super().__init__(endpoint, lib.kdbus_endpoint_get_path(endpoint))

    def fileno(self) -> int:
        """The descriptor that keeps the endpoint."""
        return int(lib.kdbus_endpoint_get_fd(self._get()))

    def update(self, policy: Policy | None) -> None:
        """Replace what connections on it may do; None: nothing.

        `Inherited` in a child of the process that made it.
        """
        check(lib.kdbus_endpoint_update(self._get(), policy._policy if policy else ffi.NULL))
