// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A unicast SEND, against what else is on its bus
 *
 * One thing is multiplied at a time (connections, names, matches), each on a
 * bus of its own that only grows; the sender and the receiver stay the same.
 * Since the levels can't be taken in turn, each is held against the floor of
 * its own rounds: what grows is the ratio.
 *
 * A user may have 1024 connections, so that more of them need more users:
 * child processes, each with a uid of its own, hold them. A connection may have
 * 256 names and as many matches; for these some connections of our own do.
 */

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(64) << 10)
#define POOL_SIZE_CROWD (UINT64_C(16) << 10)
#define N_PER_USER 1000
#define N_PER_CONNECTION 250
#define N_CHILDREN_MAX 64
#define N_HOLDERS_MAX 64
#define FIRST_UID 61000
#define ABSENT_ID (UINT64_C(1) << 40)

typedef struct Crowd Crowd;
typedef struct Dimension Dimension;

/* what is multiplied, and who holds it */
struct Crowd {
	const char *path;
	size_t n; /* so many there are */
	pid_t children[N_CHILDREN_MAX];
	size_t n_children;
	Connection holders[N_HOLDERS_MAX];
	size_t n_holders;
};

struct Dimension {
	const char *name;
	const char *bus;
	int (*grow)(Crowd *crowd, size_t n);
	bool with_name;      /* also send to a name */
	bool with_broadcast; /* also send a broadcast */
};

static const size_t levels[] = { 10, 100, 1000, 10000 };

#define N_LEVELS (sizeof(levels) / sizeof(*levels))

static _Noreturn void child_run(const char *path, uid_t uid, size_t n, int report)
{
	Connection connection;
	int r = 0;

	if (setresgid(uid, uid, uid) < 0 || setresuid(uid, uid, uid) < 0)
		r = -errno;
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* forgotten at each change of uid */

	for (; !r && n; --n)
		r = connection_init(&connection, path, POOL_SIZE_CROWD, 0, 0, NULL);
	if (write(report, &r, sizeof(r)) == sizeof(r))
		for (;;)
			pause();

	_exit(1);
}

static int crowd_add_child(Crowd *crowd, size_t n)
{
	int r, report[2];
	pid_t pid;

	if (crowd->n_children >= N_CHILDREN_MAX)
		return -E2BIG;
	if (pipe(report) < 0)
		return -errno;

	pid = fork();
	if (pid == 0) {
		close(report[0]);
		child_run(crowd->path, FIRST_UID + crowd->n_children, n, report[1]);
	}

	close(report[1]);
	if (pid < 0) {
		r = -errno;
	} else {
		crowd->children[crowd->n_children++] = pid;
		if (read(report[0], &r, sizeof(r)) != sizeof(r))
			r = -EPIPE;
	}
	close(report[0]);

	return r;
}

static int crowd_grow_connections(Crowd *crowd, size_t n)
{
	size_t more;
	int r;

	for (; crowd->n < n; crowd->n += more) {
		more = n - crowd->n < N_PER_USER ? n - crowd->n : N_PER_USER;
		r = crowd_add_child(crowd, more);
		if (r < 0)
			return fail("more connections", r);
	}

	return 0;
}

/* The connection that takes the next name or match. */
static int crowd_holder(Crowd *crowd, Connection **holderp)
{
	int r;

	if (crowd->n % N_PER_CONNECTION == 0) {
		if (crowd->n_holders >= N_HOLDERS_MAX)
			return -E2BIG;
		r = connection_init(&crowd->holders[crowd->n_holders++], crowd->path, POOL_SIZE, 0,
				    0, NULL);
		if (r < 0)
			return r;
	}

	*holderp = &crowd->holders[crowd->n_holders - 1];
	return 0;
}

static int crowd_grow_names(Crowd *crowd, size_t n)
{
	Connection *holder;
	char name[64];
	int r;

	for (; crowd->n < n; ++crowd->n) {
		r = crowd_holder(crowd, &holder);
		if (r < 0)
			return r;
		snprintf(name, sizeof(name), "bench.names.n%zu", crowd->n);
		r = connection_name_acquire(holder, name);
		if (r < 0)
			return r;
	}

	return 0;
}

/* None of these matches anything that is sent. */
static int crowd_grow_matches(Crowd *crowd, size_t n, uint64_t type)
{
	uint8_t mask[BLOOM_SIZE];
	Connection *holder;
	char name[64];
	uint64_t id;
	int r;

	for (; crowd->n < n; ++crowd->n) {
		r = crowd_holder(crowd, &holder);
		if (r < 0)
			return r;

		switch (type) {
		case KDBUS_ITEM_ID:
			id = ABSENT_ID + crowd->n;
			r = connection_match_add(holder, crowd->n, type, &id, sizeof(id));
			break;
		case KDBUS_ITEM_NAME:
			snprintf(name, sizeof(name), "bench.absent.n%zu", crowd->n);
			r = connection_match_add(holder, crowd->n, type, name, strlen(name) + 1);
			break;
		default:
			memset(mask, 0, sizeof(mask));
			mask[crowd->n % BLOOM_SIZE] = 1 << (crowd->n / BLOOM_SIZE % 8);
			mask[(crowd->n * 7 + 3) % BLOOM_SIZE] |= 0x11;
			r = connection_match_add(holder, crowd->n, KDBUS_ITEM_BLOOM_MASK, mask,
						 sizeof(mask));
			break;
		}
		if (r < 0)
			return r;
	}

	return 0;
}

