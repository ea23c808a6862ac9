// SPDX-License-Identifier: LGPL-2.1-or-later
#pragma once

/*
 * Tables
 *
 * A table is one function that opens what it needs, takes its samples in
 * interleaved rounds and prints its rows. It returns 0, or a negative error
 * code after telling on stderr what failed.
 */

#include <stddef.h>

typedef struct Options Options;

struct Options {
	const char *floor;     /* mount point of the floor */
	const char *directory; /* mount point of kdbusfs */
	size_t n_rounds;
};

/* Rounds that are run, but not counted, before the first that is. */
#define N_WARM_UP(n_rounds) ((n_rounds) / 10 + 5)

int table_basic(const Options *options);
int table_calls(const Options *options);
int table_broadcast(const Options *options);
int table_scale(const Options *options);
int table_fds(const Options *options);
int table_metadata(const Options *options);

int idle(const char *directory, size_t n_connections, size_t pool_size);
