/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Well-known names
 */

#include "connection.h"
#include "item.h"
#include "util.h"

static int name_command(struct kdbus_conn *conn, unsigned long code, const char *name,
			uint64_t flags, uint64_t *flagsp)
{
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	struct kdbus_cmd head = { .flags = flags };
	int r;

	if ((r = kdbus_chain_init(&chain, &head, sizeof(head))) < 0 ||
	    (r = kdbus_chain_append_string(&chain, KDBUS_ITEM_NAME, name)) < 0)
		return r;

	r = kdbus_conn_ioctl_chain(conn, code, &chain);
	if (r < 0)
		return r;

	if (flagsp)
		*flagsp = ((const struct kdbus_cmd *)chain.data)->return_flags;
	return 0;
}

/**
 * kdbus_conn_acquire_name() - become owner of a well-known name, or queue for it
 * @conn:	connection to use
 * @name:	the name
 * @flags:	KDBUS_NAME_REPLACE_EXISTING, _ALLOW_REPLACEMENT, _QUEUE
 * @flagsp:	optional, how the name is held now: KDBUS_NAME_PRIMARY as owner,
 *		_IN_QUEUE as one in line, neither if the connection left the line
 *		(it was in it and did not ask for _QUEUE again); with _ACQUIRED
 *		if this call made the difference
 *
 * Return: 0 on success, -EEXIST if another owns it, -EPERM if the policy forbids
 *         it, -EINVAL if the name is bad, -E2BIG if the connection has too many.
 */
_public_ int kdbus_conn_acquire_name(struct kdbus_conn *conn, const char *name, uint64_t flags,
				     uint64_t *flagsp)
{
	return name_command(conn, KDBUS_CMD_NAME_ACQUIRE, name, flags, flagsp);
}

/**
 * kdbus_conn_release_name() - give a well-known name back, or leave its queue
 * @conn:	connection to use
 * @name:	the name
 *
 * Return: 0 on success, -ESRCH if nobody has it, -EADDRINUSE if others have.
 */
_public_ int kdbus_conn_release_name(struct kdbus_conn *conn, const char *name)
{
	return name_command(conn, KDBUS_CMD_NAME_RELEASE, name, 0, NULL);
}