static int crowd_grow_matches_id(Crowd *crowd, size_t n)
{
	return crowd_grow_matches(crowd, n, KDBUS_ITEM_ID);
}

static int crowd_grow_matches_name(Crowd *crowd, size_t n)
{
	return crowd_grow_matches(crowd, n, KDBUS_ITEM_NAME);
}

static int crowd_grow_matches_bloom(Crowd *crowd, size_t n)
{
	return crowd_grow_matches(crowd, n, KDBUS_ITEM_BLOOM_MASK);
}

static void crowd_deinit(Crowd *crowd)
{
	size_t i;

	for (i = 0; i < crowd->n_children; ++i) {
		kill(crowd->children[i], SIGKILL);
		waitpid(crowd->children[i], NULL, 0);
	}
	for (i = 0; i < crowd->n_holders; ++i)
		connection_deinit(&crowd->holders[i]);
	*crowd = (Crowd){};
}

static const Dimension dimensions[] = {
	{ "names", "bench-scale-names", crowd_grow_names, true, false },
	{ "matches by id", "bench-scale-matches-id", crowd_grow_matches_id, false, true },
	{ "matches by name", "bench-scale-matches-name", crowd_grow_matches_name, false, true },
	{ "matches by bloom mask", "bench-scale-matches-bloom", crowd_grow_matches_bloom, false,
	  true },
	/* last, since so many of them take a while to go away */
	{ "connections", "bench-scale-connections", crowd_grow_connections, false, false },
};

enum {
	UNICAST,
	UNICAST_NAME,
	BROADCAST,
	_N_OPERATIONS,
};

static const char *const operations[_N_OPERATIONS] = { "SEND to an id", "SEND to a name",
						       "SEND to all, one matches" };

static int run_level(const Options *options, const Dimension *dimension, size_t level,
		     Connection *sender, Connection *receiver, Message *messages)
{
	const bool wanted[_N_OPERATIONS] = { true, dimension->with_name,
					     dimension->with_broadcast };
	size_t i, round, n_warm_up = N_WARM_UP(options->n_rounds);
	Sample samples[_N_OPERATIONS] = {};
	Floor floor = FLOOR_NULL;
	int r;

	r = floor_init(&floor, options->floor, options->n_rounds);
	for (i = 0; !r && i < _N_OPERATIONS; ++i)
		r = sample_init(&samples[i], options->n_rounds);

	for (round = 0; !r && round < n_warm_up + options->n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			for (i = 0; i < _N_OPERATIONS; ++i)
				sample_reset(&samples[i]);
		}

		r = floor_step(&floor);
		if (!r)
			r = connection_send_drain(sender, NULL, &messages[UNICAST], receiver);
		for (i = 0; !r && i < _N_OPERATIONS; ++i) {
			if (!wanted[i])
				continue;
			r = connection_send_drain(sender, &samples[i], &messages[i], receiver);
		}
	}

	for (i = 0; !r && i < _N_OPERATIONS; ++i)
		if (wanted[i])
			sample_print(&samples[i], &floor, "scale", operations[i], dimension->name,
				     level);

	for (i = 0; i < _N_OPERATIONS; ++i)
		sample_deinit(&samples[i]);
	floor_deinit(&floor);
	return r;
}

static int run_dimension(const Options *options, const Dimension *dimension)
{
	Connection sender = CONNECTION_NULL, receiver = CONNECTION_NULL;
	Message messages[_N_OPERATIONS] = {};
	Crowd crowd = {};
	char path[4096];
	int r, bus = -1;
	size_t i;

	r = bus_make(&bus, path, sizeof(path), options->directory, dimension->bus,
		     KDBUS_MAKE_ACCESS_WORLD);
	if (!r)
		r = connection_init(&sender, path, POOL_SIZE, 0, 0, NULL);
	if (!r)
		r = connection_init(&receiver, path, POOL_SIZE, 0, 0, NULL);
	if (!r && dimension->with_name)
		r = connection_name_acquire(&receiver, "bench.receiver");
	if (!r && dimension->with_broadcast)
		r = connection_match_add_all(&receiver);

	if (!r)
		r = message_init(&messages[UNICAST], receiver.id, 0);
	if (!r)
		r = message_init(&messages[UNICAST_NAME], KDBUS_DST_ID_NAME, 0);
	if (!r)
		r = message_init(&messages[BROADCAST], KDBUS_DST_ID_BROADCAST, KDBUS_MSG_SIGNAL);
	if (!r) {
		message_add_name(&messages[UNICAST_NAME], "bench.receiver");
		message_add_bloom(&messages[BROADCAST]);
		for (i = 0; i < _N_OPERATIONS; ++i)
			message_add_payload(&messages[i], path, 64);
	}

	crowd.path = path;
	for (i = 0; !r && i < N_LEVELS; ++i) {
		r = dimension->grow(&crowd, levels[i]);
		if (!r)
			r = run_level(options, dimension, levels[i], &sender, &receiver, messages);
	}

	for (i = 0; i < _N_OPERATIONS; ++i)
		message_deinit(&messages[i]);
	crowd_deinit(&crowd);
	connection_deinit(&receiver);
	connection_deinit(&sender);
	if (bus >= 0)
		close(bus);
	return r;
}

int table_scale(const Options *options)
{
	size_t i;
	int r, result = 0;

	for (i = 0; i < sizeof(dimensions) / sizeof(*dimensions); ++i) {
		r = run_dimension(options, &dimensions[i]);
		if (r < 0)
			result = fail(dimensions[i].name, r);
	}

	return result;
}
