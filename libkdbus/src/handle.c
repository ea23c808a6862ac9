/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Handles
 */

#include "handle.h"
#include "util.h"

/**
 * kdbus_handle_init_command() - start the command that makes something
 * @chain:	chain to initialise
 * @flags:	KDBUS_MAKE_*
 * @name:	name of what is to be made
 *
 * Return: 0 on success, -EMSGSIZE if no command could carry the name, -ENOMEM.
 */
int kdbus_handle_init_command(KdbusChain *chain, uint64_t flags, const char *name)
{
	struct kdbus_cmd cmd = { .flags = flags };
	int r;

	r = kdbus_chain_init(chain, &cmd, sizeof(cmd));
	if (r < 0)
		return r;
	return kdbus_chain_append_string(chain, KDBUS_ITEM_MAKE_NAME, name);
}

/**
 * kdbus_handle_make() - open a node, and make something through it
 * @handle:	handle to set up, which keeps what was made
 * @node:	path of the node
 * @code:	KDBUS_CMD_BUS_MAKE or KDBUS_CMD_ENDPOINT_MAKE
 * @chain:	its struct and items
 *
 * Return: 0 on success, the errno of open(2) or of the command. The handle is
 *         to be released on failure, too.
 */
int kdbus_handle_make(KdbusHandle *handle, const char *node, unsigned long code, KdbusChain *chain)
{
	handle->fd = open_node(node);
	if (handle->fd < 0)
		return handle->fd;
	return kdbus_chain_ioctl(chain, handle->fd, code);
}

/**
 * kdbus_handle_deinit() - release a handle
 * @handle:	handle to release; what was made ends when no process has its file
 */
void kdbus_handle_deinit(KdbusHandle *handle)
{
	safe_close(handle->fd);
	free(handle->path);
	*handle = (KdbusHandle)KDBUS_HANDLE_NULL;
}
