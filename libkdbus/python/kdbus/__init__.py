# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of kdbus, the message bus behind a filesystem.

    with Bus("/sys/fs/kdbus", f"{os.geteuid()}-demo") as bus:
        with Connection(bus.path) as a, Connection(bus.path) as b:
            a.send(Message(b"hello", dst_id=b.id))
            with b.recv() as message:
                print(message.src_id, message.payload())

A `Connection` sends a `Message` and receives a `ReceivedMessage`. Errors are
OSErrors with kdbus's errno, in the classes of `kdbus.errors`. Times are in
seconds, sizes in bytes.
"""

from kdbus.bus import Bus, Endpoint
from kdbus.connection import Connection, Info
from kdbus.errors import (
    Disconnected,
    Inherited,
    KdbusError,
    NameTaken,
    NoDestination,
    NoMessage,
    NoNode,
    NoReply,
    NoRoom,
    NotPermitted,
    NotWaiting,
    TimedOut,
)
from kdbus.fds import FileDescriptor, Memfd
from kdbus.match import Bloom, Match
from kdbus.message import MemfdPart, Message, Part, ReceivedMessage, Zeros
from kdbus.metadata import (
    Audit,
    Caps,
    Creds,
    IdChange,
    Metadata,
    NameChange,
    Notification,
    OwnedName,
    Pids,
    ReplyFailure,
    Timestamp,
)
from kdbus.numbers import (
    DST_ID_BROADCAST,
    DST_ID_NAME,
    MATCH_ID_ANY,
    POOL_SIZE_DEFAULT,
    SRC_ID_KERNEL,
    AttachFlag,
    HelloFlag,
    ItemType,
    ListFlag,
    MakeFlag,
    MatchFlag,
    MsgFlag,
    NameFlag,
    PayloadType,
    PolicyAccess,
)
from kdbus.policy import Policy
from kdbus.version import VERSION as __version__

__all__ = [
    "DST_ID_BROADCAST",
    "DST_ID_NAME",
    "MATCH_ID_ANY",
    "POOL_SIZE_DEFAULT",
    "SRC_ID_KERNEL",
    "AttachFlag",
    "Audit",
    "Bloom",
    "Bus",
    "Caps",
    "Connection",
    "Creds",
    "Disconnected",
    "Endpoint",
    "FileDescriptor",
    "HelloFlag",
    "IdChange",
    "Info",
    "Inherited",
    "ItemType",
    "KdbusError",
    "ListFlag",
    "MakeFlag",
    "Match",
    "MatchFlag",
    "Memfd",
    "MemfdPart",
    "Message",
    "Metadata",
    "MsgFlag",
    "NameChange",
    "NameFlag",
    "NameTaken",
    "NoDestination",
    "NoMessage",
    "NoNode",
    "NoReply",
    "NoRoom",
    "NotPermitted",
    "NotWaiting",
    "Notification",
    "OwnedName",
    "Part",
    "PayloadType",
    "Pids",
    "Policy",
    "PolicyAccess",
    "ReceivedMessage",
    "ReplyFailure",
    "TimedOut",
    "Timestamp",
    "Zeros",
    "__version__",
]
