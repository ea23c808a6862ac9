/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Building a message
 */

#include <string.h>
#include "message.h"
#include "util.h"

static int message_touch(struct kdbus_message *message)
{
	if (kdbus_message_is_received(message))
		return -EROFS;

	message->stale = true;
	message->resume = false;
	return 0;
}

static int message_set(struct kdbus_message *message, __u64 *field, uint64_t value)
{
	int r;

	r = message_touch(message);
	if (r == 0)
		*field = value;
	return r;
}

static int message_append_vec(struct kdbus_message *message, const void *data, size_t size)
{
	struct kdbus_vec vec = { .size = size, .address = (uintptr_t)data };
	int r;

	r = message_touch(message);
	if (r < 0 || !size)
		return r;
	return kdbus_chain_append(&message->payload, KDBUS_ITEM_PAYLOAD_VEC, &vec, sizeof(vec));
}

/**
 * kdbus_message_append_data() - add memory to the payload
 * @message:	message to add to
 * @data:	memory, read when the message is sent
 * @size:	bytes; 0 adds nothing
 *
 * kdbus takes up to 2 MiB in one piece, and less of it if the receiver's pool is
 * full. Large data is better sent as a memfd.
 *
 * Return: 0 on success, -EROFS if @message was received, -ENOMEM.
 */
_public_ int kdbus_message_append_data(struct kdbus_message *message, const void *data, size_t size)
{
	if (!data && size)
		return -EFAULT;
	return message_append_vec(message, data, size);
}

/**
 * kdbus_message_append_zeros() - add zero bytes to the payload
 * @message:	message to add to
 * @size:	bytes; 0 adds nothing
 *
 * They take no room in the receiver's pool.
 *
 * Return: 0 on success, -EROFS if @message was received, -ENOMEM.
 */
_public_ int kdbus_message_append_zeros(struct kdbus_message *message, size_t size)
{
	return message_append_vec(message, NULL, size);
}

/**
 * kdbus_message_append_memfd() - add a piece of a memfd to the payload
 * @message:	message to add to
 * @fd:		sealed memfd, see kdbus_memfd_seal(); stays with the caller
 * @start:	where the piece starts
 * @size:	bytes
 *
 * Return: 0 on success, -EROFS if @message was received, -ENOMEM.
 */
_public_ int kdbus_message_append_memfd(struct kdbus_message *message, int fd, uint64_t start,
					uint64_t size)
{
	struct kdbus_memfd memfd = { .start = start, .size = size, .fd = fd };
	int r;

	r = message_touch(message);
	if (r < 0)
		return r;
	return kdbus_chain_append(&message->payload, KDBUS_ITEM_PAYLOAD_MEMFD, &memfd,
				  sizeof(memfd));
}

/**
 * kdbus_message_append_fds() - add descriptors
 * @message:	message to add to
 * @fds:	descriptors; they stay with the caller
 * @n_fds:	number of descriptors
 *
 * Return: 0 on success, -EROFS if @message was received, -EMFILE if there are
 *         more than any message could carry, -ENOMEM.
 */
_public_ int kdbus_message_append_fds(struct kdbus_message *message, const int *fds, size_t n_fds)
{
	int r, *p;

	r = message_touch(message);
	if (r < 0 || !n_fds)
		return r;
	/* the limit is the bus's to tell, but it can't be beyond this */
	if (n_fds > 4096 - message->n_fds_out)
		return -EMFILE;

	p = realloc(message->fds_out, (message->n_fds_out + n_fds) * sizeof(*p));
	if (!p)
		return -ENOMEM;

	memcpy(p + message->n_fds_out, fds, n_fds * sizeof(*p));
	message->fds_out = p;
	message->n_fds_out += n_fds;
	return 0;
}

