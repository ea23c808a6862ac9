/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef _LINUX_KDBUS_H
#define _LINUX_KDBUS_H

/*
 * The kdbus ABI
 *
 * Numbers and layouts of the kdbus ioctl interface, under the names that
 * programs written for kdbus use. Everything else in this project takes them
 * from here.
 *
 * A command is a struct that starts with its total size, a word of flags and a
 * word of return flags, followed by a chain of items. Each item is 8-byte
 * aligned and starts with its size (header included, padding not included) and
 * its type. All integers are native-endian, and all structs have the same
 * layout on 32-bit and 64-bit machines.
 *
 * The open-ended arrays are of length 0 rather than C99 flexible arrays, since
 * they appear in unions and in members of other structs, where both C and C++
 * refuse the latter. __extension__ keeps -pedantic quiet about them, about
 * unnamed unions in C99, and about enumerators that need 64 bits.
 */

#include <linux/ioctl.h>
#include <linux/types.h>

#define KDBUS_IOCTL_MAGIC		0x95

/* kdbus_msg.src_id of messages from the bus itself, see "notifications" */
#define KDBUS_SRC_ID_KERNEL		(0)
/* kdbus_msg.dst_id: the destination is given by KDBUS_ITEM_DST_NAME alone */
#define KDBUS_DST_ID_NAME		(0)
/* kdbus_msg.dst_id: all connections with a fitting match */
#define KDBUS_DST_ID_BROADCAST		(~0ULL)
/* an id in a match rule: whichever */
#define KDBUS_MATCH_ID_ANY		(~0ULL)
/*
 * In the flags of any command and of a message: report the flags (in the same
 * word) and the item types (KDBUS_ITEM_NEGOTIATE) that are known, do no more.
 */
#define KDBUS_FLAG_NEGOTIATE		(1ULL << 63)

/*
 * Item types
 *
 * Four ranges: what user space passes in (from 1), metadata (from 0x1000, bit
 * n of the attach flags asks for item 0x1000 + n), policy (from 0x2000) and
 * notifications (from 0x8000). To the right: the payload.
 */
