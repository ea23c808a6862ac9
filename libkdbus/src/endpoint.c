/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Custom endpoints
 */

#include <kdbus/kdbus.h>
#include <string.h>
#include "handle.h"
#include "owner.h"
#include "policy.h"
#include "util.h"

struct kdbus_endpoint {
	KdbusHandle handle;
	KdbusOwner owner;
};

/**
 * kdbus_endpoint_new() - make a custom endpoint
 * @endpointp:	the new endpoint
 * @bus_path:	path of the bus's default endpoint, see kdbus_bus_get_path()
 * @name:	name of the endpoint, starting with the caller's effective uid and -
 * @flags:	KDBUS_MAKE_*: who may open it
 *
 * At first nobody on it may see or talk to any name: see
 * kdbus_endpoint_update(). The endpoint and all connections on it end with
 * kdbus_endpoint_free(), or with the process.
 *
 * Return: 0 on success, the errno of open(2); -EPERM if the caller does not own
 *         the bus, -EINVAL if the name is bad, -ENAMETOOLONG, -EEXIST if there
 *         is such an endpoint, -ESHUTDOWN if the bus is gone, -ENOMEM.
 */
_public_ int kdbus_endpoint_new(struct kdbus_endpoint **endpointp, const char *bus_path,
				const char *name, uint64_t flags)
{
	_cleanup_(kdbus_endpoint_freep) struct kdbus_endpoint *endpoint = NULL;
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	const char *slash = strrchr(bus_path, '/');
	int n_directory = slash ? slash + 1 - bus_path : 0;
	int r;

	endpoint = calloc(1, sizeof(*endpoint));
	if (!endpoint)
		return -ENOMEM;
	endpoint->handle = (KdbusHandle)KDBUS_HANDLE_NULL;

	if ((r = kdbus_owner_init(&endpoint->owner)) < 0 ||
	    (r = format(&endpoint->handle.path, "%.*s%s", n_directory, bus_path, name)) < 0 ||
	    (r = kdbus_handle_init_command(&chain, flags, name)) < 0)
		return r;

	r = kdbus_handle_make(&endpoint->handle, bus_path, KDBUS_CMD_ENDPOINT_MAKE, &chain);
	if (r < 0)
		return r;

	*endpointp = endpoint;
	endpoint = NULL;
	return 0;
}

/**
 * kdbus_endpoint_free() - end a custom endpoint
 * @endpoint:	endpoint to end, or NULL
 *
 * Its connections are disconnected. In a process that was forked from the one
 * that made it, the endpoint lives on until the last of them has ended it.
 *
 * Return: NULL.
 */
_public_ struct kdbus_endpoint *kdbus_endpoint_free(struct kdbus_endpoint *endpoint)
{
	if (!endpoint)
		return NULL;

	kdbus_handle_deinit(&endpoint->handle);
	kdbus_owner_deinit(&endpoint->owner);
	free(endpoint);
	return NULL;
}

/**
 * kdbus_endpoint_get_path() - get the path of a custom endpoint
 * @endpoint:	endpoint to look at
 *
 * Return: What to give to kdbus_conn_new() to connect through it.
 */
_public_ const char *kdbus_endpoint_get_path(const struct kdbus_endpoint *endpoint)
{
	return endpoint->handle.path;
}

/**
 * kdbus_endpoint_get_fd() - get the descriptor that keeps the endpoint
 * @endpoint:	endpoint to look at
 *
 * Return: The descriptor, which stays with @endpoint.
 */
_public_ int kdbus_endpoint_get_fd(const struct kdbus_endpoint *endpoint)
{
	return endpoint->handle.fd;
}

/**
 * kdbus_endpoint_update() - replace the policy of a custom endpoint
 * @endpoint:	endpoint to change
 * @policy:	what connections on it may do, or NULL for nothing
 *
 * Return: 0 on success, -EINVAL if a name or an access is bad, -EEXIST if a
 *         name is in it twice, -ESHUTDOWN if the endpoint is gone, -ECHILD if
 *         another process made it, -ENOMEM.
 */
_public_ int kdbus_endpoint_update(struct kdbus_endpoint *endpoint,
				   const struct kdbus_policy *policy)
{
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	int r;

	if ((r = kdbus_owner_check(&endpoint->owner)) < 0 ||
	    (r = kdbus_chain_init(&chain, &(struct kdbus_cmd){}, sizeof(struct kdbus_cmd))) < 0 ||
	    (policy && (r = kdbus_chain_append_items(&chain, &policy->items)) < 0))
		return r;

	return kdbus_chain_ioctl(&chain, endpoint->handle.fd, KDBUS_CMD_ENDPOINT_UPDATE);
}
