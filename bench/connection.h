// SPDX-License-Identifier: LGPL-2.1-or-later
#pragma once

/*
 * Connections and messages by raw ioctls
 *
 * The smallest layer that lets the tables say what they time without hiding
 * any system call: each function makes the one ioctl in its name. Messages are
 * built once, outside of the timed part, and sent any number of times.
 */

#include <kdbus/extension.h>
#include <linux/kdbus.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "sample.h"

typedef struct Connection Connection;
typedef struct Message Message;
typedef struct Received Received;

#define BLOOM_SIZE 64
#define VEC_MAX (UINT64_C(2) << 20)
#define FDS_MAX 32
#define COMMAND_MAX 32768 /* bytes of a command or of a message, with items */
#define ALIGN8(x) (((x) + 7) & ~UINT64_C(7))

struct Connection {
	int fd;
	int fd_socket; /* private descriptor socket, or -1 */
	uint64_t id;
	uint64_t pool_size;
	const uint8_t *pool;
};

#define CONNECTION_NULL { .fd = -1, .fd_socket = -1 }

struct Message {
	struct kdbus_msg *msg;
	size_t n_bytes;
};

struct Received {
	uint64_t offset;
	const struct kdbus_msg *msg;
	const uint8_t *data; /* of the vecs, which follow each other */
	uint64_t n_data;
	uint64_t n_memfd; /* bytes in memfds */
	int fds[FDS_MAX];
	size_t n_fds;
};

int fail(const char *what, int error);
size_t item_put(void *at, uint64_t type, const void *data, size_t n_data);

int bus_make(int *fdp, char *path, size_t n_path, const char *directory, const char *name,
	     uint64_t flags);
int bus_make_bloom(int *fdp, char *path, size_t n_path, const char *directory, const char *name,
		   uint64_t flags, uint64_t n_bloom);

int connection_init(Connection *connection, const char *path, uint64_t pool_size, uint64_t flags,
		    uint64_t attach_flags_recv, const char *description);
void connection_deinit(Connection *connection);
int connection_init_fd_socket(Connection *connection);
int connection_map(Connection *connection);
int connection_name_acquire(Connection *connection, const char *name);
int connection_match_add(Connection *connection, uint64_t cookie, uint64_t type, const void *data,
			 size_t n_data);
int connection_match_add_all(Connection *connection);

int connection_send(Connection *connection, Sample *sample, Message *message, uint64_t flags,
		    Received *replyp);
int connection_recv(Connection *connection, Sample *sample, Received *received);
int connection_free(Connection *connection, Sample *sample, uint64_t offset);
int connection_drop(Connection *connection, Received *received);
int connection_drain(Connection *connection);
int connection_send_drain(Connection *sender, Sample *sample, Message *message,
			  Connection *receiver);

int message_init(Message *message, uint64_t dst_id, uint64_t flags);
void message_deinit(Message *message);
void message_add(Message *message, uint64_t type, const void *data, size_t n_data);
void message_add_payload(Message *message, const void *data, uint64_t size);
void message_add_memfd(Message *message, int fd, uint64_t size);
void message_add_fds(Message *message, const int *fds, size_t n_fds);
void message_add_bloom(Message *message);
void message_add_name(Message *message, const char *name);

int sealed_memfd(int *fdp, const void *data, size_t size);
