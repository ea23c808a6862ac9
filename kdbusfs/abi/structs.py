# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts of the kdbus ABI as precompiled `struct.Struct`s, native byte order, no padding.

Sizes and offsets are those of linux/kdbus.h; tests/abi holds both against each other.
"""

from struct import Struct

U32 = Struct("=I")
I32 = Struct("=i")
I64 = Struct("=q")
U64 = Struct("=Q")
U64x2 = Struct("=QQ")
U64x3 = Struct("=QQQ")

ITEM_HEADER = Struct("=QQ")
"""struct kdbus_item: size (header and payload, without padding), type."""
ITEM_HEADER_SIZE = 16

CMD = Struct("=QQQ")
"""struct kdbus_cmd: size, flags, return_flags."""
CMD_HELLO = Struct("=QQQQQQQQQQ16s")
"""struct kdbus_cmd_hello: size, flags, return_flags, attach_flags_send, attach_flags_recv,
bus_flags, id, pool_size, offset, items_size, id128."""
CMD_FREE = Struct("=QQQQ")
"""struct kdbus_cmd_free: size, flags, return_flags, offset."""
CMD_INFO = Struct("=QQQQQQQ")
"""struct kdbus_cmd_info: size, flags, return_flags, id, attach_flags, offset, info_size."""
CMD_LIST = Struct("=QQQQQ")
"""struct kdbus_cmd_list: size, flags, return_flags, offset, list_size."""
CMD_SEND = Struct("=QQQQQQQ")
"""struct kdbus_cmd_send: size, flags, return_flags, msg_address, reply (`MSG_INFO`)."""
CMD_RECV = Struct("=QQQqQQQQ")
"""struct kdbus_cmd_recv: size, flags, return_flags, priority, dropped_msgs, msg (`MSG_INFO`)."""
CMD_MATCH = Struct("=QQQQ")
"""struct kdbus_cmd_match: size, flags, return_flags, cookie."""
CMD_FD_SOCKET = Struct("=QQQiI")
"""struct kdbusfs_cmd_fd_socket: size, flags, return_flags, fd, padding."""

MSG = Struct("=QQqQQQQQ")
"""struct kdbus_msg: size, flags, priority, dst_id, src_id, payload_type, cookie, and timeout_ns or
cookie_reply."""
MSG_SIZE = 64
MSG_SRC_ID = 32
"""Offset of src_id in struct kdbus_msg."""

INFO = Struct("=QQQ")
"""struct kdbus_info: size, id, flags."""
MSG_INFO = Struct("=QQQ")
"""struct kdbus_msg_info: offset, msg_size, return_flags."""

VEC = Struct("=QQ")
"""struct kdbus_vec: size, address or offset."""
MEMFD = Struct("=QQiI")
"""struct kdbus_memfd: start, size, fd, padding."""
CREDS = Struct("=8Q")
"""struct kdbus_creds: uid, euid, suid, fsuid, gid, egid, sgid, fsgid."""
PIDS = Struct("=QQQ")
"""struct kdbus_pids: pid, tid, ppid."""
AUDIT = Struct("=II")
"""struct kdbus_audit: sessionid, loginuid."""
TIMESTAMP = Struct("=QQQ")
"""struct kdbus_timestamp: seqnum, monotonic_ns, realtime_ns."""
ID_CHANGE = Struct("=QQ")
"""struct kdbus_notify_id_change: id, flags."""
NAME_CHANGE = Struct("=QQQQ")
"""struct kdbus_notify_name_change: old id, old flags, new id, new flags; the name follows."""
BLOOM_PARAMETER = Struct("=QQ")
"""struct kdbus_bloom_parameter: size in bytes, n_hash."""
POLICY_ACCESS = Struct("=QQQ")
"""struct kdbus_policy_access: type, access, id."""


def align8(n: int) -> int:
    """*n* rounded up to a multiple of 8."""
    return (n + 7) & ~7
