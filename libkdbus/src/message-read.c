/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading a message that was received
 */

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include "command.h"
#include "message.h"
#include "util.h"

static void message_count(struct kdbus_message *message, const void *items, size_t size)
{
	const struct kdbus_item *item = NULL;

	while ((item = kdbus_items_next(items, size, item))) {
		switch (item->type) {
		case KDBUS_ITEM_PAYLOAD_MEMFD:
			++message->n_memfds;
			++message->n_parts;
			break;
		case KDBUS_ITEM_PAYLOAD_OFF:
			++message->n_parts;
			break;
		case KDBUS_ITEM_FDS:
			message->n_fds += kdbus_item_get_payload_size(item) / sizeof(int);
			break;
		}
	}
}

static int part_init(KdbusPart *part, const struct kdbus_item *item, const uint8_t *slice,
		     size_t size)
{
	size_t n_payload = kdbus_item_get_payload_size(item);

	*part = (KdbusPart){ .fd = -1 };
	if (item->type == KDBUS_ITEM_PAYLOAD_MEMFD) {
		if (n_payload != sizeof(item->memfd))
			return -EBADMSG;
		part->type = KDBUS_PART_MEMFD;
		part->size = item->memfd.size;
		part->start = item->memfd.start;
		part->fd = item->memfd.fd;
		return 0;
	}

	if (n_payload != sizeof(item->vec))
		return -EBADMSG;
	part->size = item->vec.size;
	if (item->vec.offset == ~UINT64_C(0)) {
		part->type = KDBUS_PART_ZEROS;
		return 0;
	}
	if (item->vec.offset > size || item->vec.size > size - item->vec.offset)
		return -EBADMSG;
	part->type = KDBUS_PART_DATA;
	part->data = slice + item->vec.offset;
	return 0;
}

/* take head and items out of the slice, which others may write to */
static int message_read(struct kdbus_message *message, const void *slice, size_t size)
{
	const volatile struct kdbus_msg *shared = slice;
	uint64_t n;

	if (size < sizeof(*shared))
		return -EBADMSG;
	n = shared->size;
	if (n < sizeof(*shared) || n > size)
		return -EBADMSG;

	message->in = malloc(n);
	if (!message->in)
		return -ENOMEM;

	copy_shared(message->in, slice, n);
	message->in->size = n;
	message->msg = message->in;
	return 0;
}

/* look up parts and descriptors; even on failure all descriptors are noted */
static int message_parse(struct kdbus_message *message, const void *slice, size_t size)
{
	const struct kdbus_msg *msg = message->msg;
	const struct kdbus_item *item = NULL;
	size_t n_items = msg->size - sizeof(*msg), n_parts = 0, n_fds = 0;
	int r = 0, k;

	message_count(message, msg->items, n_items);

	if (message->n_parts) {
		message->parts = calloc(message->n_parts, sizeof(*message->parts));
		message->iov = calloc(message->n_parts, sizeof(*message->iov));
	}
	if (message->n_fds)
		message->fds = calloc(message->n_fds, sizeof(*message->fds));
	if ((message->n_parts && (!message->parts || !message->iov)) ||
	    (message->n_fds && !message->fds)) {
		message->n_parts = message->n_fds = 0;
		return -ENOMEM;
	}

	while ((item = kdbus_items_next(msg->items, n_items, item))) {
		switch (item->type) {
		case KDBUS_ITEM_PAYLOAD_MEMFD:
		case KDBUS_ITEM_PAYLOAD_OFF:
			k = part_init(&message->parts[n_parts++], item, slice, size);
			r = r ?: k;
			break;
		case KDBUS_ITEM_FDS:
			k = kdbus_item_get_payload_size(item) / sizeof(int);
			if (k)
				memcpy(message->fds + n_fds, item->fds, k * sizeof(int));
			n_fds += k;
			break;
		}
	}
	return r ?: kdbus_items_check(msg->items, n_items);
}