__extension__ enum kdbus_item_type {
	_KDBUS_ITEM_NULL		= 0,

	_KDBUS_ITEM_USER_BASE		= 0x0001,
	KDBUS_ITEM_NEGOTIATE		= 0x0001, /* u64 per type, cleared if unknown */
	KDBUS_ITEM_PAYLOAD_VEC		= 0x0002, /* kdbus_vec, .address */
	KDBUS_ITEM_PAYLOAD_OFF		= 0x0003, /* kdbus_vec, .offset */
	KDBUS_ITEM_PAYLOAD_MEMFD	= 0x0004, /* kdbus_memfd */
	KDBUS_ITEM_FDS			= 0x0005, /* s32 per descriptor */
	KDBUS_ITEM_CANCEL_FD		= 0x0006, /* s32; readable: give up the call */
	KDBUS_ITEM_BLOOM_PARAMETER	= 0x0007, /* kdbus_bloom_parameter */
	KDBUS_ITEM_BLOOM_FILTER		= 0x0008, /* kdbus_bloom_filter */
	KDBUS_ITEM_BLOOM_MASK		= 0x0009, /* bits, one set per generation */
	KDBUS_ITEM_DST_NAME		= 0x000a, /* string */
	KDBUS_ITEM_MAKE_NAME		= 0x000b, /* string */
	KDBUS_ITEM_ATTACH_FLAGS_SEND	= 0x000c, /* u64, KDBUS_ATTACH_* */
	KDBUS_ITEM_ATTACH_FLAGS_RECV	= 0x000d, /* u64, KDBUS_ATTACH_* */
	KDBUS_ITEM_ID			= 0x000e, /* u64 */
	KDBUS_ITEM_NAME			= 0x000f, /* string */
	KDBUS_ITEM_DST_ID		= 0x0010, /* u64 */

	_KDBUS_ITEM_ATTACH_BASE		= 0x1000,
	KDBUS_ITEM_TIMESTAMP		= 0x1000, /* kdbus_timestamp */
	KDBUS_ITEM_CREDS		= 0x1001, /* kdbus_creds */
	KDBUS_ITEM_PIDS			= 0x1002, /* kdbus_pids */
	KDBUS_ITEM_AUXGROUPS		= 0x1003, /* u64 per group */
	KDBUS_ITEM_OWNED_NAME		= 0x1004, /* kdbus_name */
	KDBUS_ITEM_TID_COMM		= 0x1005, /* string; the process can set it */
	KDBUS_ITEM_PID_COMM		= 0x1006, /* string; the process can set it */
	KDBUS_ITEM_EXE			= 0x1007, /* string; the process can set it */
	KDBUS_ITEM_CMDLINE		= 0x1008, /* string; the process can set it */
	KDBUS_ITEM_CGROUP		= 0x1009, /* string */
	KDBUS_ITEM_CAPS			= 0x100a, /* kdbus_caps */
	KDBUS_ITEM_SECLABEL		= 0x100b, /* string */
	KDBUS_ITEM_AUDIT		= 0x100c, /* kdbus_audit */
	KDBUS_ITEM_CONN_DESCRIPTION	= 0x100d, /* string */

	_KDBUS_ITEM_POLICY_BASE		= 0x2000,
	KDBUS_ITEM_POLICY_ACCESS	= 0x2000, /* kdbus_policy_access */

	_KDBUS_ITEM_KERNEL_BASE		= 0x8000,
	KDBUS_ITEM_NAME_ADD		= 0x8000, /* kdbus_notify_name_change */
	KDBUS_ITEM_NAME_REMOVE		= 0x8001, /* kdbus_notify_name_change */
	KDBUS_ITEM_NAME_CHANGE		= 0x8002, /* kdbus_notify_name_change */
	KDBUS_ITEM_ID_ADD		= 0x8003, /* kdbus_notify_id_change */
	KDBUS_ITEM_ID_REMOVE		= 0x8004, /* kdbus_notify_id_change */
	KDBUS_ITEM_REPLY_TIMEOUT	= 0x8005, /* none */
	KDBUS_ITEM_REPLY_DEAD		= 0x8006  /* none */
};

/* Attach flags: which metadata to send, to receive, or to be told */
__extension__ enum kdbus_attach_flags {
	KDBUS_ATTACH_TIMESTAMP		= 1ULL << 0,
	KDBUS_ATTACH_CREDS		= 1ULL << 1,
	KDBUS_ATTACH_PIDS		= 1ULL << 2,
	KDBUS_ATTACH_AUXGROUPS		= 1ULL << 3,
	KDBUS_ATTACH_NAMES		= 1ULL << 4,
	KDBUS_ATTACH_TID_COMM		= 1ULL << 5,
	KDBUS_ATTACH_PID_COMM		= 1ULL << 6,
	KDBUS_ATTACH_EXE		= 1ULL << 7,
	KDBUS_ATTACH_CMDLINE		= 1ULL << 8,
	KDBUS_ATTACH_CGROUP		= 1ULL << 9,
	KDBUS_ATTACH_CAPS		= 1ULL << 10,
	KDBUS_ATTACH_SECLABEL		= 1ULL << 11,
	KDBUS_ATTACH_AUDIT		= 1ULL << 12,
	KDBUS_ATTACH_CONN_DESCRIPTION	= 1ULL << 13,
	_KDBUS_ATTACH_ALL		= (1ULL << 14) - 1,
	_KDBUS_ATTACH_ANY		= ~0ULL
};

/*
 * Payload of messages
 */

/* A piece of memory. Sent: its address; received: where in the message it is */
__extension__ struct kdbus_vec {
	__u64 size;
	union {
		__u64 address;		/* 0: @size zero bytes */
		__u64 offset;		/* from the start of the kdbus_msg, ~0: zeros */
	};
} __attribute__((__aligned__(8)));