/**
 * kdbus_message_set_bloom_filter() - say what a signal is about
 * @message:	message to change, which becomes a signal
 * @generation:	which set of masks with several to hold it against
 * @filter:	bits, see kdbus_bloom_add(); copied
 * @size:	the bus's bloom size
 *
 * Return: 0 on success, -EROFS if @message was received, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_message_set_bloom_filter(struct kdbus_message *message, uint64_t generation,
					    const void *filter, size_t size)
{
	int r;

	r = message_touch(message);
	if (r < 0)
		return r;

	kdbus_chain_deinit(&message->filter);
	r = kdbus_chain_append_two(&message->filter, KDBUS_ITEM_BLOOM_FILTER, &generation,
				   sizeof(generation), filter, size);
	if (r < 0)
		return r;

	message->head.flags |= KDBUS_MSG_SIGNAL;
	return 0;
}

/**
 * kdbus_message_set_dst_name() - send to the owner of a name
 * @message:	message to change
 * @name:	well-known name, or NULL for none
 *
 * With an id set as well, only if that connection owns the name.
 *
 * Return: 0 on success, -EROFS if @message was received, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_message_set_dst_name(struct kdbus_message *message, const char *name)
{
	int r;

	r = message_touch(message);
	if (r < 0)
		return r;

	kdbus_chain_deinit(&message->dst_name);
	if (!name)
		return 0;
	return kdbus_chain_append_string(&message->dst_name, KDBUS_ITEM_DST_NAME, name);
}

/**
 * kdbus_message_set_dst_id() - send to a connection, or to all
 * @message:	message to change
 * @id:		its id, KDBUS_DST_ID_BROADCAST, or KDBUS_DST_ID_NAME for none
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_dst_id(struct kdbus_message *message, uint64_t id)
{
	return message_set(message, &message->head.dst_id, id);
}

/**
 * kdbus_message_set_flags() - set the flags of a message
 * @message:	message to change
 * @flags:	KDBUS_MSG_*
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_flags(struct kdbus_message *message, uint64_t flags)
{
	return message_set(message, &message->head.flags, flags);
}

/**
 * kdbus_message_set_priority() - set how urgent a message is
 * @message:	message to change
 * @priority:	the lower the more urgent; 0 at first
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_priority(struct kdbus_message *message, int64_t priority)
{
	return message_set(message, (__u64 *)&message->head.priority, priority);
}

/**
 * kdbus_message_set_payload_type() - say what the payload is
 * @message:	message to change
 * @payload_type: any number but 0
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_payload_type(struct kdbus_message *message, uint64_t payload_type)
{
	return message_set(message, &message->head.payload_type, payload_type);
}

/**
 * kdbus_message_set_cookie() - number a message
 * @message:	message to change
 * @cookie:	the number a reply refers to, or 0 to get a fresh one each time the
 *		message is sent
 *
 * Fresh ones count from 1 on each connection. Who numbers some requests by hand
 * should number all.
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_cookie(struct kdbus_message *message, uint64_t cookie)
{
	int r;

	r = message_touch(message);
	if (r < 0)
		return r;

	message->head.cookie = cookie;
	message->has_cookie = cookie;
	return 0;
}

/**
 * kdbus_message_set_cookie_reply() - make a message a reply
 * @message:	message to change
 * @cookie_reply: cookie of the request
 *
 * See kdbus_conn_reply(). Cookie and deadline share one field.
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_cookie_reply(struct kdbus_message *message, uint64_t cookie_reply)
{
	return message_set(message, &message->head.cookie_reply, cookie_reply);
}

/**
 * kdbus_message_set_deadline() - make a message a request
 * @message:	message to change
 * @deadline:	when to get a KDBUS_ITEM_REPLY_TIMEOUT notification instead
 *
 * For kdbus_conn_send(); kdbus_conn_call() needs none. Cookie and deadline share
 * one field.
 *
 * Return: 0 on success, -EROFS if @message was received.
 */
_public_ int kdbus_message_set_deadline(struct kdbus_message *message, uint64_t deadline)
{
	int r;

	r = message_touch(message);
	if (r < 0)
		return r;

	message->head.timeout_ns = deadline;
	message->head.flags |= KDBUS_MSG_EXPECT_REPLY;
	return 0;
}

/**
 * kdbus_message_build() - put a message together for sending
 * @message:	message that was built
 * @msgp:	the message, owned by @message and good until it changes
 *
 * Return: 0 on success, -EROFS if @message was received, -ENOMEM.
 */
int kdbus_message_build(struct kdbus_message *message, struct kdbus_msg **msgp)
{
	_cleanup_(kdbus_chain_deinit) KdbusChain wire = KDBUS_CHAIN_NULL;
	struct kdbus_msg *msg;
	int r;

	if (kdbus_message_is_received(message))
		return -EROFS;

	if (message->stale) {
		if ((r = kdbus_chain_init(&wire, NULL, sizeof(*msg))) < 0 ||
		    (r = kdbus_chain_append_items(&wire, &message->dst_name)) < 0 ||
		    (r = kdbus_chain_append_items(&wire, &message->filter)) < 0 ||
		    (r = kdbus_chain_append_items(&wire, &message->payload)) < 0 ||
		    (message->n_fds_out &&
		     (r = kdbus_chain_append(&wire, KDBUS_ITEM_FDS, message->fds_out,
					     message->n_fds_out * sizeof(int))) < 0))
			return r;

		kdbus_chain_deinit(&message->wire);
		message->wire = wire;
		message->stale = false;
		wire = (KdbusChain)KDBUS_CHAIN_NULL;
	}

	msg = (void *)message->wire.data;
	*msg = message->head;
	msg->size = message->wire.size;
	*msgp = msg;
	return 0;
}