/* the next descriptor of the packet, or -1 if it could not be sent or did not fit in the table */
static int packet_next(KdbusFdPacket *packet, uint64_t *positionp, size_t *n_takenp)
{
	uint64_t position = (*positionp)++;

	if (position >= 64 || packet->lost >> position & 1 || *n_takenp >= packet->n_fds)
		return -1;
	return packet->fds[(*n_takenp)++];
}

/*
 * Descriptors by the socket: the numbers in the slice mean nothing. FDS is left
 * out as a whole for a connection that does not accept descriptors.
 */
static void message_assign_fds(struct kdbus_message *message, KdbusFdPacket *packet)
{
	size_t n_taken = 0, n_fds = message->n_fds;
	uint64_t position = 0;

	for (size_t i = 0; i < message->n_fds; ++i)
		message->fds[i] = -1;
	for (size_t i = 0; i < message->n_parts; ++i)
		message->parts[i].fd = -1;

	if (packet && packet->n_sent == message->n_memfds)
		n_fds = 0;
	if (packet && packet->n_sent == n_fds + message->n_memfds) {
		for (size_t i = 0; i < n_fds; ++i)
			message->fds[i] = packet_next(packet, &position, &n_taken);
		for (size_t i = 0; i < message->n_parts; ++i)
			if (message->parts[i].type == KDBUS_PART_MEMFD)
				message->parts[i].fd = packet_next(packet, &position, &n_taken);
		/* those are ours now, the rest (there is none) is closed */
		memmove(packet->fds, packet->fds + n_taken,
			(packet->n_fds - n_taken) * sizeof(int));
		packet->n_fds -= n_taken;
	}
	if (n_taken < message->n_fds + message->n_memfds)
		message->incomplete = true;
}

/**
 * kdbus_message_new_from_slice() - make a message of what was received
 * @messagep:	the new message
 * @conn:	connection that received it
 * @info:	where it is
 *
 * On failure the slice is freed and the descriptors are closed: the message is
 * lost.
 *
 * Return: 0 on success, -EBADMSG if it makes no sense, -ENOMEM.
 */
int kdbus_message_new_from_slice(struct kdbus_message **messagep, struct kdbus_conn *conn,
				 const struct kdbus_msg_info *info)
{
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	_cleanup_(kdbus_fd_packet_freep) KdbusFdPacket *packet = NULL;
	const uint8_t *slice;
	int r;

	if (info->offset > conn->pool_size || info->msg_size > conn->pool_size - info->offset)
		return -EBADMSG;

	message = calloc(1, sizeof(*message));
	if (!message) {
		kdbus_command_free(conn, info->offset, info->msg_size);
		return -ENOMEM;
	}

	kdbus_slice_link(&message->slice, conn, info->offset, info->msg_size);
	message->incomplete = info->return_flags & KDBUS_RECV_RETURN_INCOMPLETE_FDS;
	slice = conn->pool + info->offset;
	r = message_read(message, slice, info->msg_size);
	if (r == 0)
		r = message_parse(message, slice, info->msg_size);

	if (conn->fd_socket.fd >= 0 && (message->n_fds || message->n_memfds)) {
		packet = kdbus_fd_socket_take(&conn->fd_socket, info->offset);
		message_assign_fds(message, packet);
	}
	if (r < 0)
		return r;

	*messagep = message;
	message = NULL;
	return 0;
}

/* the numbers in a message that is still queued are not ours */
static void forget_fds(struct kdbus_msg *msg)
{
	const struct kdbus_item *i = NULL;
	struct kdbus_item *item;

	while ((i = kdbus_items_next(msg->items, msg->size - sizeof(*msg), i))) {
		item = (struct kdbus_item *)i;
		if (item->type == KDBUS_ITEM_FDS)
			memset(item->fds, -1, kdbus_item_get_payload_size(item));
		else if (item->type == KDBUS_ITEM_PAYLOAD_MEMFD &&
			 kdbus_item_get_payload_size(item) >= sizeof(item->memfd))
			item->memfd.fd = -1;
	}
}