/* A piece of a sealed memfd */
struct kdbus_memfd {
	__u64 start;
	__u64 size;
	int fd;
	__u32 __pad;
} __attribute__((__aligned__(8)));

/* The bloom filters of a bus, chosen by its creator */
struct kdbus_bloom_parameter {
	__u64 size;			/* bytes in a filter */
	__u64 n_hash;			/* hash functions; for programs to agree on */
} __attribute__((__aligned__(8)));

/* What a signal is about, to be held against the masks of the receivers */
__extension__ struct kdbus_bloom_filter {
	__u64 generation;		/* which set of a mask with several to take */
	__u64 data[0];
} __attribute__((__aligned__(8)));

/*
 * Metadata
 */

/* CLOCK_MONOTONIC and CLOCK_REALTIME at delivery, and the number on the bus */
struct kdbus_timestamp {
	__u64 seqnum;
	__u64 monotonic_ns;
	__u64 realtime_ns;
} __attribute__((__aligned__(8)));

/* User and group ids as in credentials(7), in the receiver's user namespace */
struct kdbus_creds {
	__u64 uid;
	__u64 euid;
	__u64 suid;
	__u64 fsuid;
	__u64 gid;
	__u64 egid;
	__u64 sgid;
	__u64 fsgid;
} __attribute__((__aligned__(8)));

/* Process, thread and parent in the receiver's pid namespace, 0 if not there */
struct kdbus_pids {
	__u64 pid;
	__u64 tid;
	__u64 ppid;
} __attribute__((__aligned__(8)));

/*
 * Capability sets: inheritable, permitted, effective and bounding, each
 * last_cap / 32 + 1 words, low word first.
 */
__extension__ struct kdbus_caps {
	__u32 last_cap;
	__u32 caps[0];
} __attribute__((__aligned__(8)));

/* Audit session and login user; 2^32-1 each while unset */
struct kdbus_audit {
	__u32 sessionid;
	__u32 loginuid;
} __attribute__((__aligned__(8)));

/* A well-known name and the KDBUS_NAME_* flags it is held with */
__extension__ struct kdbus_name {
	__u64 flags;
	char name[0];
} __attribute__((__aligned__(8)));

/*
 * Policy
 *
 * An access line follows a KDBUS_ITEM_NAME and says what whom may do with it.
 */

/* Whom */
__extension__ enum kdbus_policy_access_type {
	_KDBUS_POLICY_ACCESS_NULL	= 0,
	KDBUS_POLICY_ACCESS_USER	= 1,	/* .id is a uid */
	KDBUS_POLICY_ACCESS_GROUP	= 2,	/* .id is a gid */
	KDBUS_POLICY_ACCESS_WORLD	= 3	/* .id is ignored */
};

/* What; each includes those before it */
__extension__ enum kdbus_policy_type {
	KDBUS_POLICY_SEE		= 0,
	KDBUS_POLICY_TALK		= 1,
	KDBUS_POLICY_OWN		= 2
};

struct kdbus_policy_access {
	__u64 type;			/* KDBUS_POLICY_ACCESS_* */
	__u64 access;			/* KDBUS_POLICY_{SEE,TALK,OWN} */
	__u64 id;
} __attribute__((__aligned__(8)));

/*
 * Notifications
 *
 * Messages from the bus: a single item from 0x8000 on, then a timestamp. The
 * same structs serve as match rules.
 */

/* A connection came or went; KDBUS_HELLO_* flags. In a name change: its owner,
 * and the KDBUS_NAME_* flags it holds the name with */
struct kdbus_notify_id_change {
	__u64 id;
	__u64 flags;
} __attribute__((__aligned__(8)));

/* A well-known name got an owner, lost its owner, or has another one */
__extension__ struct kdbus_notify_name_change {
	struct kdbus_notify_id_change old_id;
	struct kdbus_notify_id_change new_id;
	char name[0];
} __attribute__((__aligned__(8)));

/*
 * One item of a chain. The next starts at the following multiple of 8 after
 * @size bytes.
 */
