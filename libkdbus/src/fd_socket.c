/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Descriptor sockets
 */

#include <kdbus/extension.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include "fd_socket.h"
#include "util.h"

/* SCM_MAX_FD of the kernel: no packet brings more */
#define N_FDS_MAX 253

/**
 * kdbus_fd_packet_free() - release a packet
 * @packet:	packet to release, or NULL; descriptors left in it are closed
 *
 * Return: NULL.
 */
KdbusFdPacket *kdbus_fd_packet_free(KdbusFdPacket *packet)
{
	if (!packet)
		return NULL;

	for (size_t i = 0; i < packet->n_fds; ++i)
		safe_close(packet->fds[i]);
	free(packet);
	return NULL;
}

void kdbus_fd_packet_freep(KdbusFdPacket **packetp)
{
	*packetp = kdbus_fd_packet_free(*packetp);
}

/**
 * kdbus_fd_socket_deinit() - end a socket
 * @fd_socket:	socket to end; descriptors nobody asked for are closed
 *
 * Nobody else may use it. A lock that is held nevertheless was copied by fork()
 * from a thread that is not here. What it was about to change is left alone.
 */
void kdbus_fd_socket_deinit(KdbusFdSocket *fd_socket)
{
	KdbusFdPacket *packet;

	if (pthread_mutex_trylock(&fd_socket->lock) == 0) {
		while ((packet = fd_socket->packets)) {
			fd_socket->packets = packet->next;
			kdbus_fd_packet_free(packet);
		}
		pthread_mutex_unlock(&fd_socket->lock);
		pthread_mutex_destroy(&fd_socket->lock);
	}
	fd_socket->fd = safe_close(fd_socket->fd);
}

static KdbusFdPacket *packet_new(const struct kdbusfs_fd_packet_lost *data, struct msghdr *msg)
{
	KdbusFdPacket *packet;

	packet = malloc(sizeof(*packet) + N_FDS_MAX * sizeof(int));
	if (packet)
		*packet = (KdbusFdPacket){
			.offset = data->packet.offset,
			.n_sent = data->packet.n_fds & ~KDBUSFS_FD_PACKET_LOST,
			.lost = data->lost,
		};

	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		int fds[N_FDS_MAX];

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;

		memcpy(fds, CMSG_DATA(c), n * sizeof(int));
		for (size_t i = 0; i < n; ++i) {
			if (packet && packet->n_fds < N_FDS_MAX)
				packet->fds[packet->n_fds++] = fds[i];
			else
				safe_close(fds[i]);
		}
	}
	return packet;
}

/* the next packet that is there; false: none */
static bool socket_recv(KdbusFdSocket *fd_socket, KdbusFdPacket **packetp)
{
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(N_FDS_MAX * sizeof(int))];
	} control;
	struct kdbusfs_fd_packet_lost data = {};
	struct iovec iov = { .iov_base = &data, .iov_len = sizeof(data) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n;

	do {
		n = recvmsg(fd_socket->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n <= 0)
		return false;

	*packetp = packet_new(&data, &msg);
	if ((size_t)n !=
	    (data.packet.n_fds & KDBUSFS_FD_PACKET_LOST ? sizeof(data) : sizeof(data.packet)))
		kdbus_fd_packet_freep(packetp);
	return true;
}

static KdbusFdPacket *socket_unlink(KdbusFdSocket *fd_socket, uint64_t offset)
{
	KdbusFdPacket **p, *packet;

	for (p = &fd_socket->packets; (packet = *p); p = &packet->next) {
		if (packet->offset == offset) {
			*p = packet->next;
			return packet;
		}
	}
	return NULL;
}

/**
 * kdbus_fd_socket_take() - get the descriptors of a slice
 * @fd_socket:	socket to look at
 * @offset:	of the slice, which must not have been freed yet
 *
 * A packet left over from an earlier slice at the same place (whose message
 * nobody could make use of) is always older, hence the last one counts.
 *
 * Return: The packet, owned by the caller; or NULL if there is none.
 */
KdbusFdPacket *kdbus_fd_socket_take(KdbusFdSocket *fd_socket, uint64_t offset)
{
	KdbusFdPacket *packet;

	pthread_mutex_lock(&fd_socket->lock);
	while (socket_recv(fd_socket, &packet)) {
		if (!packet)
			continue;
		kdbus_fd_packet_free(socket_unlink(fd_socket, packet->offset));
		packet->next = fd_socket->packets;
		fd_socket->packets = packet;
	}
	packet = socket_unlink(fd_socket, offset);
	pthread_mutex_unlock(&fd_socket->lock);
	return packet;
}