/**
 * kdbus_message_new_from_copy() - make a message of a copy of a queued one
 * @messagep:	the new message
 * @copy:	the slice on the heap; belongs to the message, also on failure
 * @size:	its size
 *
 * Return: 0 on success, -EBADMSG if it makes no sense, -ENOMEM.
 */
int kdbus_message_new_from_copy(struct kdbus_message **messagep, void *copy, size_t size)
{
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	int r;

	message = calloc(1, sizeof(*message));
	if (!message) {
		free(copy);
		return -ENOMEM;
	}
	message->copy = copy;

	r = message_read(message, copy, size);
	if (r < 0)
		return r;
	forget_fds(message->in);
	r = message_parse(message, copy, size);
	if (r < 0)
		return r;

	message->incomplete = message->n_fds || message->n_memfds;
	*messagep = message;
	message = NULL;
	return 0;
}

/*
 * Payload
 */

/**
 * kdbus_message_get_size() - get the size of the payload
 * @message:	message that was received
 *
 * Return: Bytes of all parts together.
 */
_public_ uint64_t kdbus_message_get_size(const struct kdbus_message *message)
{
	uint64_t size = 0;

	for (size_t i = 0; i < message->n_parts; ++i)
		size += message->parts[i].size;
	return size;
}

/**
 * kdbus_message_get_n_parts() - get the number of parts
 * @message:	message that was received
 *
 * Return: How many pieces the payload came in, as the sender made them.
 */
_public_ size_t kdbus_message_get_n_parts(const struct kdbus_message *message)
{
	return message->n_parts;
}

/**
 * kdbus_message_get_part_type() - get how a part came
 * @message:	message that was received
 * @part:	number of the part, from 0
 *
 * Return: enum kdbus_part_type, or -ERANGE if there is no such part.
 */
_public_ int kdbus_message_get_part_type(const struct kdbus_message *message, size_t part)
{
	return part < message->n_parts ? (int)message->parts[part].type : -ERANGE;
}

/**
 * kdbus_message_get_part_size() - get the size of a part
 * @message:	message that was received
 * @part:	number of the part, from 0
 *
 * Return: Bytes, 0 if there is no such part.
 */
_public_ uint64_t kdbus_message_get_part_size(const struct kdbus_message *message, size_t part)
{
	return part < message->n_parts ? message->parts[part].size : 0;
}

/* what lies beyond the end of a file can be mapped, but not be read */
static int part_check_memfd(const KdbusPart *part)
{
	struct stat st;

	if (part->fd < 0)
		return -EBADF;
	if (fstat(part->fd, &st) < 0)
		return -errno;
	if (part->start > (uint64_t)st.st_size || part->size > st.st_size - part->start)
		return -EBADMSG;
	return 0;
}

/* have the memory of a part at part->data */
static int part_map(KdbusPart *part)
{
	uint64_t skip = 0, size;
	void *map;
	int r;

	if (part->data)
		return 0;

	if (part->type == KDBUS_PART_MEMFD) {
		r = part_check_memfd(part);
		if (r < 0)
			return r;
		skip = part->start % sysconf(_SC_PAGESIZE);
	}

	if (__builtin_add_overflow(part->size, skip, &size) || size > SIZE_MAX)
		return -ENOMEM;
	map = mmap(NULL, size, PROT_READ,
		   MAP_PRIVATE | (part->type == KDBUS_PART_MEMFD ? 0 : MAP_ANONYMOUS),
		   part->type == KDBUS_PART_MEMFD ? part->fd : -1, part->start - skip);
	if (map == MAP_FAILED)
		return -errno;

	part->map = map;
	part->n_map = size;
	part->data = (const uint8_t *)map + skip;
	return 0;
}

/**
 * kdbus_message_get_part() - get the data of a part
 * @message:	message that was received
 * @part:	number of the part, from 0
 * @datap:	the data
 * @sizep:	optional, bytes
 *
 * A memfd is mapped the first time.
 *
 * Return: 0 on success, -ERANGE if there is no such part, -EBADF if its memfd
 *         did not arrive or was taken, -EBADMSG if there is less in it than the
 *         message says, the errno of fstat(2) and mmap(2).
 */
