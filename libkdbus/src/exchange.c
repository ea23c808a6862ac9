/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Exchanges
 */

#include <string.h>
#include "exchange.h"
#include "util.h"

/* a share of the pool that may wait to be freed */
#define DEFERRED_SHARE 16

/* take over what waits to be freed */
static size_t conn_take_deferred(struct kdbus_conn *conn, uint64_t *offsets)
{
	size_t n;

	if (!atomic_load_explicit(&conn->n_deferred, memory_order_relaxed))
		return 0;

	pthread_mutex_lock(&conn->free_lock);
	n = conn->n_deferred;
	memcpy(offsets, conn->deferred, n * sizeof(*offsets));
	conn->n_deferred = 0;
	conn->deferred_size = 0;
	pthread_mutex_unlock(&conn->free_lock);
	return n;
}

/**
 * kdbus_conn_defer_free() - have a slice freed by the next exchange
 * @conn:	connection to use
 * @offset:	where the slice starts
 * @size:	its size
 *
 * Return: Whether it will be; else there are enough already.
 */
bool kdbus_conn_defer_free(struct kdbus_conn *conn, uint64_t offset, uint64_t size)
{
	bool taken = false;

	if (!conn->has_exchange)
		return false;

	pthread_mutex_lock(&conn->free_lock);
	if (conn->n_deferred < KDBUS_DEFERRED_MAX &&
	    size <= conn->pool_size / DEFERRED_SHARE - conn->deferred_size) {
		conn->deferred[conn->n_deferred++] = offset;
		conn->deferred_size += size;
		taken = true;
	}
	pthread_mutex_unlock(&conn->free_lock);
	return taken;
}

/**
 * kdbus_exchange_init() - start an exchange, with what waits to be freed
 * @exchange:	exchange to fill in
 * @conn:	connection to use
 * @flags:	KDBUSFS_EXCHANGE_*
 * @n_recv:	how many messages to receive at most
 */
void kdbus_exchange_init(KdbusExchange *exchange, struct kdbus_conn *conn, uint64_t flags,
			 size_t n_recv)
{
	struct kdbusfs_cmd_exchange *cmd = &exchange->cmd;

	exchange->n_payload = 0;
	exchange->alone = false;
	*cmd = (struct kdbusfs_cmd_exchange){
		.size = sizeof(*cmd) + n_recv * sizeof(struct kdbus_msg_info),
		.flags = flags,
		.deadline_ns = KDBUS_DEADLINE_NEVER,
		.n_recv = n_recv,
		.cancel_fd = -1,
		.fd_socket = -1,
	};
	cmd->n_free = conn_take_deferred(conn, (uint64_t *)(exchange->block + cmd->size));
	cmd->size += cmd->n_free * sizeof(uint64_t);
}

/*
 * Bytes of payload of @msg that go with the call. @alonep: not all that it brings can, so that it
 * has to be the only message.
 */
static size_t inline_size(const struct kdbus_msg *msg, bool *alonep)
{
	const struct kdbus_item *item = NULL;
	size_t size = 0;

	while ((item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), item))) {
		switch (item->type) {
		case KDBUS_ITEM_PAYLOAD_VEC:
			if (!item->vec.address || item->vec.size > KDBUS_INLINE_MAX - size) {
				*alonep = true;
				return 0;
			}
			size += item->vec.size;
			break;
		case KDBUS_ITEM_PAYLOAD_MEMFD:
		case KDBUS_ITEM_FDS:
			*alonep = true;
			break;
		}
	}
	return size;
}

/**
 * kdbus_exchange_fits() - tell whether a message can go with an exchange
 * @msg:	message
 * @n_recv:	how many messages are to be received
 *
 * Return: Whether there is room for it, whatever there is to be freed.
 */
