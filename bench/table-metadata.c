// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * What each kind of metadata adds to SEND
 *
 * One receiver for each kind asks for that kind alone. The sender has a name
 * and a description, so that there is something to tell.
 */

#include <string.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(1) << 20)
#define COMMON (KDBUS_ATTACH_TIMESTAMP | KDBUS_ATTACH_CREDS | KDBUS_ATTACH_PIDS)

static const struct {
	const char *name;
	uint64_t attach_flags;
} kinds[] = {
	{ "none", 0 },
	{ "timestamp", KDBUS_ATTACH_TIMESTAMP },
	{ "creds", KDBUS_ATTACH_CREDS },
	{ "pids", KDBUS_ATTACH_PIDS },
	{ "auxgroups", KDBUS_ATTACH_AUXGROUPS },
	{ "names", KDBUS_ATTACH_NAMES },
	{ "tid_comm", KDBUS_ATTACH_TID_COMM },
	{ "pid_comm", KDBUS_ATTACH_PID_COMM },
	{ "exe", KDBUS_ATTACH_EXE },
	{ "cmdline", KDBUS_ATTACH_CMDLINE },
	{ "cgroup", KDBUS_ATTACH_CGROUP },
	{ "caps", KDBUS_ATTACH_CAPS },
	{ "seclabel", KDBUS_ATTACH_SECLABEL },
	{ "audit", KDBUS_ATTACH_AUDIT },
	{ "conn_description", KDBUS_ATTACH_CONN_DESCRIPTION },
	{ "timestamp+creds+pids", COMMON },
	{ "all", _KDBUS_ATTACH_ALL },
};

#define N_KINDS (sizeof(kinds) / sizeof(*kinds))

int table_metadata(const Options *options)
{
	Connection sender = CONNECTION_NULL, receivers[N_KINDS];
	size_t i, round, n_warm_up = N_WARM_UP(options->n_rounds);
	Message messages[N_KINDS] = {};
	Sample samples[N_KINDS] = {};
	Floor floor = FLOOR_NULL;
	char path[4096];
	int r, bus = -1;

	for (i = 0; i < N_KINDS; ++i)
		receivers[i] = (Connection)CONNECTION_NULL;

	r = floor_init(&floor, options->floor, options->n_rounds);
	if (r < 0) {
		fail("floor", r);
		goto exit;
	}

	r = bus_make(&bus, path, sizeof(path), options->directory, "bench-metadata", 0);
	if (!r)
		r = connection_init(&sender, path, POOL_SIZE, 0, 0, "bench-sender");
	if (!r)
		r = connection_name_acquire(&sender, "bench.sender");
	for (i = 0; !r && i < N_KINDS; ++i) {
		r = connection_init(&receivers[i], path, POOL_SIZE, 0, kinds[i].attach_flags, NULL);
		if (!r)
			r = sample_init(&samples[i], options->n_rounds);
		if (!r)
			r = message_init(&messages[i], receivers[i].id, 0);
		if (!r)
			message_add_payload(&messages[i], path, 64);
	}

	for (round = 0; !r && round < n_warm_up + options->n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			for (i = 0; i < N_KINDS; ++i)
				sample_reset(&samples[i]);
		}

		r = floor_step(&floor);
		if (!r)
			r = connection_send_drain(&sender, NULL, &messages[0], &receivers[0]);
		for (i = 0; !r && i < N_KINDS; ++i)
			r = connection_send_drain(&sender, &samples[i], &messages[i],
						  &receivers[i]);
	}

	for (i = 0; !r && i < N_KINDS; ++i)
		sample_print(&samples[i], &floor, "metadata", "SEND", kinds[i].name, 64);

exit:
	for (i = 0; i < N_KINDS; ++i) {
		message_deinit(&messages[i]);
		sample_deinit(&samples[i]);
		connection_deinit(&receivers[i]);
	}
	connection_deinit(&sender);
	if (bus >= 0)
		close(bus);
	floor_deinit(&floor);
	return r;
}
