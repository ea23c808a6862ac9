// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Connections and messages by raw ioctls
 */

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include "connection.h"

#define ITEM_HEADER offsetof(struct kdbus_item, data)

/* Tells on stderr what failed, and hands the error on. */
int fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(-error));
	return error;
}

/* Returns the number of bytes used, padding included. */
size_t item_put(void *at, uint64_t type, const void *data, size_t n_data)
{
	struct kdbus_item *item = at;

	item->size = ITEM_HEADER + n_data;
	item->type = type;
	memcpy(item->data, data, n_data);

	return ALIGN8(item->size);
}

/**
 * bus_make() - make a bus
 * @fdp:		output argument for the descriptor that keeps the bus alive
 * @path:		output buffer for the path of its endpoint
 * @n_path:		size of that buffer
 * @directory:		mount point
 * @name:		name of the bus, without the uid in front
 * @flags:		KDBUS_MAKE_*
 *
 * Return: 0 on success, negative error code on failure.
 */
int bus_make(int *fdp, char *path, size_t n_path, const char *directory, const char *name,
	     uint64_t flags)
{
	return bus_make_bloom(fdp, path, n_path, directory, name, flags, BLOOM_SIZE);
}

/* The same with filters of another size than that of message_add_bloom(). */
int bus_make_bloom(int *fdp, char *path, size_t n_path, const char *directory, const char *name,
		   uint64_t flags, uint64_t n_bloom)
{
	struct kdbus_bloom_parameter bloom = { .size = n_bloom, .n_hash = 1 };
	uint64_t buffer[COMMAND_MAX / 8] = {};
	struct kdbus_cmd *command = (void *)buffer;
	char full[64];
	int fd, r;

	snprintf(full, sizeof(full), "%u-%s", geteuid(), name);
	snprintf(path, n_path, "%s/control", directory);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return fail(path, -errno);

	command->size = sizeof(*command);
	command->flags = flags;
	command->size += item_put((uint8_t *)command + command->size, KDBUS_ITEM_BLOOM_PARAMETER,
				  &bloom, sizeof(bloom));
	command->size += item_put((uint8_t *)command + command->size, KDBUS_ITEM_MAKE_NAME, full,
				  strlen(full) + 1);

	r = sample_ioctl(NULL, fd, KDBUS_CMD_BUS_MAKE, command);
	if (r < 0) {
		close(fd);
		return fail("BUS_MAKE", r);
	}

	snprintf(path, n_path, "%s/%s/bus", directory, full);
	*fdp = fd;
	return 0;
}

/**
 * connection_init() - open an endpoint and say hello
 * @connection:		connection to initialise
 * @path:		path of the endpoint
 * @pool_size:		bytes of the pool
 * @flags:		KDBUS_HELLO_*
 * @attach_flags_recv:	KDBUS_ATTACH_* to receive
 * @description:	name shown to others, or NULL
 *
 * Return: 0 on success, negative error code on failure.
 */
int connection_init(Connection *connection, const char *path, uint64_t pool_size, uint64_t flags,
		    uint64_t attach_flags_recv, const char *description)
{
	uint64_t buffer[COMMAND_MAX / 8] = {};
	struct kdbus_cmd_hello *command = (void *)buffer;
	int r;

	*connection = (Connection)CONNECTION_NULL;
	connection->pool_size = pool_size;
	connection->fd = open(path, O_RDWR | O_CLOEXEC);
	if (connection->fd < 0)
		return fail(path, -errno);

	command->size = sizeof(*command);
	command->flags = flags;
	command->attach_flags_send = _KDBUS_ATTACH_ALL;
	command->attach_flags_recv = attach_flags_recv;
	command->pool_size = pool_size;
	if (description)
		command->size += item_put((uint8_t *)command + command->size,
					  KDBUS_ITEM_CONN_DESCRIPTION, description,
					  strlen(description) + 1);

	r = sample_ioctl(NULL, connection->fd, KDBUS_CMD_HELLO, command);
	if (r < 0) {
		connection_deinit(connection);
		return fail("HELLO", r);
	}

	connection->id = command->id;
	return connection_free(connection, NULL, command->offset);
}

void connection_deinit(Connection *connection)
{
	if (connection->pool)
		munmap((void *)connection->pool, connection->pool_size);
	if (connection->fd_socket >= 0)
		close(connection->fd_socket);
	if (connection->fd >= 0)
		close(connection->fd);
	*connection = (Connection)CONNECTION_NULL;
}

/* From here on descriptors come on a socket; -ENOTTY where that is unknown. */
int connection_init_fd_socket(Connection *connection)
{
	struct kdbusfs_cmd_fd_socket command = { .size = sizeof(command) };
	int pair[2], r;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;

	command.fd = pair[1];
	r = sample_ioctl(NULL, connection->fd, KDBUSFS_CMD_FD_SOCKET, &command);
	close(pair[1]);
	if (r < 0) {
		close(pair[0]);
		return r;
	}

	connection->fd_socket = pair[0];
	return 0;
}

