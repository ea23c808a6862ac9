/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Messages of both kinds, built and received: their life and their head
 */

#include <sys/mman.h>
#include "message.h"
#include "util.h"

/**
 * kdbus_message_new() - start a message
 * @messagep:	the new message
 *
 * It has no destination yet, the payload type KDBUS_PAYLOAD_DBUS, and gets a
 * cookie when it is sent unless kdbus_message_set_cookie() gave it one.
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_message_new(struct kdbus_message **messagep)
{
	struct kdbus_message *message;

	message = calloc(1, sizeof(*message));
	if (!message)
		return -ENOMEM;

	message->msg = &message->head;
	message->head.payload_type = KDBUS_PAYLOAD_DBUS;
	message->stale = true;
	*messagep = message;
	return 0;
}

/**
 * kdbus_message_free() - release a message
 * @message:	message to release, or NULL
 *
 * Of a received message, the descriptors that were not taken are closed, what
 * was mapped is unmapped, and its slice is freed. Of a message that was built,
 * nothing but the message goes.
 *
 * Return: NULL.
 */
_public_ struct kdbus_message *kdbus_message_free(struct kdbus_message *message)
{
	if (!message)
		return NULL;

	for (size_t i = 0; i < message->n_parts; ++i) {
		if (message->parts[i].map)
			munmap(message->parts[i].map, message->parts[i].n_map);
		safe_close(message->parts[i].fd);
	}
	for (size_t i = 0; i < message->n_fds; ++i)
		safe_close(message->fds[i]);
	kdbus_slice_unlink(&message->slice);

	free(message->parts);
	free(message->fds);
	free(message->iov);
	free(message->in);
	free(message->copy);
	free(message->fds_out);
	kdbus_chain_deinit(&message->payload);
	kdbus_chain_deinit(&message->filter);
	kdbus_chain_deinit(&message->dst_name);
	kdbus_chain_deinit(&message->wire);
	free(message);
	return NULL;
}

/**
 * kdbus_message_get_flags() - get the flags of a message
 * @message:	message to look at
 *
 * Return: KDBUS_MSG_*
 */
_public_ uint64_t kdbus_message_get_flags(const struct kdbus_message *message)
{
	return message->msg->flags;
}

/**
 * kdbus_message_get_priority() - get how urgent a message is
 * @message:	message to look at
 *
 * Return: The priority, the lower the more urgent.
 */
_public_ int64_t kdbus_message_get_priority(const struct kdbus_message *message)
{
	return message->msg->priority;
}

/**
 * kdbus_message_get_dst_id() - get the destination, as the sender wrote it
 * @message:	message to look at
 *
 * Return: An id, KDBUS_DST_ID_BROADCAST, or KDBUS_DST_ID_NAME if it was sent to a
 *         name.
 */
_public_ uint64_t kdbus_message_get_dst_id(const struct kdbus_message *message)
{
	return message->msg->dst_id;
}

/**
 * kdbus_message_get_src_id() - get the sender
 * @message:	message to look at
 *
 * Return: An id, KDBUS_SRC_ID_KERNEL for notifications.
 */
_public_ uint64_t kdbus_message_get_src_id(const struct kdbus_message *message)
{
	return message->msg->src_id;
}

/**
 * kdbus_message_get_payload_type() - get what the payload is
 * @message:	message to look at
 *
 * Return: KDBUS_PAYLOAD_*, or another number.
 */
_public_ uint64_t kdbus_message_get_payload_type(const struct kdbus_message *message)
{
	return message->msg->payload_type;
}

/**
 * kdbus_message_get_cookie() - get the number of a message
 * @message:	message to look at
 *
 * Return: The sender's number for it; of a message that was built, the one it
 *         was sent with last.
 */
_public_ uint64_t kdbus_message_get_cookie(const struct kdbus_message *message)
{
	return message->msg->cookie;
}

/**
 * kdbus_message_get_cookie_reply() - get the cookie of the request
 * @message:	message to look at
 *
 * Return: The cookie, or 0 if @message is no reply.
 */
_public_ uint64_t kdbus_message_get_cookie_reply(const struct kdbus_message *message)
{
	if (message->msg->flags & KDBUS_MSG_EXPECT_REPLY)
		return 0;
	return message->msg->cookie_reply;
}

/**
 * kdbus_message_get_deadline() - get when a request times out
 * @message:	message to look at
 *
 * Return: The deadline, or 0 if @message is no request.
 */
_public_ uint64_t kdbus_message_get_deadline(const struct kdbus_message *message)
{
	if (!(message->msg->flags & KDBUS_MSG_EXPECT_REPLY))
		return 0;
	return message->msg->timeout_ns;
}
