// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A broadcast, against the number of its receivers
 *
 * Each number has a bus of its own, all there at once, so that the rounds can
 * take them in turn. All receivers live in this process and are drained after
 * each broadcast.
 */

#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(64) << 10)
#define N_RECEIVERS_MAX 512

typedef struct Audience Audience;

struct Audience {
	int bus;
	Connection sender;
	Connection *receivers;
	size_t n_receivers;
	Message message;
	Sample sample;
};

#define AUDIENCE_NULL { .bus = -1, .sender = CONNECTION_NULL }

static const size_t n_receivers[] = { 1, 8, 64, N_RECEIVERS_MAX };

#define N_AUDIENCES (sizeof(n_receivers) / sizeof(*n_receivers))

static int audience_init(Audience *audience, const Options *options, size_t n)
{
	char name[64], path[4096];
	size_t i;
	int r;

	*audience = (Audience)AUDIENCE_NULL;
	audience->receivers = calloc(n, sizeof(*audience->receivers));
	if (!audience->receivers)
		return -ENOMEM;
	audience->n_receivers = n;
	for (i = 0; i < n; ++i)
		audience->receivers[i] = (Connection)CONNECTION_NULL;

	r = sample_init(&audience->sample, options->n_rounds);
	if (r < 0)
		return r;

	snprintf(name, sizeof(name), "bench-broadcast-%zu", n);
	r = bus_make(&audience->bus, path, sizeof(path), options->directory, name, 0);
	if (!r)
		r = connection_init(&audience->sender, path, POOL_SIZE, 0, 0, NULL);
	for (i = 0; !r && i < n; ++i) {
		r = connection_init(&audience->receivers[i], path, POOL_SIZE, 0, 0, NULL);
		if (!r)
			r = connection_match_add_all(&audience->receivers[i]);
	}
	if (!r)
		r = message_init(&audience->message, KDBUS_DST_ID_BROADCAST, KDBUS_MSG_SIGNAL);
	if (r < 0)
		return r;

	message_add_bloom(&audience->message);
	message_add_payload(&audience->message, n_receivers, 16);
	return 0;
}

static void audience_deinit(Audience *audience)
{
	size_t i;

	message_deinit(&audience->message);
	for (i = 0; i < audience->n_receivers; ++i)
		connection_deinit(&audience->receivers[i]);
	free(audience->receivers);
	connection_deinit(&audience->sender);
	if (audience->bus >= 0)
		close(audience->bus);
	sample_deinit(&audience->sample);
	*audience = (Audience)AUDIENCE_NULL;
}

static int audience_step(Audience *audience, Sample *sample)
{
	size_t i;
	int r;

	r = connection_send(&audience->sender, sample, &audience->message, 0, NULL);
	if (r < 0)
		return fail("SEND of a broadcast", r);

	/* all must have got it, else there was less to do */
	for (i = 0; !r && i < audience->n_receivers; ++i)
		r = connection_drain(&audience->receivers[i]);

	return r;
}

int table_broadcast(const Options *options)
{
	size_t i, round, n_rounds, n_warm_up;
	Audience audiences[N_AUDIENCES];
	Floor floor = FLOOR_NULL;
	int r;

	for (i = 0; i < N_AUDIENCES; ++i)
		audiences[i] = (Audience)AUDIENCE_NULL;

	/* a round drains more than 500 receivers */
	n_rounds = options->n_rounds / 10 + 10;
	n_warm_up = N_WARM_UP(n_rounds);

	r = floor_init(&floor, options->floor, options->n_rounds);
	if (r < 0)
		fail("floor", r);
	for (i = 0; !r && i < N_AUDIENCES; ++i)
		r = audience_init(&audiences[i], options, n_receivers[i]);

	for (round = 0; !r && round < n_warm_up + n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			for (i = 0; i < N_AUDIENCES; ++i)
				sample_reset(&audiences[i].sample);
		}

		r = floor_step(&floor);
		if (!r)
			r = audience_step(&audiences[0], NULL);
		for (i = 0; !r && i < N_AUDIENCES; ++i)
			r = audience_step(&audiences[i], &audiences[i].sample);
	}

	for (i = 0; !r && i < N_AUDIENCES; ++i)
		sample_print(&audiences[i].sample, &floor, "broadcast", "SEND", "receivers",
			     n_receivers[i]);

	for (i = 0; i < N_AUDIENCES; ++i)
		audience_deinit(&audiences[i]);
	floor_deinit(&floor);
	return r;
}
