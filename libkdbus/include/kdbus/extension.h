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

__extension__ enum kdbusfs_ioctl_type {
	KDBUSFS_CMD_FD_SOCKET = _IOW(KDBUS_IOCTL_MAGIC, 0xf0, struct kdbusfs_cmd_fd_socket),
	/* as KDBUS_CMD_RECV, but descriptors arrive on the socket */
	KDBUSFS_CMD_RECV = _IOWR(KDBUS_IOCTL_MAGIC, 0xf1, struct kdbus_cmd_recv),
	/* as KDBUS_CMD_SEND, but those of a synchronous reply arrive on the socket */
	KDBUSFS_CMD_SEND = _IOWR(KDBUS_IOCTL_MAGIC, 0xf2, struct kdbus_cmd_send)
};

#endif /* _KDBUS_EXTENSION_H */
