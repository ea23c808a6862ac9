# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers of the kdbus ABI, under kdbus's own names without the prefix.

Each class names the C prefix its members have in linux/kdbus.h. Hot paths use plain integers
(`int(...)` once, at import): arithmetic on enum members costs more than the work it does.
"""

from enum import IntEnum, IntFlag

IOCTL_MAGIC = 0x95

ID_ANY = (1 << 64) - 1
"""KDBUS_DST_ID_BROADCAST as a destination, KDBUS_MATCH_ID_ANY in a rule."""
DST_ID_BROADCAST = ID_ANY
OFFSET_NONE = (1 << 64) - 1
"""The offset in a PAYLOAD_OFF item that stands for zero bytes without data."""
FLAG_NEGOTIATE = 1 << 63


class Command(IntEnum):
    """KDBUS_CMD_*: the ioctl numbers."""

    BUS_MAKE = 0x40189500
    ENDPOINT_MAKE = 0x40189510
    ENDPOINT_UPDATE = 0x40189511
    HELLO = 0xC0609580
    UPDATE = 0x40189581
    BYEBYE = 0x40189582
    FREE = 0x40209583
    CONN_INFO = 0x80389584
    BUS_CREATOR_INFO = 0x80389585
    LIST = 0x80289586
    SEND = 0x40389590
    RECV = 0x80409591
    NAME_ACQUIRE = 0x401895A0
    NAME_RELEASE = 0x401895A1
    MATCH_ADD = 0x402095B0
    MATCH_REMOVE = 0x402095B1


class ExtensionCommand(IntEnum):
    """KDBUSFS_CMD_*: commands of kdbusfs alone, used by libkdbus (kdbus/extension.h)."""

    FD_SOCKET = 0x402095F0
    RECV = 0xC04095F1
    SEND = 0xC03895F2
    EXCHANGE = 0xC04895F3
    """Its size is that of the block; this is the number for the smallest."""


EXCHANGE_MASK = ~(0x3FFF << 16)
"""What remains of the number of an EXCHANGE, without its size."""


class ExtensionItemType(IntEnum):
    """KDBUSFS_ITEM_*: items of kdbusfs alone (kdbus/extension.h)."""

    PAYLOAD_INLINE = 0x0FF0


class ExchangeFlag(IntFlag):
    """KDBUSFS_EXCHANGE_*: flags of EXCHANGE."""

    WAIT = 1
    CALL = 2


class ItemType(IntEnum):
    """KDBUS_ITEM_*: what an item holds."""

    NEGOTIATE = 1
    PAYLOAD_VEC = 2
    PAYLOAD_OFF = 3
    PAYLOAD_MEMFD = 4
    FDS = 5
    CANCEL_FD = 6
    BLOOM_PARAMETER = 7
    BLOOM_FILTER = 8
    BLOOM_MASK = 9
    DST_NAME = 10
    MAKE_NAME = 11
    ATTACH_FLAGS_SEND = 12
    ATTACH_FLAGS_RECV = 13
    ID = 14
    NAME = 15
    DST_ID = 16
    TIMESTAMP = 0x1000
    CREDS = 0x1001
    PIDS = 0x1002
    AUXGROUPS = 0x1003
    OWNED_NAME = 0x1004
    TID_COMM = 0x1005
    PID_COMM = 0x1006
    EXE = 0x1007
    CMDLINE = 0x1008
    CGROUP = 0x1009
    CAPS = 0x100A
    SECLABEL = 0x100B
    AUDIT = 0x100C
    CONN_DESCRIPTION = 0x100D
    POLICY_ACCESS = 0x2000
    NAME_ADD = 0x8000
    NAME_REMOVE = 0x8001
    NAME_CHANGE = 0x8002
    ID_ADD = 0x8003
    ID_REMOVE = 0x8004
    REPLY_TIMEOUT = 0x8005
    REPLY_DEAD = 0x8006


class AttachFlag(IntFlag):
    """KDBUS_ATTACH_*: which metadata; bit n stands for item 0x1000+n (NAMES: OWNED_NAME)."""

    TIMESTAMP = 1 << 0
    CREDS = 1 << 1
    PIDS = 1 << 2
    AUXGROUPS = 1 << 3
    NAMES = 1 << 4
    TID_COMM = 1 << 5
    PID_COMM = 1 << 6
    EXE = 1 << 7
    CMDLINE = 1 << 8
    CGROUP = 1 << 9
    CAPS = 1 << 10
    SECLABEL = 1 << 11
    AUDIT = 1 << 12
    CONN_DESCRIPTION = 1 << 13


ATTACH_ALL = 0x3FFF
"""_KDBUS_ATTACH_ALL"""
ATTACH_ANY = (1 << 64) - 1
"""_KDBUS_ATTACH_ANY: stands for ATTACH_ALL wherever attach flags are given."""


class MakeFlag(IntFlag):
    """KDBUS_MAKE_*: flags of BUS_MAKE and ENDPOINT_MAKE."""

    ACCESS_GROUP = 1
    ACCESS_WORLD = 2


class HelloFlag(IntFlag):
    """KDBUS_HELLO_*: flags of HELLO."""

    ACCEPT_FD = 1
    ACTIVATOR = 2
    POLICY_HOLDER = 4
    MONITOR = 8


class MsgFlag(IntFlag):
    """KDBUS_MSG_*: flags of a message."""

    EXPECT_REPLY = 1
    NO_AUTO_START = 2
    SIGNAL = 4


class SendFlag(IntFlag):
    """KDBUS_SEND_*: flags of SEND."""

    SYNC_REPLY = 1


class RecvFlag(IntFlag):
    """KDBUS_RECV_*: flags of RECV."""

    PEEK = 1
    DROP = 2
    USE_PRIORITY = 4


class RecvReturnFlag(IntFlag):
    """KDBUS_RECV_RETURN_*: INCOMPLETE_FDS in msg.return_flags, DROPPED_MSGS in return_flags."""

    INCOMPLETE_FDS = 1
    DROPPED_MSGS = 2


class ListFlag(IntFlag):
    """KDBUS_LIST_*: flags of LIST."""

    UNIQUE = 1
    NAMES = 2
    ACTIVATORS = 4
    QUEUED = 8


class MatchFlag(IntFlag):
    """KDBUS_MATCH_*: flags of MATCH_ADD."""

    REPLACE = 1


class NameFlag(IntFlag):
    """KDBUS_NAME_*: flags of NAME_ACQUIRE and of a name's owner record."""

    REPLACE_EXISTING = 1
    ALLOW_REPLACEMENT = 2
    QUEUE = 4
    IN_QUEUE = 8
    ACTIVATOR = 0x10
    PRIMARY = 0x20
    ACQUIRED = 0x40


