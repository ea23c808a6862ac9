/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef _KDBUS_EXTENSION_H
#define _KDBUS_EXTENSION_H

/*
 * Commands of kdbusfs that kdbus did not have
 *
 * A filesystem in user space can't install descriptors in the process that
 * calls it. It can do so by force (it stops the thread on its way out and makes
 * it receive them), which costs time and is not always allowed. A client that
 * knows of these commands hands over one end of a socket pair once, and gets
 * descriptors through it.
 *
 * They also encode the direction in which the struct really travels, which
 * spares the daemon from fetching or storing it in the caller's memory.
 *
 * Anywhere else they are refused with ENOTTY, as any unknown ioctl is. The plain
 * commands then do.
 */

#include <linux/kdbus.h>

/*
 * Hand over one end of socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC) on a
 * connection. The daemon keeps a duplicate, so the caller closes its copy.
 * Again on the same connection: replaces the earlier one.
 */
struct kdbusfs_cmd_fd_socket {
	__u64 size;
	__u64 flags; /* none are known */
	__u64 return_flags;
	__s32 fd;
	__u32 __pad;
} __attribute__((__aligned__(8)));

/*
 * The data of a packet on that socket; the descriptors are its SCM_RIGHTS:
 * those of the message's KDBUS_ITEM_FDS in order, then one for each of its
 * KDBUS_ITEM_PAYLOAD_MEMFD in item order. Their numbers in the slice are -1.
 * A connection without KDBUS_HELLO_ACCEPT_FD (only a monitor gets messages with
 * descriptors then) gets the memfds alone. The packet is there before the ioctl
 * returns, and only if there are any.
 *
 * Some files can't be sent over a socket: an io_uring, or one that a security module denies. If
 * there are any, KDBUSFS_FD_PACKET_LOST is set in n_fds, and struct kdbusfs_fd_packet_lost is the
 * data: bit n of lost stands for the nth descriptor, which is not among those of the packet.
 */
struct kdbusfs_fd_packet {
	__u64 offset; /* of the slice that they belong to */
	__u64 n_fds;  /* all of them, lost or not */
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
