# SPDX-License-Identifier: LGPL-2.1-or-later
"""Layouts of the kdbus ABI as precompiled `struct.Struct`s, native byte order, no padding.

STRUCT_FIELD is the offset of a field, for what is read or written by itself; each struct begins
with its size. Sizes and offsets are those of linux/kdbus.h; tests/abi holds both against it.
"""

from struct import Struct
from typing import Final

U32 = Struct("=I")
I32 = Struct("=i")
I64 = Struct("=q")
U64 = Struct("=Q")
U64x2 = Struct("=QQ")

ITEM_HEADER = Struct("=QQ")
"""struct kdbus_item: size (header and payload, without padding), type."""
ITEM_HEADER_SIZE: Final = 16
ITEM_TYPE: Final = 8

CMD = Struct("=QQQ")
"""struct kdbus_cmd, which begins every command's struct: size, flags, return_flags."""
CMD_SIZE: Final = 24
CMD_FLAGS: Final = 8
CMD_RETURN_FLAGS: Final = 16
CMD_HELLO = Struct("=QQQQQQQQQQ16s")
"""struct kdbus_cmd_hello: size, flags, return_flags, attach_flags_send, attach_flags_recv,
bus_flags, id, pool_size, offset, items_size, id128."""
CMD_HELLO_ATTACH_FLAGS_SEND: Final = 24
CMD_HELLO_ATTACH_FLAGS_RECV: Final = 32
CMD_HELLO_BUS_FLAGS: Final = 40
"""id follows."""
CMD_HELLO_POOL_SIZE: Final = 56
CMD_HELLO_OFFSET: Final = 64
"""items_size follows."""
CMD_HELLO_ID128: Final = 80
CMD_FREE = Struct("=QQQQ")
"""struct kdbus_cmd_free: size, flags, return_flags, offset."""
CMD_FREE_OFFSET: Final = 24
CMD_INFO = Struct("=QQQQQQQ")
"""struct kdbus_cmd_info: size, flags, return_flags, id, attach_flags, offset, info_size."""
CMD_INFO_ID: Final = 24
CMD_INFO_ATTACH_FLAGS: Final = 32
CMD_INFO_OFFSET: Final = 40
"""info_size follows."""
CMD_LIST = Struct("=QQQQQ")
"""struct kdbus_cmd_list: size, flags, return_flags, offset, list_size."""
CMD_LIST_OFFSET: Final = 24
"""list_size follows."""
CMD_SEND = Struct("=QQQQQQQ")
"""struct kdbus_cmd_send: size, flags, return_flags, msg_address, reply (`MSG_INFO`)."""
CMD_SEND_MSG_ADDRESS: Final = 24
CMD_SEND_REPLY: Final = 32
CMD_SEND_REPLY_RETURN_FLAGS: Final = 48
CMD_RECV = Struct("=QQQqQQQQ")
"""struct kdbus_cmd_recv: size, flags, return_flags, priority, dropped_msgs, msg (`MSG_INFO`)."""
CMD_RECV_PRIORITY: Final = 24
CMD_RECV_DROPPED_MSGS: Final = 32
"""msg follows."""
CMD_RECV_MSG: Final = 40
CMD_RECV_MSG_RETURN_FLAGS: Final = 56
CMD_MATCH = Struct("=QQQQ")
"""struct kdbus_cmd_match: size, flags, return_flags, cookie."""
CMD_MATCH_COOKIE: Final = 24
CMD_FD_SOCKET = Struct("=QQQiI")
"""struct kdbusfs_cmd_fd_socket: size, flags, return_flags, fd, padding."""
CMD_FD_SOCKET_FD: Final = 24
CMD_EXCHANGE = Struct("=QQQQQIIIIIIii")
"""struct kdbusfs_cmd_exchange: size, flags, return_flags, deadline_ns, dropped_msgs, n_free,
n_freed, n_send, n_sent, n_recv, n_received, cancel_fd, fd_socket."""
CMD_EXCHANGE_DROPPED_MSGS: Final = 32
CMD_EXCHANGE_N_FREED: Final = 44
CMD_EXCHANGE_N_SENT: Final = 52
CMD_EXCHANGE_N_RECEIVED: Final = 60
CMD_EXCHANGE_FD_SOCKET: Final = 68

MSG = Struct("=QQqQQQQQ")
"""struct kdbus_msg: size, flags, priority, dst_id, src_id, payload_type, cookie, and timeout_ns or
cookie_reply."""
MSG_SIZE: Final = 64
MSG_SRC_ID: Final = 32

INFO = Struct("=QQQ")
"""struct kdbus_info: size, id, flags."""
MSG_INFO = Struct("=QQQ")
"""struct kdbus_msg_info: offset, msg_size, return_flags."""

VEC = Struct("=QQ")
"""struct kdbus_vec: size, address or offset."""
VEC_ADDRESS: Final = 8
VEC_OFFSET: Final = 8
MEMFD = Struct("=QQiI")
"""struct kdbus_memfd: start, size, fd, padding."""
MEMFD_FD: Final = 16
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
BLOOM_FILTER_DATA: Final = 8
"""struct kdbus_bloom_filter: generation, data."""
POLICY_ACCESS = Struct("=QQQ")
"""struct kdbus_policy_access: type, access, id."""


def align8(n: int) -> int:
    """*n* rounded up to a multiple of 8."""
    return (n + 7) & ~7