int connection_map(Connection *connection)
{
	void *pool;

	pool = mmap(NULL, connection->pool_size, PROT_READ, MAP_SHARED, connection->fd, 0);
	if (pool == MAP_FAILED)
		return fail("mmap", -errno);

	connection->pool = pool;
	return 0;
}

int connection_name_acquire(Connection *connection, const char *name)
{
	uint64_t buffer[COMMAND_MAX / 8] = {};
	struct kdbus_cmd *command = (void *)buffer;
	int r;

	command->size = sizeof(*command);
	command->size += item_put((uint8_t *)command + command->size, KDBUS_ITEM_NAME, name,
				  strlen(name) + 1);

	r = sample_ioctl(NULL, connection->fd, KDBUS_CMD_NAME_ACQUIRE, command);
	return r < 0 ? fail("NAME_ACQUIRE", r) : 0;
}

int connection_match_add(Connection *connection, uint64_t cookie, uint64_t type, const void *data,
			 size_t n_data)
{
	uint64_t buffer[COMMAND_MAX / 8] = {};
	struct kdbus_cmd_match *command = (void *)buffer;
	int r;

	command->size = sizeof(*command);
	command->cookie = cookie;
	command->size += item_put((uint8_t *)command + command->size, type, data, n_data);

	r = sample_ioctl(NULL, connection->fd, KDBUS_CMD_MATCH_ADD, command);
	return r < 0 ? fail("MATCH_ADD", r) : 0;
}

/* An empty mask is in every filter, but takes no notifications. */
int connection_match_add_all(Connection *connection)
{
	static const uint8_t mask[BLOOM_SIZE];

	return connection_match_add(connection, 1, KDBUS_ITEM_BLOOM_MASK, mask, sizeof(mask));
}

static int fd_socket_recv(Connection *connection, Received *received)
{
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
	} control;
	struct kdbusfs_fd_packet packet;
	struct iovec iov = { &packet, sizeof(packet) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};

	if (recvmsg(connection->fd_socket, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) < 0)
		return -errno;
	if (packet.offset != received->offset || !CMSG_FIRSTHDR(&msg))
		return -EBADMSG;

	received->n_fds = (CMSG_FIRSTHDR(&msg)->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	memcpy(received->fds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), received->n_fds * sizeof(int));
	return 0;
}

/* Finds data and descriptors of the message at the offset in the mapped pool. */
static int received_parse(Connection *connection, Received *received,
			  const struct kdbus_msg_info *info)
{
	const struct kdbus_item *item;
	const uint8_t *end;
	size_t i;

	*received = (Received){ .offset = info->offset };
	if (info->return_flags & KDBUS_RECV_RETURN_INCOMPLETE_FDS)
		return fail("descriptors are incomplete", -EBADF);
	if (!connection->pool)
		return 0;

	received->msg = (const void *)(connection->pool + info->offset);
	end = (const uint8_t *)received->msg + received->msg->size;
	for (item = received->msg->items; (const uint8_t *)item < end;
	     item = (const void *)((const uint8_t *)item + ALIGN8(item->size))) {
		switch (item->type) {
		case KDBUS_ITEM_PAYLOAD_OFF:
			if (!received->data)
				received->data = (const uint8_t *)received->msg + item->vec.offset;
			received->n_data += item->vec.size;
			break;
		case KDBUS_ITEM_PAYLOAD_MEMFD:
			received->n_memfd += item->memfd.size;
			received->fds[received->n_fds++] = item->memfd.fd;
			break;
		case KDBUS_ITEM_FDS:
			for (i = 0; i < (item->size - ITEM_HEADER) / sizeof(int); ++i)
				received->fds[received->n_fds++] = item->fds[i];
			break;
		}
	}

	if (received->n_fds && connection->fd_socket >= 0)
		return fd_socket_recv(connection, received);

	return 0;
}

/**
 * connection_send() - send a message
 * @connection:		sender
 * @sample:		sample that takes the time of the ioctl, or NULL
 * @message:		message
 * @flags:		KDBUS_SEND_*
 * @replyp:		output argument for the reply, or NULL
 *
 * Return: 0 on success, negative error code of the ioctl on failure.
 */
int connection_send(Connection *connection, Sample *sample, Message *message, uint64_t flags,
		    Received *replyp)
{
	struct kdbus_cmd_send command = {
		.size = sizeof(command),
		.flags = flags,
		.msg_address = (uintptr_t)message->msg,
	};
	bool by_socket = replyp && connection->fd_socket >= 0;
	int r;

	r = sample_ioctl(sample, connection->fd, by_socket ? KDBUSFS_CMD_SEND : KDBUS_CMD_SEND,
			 &command);
	if (r < 0 || !replyp)
		return r;

	return received_parse(connection, replyp, &command.reply);
}

