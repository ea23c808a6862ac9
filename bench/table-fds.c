// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Descriptor passing, by force and over the private socket
 *
 * A plain kdbus client gets its descriptors put into its table by the daemon,
 * which stops the thread for it (`raw`); one that knows the extension commands
 * reads them from a socket (`socket`). What is timed is all that the receiver
 * does until it has them: RECV, and recvmsg(2) in the latter case.
 */

#include <string.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(1) << 20)
#define N_FDS_MAX 16

enum {
	RAW,
	SOCKET,
	_N_PATHS,
};

static const char *const paths[_N_PATHS] = { "raw", "socket" };
static const size_t n_fds[] = { 0, 1, N_FDS_MAX };

#define N_COUNTS (sizeof(n_fds) / sizeof(*n_fds))

typedef struct Passing Passing;

struct Passing {
	Message message;
	Sample send;
	Sample recv;
};

static int passing_init(Passing *passing, Connection *receiver, const int *fds, size_t n,
			size_t n_rounds)
{
	int r;

	r = sample_init(&passing->send, n_rounds);
	if (!r)
		r = sample_init(&passing->recv, n_rounds);
	if (!r)
		r = message_init(&passing->message, receiver->id, 0);
	if (r < 0)
		return r;

	if (n)
		message_add_fds(&passing->message, fds, n);
	message_add_payload(&passing->message, paths, 8);
	return 0;
}

static void passing_deinit(Passing *passing)
{
	message_deinit(&passing->message);
	sample_deinit(&passing->recv);
	sample_deinit(&passing->send);
}

static int passing_step(Passing *passing, Connection *sender, Connection *receiver, size_t n)
{
	Received received;
	uint64_t start;
	size_t i;
	int r;

	r = connection_send(sender, &passing->send, &passing->message, 0, NULL);
	if (r < 0)
		return fail("SEND of descriptors", r);

	start = now_ns();
	r = connection_recv(receiver, NULL, &received);
	sample_add(&passing->recv, now_ns() - start);
	if (r < 0)
		return fail("RECV of descriptors", r);

	for (i = 0; i < received.n_fds; ++i)
		if (received.fds[i] < 0)
			break;
	if (i != n || received.n_fds != n)
		return fail("not all descriptors arrived", -EBADMSG);

	r = connection_drop(receiver, &received);
	return r < 0 ? fail("FREE", r) : 0;
}

int table_fds(const Options *options)
{
	Connection sender = CONNECTION_NULL,
		   receivers[_N_PATHS] = { CONNECTION_NULL, CONNECTION_NULL };
	size_t i, j, round, n_paths = _N_PATHS, n_warm_up = N_WARM_UP(options->n_rounds);
	Passing passings[_N_PATHS][N_COUNTS] = {};
	int r, bus = -1, ends[2] = { -1, -1 }, fds[N_FDS_MAX];
	Floor floor = FLOOR_NULL;
	char path[4096];

	if (pipe(ends) < 0) {
		r = fail("pipe", -errno);
		goto exit;
	}
	for (i = 0; i < N_FDS_MAX; ++i)
		fds[i] = ends[i % 2];

	r = floor_init(&floor, options->floor, options->n_rounds);
	if (r < 0) {
		fail("floor", r);
		goto exit;
	}

	r = bus_make(&bus, path, sizeof(path), options->directory, "bench-fds", 0);
	if (!r)
		r = connection_init(&sender, path, POOL_SIZE, 0, 0, NULL);
	for (i = 0; !r && i < _N_PATHS; ++i) {
		r = connection_init(&receivers[i], path, POOL_SIZE, KDBUS_HELLO_ACCEPT_FD, 0, NULL);
		if (!r)
			r = connection_map(&receivers[i]);
		for (j = 0; !r && j < N_COUNTS; ++j)
			r = passing_init(&passings[i][j], &receivers[i], fds, n_fds[j],
					 options->n_rounds);
	}
	if (r < 0)
		goto exit;

	r = connection_init_fd_socket(&receivers[SOCKET]);
	if (r == -ENOTTY) {
		fail("no private socket, its rows are left out", r);
		n_paths = SOCKET;
		r = 0;
	}

	for (round = 0; !r && round < n_warm_up + options->n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			for (i = 0; i < n_paths; ++i)
				for (j = 0; j < N_COUNTS; ++j) {
					sample_reset(&passings[i][j].send);
					sample_reset(&passings[i][j].recv);
				}
		}

		r = floor_step(&floor);
		if (!r)
			r = connection_send_drain(&sender, NULL, &passings[RAW][0].message,
						  &receivers[RAW]);
		for (i = 0; !r && i < n_paths; ++i)
			for (j = 0; !r && j < N_COUNTS; ++j)
				r = passing_step(&passings[i][j], &sender, &receivers[i], n_fds[j]);
	}

	for (i = 0; !r && i < n_paths; ++i)
		for (j = 0; j < N_COUNTS; ++j) {
			sample_print(&passings[i][j].send, &floor, "fds", "SEND", paths[i],
				     n_fds[j]);
			sample_print(&passings[i][j].recv, &floor, "fds", "RECV", paths[i],
				     n_fds[j]);
		}

exit:
	for (i = 0; i < _N_PATHS; ++i) {
		for (j = 0; j < N_COUNTS; ++j)
			passing_deinit(&passings[i][j]);
		connection_deinit(&receivers[i]);
	}
	connection_deinit(&sender);
	if (bus >= 0)
		close(bus);
	for (i = 0; i < 2; ++i)
		if (ends[i] >= 0)
			close(ends[i]);
	floor_deinit(&floor);
	return r;
}
