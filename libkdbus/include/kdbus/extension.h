/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef _KDBUS_EXTENSION_H
#define _KDBUS_EXTENSION_H

/*
 * Commands of kdbusfs that kdbus did not have
 *
 * A filesystem in user space cannot simply install descriptors in the process
 * that calls it. It can force them on it (it stops the thread before its call
 * returns and makes it receive them), but that costs time and is not always
 * allowed. A client that knows these commands hands over one end of a socket
 * pair once per connection, and receives its descriptors through the other end.
 *
 * The numbers of these commands also say in which direction the struct is
 * copied. So the kernel copies it, and the daemon need not read or write the
 * memory of the caller.
 *
 * Everything but kdbusfs refuses them with ENOTTY, as any unknown ioctl. Use the
 * plain commands then.
 */

#include <linux/kdbus.h>

/*
 * KDBUSFS_CMD_FD_SOCKET, on a connection: hand over one end of
 * socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC). The daemon keeps a
 * duplicate, so the caller closes its copy. Issued again on the same connection,
 * it replaces the earlier socket.
 */
struct kdbusfs_cmd_fd_socket {
	__u64 size;
	__u64 flags; /* there are none yet */
	__u64 return_flags;
	__s32 fd;
	__u32 __pad;
} __attribute__((__aligned__(8)));

/*
 * One packet on that socket. This struct is its data. Its SCM_RIGHTS are the
 * descriptors of one message: those of KDBUS_ITEM_FDS in order, then one for each
 * KDBUS_ITEM_PAYLOAD_MEMFD in the order of the items. In the slice, the items
 * have -1 in place of their numbers. A connection without KDBUS_HELLO_ACCEPT_FD
 * receives the memfds alone; only a monitor receives such messages then. The
 * packet is in the socket before the ioctl returns. A message without descriptors
 * has no packet.
 *
 * Some files cannot be sent over a socket: an io_uring, or one that a security
 * module denies. If the message has any, KDBUSFS_FD_PACKET_LOST is set in n_fds,
 * and the data is struct kdbusfs_fd_packet_lost. Bit n of lost, counted from 0,
 * is set if descriptor n is not in the packet.
 */
struct kdbusfs_fd_packet {
	__u64 offset; /* in bytes, of the message's slice in the pool */
	__u64 n_fds;  /* number of descriptors, lost or not */
} __attribute__((__aligned__(8)));

struct kdbusfs_fd_packet_lost {
	struct kdbusfs_fd_packet packet;
	__u64 lost;
} __attribute__((__aligned__(8)));

#define KDBUSFS_FD_PACKET_LOST (1ULL << 63)

/*
 * Free slices, send messages, and wait for messages, in one call.
 *
 * The argument is one block that travels with the request, in both directions, so nothing is read
 * from elsewhere but payload that lies elsewhere, and nothing is stored elsewhere:
 *
 *	struct kdbusfs_cmd_exchange
 *	struct kdbus_msg_info	received[n_recv]	out
 *	__u64			free[n_free]		offsets, as for KDBUS_CMD_FREE
 *	struct kdbus_msg	n_send of them, one behind the other, each at a multiple of 8
 *	payload of these, as it comes
 *
 * KDBUSFS_CMD_EXCHANGE(size) is the number of the command for a block of up to @size bytes, of
 * which there may be KDBUSFS_EXCHANGE_SIZE_MAX. The messages are as for KDBUS_CMD_SEND. Their
 * payload may also lie in the block, described by an item of type KDBUSFS_ITEM_PAYLOAD_INLINE, a
 * struct kdbus_vec with the offset in the block; the receiver gets a KDBUS_ITEM_PAYLOAD_OFF.
 *
 * First all slices are freed, then all messages are sent. Each message is for itself, as if sent
 * by a call of its own. The first thing that is refused ends the call with its errno; n_freed and
 * n_sent say how far it came. With KDBUSFS_EXCHANGE_CALL the last message is sent as with
 * KDBUS_SEND_SYNC_REPLY: the call waits for its reply, which is received[0], and for nothing else.
 *
 * Then up to n_recv messages are received, n_received in the end; one that brings descriptors is
 * the last. Without any, KDBUSFS_EXCHANGE_WAIT waits until there is one, messages were lost,
 * deadline_ns has come (ETIMEDOUT), cancel_fd is readable (ECANCELED), or the connection has ended
 * (ECONNRESET). A signal ends a wait like one for a synchronous reply: EINTR, or the same call
 * goes on after a handler with SA_RESTART. What has been freed and sent is not done again, since
 * the block says so: n_freed and n_sent are read, too.
 */
struct kdbusfs_cmd_exchange {
	__u64 size;         /* of the block */
	__u64 flags;        /* KDBUSFS_EXCHANGE_* */
	__u64 return_flags; /* KDBUS_RECV_RETURN_DROPPED_MSGS */
	__u64 deadline_ns;  /* CLOCK_MONOTONIC; ~0: never */
	__u64 dropped_msgs; /* how many messages were lost */
	__u32 n_free;
	__u32 n_freed; /* 0 at first */
	__u32 n_send;
	__u32 n_sent; /* 0 at first */
	__u32 n_recv;
	__u32 n_received;
	__s32 cancel_fd; /* ends a wait, or -1 */
	__s32 fd_socket; /* as for KDBUSFS_CMD_FD_SOCKET, or -1 */
} __attribute__((__aligned__(8)));

enum {
	KDBUSFS_EXCHANGE_WAIT = 1 << 0,
	KDBUSFS_EXCHANGE_CALL = 1 << 1
};

enum {
	KDBUSFS_ITEM_PAYLOAD_INLINE = 0x0ff0 /* kdbus_vec, .offset */
};

#define KDBUSFS_EXCHANGE_SIZE_MAX ((1U << _IOC_SIZEBITS) - 8)
#define KDBUSFS_CMD_EXCHANGE(size) _IOC(_IOC_READ | _IOC_WRITE, KDBUS_IOCTL_MAGIC, 0xf3, (size))

__extension__ enum kdbusfs_ioctl_type {
	KDBUSFS_CMD_FD_SOCKET = _IOW(KDBUS_IOCTL_MAGIC, 0xf0, struct kdbusfs_cmd_fd_socket),
	/* as KDBUS_CMD_RECV, but descriptors arrive on the socket */
	KDBUSFS_CMD_RECV = _IOWR(KDBUS_IOCTL_MAGIC, 0xf1, struct kdbus_cmd_recv),
	/* as KDBUS_CMD_SEND, but those of a synchronous reply arrive on the socket */
	KDBUSFS_CMD_SEND = _IOWR(KDBUS_IOCTL_MAGIC, 0xf2, struct kdbus_cmd_send)
};

#endif /* _KDBUS_EXTENSION_H */