__extension__ struct kdbus_item {
	__u64 size;
	__u64 type;			/* KDBUS_ITEM_* */
	union {
		__u8 data[0];
		__u32 data32[0];
		__u64 data64[0];
		char str[0];
		int fds[0];
		__u64 id;

		struct kdbus_vec vec;
		struct kdbus_memfd memfd;
		struct kdbus_bloom_parameter bloom_parameter;
		struct kdbus_bloom_filter bloom_filter;

		struct kdbus_timestamp timestamp;
		struct kdbus_creds creds;
		struct kdbus_pids pids;
		struct kdbus_caps caps;
		struct kdbus_audit audit;
		struct kdbus_name name;

		struct kdbus_policy_access policy_access;

		struct kdbus_notify_id_change id_change;
		struct kdbus_notify_name_change name_change;
	};
} __attribute__((__aligned__(8)));

/*
 * Messages
 */

__extension__ enum kdbus_msg_flags {
	KDBUS_MSG_EXPECT_REPLY		= 1ULL << 0, /* a request; needs timeout_ns */
	KDBUS_MSG_NO_AUTO_START		= 1ULL << 1, /* not if only an activator is there */
	KDBUS_MSG_SIGNAL		= 1ULL << 2  /* only to whom has a match for it */
};

/* Any other number from 1 on may be used as well */
__extension__ enum kdbus_payload_type {
	KDBUS_PAYLOAD_KERNEL		= 0,
	KDBUS_PAYLOAD_DBUS		= 0x4442757344427573ULL /* "DBusDBus" */
};