bool kdbus_exchange_fits(const struct kdbus_msg *msg, size_t n_recv)
{
	size_t room = KDBUSFS_EXCHANGE_SIZE_MAX - sizeof(struct kdbusfs_cmd_exchange) -
		      n_recv * sizeof(struct kdbus_msg_info) -
		      KDBUS_DEFERRED_MAX * sizeof(uint64_t) - KDBUS_INLINE_MAX;

	return msg->size <= room - sizeof(uint64_t);
}

/**
 * kdbus_exchange_add() - send a message with an exchange
 * @exchange:	exchange to add to, after kdbus_exchange_init()
 * @msg:	message, whose payload must stay until kdbus_exchange_run()
 *
 * Return: Whether there was room for it.
 */
bool kdbus_exchange_add(KdbusExchange *exchange, const struct kdbus_msg *msg)
{
	struct kdbusfs_cmd_exchange *cmd = &exchange->cmd;
	bool alone = false;
	size_t n;

	n = inline_size(msg, &alone);
	if (cmd->n_send && (alone || exchange->alone || cmd->n_send == KDBUS_EXCHANGE_SEND_MAX))
		return false;
	if (msg->size > sizeof(exchange->block) ||
	    cmd->size + align8(msg->size) + exchange->n_payload + n > sizeof(exchange->block))
		return false;

	if (!cmd->n_send++)
		exchange->first = cmd->size;
	memcpy(exchange->block + cmd->size, msg, msg->size);
	cmd->size += align8(msg->size);
	exchange->alone = alone;
	exchange->n_payload += n;
	return true;
}

/* put the payload of the message at @at behind all messages; returns where the next one is */
static size_t exchange_inline(KdbusExchange *exchange, size_t at)
{
	struct kdbusfs_cmd_exchange *cmd = &exchange->cmd;
	struct kdbus_msg *msg = (void *)(exchange->block + at);
	const struct kdbus_item *i = NULL;
	struct kdbus_item *item;

	while ((i = kdbus_items_next(msg->items, msg->size - sizeof(*msg), i))) {
		item = (struct kdbus_item *)i;
		if (item->type != KDBUS_ITEM_PAYLOAD_VEC)
			continue;
		memcpy(exchange->block + cmd->size, (void *)(uintptr_t)item->vec.address,
		       item->vec.size);
		item->type = KDBUSFS_ITEM_PAYLOAD_INLINE;
		item->vec.offset = cmd->size;
		cmd->size += item->vec.size;
	}
	return at + align8(msg->size);
}

/* what the call did not come to free is left to the next one, but for what it stumbled on */
static void exchange_give_back(const KdbusExchange *exchange, struct kdbus_conn *conn, int r)
{
	const struct kdbusfs_cmd_exchange *cmd = &exchange->cmd;
	const uint64_t *offsets = (const void *)(kdbus_exchange_received(exchange) + cmd->n_recv);

	for (size_t n = cmd->n_freed + (r == -ENXIO); n < cmd->n_free; ++n)
		kdbus_conn_defer_free(conn, offsets[n], 0);
}

/**
 * kdbus_exchange_run() - do it
 * @exchange:	exchange that was put together; says how far it came
 * @conn:	connection to use
 *
 * Messages that were lost meanwhile are counted.
 *
 * Return: 0 on success, -ECHILD if another process made @conn, the errno of the command, which is
 *         that of the first message that was refused, or of the wait.
 */
int kdbus_exchange_run(KdbusExchange *exchange, struct kdbus_conn *conn)
{
	struct kdbusfs_cmd_exchange *cmd = &exchange->cmd;
	size_t at = exchange->first;
	int r;

	if (exchange->n_payload)
		for (size_t n = 0; n < cmd->n_send; ++n)
			at = exchange_inline(exchange, at);
	cmd->size = align8(cmd->size);
	r = kdbus_conn_ioctl(conn, KDBUSFS_CMD_EXCHANGE(cmd->size), cmd);
	if (cmd->n_freed < cmd->n_free)
		exchange_give_back(exchange, conn, r);
	if (cmd->dropped_msgs)
		atomic_fetch_add(&conn->n_lost, cmd->dropped_msgs);
	return r;
}
