# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers of <linux/kdbus.h>, by family and without their prefix."""

from enum import IntEnum, IntFlag

from kdbus._kdbus import lib

SRC_ID_KERNEL: int = lib.KDBUS_SRC_ID_KERNEL
DST_ID_NAME: int = lib.KDBUS_DST_ID_NAME
DST_ID_BROADCAST: int = lib.KDBUS_DST_ID_BROADCAST
MATCH_ID_ANY: int = lib.KDBUS_MATCH_ID_ANY
POOL_SIZE_DEFAULT: int = lib.KDBUS_POOL_SIZE_DEFAULT


class MakeFlag(IntFlag):
    """KDBUS_MAKE_*: who may open a bus or endpoint besides its owner."""

    NONE = 0
    ACCESS_GROUP = lib.KDBUS_MAKE_ACCESS_GROUP
    ACCESS_WORLD = lib.KDBUS_MAKE_ACCESS_WORLD


class HelloFlag(IntFlag):
    """KDBUS_HELLO_*: the kind of a connection."""

    ACCEPT_FD = lib.KDBUS_HELLO_ACCEPT_FD
    ACTIVATOR = lib.KDBUS_HELLO_ACTIVATOR
    POLICY_HOLDER = lib.KDBUS_HELLO_POLICY_HOLDER
    MONITOR = lib.KDBUS_HELLO_MONITOR


class AttachFlag(IntFlag):
    """KDBUS_ATTACH_*: metadata."""

    NONE = 0
    TIMESTAMP = lib.KDBUS_ATTACH_TIMESTAMP
    CREDS = lib.KDBUS_ATTACH_CREDS
    PIDS = lib.KDBUS_ATTACH_PIDS
    AUXGROUPS = lib.KDBUS_ATTACH_AUXGROUPS
    NAMES = lib.KDBUS_ATTACH_NAMES
    TID_COMM = lib.KDBUS_ATTACH_TID_COMM
    PID_COMM = lib.KDBUS_ATTACH_PID_COMM
    EXE = lib.KDBUS_ATTACH_EXE
    CMDLINE = lib.KDBUS_ATTACH_CMDLINE
    CGROUP = lib.KDBUS_ATTACH_CGROUP
    CAPS = lib.KDBUS_ATTACH_CAPS
    SECLABEL = lib.KDBUS_ATTACH_SECLABEL
    AUDIT = lib.KDBUS_ATTACH_AUDIT
    CONN_DESCRIPTION = lib.KDBUS_ATTACH_CONN_DESCRIPTION
    ALL = lib._KDBUS_ATTACH_ALL


class MsgFlag(IntFlag):
    """KDBUS_MSG_*: the kind of a message."""

    NONE = 0
    EXPECT_REPLY = lib.KDBUS_MSG_EXPECT_REPLY
    NO_AUTO_START = lib.KDBUS_MSG_NO_AUTO_START
    SIGNAL = lib.KDBUS_MSG_SIGNAL


class NameFlag(IntFlag):
    """KDBUS_NAME_*: how to acquire a name, and how it is held."""

    NONE = 0
    REPLACE_EXISTING = lib.KDBUS_NAME_REPLACE_EXISTING
    ALLOW_REPLACEMENT = lib.KDBUS_NAME_ALLOW_REPLACEMENT
    QUEUE = lib.KDBUS_NAME_QUEUE
    IN_QUEUE = lib.KDBUS_NAME_IN_QUEUE
    ACTIVATOR = lib.KDBUS_NAME_ACTIVATOR
    PRIMARY = lib.KDBUS_NAME_PRIMARY
    ACQUIRED = lib.KDBUS_NAME_ACQUIRED


class ListFlag(IntFlag):
    """KDBUS_LIST_*: what to list."""

    UNIQUE = lib.KDBUS_LIST_UNIQUE
    NAMES = lib.KDBUS_LIST_NAMES
    ACTIVATORS = lib.KDBUS_LIST_ACTIVATORS
    QUEUED = lib.KDBUS_LIST_QUEUED


class MatchFlag(IntFlag):
    """KDBUS_MATCH_*: how to add a match."""

    NONE = 0
    REPLACE = lib.KDBUS_MATCH_REPLACE


class PolicyAccess(IntEnum):
    """KDBUS_POLICY_*: what is allowed; each includes those before it."""

    SEE = lib.KDBUS_POLICY_SEE
    TALK = lib.KDBUS_POLICY_TALK
    OWN = lib.KDBUS_POLICY_OWN


class PayloadType(IntEnum):
    """KDBUS_PAYLOAD_*; other numbers may be used as well."""

    KERNEL = lib.KDBUS_PAYLOAD_KERNEL
    DBUS = lib.KDBUS_PAYLOAD_DBUS


class ItemType(IntEnum):
    """KDBUS_ITEM_*, as far as they are seen from here: notifications."""

    NAME_ADD = lib.KDBUS_ITEM_NAME_ADD
    NAME_REMOVE = lib.KDBUS_ITEM_NAME_REMOVE
    NAME_CHANGE = lib.KDBUS_ITEM_NAME_CHANGE
    ID_ADD = lib.KDBUS_ITEM_ID_ADD
    ID_REMOVE = lib.KDBUS_ITEM_ID_REMOVE
    REPLY_TIMEOUT = lib.KDBUS_ITEM_REPLY_TIMEOUT
    REPLY_DEAD = lib.KDBUS_ITEM_REPLY_DEAD
