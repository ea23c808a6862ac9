// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * What a message costs: SEND, RECV, FREE, poll, and an ioctl that fails early
 */

#include <string.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(16) << 20)
#define LARGE (64 * 1024)
#define UNKNOWN_FLAG (UINT64_C(1) << 40)

enum {
	EARLY_FAIL,
	FREE_DUMMY,
	POLL_EMPTY,
	SEND_SMALL,
	POLL_QUEUED,
	RECV_SMALL,
	FREE_SLICE,
	SEND_LARGE,
	RECV_LARGE,
	FREE_LARGE,
	_N_OPERATIONS,
};

static const struct {
	const char *operation;
	const char *variant;
	uint64_t n;
} operations[_N_OPERATIONS] = {
	[EARLY_FAIL] = { "fail early", "SEND with an unknown flag", 0 },
	[FREE_DUMMY] = { "FREE", "dummy offset", 0 },
	[POLL_EMPTY] = { "poll", "queue empty", 0 },
	[SEND_SMALL] = { "SEND", "", 64 },
	[POLL_QUEUED] = { "poll", "message queued", 0 },
	[RECV_SMALL] = { "RECV", "", 64 },
	[FREE_SLICE] = { "FREE", "slice", 64 },
	[SEND_LARGE] = { "SEND", "", LARGE },
	[RECV_LARGE] = { "RECV", "", LARGE },
	[FREE_LARGE] = { "FREE", "slice", LARGE },
};

static int check_payload(const Received *received, const uint8_t *data, uint64_t n_data)
{
	if (received->n_data != n_data || memcmp(received->data, data, n_data))
		return fail("message does not carry what was sent", -EBADMSG);

	return 0;
}

static int round_basic(Sample *samples, Connection *sender, Connection *receiver, Message *small,
		       Message *large, const uint8_t *data)
{
	Received received;
	int r;

	/* not counted: the floor ran last */
	r = connection_send_drain(sender, NULL, small, receiver);
	if (r < 0)
		return r;

	r = connection_send(sender, &samples[EARLY_FAIL], small, UNKNOWN_FLAG, NULL);
	if (r != -EINVAL)
		return fail("SEND with an unknown flag", r < 0 ? r : -EPROTO);

	r = connection_free(receiver, &samples[FREE_DUMMY], receiver->pool_size);
	if (r < 0)
		return fail("FREE of the dummy offset", r);

	r = sample_poll(&samples[POLL_EMPTY], receiver->fd);
	if (r != POLLOUT)
		return fail("poll with an empty queue", r < 0 ? r : -EPROTO);

	r = connection_send(sender, &samples[SEND_SMALL], small, 0, NULL);
	if (r < 0)
		return fail("SEND", r);

	r = sample_poll(&samples[POLL_QUEUED], receiver->fd);
	if (r != (POLLIN | POLLOUT))
		return fail("poll with a message queued", r < 0 ? r : -EPROTO);

	r = connection_recv(receiver, &samples[RECV_SMALL], &received);
	if (r < 0)
		return fail("RECV", r);
	r = check_payload(&received, data, 64);
	if (r < 0)
		return r;
	r = connection_free(receiver, &samples[FREE_SLICE], received.offset);
	if (r < 0)
		return fail("FREE", r);

	r = connection_send(sender, &samples[SEND_LARGE], large, 0, NULL);
	if (r < 0)
		return fail("SEND", r);
	r = connection_recv(receiver, &samples[RECV_LARGE], &received);
	if (r < 0)
		return fail("RECV", r);
	r = check_payload(&received, data, LARGE);
	if (r < 0)
		return r;
	r = connection_free(receiver, &samples[FREE_LARGE], received.offset);
	if (r < 0)
		return fail("FREE", r);

	return 0;
}

int table_basic(const Options *options)
{
	Connection sender = CONNECTION_NULL, receiver = CONNECTION_NULL;
	Message small = {}, large = {};
	Sample samples[_N_OPERATIONS] = {};
	size_t i, round, n_warm_up = N_WARM_UP(options->n_rounds);
	Floor floor = FLOOR_NULL;
	static uint8_t data[LARGE];
	char path[4096];
	int r, bus = -1;

	memset(data, 0x5a, sizeof(data));
	r = floor_init(&floor, options->floor, options->n_rounds);
	if (r < 0) {
		fail("floor", r);
		goto exit;
	}
	for (i = 0; i < _N_OPERATIONS; ++i) {
		r = sample_init(&samples[i], options->n_rounds);
		if (r < 0)
			goto exit;
	}

	r = bus_make(&bus, path, sizeof(path), options->directory, "bench-basic", 0);
	if (!r)
		r = connection_init(&sender, path, POOL_SIZE, 0, 0, NULL);
	if (!r)
		r = connection_init(&receiver, path, POOL_SIZE, 0, 0, NULL);
	if (!r)
		r = connection_map(&receiver);
	if (!r)
		r = message_init(&small, receiver.id, 0);
	if (!r)
		r = message_init(&large, receiver.id, 0);
	if (r < 0)
		goto exit;
	message_add_payload(&small, data, 64);
	message_add_payload(&large, data, LARGE);

	for (round = 0; round < n_warm_up + options->n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			for (i = 0; i < _N_OPERATIONS; ++i)
				sample_reset(&samples[i]);
		}

		r = floor_step(&floor);
		if (r < 0)
			goto exit;
		r = round_basic(samples, &sender, &receiver, &small, &large, data);
		if (r < 0)
			goto exit;
	}

	sample_print(&floor.ioctl, &floor, "basic", "floor", "ioctl", 0);
	sample_print(&floor.cold, &floor, "basic", "floor", "ioctl, first of its round", 0);
	sample_print(&floor.poll, &floor, "basic", "floor", "poll", 0);
	for (i = 0; i < _N_OPERATIONS; ++i)
		sample_print(&samples[i], &floor, "basic", operations[i].operation,
			     operations[i].variant, operations[i].n);

exit:
	message_deinit(&large);
	message_deinit(&small);
	for (i = 0; i < _N_OPERATIONS; ++i)
		sample_deinit(&samples[i]);
	connection_deinit(&receiver);
	connection_deinit(&sender);
	if (bus >= 0)
		close(bus);
	floor_deinit(&floor);
	return r;
}
