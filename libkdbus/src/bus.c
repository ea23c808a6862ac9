/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Buses
 */

#include <kdbus/kdbus.h>
#include "handle.h"
#include "util.h"

struct kdbus_bus {
	KdbusHandle handle;
};

/**
 * kdbus_bus_new() - make a bus
 * @busp:	the new bus
 * @root:	directory kdbusfs is mounted on
 * @name:	name of the bus, starting with the caller's effective uid and -
 * @options:	how to make it, or NULL
 *
 * The bus and all connections on it end with kdbus_bus_free(), or with the
 * process.
 *
 * Return: 0 on success, the errno of open(2); -EINVAL if name or bloom
 *         parameters are bad, -ENAMETOOLONG, -EEXIST if there is such a bus,
 *         -EMFILE if the user has too many, -ENOMEM.
 */
_public_ int kdbus_bus_new(struct kdbus_bus **busp, const char *root, const char *name,
			   const struct kdbus_bus_options *options)
{
	static const struct kdbus_bus_options defaults;
	struct kdbus_bloom_parameter bloom = { .size = 64, .n_hash = 8 };
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	_cleanup_(kdbus_bus_freep) struct kdbus_bus *bus = NULL;
	_cleanup_(freep) char *control = NULL;
	int r;

	options = options ?: &defaults;
	if (options->bloom.size)
		bloom = options->bloom;

	bus = calloc(1, sizeof(*bus));
	if (!bus)
		return -ENOMEM;
	bus->handle = (KdbusHandle)KDBUS_HANDLE_NULL;

	if ((r = format(&control, "%s/control", root)) < 0 ||
	    (r = format(&bus->handle.path, "%s/%s/bus", root, name)) < 0)
		return r;

	if ((r = kdbus_handle_init_command(&chain, options->flags, name)) < 0 ||
	    (r = kdbus_chain_append(&chain, KDBUS_ITEM_BLOOM_PARAMETER, &bloom, sizeof(bloom))) <
		    0 ||
	    (r = kdbus_chain_append(&chain, KDBUS_ITEM_ATTACH_FLAGS_SEND, &options->attach_flags,
				    sizeof(options->attach_flags))) < 0 ||
	    (r = kdbus_handle_make(&bus->handle, control, KDBUS_CMD_BUS_MAKE, &chain)) < 0)
		return r;

	*busp = bus;
	bus = NULL;
	return 0;
}

/**
 * kdbus_bus_free() - end a bus
 * @bus:	bus to end, or NULL
 *
 * Its connections are disconnected. In a process that was forked from the one
 * that made it, the bus lives on until the last of them has ended it.
 *
 * Return: NULL.
 */
_public_ struct kdbus_bus *kdbus_bus_free(struct kdbus_bus *bus)
{
	if (!bus)
		return NULL;

	kdbus_handle_deinit(&bus->handle);
	free(bus);
	return NULL;
}

/**
 * kdbus_bus_get_path() - get the path of the default endpoint
 * @bus:	bus to look at
 *
 * Return: What to give to kdbus_conn_new() to connect to the bus.
 */
_public_ const char *kdbus_bus_get_path(const struct kdbus_bus *bus)
{
	return bus->handle.path;
}

/**
 * kdbus_bus_get_fd() - get the descriptor that keeps the bus
 * @bus:	bus to look at
 *
 * Return: The descriptor, which stays with @bus.
 */
_public_ int kdbus_bus_get_fd(const struct kdbus_bus *bus)
{
	return bus->handle.fd;
}
