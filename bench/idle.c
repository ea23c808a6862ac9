// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Connections that do nothing, for whoever looks at memory meanwhile
 *
 * Prints `few`, `many` and `closed` as it gets there, and goes on at each line
 * read. The few pay for what the daemon sets up once.
 */

#include <stdio.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define N_FEW 10

static int tell(const char *stage)
{
	char line[64];

	puts(stage);
	fflush(stdout);
	return fgets(line, sizeof(line), stdin) ? 0 : -EPIPE;
}

int idle(const char *directory, size_t n_connections, size_t pool_size)
{
	Connection *connections;
	char path[4096];
	int r, bus = -1;
	size_t i;

	connections = calloc(N_FEW + n_connections, sizeof(*connections));
	if (!connections)
		return -ENOMEM;
	for (i = 0; i < N_FEW + n_connections; ++i)
		connections[i] = (Connection)CONNECTION_NULL;

	r = bus_make(&bus, path, sizeof(path), directory, "bench-idle", 0);
	for (i = 0; !r && i < N_FEW + n_connections; ++i) {
		if (i == N_FEW)
			r = tell("few");
		if (!r)
			r = connection_init(&connections[i], path, pool_size, 0, 0, NULL);
	}
	if (!r)
		r = tell("many");

	for (i = 0; i < N_FEW + n_connections; ++i)
		connection_deinit(&connections[i]);
	free(connections);
	if (bus >= 0)
		close(bus);

	return r < 0 ? r : tell("closed");
}
