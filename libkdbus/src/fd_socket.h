/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Descriptor sockets
 *
 * Where kdbusfs delivers descriptors that it could only force upon us
 * otherwise, see <kdbus/extension.h>. A packet says by its offset which slice
 * its descriptors belong to. It is there before the ioctl that handed out the
 * slice returns, so nobody ever waits here; but when several threads receive,
 * one may come across the packets of another. So all that are there are taken
 * in, and kept until asked for.
 */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

typedef struct KdbusFdPacket KdbusFdPacket;
typedef struct KdbusFdSocket KdbusFdSocket;

struct KdbusFdPacket {
	KdbusFdPacket *next;
	uint64_t offset;
	/* as sent; some may not have made it because of RLIMIT_NOFILE */
	uint64_t n_sent;
	/* bit n: the nth of them could not be sent */
	uint64_t lost;
	size_t n_fds;
	int fds[];
};

struct KdbusFdSocket {
	int fd;
	pthread_mutex_t lock;
	KdbusFdPacket *packets;
};

#define KDBUS_FD_SOCKET_INIT { .fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER }

KdbusFdPacket *kdbus_fd_packet_free(KdbusFdPacket *packet);
void kdbus_fd_packet_freep(KdbusFdPacket **packetp);

void kdbus_fd_socket_deinit(KdbusFdSocket *fd_socket);
KdbusFdPacket *kdbus_fd_socket_take(KdbusFdSocket *fd_socket, uint64_t offset);
