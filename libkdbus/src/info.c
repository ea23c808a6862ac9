/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the bus knows
 *
 * Results are copied out of the pool, so that they hold no slice and outlive
 * the connection.
 */

#include <string.h>
#include "connection.h"
#include "item.h"
#include "util.h"

struct kdbus_info_list {
	size_t size;
	struct kdbus_info records[];
};

static int check_records(const struct kdbus_info_list *list)
{
	const struct kdbus_info *info = NULL;
	size_t end = 0;
	int r;

	while ((info = kdbus_info_list_next(list, info))) {
		r = kdbus_items_check(info->items, info->size - sizeof(*info));
		if (r < 0)
			return r;
		end = (const uint8_t *)info - (const uint8_t *)list->records + align8(info->size);
	}
	return end >= list->size ? 0 : -EBADMSG;
}

static int info_list_new(struct kdbus_info_list **listp, struct kdbus_conn *conn, uint64_t offset,
			 uint64_t size)
{
	_cleanup_(kdbus_info_list_freep) struct kdbus_info_list *list = NULL;
	int r;

	r = kdbus_conn_copy_slice(conn, offset, size, sizeof(*list), &list);
	if (r < 0)
		return r;

	list->size = size;
	r = check_records(list);
	if (r < 0)
		return r;

	*listp = list;
	list = NULL;
	return 0;
}

/**
 * kdbus_conn_list() - list connections and names
 * @conn:	connection to use
 * @flags:	KDBUS_LIST_*: what to list
 * @listp:	the records: id, KDBUS_HELLO_* flags, and an OWNED_NAME item in
 *		each that was asked for because of a name
 *
 * Return: 0 on success, -EXFULL if the result does not fit in the pool, -ENOMEM.
 */
_public_ int kdbus_conn_list(struct kdbus_conn *conn, uint64_t flags,
			     struct kdbus_info_list **listp)
{
	struct kdbus_cmd_list cmd = { .size = sizeof(cmd), .flags = flags };
	int r;

	r = kdbus_conn_ioctl(conn, KDBUS_CMD_LIST, &cmd);
	if (r < 0)
		return r;

	return info_list_new(listp, conn, cmd.offset, cmd.list_size);
}

/**
 * kdbus_conn_info() - ask about a connection
 * @conn:	connection to use
 * @id:		its id, or 0
 * @name:	a name it owns, or NULL; if both are given they must agree
 * @attach_flags: KDBUS_ATTACH_*: what to tell, as far as it agreed to
 * @listp:	one record: id, KDBUS_HELLO_* flags, metadata of when it connected
 *
 * Return: 0 on success, -ENXIO if there is no such connection, -ESRCH if nobody
 *         owns the name, -EXFULL if the result does not fit in the pool, -ENOMEM.
 */
_public_ int kdbus_conn_info(struct kdbus_conn *conn, uint64_t id, const char *name,
			     uint64_t attach_flags, struct kdbus_info_list **listp)
{
	struct kdbus_cmd_info head = { .id = id, .attach_flags = attach_flags };
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	struct kdbus_cmd_info *cmd;
	int r;

	if ((r = kdbus_chain_init(&chain, &head, sizeof(head))) < 0 ||
	    (name && (r = kdbus_chain_append_string(&chain, KDBUS_ITEM_NAME, name)) < 0))
		return r;

	r = kdbus_conn_ioctl_chain(conn, KDBUS_CMD_CONN_INFO, &chain);
	if (r < 0)
		return r;
	cmd = (void *)chain.data;

	return info_list_new(listp, conn, cmd->offset, cmd->info_size);
}

/**
 * kdbus_conn_creator_info() - ask about who made the bus
 * @conn:	connection to use
 * @attach_flags: KDBUS_ATTACH_*: what to tell, as far as the creator agreed to
 * @listp:	one record: id of the bus, KDBUS_MAKE_* flags, its name in a
 *		MAKE_NAME item, metadata of when it was made
 *
 * Return: 0 on success, -EXFULL if the result does not fit in the pool, -ENOMEM.
 */
_public_ int kdbus_conn_creator_info(struct kdbus_conn *conn, uint64_t attach_flags,
				     struct kdbus_info_list **listp)
{
	struct kdbus_cmd_info cmd = { .size = sizeof(cmd), .attach_flags = attach_flags };
	int r;

	r = kdbus_conn_ioctl(conn, KDBUS_CMD_BUS_CREATOR_INFO, &cmd);
	if (r < 0)
		return r;

	return info_list_new(listp, conn, cmd.offset, cmd.info_size);
}

/**
 * kdbus_info_list_free() - release records
 * @list:	list to release, or NULL
 *
 * Return: NULL.
 */
_public_ struct kdbus_info_list *kdbus_info_list_free(struct kdbus_info_list *list)
{
	free(list);
	return NULL;
}

/**
 * kdbus_info_list_next() - walk records
 * @list:	list to walk
 * @info:	the record before, or NULL to get the first
 *
 * Return: The next record, good as long as @list; NULL if there is none.
 */
_public_ const struct kdbus_info *kdbus_info_list_next(const struct kdbus_info_list *list,
						       const struct kdbus_info *info)
{
	size_t position = 0;

	if (info)
		position = (const uint8_t *)info - (const uint8_t *)list->records +
			   align8(info->size);
	if (position > list->size || list->size - position < sizeof(*info))
		return NULL;

	info = (const void *)((const uint8_t *)list->records + position);
	if (info->size < sizeof(*info) || info->size > list->size - position)
		return NULL;
	return info;
}

/**
 * kdbus_info_get_item() - find an item of a record
 * @info:	record to look at
 * @type:	KDBUS_ITEM_*
 *
 * Return: The first item of that type, or NULL.
 */
_public_ const struct kdbus_item *kdbus_info_get_item(const struct kdbus_info *info, uint64_t type)
{
	return kdbus_items_find(info->items, info->size - sizeof(*info), type);
}

/**
 * kdbus_info_next_item() - walk the items of a record
 * @info:	record to look at
 * @item:	the item before, or NULL to get the first
 *
 * Return: The next item, or NULL if there is none.
 */
_public_ const struct kdbus_item *kdbus_info_next_item(const struct kdbus_info *info,
						       const struct kdbus_item *item)
{
	return kdbus_items_next(info->items, info->size - sizeof(*info), item);
}
