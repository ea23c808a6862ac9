# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata and notifications: what the bus says about messages and connections."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kdbus._kdbus import ffi, lib
from kdbus.errors import fail
from kdbus.numbers import HelloFlag, ItemType, NameFlag


@dataclass(frozen=True, slots=True)
class Creds:
    """struct kdbus_creds: ids as in credentials(7), in our user namespace."""

    uid: int
    euid: int
    suid: int
    fsuid: int
    gid: int
    egid: int
    sgid: int
    fsgid: int


@dataclass(frozen=True, slots=True)
class Pids:
    """struct kdbus_pids: process, thread and parent in our pid namespace, 0 if not there."""

    pid: int
    tid: int
    ppid: int


@dataclass(frozen=True, slots=True)
class Timestamp:
    """struct kdbus_timestamp: nanoseconds, and the number of the message on its bus."""

    seqnum: int
    monotonic_ns: int
    realtime_ns: int


@dataclass(frozen=True, slots=True)
class Audit:
    """struct kdbus_audit: None where unset."""

    sessionid: int | None
    loginuid: int | None


@dataclass(frozen=True, slots=True)
class Caps:
    """struct kdbus_caps: sets as bit masks, see capabilities(7)."""

    last_cap: int
    inheritable: int
    permitted: int
    effective: int
    bounding: int


@dataclass(frozen=True, slots=True)
class OwnedName:
    """struct kdbus_name: a well-known name and how it is held."""

    name: str
    flags: NameFlag


@dataclass(frozen=True, slots=True)
class IdChange:
    """struct kdbus_notify_id_change: a connection came (ID_ADD) or went (ID_REMOVE)."""

    type: ItemType
    id: int
    flags: HelloFlag


@dataclass(frozen=True, slots=True)
class NameChange:
    """struct kdbus_notify_name_change: a name got (NAME_ADD), lost (NAME_REMOVE) or changed
    (NAME_CHANGE) its owner. The id of nobody is 0."""

    type: ItemType
    name: str
    old_id: int
    old_flags: NameFlag
    new_id: int
    new_flags: NameFlag


@dataclass(frozen=True, slots=True)
class ReplyFailure:
    """A request will have no reply: REPLY_TIMEOUT or REPLY_DEAD. Its cookie is the
    `cookie_reply` of the message that brought this."""

    type: ItemType


Notification = IdChange | NameChange | ReplyFailure


@dataclass(slots=True)
class Metadata:
    """All that came along; None for what did not."""

    creds: Creds | None = None
    pids: Pids | None = None
    auxgroups: list[int] | None = None
    tid_comm: str | None = None
    pid_comm: str | None = None
    exe: str | None = None
    cmdline: str | None = None
    cgroup: str | None = None
    caps: Caps | None = None
    seclabel: str | None = None
    audit: Audit | None = None
    names: list[OwnedName] = field(default_factory=list)
    description: str | None = None
    timestamp: Timestamp | None = None
    bus_name: str | None = None


_STRINGS = {
    lib.KDBUS_ITEM_TID_COMM: "tid_comm",
    lib.KDBUS_ITEM_PID_COMM: "pid_comm",
    lib.KDBUS_ITEM_EXE: "exe",
    lib.KDBUS_ITEM_CMDLINE: "cmdline",
    lib.KDBUS_ITEM_CGROUP: "cgroup",
    lib.KDBUS_ITEM_SECLABEL: "seclabel",
    lib.KDBUS_ITEM_CONN_DESCRIPTION: "description",
    lib.KDBUS_ITEM_MAKE_NAME: "bus_name",
}

_UNSET = 0xFFFFFFFF


def _decode(string: Any) -> str:
    return os.fsdecode(ffi.string(string))


def _parse_creds(item: Any) -> Creds | None:
    c = lib.kdbus_item_get_creds(item)
    if not c:
        return None
    return Creds(c.uid, c.euid, c.suid, c.fsuid, c.gid, c.egid, c.sgid, c.fsgid)


def _parse_pids(item: Any) -> Pids | None:
    p = lib.kdbus_item_get_pids(item)
    return Pids(p.pid, p.tid, p.ppid) if p else None


def _parse_timestamp(item: Any) -> Timestamp | None:
    t = lib.kdbus_item_get_timestamp(item)
    return Timestamp(t.seqnum, t.monotonic_ns, t.realtime_ns) if t else None


def _parse_audit(item: Any) -> Audit | None:
    a = lib.kdbus_item_get_audit(item)
    if not a:
        return None
    return Audit(*(None if n == _UNSET else n for n in (a.sessionid, a.loginuid)))


def _parse_auxgroups(item: Any) -> list[int] | None:
    n_groups = ffi.new("size_t *")
    groups = lib.kdbus_item_get_auxgroups(item, n_groups)
    return list(ffi.unpack(groups, n_groups[0])) if groups and n_groups[0] else []


def _parse_caps(item: Any) -> Caps | None:
    n_words = ffi.new("size_t *")
    caps = lib.kdbus_item_get_caps(item, n_words)
    if not caps:
        return None
    n = n_words[0]
    words = ffi.cast("__u32 *", caps) + 1
    sets = (ffi.unpack(words + i * n, n) for i in range(4))
    return Caps(caps.last_cap, *(sum(w << 32 * i for i, w in enumerate(s)) for s in sets))


_PARSERS = {
    lib.KDBUS_ITEM_CREDS: ("creds", _parse_creds),
    lib.KDBUS_ITEM_PIDS: ("pids", _parse_pids),
    lib.KDBUS_ITEM_TIMESTAMP: ("timestamp", _parse_timestamp),
    lib.KDBUS_ITEM_AUDIT: ("audit", _parse_audit),
    lib.KDBUS_ITEM_AUXGROUPS: ("auxgroups", _parse_auxgroups),
    lib.KDBUS_ITEM_CAPS: ("caps", _parse_caps),
}


def parse_metadata(items: Iterable[Any]) -> Metadata:
    """The metadata among *items* (pointers to struct kdbus_item)."""
    metadata = Metadata()
    for item in items:
        if item.type in _PARSERS:
            name, parse = _PARSERS[item.type]
            setattr(metadata, name, parse(item))
        elif item.type in _STRINGS:
            string = lib.kdbus_item_get_string(item)
            setattr(metadata, _STRINGS[item.type], _decode(string) if string else None)
        elif item.type == lib.KDBUS_ITEM_OWNED_NAME:
            owned = lib.kdbus_item_get_name(item)
            if owned:
                # .name is an array of length 0: take its address
                name = _decode(ffi.cast("char *", owned) + ffi.sizeof("__u64"))
                metadata.names.append(OwnedName(name, NameFlag(owned.flags)))
    return metadata


def parse_notification(item: Any) -> Notification:
    """The notification in *item*, the first of a message from the bus; OSError EBADMSG if it
    is none."""
    if change := lib.kdbus_item_get_id_change(item):
        return IdChange(ItemType(item.type), change.id, HelloFlag(change.flags))
    if item.type in (ItemType.REPLY_TIMEOUT, ItemType.REPLY_DEAD):
        return ReplyFailure(ItemType(item.type))
    change = lib.kdbus_item_get_name_change(item)
    if not change:
        fail(errno.EBADMSG)
    name = ffi.cast("char *", change) + ffi.sizeof("struct kdbus_notify_name_change")
    return NameChange(
        ItemType(item.type),
        _decode(name),
        change.old_id.id,
        NameFlag(change.old_id.flags),
        change.new_id.id,
        NameFlag(change.new_id.flags),
    )