/**
 * connection_recv() - take the next message
 * @connection:		receiver
 * @sample:		sample that takes the time of the ioctl, or NULL
 * @received:		output argument for the message
 *
 * Descriptors are taken off the socket, if there is one; that is part of the
 * time only insofar as the caller takes it.
 *
 * Return: 0 on success, negative error code of the ioctl on failure.
 */
int connection_recv(Connection *connection, Sample *sample, Received *received)
{
	struct kdbus_cmd_recv command = { .size = sizeof(command) };
	bool by_socket = connection->fd_socket >= 0;
	int r;

	r = sample_ioctl(sample, connection->fd, by_socket ? KDBUSFS_CMD_RECV : KDBUS_CMD_RECV,
			 &command);
	if (r < 0)
		return r;

	return received_parse(connection, received, &command.msg);
}

int connection_free(Connection *connection, Sample *sample, uint64_t offset)
{
	struct kdbus_cmd_free command = { .size = sizeof(command), .offset = offset };

	return sample_ioctl(sample, connection->fd, KDBUS_CMD_FREE, &command);
}

/* Gives back all that came with a message. */
int connection_drop(Connection *connection, Received *received)
{
	size_t i;

	for (i = 0; i < received->n_fds; ++i)
		close(received->fds[i]);

	return connection_free(connection, NULL, received->offset);
}

/* Takes the one message that is expected, outside of any sample. */
int connection_drain(Connection *connection)
{
	Received received;
	int r;

	r = connection_recv(connection, NULL, &received);
	if (r < 0)
		return fail("RECV", r);

	r = connection_drop(connection, &received);
	return r < 0 ? fail("FREE", r) : 0;
}

/* Only the SEND goes into the sample. */
int connection_send_drain(Connection *sender, Sample *sample, Message *message,
			  Connection *receiver)
{
	int r;

	r = connection_send(sender, sample, message, 0, NULL);
	if (r < 0)
		return fail("SEND", r);

	return connection_drain(receiver);
}

int message_init(Message *message, uint64_t dst_id, uint64_t flags)
{
	message->msg = calloc(1, COMMAND_MAX);
	if (!message->msg)
		return -ENOMEM;

	message->msg->size = sizeof(*message->msg);
	message->msg->flags = flags;
	message->msg->dst_id = dst_id;
	message->msg->payload_type = KDBUS_PAYLOAD_DBUS;
	message->msg->cookie = 1;
	return 0;
}

void message_deinit(Message *message)
{
	free(message->msg);
	*message = (Message){};
}

void message_add(Message *message, uint64_t type, const void *data, size_t n_data)
{
	assert(message->msg->size + ITEM_HEADER + ALIGN8(n_data) <= COMMAND_MAX);
	message->msg->size += item_put((uint8_t *)message->msg + message->msg->size, type, data,
				       n_data);
}

/* As many vecs as the limit on one of them asks for. */
void message_add_payload(Message *message, const void *data, uint64_t size)
{
	struct kdbus_vec vec;
	uint64_t done;

	for (done = 0; done < size; done += vec.size) {
		vec.address = (uintptr_t)data + done;
		vec.size = size - done < VEC_MAX ? size - done : VEC_MAX;
		message_add(message, KDBUS_ITEM_PAYLOAD_VEC, &vec, sizeof(vec));
	}
}

void message_add_memfd(Message *message, int fd, uint64_t size)
{
	struct kdbus_memfd memfd = { .size = size, .fd = fd };

	message_add(message, KDBUS_ITEM_PAYLOAD_MEMFD, &memfd, sizeof(memfd));
}

void message_add_fds(Message *message, const int *fds, size_t n_fds)
{
	message_add(message, KDBUS_ITEM_FDS, fds, n_fds * sizeof(*fds));
}

/* An empty filter: only an empty mask is in it. */
void message_add_bloom(Message *message)
{
	uint64_t filter[1 + BLOOM_SIZE / 8] = {};

	message_add(message, KDBUS_ITEM_BLOOM_FILTER, filter, sizeof(filter));
}

void message_add_name(Message *message, const char *name)
{
	message_add(message, KDBUS_ITEM_DST_NAME, name, strlen(name) + 1);
}

int sealed_memfd(int *fdp, const void *data, size_t size)
{
	size_t done;
	ssize_t l;
	int fd, r;

	fd = memfd_create("kdbusfs-bench", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;

	for (done = 0; done < size; done += l) {
		l = write(fd, (const uint8_t *)data + done, size - done);
		if (l < 0) {
			r = -errno;
			close(fd);
			return r;
		}
	}

	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0) {
		r = -errno;
		close(fd);
		return r;
	}

	*fdp = fd;
	return 0;
}
