// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The client: takes the samples of one table, and prints its rows as JSON
 *
 * Runs on the CPU, and as the user, that whoever starts it has chosen.
 */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include "table.h"

static const struct {
	const char *name;
	int (*run)(const Options *options);
} tables[] = {
	{ "basic", table_basic }, { "calls", table_calls }, { "broadcast", table_broadcast },
	{ "scale", table_scale }, { "fds", table_fds },     { "metadata", table_metadata },
};

int main(int argc, char **argv)
{
	struct rlimit limit = { 65536, 65536 };
	Options options;
	size_t i;

	prctl(PR_SET_PDEATHSIG, SIGTERM);
	setrlimit(RLIMIT_NOFILE, &limit);

	if (argc == 5 && !strcmp(argv[1], "idle"))
		return idle(argv[2], strtoul(argv[3], NULL, 10), strtoul(argv[4], NULL, 10)) < 0;

	for (i = 0; argc == 5 && i < sizeof(tables) / sizeof(*tables); ++i) {
		if (strcmp(argv[1], tables[i].name))
			continue;

		options = (Options){
			.floor = argv[2],
			.directory = argv[3],
			.n_rounds = strtoul(argv[4], NULL, 10),
		};
		return tables[i].run(&options) < 0;
	}

	fprintf(stderr, "usage: %s TABLE FLOOR MOUNTPOINT ROUNDS\n", argv[0]);
	fprintf(stderr, "       %s idle MOUNTPOINT CONNECTIONS POOL_SIZE\n", argv[0]);
	return 2;
}