_public_ int kdbus_message_get_part(struct kdbus_message *message, size_t part, const void **datap,
				    size_t *sizep)
{
	int r;

	if (part >= message->n_parts)
		return -ERANGE;

	r = part_map(&message->parts[part]);
	if (r < 0)
		return r;

	*datap = message->parts[part].data;
	if (sizep)
		*sizep = message->parts[part].size;
	return 0;
}

/**
 * kdbus_message_get_iov() - get the data of all parts
 * @message:	message that was received
 * @iovp:	one element for each part, not to be written to
 * @n_iovp:	number of elements
 *
 * Return: 0 on success, as kdbus_message_get_part() otherwise.
 */
_public_ int kdbus_message_get_iov(struct kdbus_message *message, const struct iovec **iovp,
				   size_t *n_iovp)
{
	int r;

	for (size_t i = 0; i < message->n_parts; ++i) {
		r = part_map(&message->parts[i]);
		if (r < 0)
			return r;
		message->iov[i] = (struct iovec){
			.iov_base = (void *)message->parts[i].data,
			.iov_len = message->parts[i].size,
		};
	}

	*iovp = message->iov;
	*n_iovp = message->n_parts;
	return 0;
}

/**
 * kdbus_message_copy() - copy from the payload
 * @message:	message that was received
 * @offset:	where in the payload to start
 * @buffer:	where to copy to
 * @size:	bytes that fit there
 * @copiedp:	bytes copied; less than @size at the end of the payload
 *
 * Return: 0 on success, as kdbus_message_get_part() otherwise.
 */
_public_ int kdbus_message_copy(struct kdbus_message *message, uint64_t offset, void *buffer,
				size_t size, size_t *copiedp)
{
	size_t n, copied = 0;
	KdbusPart *part;
	int r;

	for (size_t i = 0; i < message->n_parts && copied < size; ++i) {
		part = &message->parts[i];
		if (offset >= part->size) {
			offset -= part->size;
			continue;
		}

		n = size - copied;
		if (n > part->size - offset)
			n = part->size - offset;
		if (part->type == KDBUS_PART_ZEROS) {
			memset((uint8_t *)buffer + copied, 0, n);
		} else {
			r = part_map(part);
			if (r < 0)
				return r;
			memcpy((uint8_t *)buffer + copied, (const uint8_t *)part->data + offset, n);
		}
		copied += n;
		offset = 0;
	}

	*copiedp = copied;
	return 0;
}

/*
 * Descriptors
 */

/**
 * kdbus_message_get_memfd() - look at the memfd of a part
 * @message:	message that was received
 * @part:	number of the part, from 0
 * @fdp:	the descriptor, which stays with @message
 * @startp:	optional, where in the memfd the part starts
 * @sizep:	optional, bytes
 *
 * Return: 0 on success, -ERANGE if there is no such part, -EMEDIUMTYPE if it did
 *         not come as a memfd, -EBADF if that did not arrive or was taken.
 */
_public_ int kdbus_message_get_memfd(const struct kdbus_message *message, size_t part, int *fdp,
				     uint64_t *startp, uint64_t *sizep)
{
	const KdbusPart *p;

	if (part >= message->n_parts)
		return -ERANGE;

	p = &message->parts[part];
	if (p->type != KDBUS_PART_MEMFD)
		return -EMEDIUMTYPE;
	if (p->fd < 0)
		return -EBADF;

	*fdp = p->fd;
	if (startp)
		*startp = p->start;
	if (sizep)
		*sizep = p->size;
	return 0;
}

/**
 * kdbus_message_take_memfd() - take the memfd of a part
 * @message:	message that was received
 * @part:	number of the part, from 0
 * @fdp:	the descriptor, which belongs to the caller from now on
 *
 * Data that was mapped before stays.
 *
 * Return: As kdbus_message_get_memfd().
 */
_public_ int kdbus_message_take_memfd(struct kdbus_message *message, size_t part, int *fdp)
{
	int r;

	r = kdbus_message_get_memfd(message, part, fdp, NULL, NULL);
	if (r < 0)
		return r;

	message->parts[part].fd = -1;
	return 0;
}

