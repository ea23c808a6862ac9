/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Messages
 *
 * One struct for both ways. While a message is being built, msg is its own head
 * and the rest is collected apart; kdbus_message_build() puts it together for
 * sending. Of a received message, head and items are copied once, and all that is
 * ever judged or told is that copy: others may be able to write into the pool (on
 * FUSE, whoever shares the descriptor can map it for writing). Data of the payload
 * stays in the pool or, if the message was peeked at, in a copy of the slice.
 * Parts and descriptors have been looked up once, memory of memfds is mapped when
 * someone asks for it.
 */

#include "connection.h"
#include "item.h"

typedef struct KdbusPart KdbusPart;

struct KdbusPart {
	enum kdbus_part_type type;
	uint64_t size;
	const void *data;
	/* memfd: the piece of it */
	int fd;
	uint64_t start;
	/* memory that we mapped for it */
	void *map;
	size_t n_map;
};

struct kdbus_message {
	const struct kdbus_msg *msg;

	/* being built */
	struct kdbus_msg head;
	KdbusChain payload;
	KdbusChain filter;
	KdbusChain dst_name;
	int *fds_out;
	size_t n_fds_out;
	KdbusChain wire;
	bool stale;
	bool has_cookie;
	bool resume;

	/* received */
	KdbusSlice slice;
	struct kdbus_msg *in;
	void *copy;
	KdbusPart *parts;
	size_t n_parts;
	size_t n_memfds;
	int *fds;
	size_t n_fds;
	struct iovec *iov;
	bool incomplete;
};

static inline bool kdbus_message_is_received(const struct kdbus_message *message)
{
	return message->msg != &message->head;
}

int kdbus_message_build(struct kdbus_message *message, struct kdbus_msg **msgp);
int kdbus_message_new_from_slice(struct kdbus_message **messagep, struct kdbus_conn *conn,
				 const struct kdbus_msg_info *info);
int kdbus_message_new_from_copy(struct kdbus_message **messagep, void *copy, size_t size);