class PolicyType(IntEnum):
    """KDBUS_POLICY_ACCESS_{USER,GROUP,WORLD}: whom a policy line speaks of."""

    USER = 1
    GROUP = 2
    WORLD = 3


class PolicyAccess(IntEnum):
    """KDBUS_POLICY_{SEE,TALK,OWN}: what a policy line grants; higher includes lower."""

    SEE = 0
    TALK = 1
    OWN = 2


class PayloadType(IntEnum):
    """KDBUS_PAYLOAD_*: users may send any value but KERNEL."""

    KERNEL = 0
    DBUS = 0x4442757344427573


class Limit(IntEnum):
    """The limits of kdbus(7) and ipc/kdbus/limits.h; KDBUS_*_MAX_*."""

    COMMAND_SIZE = 32768
    VEC_SIZE = 2 * 1024 * 1024
    MESSAGE_MEMFDS = 16
    MESSAGE_FDS = 16
    USER_FDS = 16
    USER_MESSAGES = 256
    CONNECTION_REQUESTS = 128
    CONNECTION_NAMES = 256
    CONNECTION_MATCHES = 256
    USER_CONNECTIONS = 1024
    USER_BUSES = 16
    NAME_LENGTH = 255
    SYSNAME_LENGTH = 63
    BLOOM_SIZE_MIN = 8
    BLOOM_SIZE_MAX = 4096