__extension__ struct kdbus_msg {
	__u64 size;			/* header and items, not the payload area */
	__u64 flags;			/* KDBUS_MSG_* */
	__s64 priority;			/* lowest first, if RECV asks for it */
	__u64 dst_id;
	__u64 src_id;
	__u64 payload_type;
	__u64 cookie;			/* the sender's own */
	union {
		__u64 timeout_ns;	/* request: deadline on CLOCK_MONOTONIC */
		__u64 cookie_reply;	/* reply: cookie of the request, 0: none */
	};
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* Where in the pool a message was put */
struct kdbus_msg_info {
	__u64 offset;
	__u64 msg_size;			/* of the slice: message and payload area */
	__u64 return_flags;		/* KDBUS_RECV_RETURN_INCOMPLETE_FDS */
} __attribute__((__aligned__(8)));

/*
 * Commands
 *
 * Each starts with size, flags and return_flags. Fields said to be returned
 * need no value on input.
 */

/* Commands without a struct of their own: flags and items only */
__extension__ struct kdbus_cmd {
	__u64 size;
	__u64 flags;
	__u64 return_flags;
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* KDBUS_CMD_BUS_MAKE, KDBUS_CMD_ENDPOINT_MAKE: the mode of the new node */
__extension__ enum kdbus_make_flags {
	KDBUS_MAKE_ACCESS_GROUP		= 1ULL << 0,
	KDBUS_MAKE_ACCESS_WORLD		= 1ULL << 1
};

/* KDBUS_CMD_NAME_ACQUIRE; the first three as input, the others are returned */
__extension__ enum kdbus_name_flags {
	KDBUS_NAME_REPLACE_EXISTING	= 1ULL << 0, /* take it from an owner that allows it */
	KDBUS_NAME_ALLOW_REPLACEMENT	= 1ULL << 1, /* others may take it from me */
	KDBUS_NAME_QUEUE		= 1ULL << 2, /* wait in line for it */
	KDBUS_NAME_IN_QUEUE		= 1ULL << 3, /* waiting in line */
	KDBUS_NAME_ACTIVATOR		= 1ULL << 4, /* held by an activator */
	KDBUS_NAME_PRIMARY		= 1ULL << 5, /* the owner */
	KDBUS_NAME_ACQUIRED		= 1ULL << 6  /* this very call changed it */
};

__extension__ enum kdbus_hello_flags {
	KDBUS_HELLO_ACCEPT_FD		= 1ULL << 0, /* messages may bring descriptors */
	KDBUS_HELLO_ACTIVATOR		= 1ULL << 1, /* messages for a name wait here */
	KDBUS_HELLO_POLICY_HOLDER	= 1ULL << 2, /* holds the policy of a name */
	KDBUS_HELLO_MONITOR		= 1ULL << 3  /* gets a copy of everything */
};

/* KDBUS_CMD_HELLO: become a connection */
__extension__ struct kdbus_cmd_hello {
	__u64 size;
	__u64 flags;			/* KDBUS_HELLO_* */
	__u64 return_flags;
	__u64 attach_flags_send;	/* metadata that CONN_INFO may tell of us */
	__u64 attach_flags_recv;	/* metadata wanted on messages */
	__u64 bus_flags;		/* returned: flags of the BUS_MAKE */
	__u64 id;			/* returned */
	__u64 pool_size;		/* whole pages */
	__u64 offset;			/* returned: items about the bus, to be freed */
	__u64 items_size;		/* returned: their size */
	__u8 id128[16];			/* returned: UUID of the bus */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* KDBUS_CMD_FREE: give a slice of the pool back */
__extension__ struct kdbus_cmd_free {
	__u64 size;
	__u64 flags;
	__u64 return_flags;
	__u64 offset;
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* KDBUS_CMD_SEND: wait for the reply in the call itself */
__extension__ enum kdbus_send_flags {
	KDBUS_SEND_SYNC_REPLY		= 1ULL << 0
};

__extension__ struct kdbus_cmd_send {
	__u64 size;
	__u64 flags;			/* KDBUS_SEND_* */
	__u64 return_flags;
	__u64 msg_address;		/* of a struct kdbus_msg */
	struct kdbus_msg_info reply;	/* returned */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

__extension__ enum kdbus_recv_flags {
	KDBUS_RECV_PEEK			= 1ULL << 0, /* leave it in the queue */
	KDBUS_RECV_DROP			= 1ULL << 1, /* throw it away unseen */
	KDBUS_RECV_USE_PRIORITY		= 1ULL << 2  /* the most urgent, see .priority */
};

__extension__ enum kdbus_recv_return_flags {
	KDBUS_RECV_RETURN_INCOMPLETE_FDS = 1ULL << 0, /* .msg.return_flags: some are -1 */
	KDBUS_RECV_RETURN_DROPPED_MSGS	= 1ULL << 1  /* .return_flags: see .dropped_msgs */
};

/* KDBUS_CMD_RECV: take the next message out of the queue */
__extension__ struct kdbus_cmd_recv {
	__u64 size;
	__u64 flags;			/* KDBUS_RECV_* */
	__u64 return_flags;		/* KDBUS_RECV_RETURN_DROPPED_MSGS */
	__s64 priority;			/* only messages with this value or a lower one */
	__u64 dropped_msgs;		/* returned, with EAGAIN too: lost since last time */
	struct kdbus_msg_info msg;	/* returned */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/*
 * KDBUS_CMD_CONN_INFO, KDBUS_CMD_BUS_CREATOR_INFO: a struct kdbus_info about a
 * connection or about who made the bus
 */
__extension__ struct kdbus_cmd_info {
	__u64 size;
	__u64 flags;
	__u64 return_flags;
	__u64 id;			/* 0: by KDBUS_ITEM_NAME */
	__u64 attach_flags;		/* what to tell */
	__u64 offset;			/* returned: slice, to be freed */
	__u64 info_size;		/* returned */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

__extension__ enum kdbus_list_flags {
	KDBUS_LIST_UNIQUE		= 1ULL << 0, /* connections */
	KDBUS_LIST_NAMES		= 1ULL << 1, /* names with their owners */
	KDBUS_LIST_ACTIVATORS		= 1ULL << 2, /* names with their activators */
	KDBUS_LIST_QUEUED		= 1ULL << 3  /* names with those in line */
};

/* KDBUS_CMD_LIST: an array of struct kdbus_info */
__extension__ struct kdbus_cmd_list {
	__u64 size;
	__u64 flags;			/* KDBUS_LIST_* */
	__u64 return_flags;
	__u64 offset;			/* returned: slice, to be freed */
	__u64 list_size;		/* returned */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* A record of LIST, or the result of CONN_INFO and BUS_CREATOR_INFO */
__extension__ struct kdbus_info {
	__u64 size;
	__u64 id;
	__u64 flags;			/* KDBUS_HELLO_* or, of a bus, KDBUS_MAKE_* */
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/* KDBUS_CMD_MATCH_ADD: instead of all matches with this cookie */
__extension__ enum kdbus_cmd_match_flags {
	KDBUS_MATCH_REPLACE		= 1ULL << 0
};

/* KDBUS_CMD_MATCH_ADD, KDBUS_CMD_MATCH_REMOVE */
__extension__ struct kdbus_cmd_match {
	__u64 size;
	__u64 flags;			/* KDBUS_MATCH_* */
	__u64 return_flags;
	__u64 cookie;
	struct kdbus_item items[0];
} __attribute__((__aligned__(8)));

/*
 * The codes. What their direction bits say is part of the number and no more:
 * every command is read and written back, and its items lie beyond the size
 * that is encoded.
 */
__extension__ enum kdbus_ioctl_type {
	/* on a control node */
	KDBUS_CMD_BUS_MAKE		= _IOW(KDBUS_IOCTL_MAGIC, 0x00, struct kdbus_cmd),

	/* on an endpoint node */
	KDBUS_CMD_ENDPOINT_MAKE		= _IOW(KDBUS_IOCTL_MAGIC, 0x10, struct kdbus_cmd),
	KDBUS_CMD_ENDPOINT_UPDATE	= _IOW(KDBUS_IOCTL_MAGIC, 0x11, struct kdbus_cmd),
	KDBUS_CMD_HELLO			= _IOWR(KDBUS_IOCTL_MAGIC, 0x80, struct kdbus_cmd_hello),

	/* on a connection */
	KDBUS_CMD_UPDATE		= _IOW(KDBUS_IOCTL_MAGIC, 0x81, struct kdbus_cmd),
	KDBUS_CMD_BYEBYE		= _IOW(KDBUS_IOCTL_MAGIC, 0x82, struct kdbus_cmd),
	KDBUS_CMD_FREE			= _IOW(KDBUS_IOCTL_MAGIC, 0x83, struct kdbus_cmd_free),
	KDBUS_CMD_CONN_INFO		= _IOR(KDBUS_IOCTL_MAGIC, 0x84, struct kdbus_cmd_info),
	KDBUS_CMD_BUS_CREATOR_INFO	= _IOR(KDBUS_IOCTL_MAGIC, 0x85, struct kdbus_cmd_info),
	KDBUS_CMD_LIST			= _IOR(KDBUS_IOCTL_MAGIC, 0x86, struct kdbus_cmd_list),
	KDBUS_CMD_SEND			= _IOW(KDBUS_IOCTL_MAGIC, 0x90, struct kdbus_cmd_send),
	KDBUS_CMD_RECV			= _IOR(KDBUS_IOCTL_MAGIC, 0x91, struct kdbus_cmd_recv),
	KDBUS_CMD_NAME_ACQUIRE		= _IOW(KDBUS_IOCTL_MAGIC, 0xa0, struct kdbus_cmd),
	KDBUS_CMD_NAME_RELEASE		= _IOW(KDBUS_IOCTL_MAGIC, 0xa1, struct kdbus_cmd),
	KDBUS_CMD_MATCH_ADD		= _IOW(KDBUS_IOCTL_MAGIC, 0xb0, struct kdbus_cmd_match),
	KDBUS_CMD_MATCH_REMOVE		= _IOW(KDBUS_IOCTL_MAGIC, 0xb1, struct kdbus_cmd_match)
};

#endif /* _LINUX_KDBUS_H */
