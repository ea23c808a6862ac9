/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Matches
 *
 * A match lets a signal or notification pass if all of its rules do; one
 * without rules lets everything pass. A connection gets what any of its
 * matches lets pass.
 */

#include <string.h>
#include "connection.h"
#include "item.h"
#include "util.h"

struct kdbus_match {
	KdbusChain items;
};

/**
 * kdbus_match_new() - make a match without rules
 * @matchp:	the new match
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_match_new(struct kdbus_match **matchp)
{
	struct kdbus_match *match;

	match = calloc(1, sizeof(*match));
	if (!match)
		return -ENOMEM;

	*matchp = match;
	return 0;
}

/**
 * kdbus_match_free() - release a match
 * @match:	match to release, or NULL
 *
 * Connections that it was added to keep it.
 *
 * Return: NULL.
 */
_public_ struct kdbus_match *kdbus_match_free(struct kdbus_match *match)
{
	if (!match)
		return NULL;

	kdbus_chain_deinit(&match->items);
	free(match);
	return NULL;
}

/**
 * kdbus_match_add_bloom_mask() - only signals with these bits in their filter
 * @match:	match to add to
 * @mask:	bits, see kdbus_bloom_add()
 * @size:	the bus's bloom size, times the number of generations
 *
 * Return: 0 on success, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_match_add_bloom_mask(struct kdbus_match *match, const void *mask, size_t size)
{
	return kdbus_chain_append(&match->items, KDBUS_ITEM_BLOOM_MASK, mask, size);
}

/**
 * kdbus_match_add_src_id() - only signals from a connection
 * @match:	match to add to
 * @id:		its id, or KDBUS_MATCH_ID_ANY for all signals and no notification
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_match_add_src_id(struct kdbus_match *match, uint64_t id)
{
	return kdbus_chain_append(&match->items, KDBUS_ITEM_ID, &id, sizeof(id));
}

/**
 * kdbus_match_add_dst_id() - only signals to a destination
 * @match:	match to add to
 * @id:		an id, KDBUS_DST_ID_BROADCAST for any destination
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_match_add_dst_id(struct kdbus_match *match, uint64_t id)
{
	return kdbus_chain_append(&match->items, KDBUS_ITEM_DST_ID, &id, sizeof(id));
}

/**
 * kdbus_match_add_src_name() - only signals from the owner of a name
 * @match:	match to add to
 * @name:	well-known name
 *
 * Return: 0 on success, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_match_add_src_name(struct kdbus_match *match, const char *name)
{
	return kdbus_chain_append_string(&match->items, KDBUS_ITEM_NAME, name);
}

/**
 * kdbus_match_add_id_change() - notifications of connections
 * @match:	match to add to
 * @type:	KDBUS_ITEM_ID_ADD or KDBUS_ITEM_ID_REMOVE
 * @id:		of the connection, or KDBUS_MATCH_ID_ANY
 *
 * Return: 0 on success, -EINVAL if @type is another, -ENOMEM.
 */
_public_ int kdbus_match_add_id_change(struct kdbus_match *match, uint64_t type, uint64_t id)
{
	struct kdbus_notify_id_change change = { .id = id };

	if (type != KDBUS_ITEM_ID_ADD && type != KDBUS_ITEM_ID_REMOVE)
		return -EINVAL;
	return kdbus_chain_append(&match->items, type, &change, sizeof(change));
}

/**
 * kdbus_match_add_name_change() - notifications of well-known names
 * @match:	match to add to
 * @type:	KDBUS_ITEM_NAME_ADD, KDBUS_ITEM_NAME_REMOVE or
 *		KDBUS_ITEM_NAME_CHANGE
 * @old_id:	former owner (0 in NAME_ADD), or KDBUS_MATCH_ID_ANY
 * @new_id:	new owner (0 in NAME_REMOVE), or KDBUS_MATCH_ID_ANY
 * @name:	the name, or NULL for any
 *
 * Return: 0 on success, -EINVAL if @type is another, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_match_add_name_change(struct kdbus_match *match, uint64_t type, uint64_t old_id,
					 uint64_t new_id, const char *name)
{
	struct kdbus_notify_name_change change = {
		.old_id.id = old_id,
		.new_id.id = new_id,
	};

	if (type < KDBUS_ITEM_NAME_ADD || type > KDBUS_ITEM_NAME_CHANGE)
		return -EINVAL;
	return kdbus_chain_append_two(&match->items, type, &change, sizeof(change), name,
				      name ? strlen(name) + 1 : 0);
}

/**
 * kdbus_conn_add_match() - receive what passes a match
 * @conn:	connection to use
 * @cookie:	number to remove the match by; several may have the same
 * @flags:	KDBUS_MATCH_REPLACE: remove those with the same cookie first
 * @match:	match to add, or NULL for one that lets everything pass
 *
 * Return: 0 on success, -EDOM if a mask does not fit the bus, -EINVAL if a name
 *         is bad, -EMFILE if there are too many, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_conn_add_match(struct kdbus_conn *conn, uint64_t cookie, uint64_t flags,
				  const struct kdbus_match *match)
{
	struct kdbus_cmd_match head = { .flags = flags, .cookie = cookie };
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	int r;

	if ((r = kdbus_chain_init(&chain, &head, sizeof(head))) < 0 ||
	    (match && (r = kdbus_chain_append_items(&chain, &match->items)) < 0))
		return r;

	return kdbus_conn_ioctl_chain(conn, KDBUS_CMD_MATCH_ADD, &chain);
}

/**
 * kdbus_conn_remove_matches() - remove all matches with a cookie
 * @conn:	connection to use
 * @cookie:	cookie they were added with
 *
 * Return: 0 on success, -EBADSLT if there is none.
 */
_public_ int kdbus_conn_remove_matches(struct kdbus_conn *conn, uint64_t cookie)
{
	struct kdbus_cmd_match cmd = { .size = sizeof(cmd), .cookie = cookie };

	return kdbus_conn_ioctl(conn, KDBUS_CMD_MATCH_REMOVE, &cmd);
}