/**
 * kdbus_message_get_n_fds() - get the number of descriptors
 * @message:	message that was received
 *
 * Return: How many were sent with it, memfds of the payload not counted.
 */
_public_ size_t kdbus_message_get_n_fds(const struct kdbus_message *message)
{
	return message->n_fds;
}

/**
 * kdbus_message_get_fd() - look at a descriptor
 * @message:	message that was received
 * @index:	number of the descriptor, from 0
 * @fdp:	the descriptor, which stays with @message
 *
 * Return: 0 on success, -ERANGE if there is none, -EBADF if it did not arrive or
 *         was taken.
 */
_public_ int kdbus_message_get_fd(const struct kdbus_message *message, size_t index, int *fdp)
{
	if (index >= message->n_fds)
		return -ERANGE;
	if (message->fds[index] < 0)
		return -EBADF;

	*fdp = message->fds[index];
	return 0;
}

/**
 * kdbus_message_take_fd() - take a descriptor
 * @message:	message that was received
 * @index:	number of the descriptor, from 0
 * @fdp:	the descriptor, which belongs to the caller from now on
 *
 * Return: As kdbus_message_get_fd().
 */
_public_ int kdbus_message_take_fd(struct kdbus_message *message, size_t index, int *fdp)
{
	int r;

	r = kdbus_message_get_fd(message, index, fdp);
	if (r < 0)
		return r;

	message->fds[index] = -1;
	return 0;
}

/**
 * kdbus_message_is_incomplete() - tell whether descriptors are missing
 * @message:	message that was received
 *
 * They are if the process had too many open, if the connection accepts none, or
 * if the message was only peeked at.
 *
 * Return: true if some are.
 */
_public_ bool kdbus_message_is_incomplete(const struct kdbus_message *message)
{
	return message->incomplete;
}

/*
 * Items
 */

/**
 * kdbus_message_next_item() - walk the items of a message
 * @message:	message that was received
 * @item:	the item before, or NULL to get the first
 *
 * Numbers of descriptors in items are not to be used.
 *
 * Return: The next item, or NULL if there is none.
 */
_public_ const struct kdbus_item *kdbus_message_next_item(const struct kdbus_message *message,
							  const struct kdbus_item *item)
{
	if (!kdbus_message_is_received(message))
		return NULL;
	return kdbus_items_next(message->msg->items, message->msg->size - sizeof(*message->msg),
				item);
}

/**
 * kdbus_message_get_item() - find an item of a message
 * @message:	message that was received
 * @type:	KDBUS_ITEM_*
 *
 * Return: The first item of that type, or NULL.
 */
_public_ const struct kdbus_item *kdbus_message_get_item(const struct kdbus_message *message,
							 uint64_t type)
{
	const struct kdbus_item *item = NULL;

	while ((item = kdbus_message_next_item(message, item)))
		if (item->type == type)
			return item;
	return NULL;
}

/**
 * kdbus_message_get_dst_name() - get the name a message was sent to
 * @message:	message that was received
 *
 * Return: The well-known name, or NULL if it was sent to an id.
 */
_public_ const char *kdbus_message_get_dst_name(const struct kdbus_message *message)
{
	return kdbus_item_get_string(kdbus_message_get_item(message, KDBUS_ITEM_DST_NAME));
}

/**
 * kdbus_message_get_notification() - get what the bus has to tell
 * @message:	message that was received
 *
 * Return: Item of a type from KDBUS_ITEM_NAME_ADD on; or NULL if another
 *         connection sent the message.
 */
_public_ const struct kdbus_item *
kdbus_message_get_notification(const struct kdbus_message *message)
{
	const struct kdbus_item *item;

	if (message->msg->src_id != KDBUS_SRC_ID_KERNEL)
		return NULL;

	item = kdbus_message_next_item(message, NULL);
	return item && item->type >= _KDBUS_ITEM_KERNEL_BASE ? item : NULL;
}
