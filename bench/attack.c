// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Attacks: what an ordinary user can do, on and on, to keep others from being served
 *
 * attack NAME MOUNT UID
 *
 * Started as root, it takes UID for all it does; what root prepares for it is
 * what that user could have had otherwise (subordinate uids, a file of its own
 * file system as memory). It says "ready" once the attack is under way, goes on
 * until a line comes on its input, and then says how many calls were done, how
 * many refused, and with which error the last time.
 */

#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "connection.h"

#define CONNECTIONS_MAX 512
#define BLOOM_MAX 4096
#define GENERATIONS 7
#define RULES 1364 /* as many as fit into one command */
#define NAMES 256
#define SUBORDINATES 32
#define SUBORDINATE_UID 100000
#define EXCHANGE_MESSAGES 64
#define VECS 1000
#define PAGE 4096
#define SKIPPED 77 /* exit code: can't be tried here */

typedef struct State State;
typedef struct Worker Worker;
typedef struct Attack Attack;

struct State {
	const char *mount;
	unsigned int uid;
	int bus;
	char path[4096];
	char control[4096];
	Connection connections[CONNECTIONS_MAX];
	size_t n_connections;
	int trap;
	uint8_t *pages;
	size_t n_pages;
	_Atomic uint64_t n_done;
	_Atomic uint64_t n_refused;
	_Atomic int error;
};

struct Worker {
	State *state;
	const Attack *attack;
	size_t index;
	size_t n_steps;
	Connection *connection; /* one of its own, if the attack has as many */
	union {
		uint64_t words[COMMAND_MAX / 8];
		struct kdbus_cmd_match match;
		struct kdbusfs_cmd_exchange exchange;
	} buffer;
	Message message;
};

struct Attack {
	const char *name;
	size_t n_threads;
	int (*prepare)(State *state); /* once, as the user */
	int (*init)(Worker *worker);  /* in each thread */
	int (*step)(Worker *worker);  /* in each thread, on and on */
};

static void count(State *state, int r)
{
	if (r >= 0) {
		++state->n_done;
	} else {
		++state->n_refused;
		state->error = -r;
	}
}

static int make_bus(State *state, uint64_t n_bloom)
{
	return bus_make_bloom(&state->bus, state->path, sizeof(state->path), state->mount, "attack",
			      KDBUS_MAKE_ACCESS_WORLD, n_bloom);
}

static int make_connections(State *state, size_t n, uint64_t pool_size)
{
	int r;

	for (; n; --n) {
		r = connection_init(&state->connections[state->n_connections], state->path,
				    pool_size, 0, 0, NULL);
		if (r < 0)
			return r;
		++state->n_connections;
	}

	return 0;
}

static int drop_next(Connection *connection)
{
	Received received;
	int r;

	r = connection_recv(connection, NULL, &received);
	return r < 0 ? r : connection_free(connection, NULL, received.offset);
}

static int send_to_self(Worker *worker)
{
	int r;

	r = connection_send(worker->connection, NULL, &worker->message, 0, NULL);
	return r < 0 ? r : drop_next(worker->connection);
}

static int match_issue(Connection *connection, struct kdbus_cmd_match *match)
{
	return sample_ioctl(NULL, connection->fd, KDBUS_CMD_MATCH_ADD, match);
}

/* One match without a rule: everything. */
static int match_everything(Connection *connection)
{
	struct kdbus_cmd_match match = { .size = sizeof(match) };

	return match_issue(connection, &match);
}

static int prepare_bus(State *state)
{
	int r;

	r = make_bus(state, BLOOM_SIZE);
	return r < 0 ? r : make_connections(state, 4, 1 << 20);
}

/* compute: no call at all, to tell what the threads alone cost others */

static int step_compute(Worker *worker)
{
	volatile size_t i;

	for (i = 0; i < 1000000; ++i)
		;
	(void)worker;
	return 0;
}

/* bloom-masks, bloom-broadcasts: bits by the thousand */

static int prepare_bloom(State *state)
{
	int r;

	r = make_bus(state, BLOOM_MAX);
	return r < 0 ? r : make_connections(state, 4, 1 << 20);
}

static void build_bloom_match(Worker *worker)
{
	static uint8_t mask[GENERATIONS * BLOOM_MAX];
	struct kdbus_cmd_match *match = &worker->buffer.match;

	memset(mask, 0xff, sizeof(mask));
	*match = (struct kdbus_cmd_match){ .size = sizeof(*match), .flags = KDBUS_MATCH_REPLACE };
	match->size += item_put(match->items, KDBUS_ITEM_BLOOM_MASK, mask, sizeof(mask));
}

static int init_bloom_masks(Worker *worker)
{
	build_bloom_match(worker);
	return 0;
}

static int step_bloom_masks(Worker *worker)
{
	worker->buffer.match.cookie = worker->n_steps % 2;
	return match_issue(worker->connection, &worker->buffer.match);
}

/* Broadcasts that all these masks have to be tried on; the last bit is missing. */
static int init_bloom_broadcasts(Worker *worker)
{
	uint64_t filter[1 + BLOOM_MAX / 8];
	size_t i;
	int r;

	build_bloom_match(worker);
	for (i = 0; i < 50; ++i) {
		worker->buffer.match.cookie = i;
		r = match_issue(worker->connection, &worker->buffer.match);
		if (r < 0)
			break; /* no more than one's share */
	}

	memset(filter, 0xff, sizeof(filter));
	filter[0] = GENERATIONS - 1;
	filter[BLOOM_MAX / 8] >>= 8;
	r = message_init(&worker->message, KDBUS_DST_ID_BROADCAST, KDBUS_MSG_SIGNAL);
	if (!r)
		message_add(&worker->message, KDBUS_ITEM_BLOOM_FILTER, filter, sizeof(filter));
	return r;
}

static int step_send(Worker *worker)
{
	return connection_send(worker->connection, NULL, &worker->message, 0, NULL);
}

/* match-rules: 20 connections, each with 50 matches that are true but for their last rule */

static int prepare_match_rules(State *state)
{
	union {
		uint64_t words[COMMAND_MAX / 8];
		struct kdbus_cmd_match match;
	} buffer;
	uint64_t id;
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	if (!r)
		r = make_connections(state, 20, 1 << 20);
	if (r < 0)
		return r;

	buffer.match = (struct kdbus_cmd_match){ .size = sizeof(buffer.match) };
	for (i = 0; i < RULES; ++i) {
		id = i < RULES - 1 ? state->connections[0].id : state->connections[1].id;
		buffer.match.size += item_put((uint8_t *)&buffer + buffer.match.size, KDBUS_ITEM_ID,
					      &id, sizeof(id));
	}

	for (i = 0; i < 20 * 50; ++i) {
		buffer.match.cookie = i / 20;
		(void)match_issue(&state->connections[i % 20], &buffer.match);
	}

	return 0;
}

static int init_broadcast(Worker *worker)
{
	int r;

	r = message_init(&worker->message, KDBUS_DST_ID_BROADCAST, KDBUS_MSG_SIGNAL);
	if (!r)
		message_add_bloom(&worker->message);
	return r;
}

/* name-release: thousands of messages, of many uids, go back to an activator */

static int prepare_name_release(State *state)
{
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	for (i = 0; !r && i < SUBORDINATES; ++i) {
		if (seteuid(0) < 0 || seteuid(SUBORDINATE_UID + i) < 0)
			return fail("seteuid", -errno);
		r = make_connections(state, 1, 1 << 16);
	}
	if (seteuid(0) < 0 || seteuid(state->uid) < 0)
		return fail("seteuid", -errno);

	return r;
}

static int activator_init(Connection *connection, const char *path, const char *name)
{
	uint64_t buffer[64] = {};
	struct kdbus_cmd_hello *hello = (void *)buffer;

	*connection = (Connection)CONNECTION_NULL;
	connection->fd = open(path, O_RDWR | O_CLOEXEC);
	if (connection->fd < 0)
		return -errno;

	*hello = (struct kdbus_cmd_hello){ .size = sizeof(*hello),
					   .flags = KDBUS_HELLO_ACTIVATOR,
					   .pool_size = 16 << 20 };
	hello->size += item_put(hello->items, KDBUS_ITEM_NAME, name, strlen(name) + 1);
	return sample_ioctl(NULL, connection->fd, KDBUS_CMD_HELLO, hello);
}

static int name_issue(Connection *connection, unsigned long command, const char *name)
{
	uint64_t buffer[64] = {};
	struct kdbus_cmd *cmd = (void *)buffer;

	cmd->size = sizeof(*cmd);
	cmd->size += item_put(cmd->items, KDBUS_ITEM_NAME, name, strlen(name) + 1);
	return sample_ioctl(NULL, connection->fd, command, cmd);
}

static int init_name_release(Worker *worker)
{
	int r;

	r = message_init(&worker->message, KDBUS_DST_ID_NAME, 0);
	if (!r)
		message_add_name(&worker->message, "attack.name");
	return r;
}

static int step_name_release(Worker *worker)
{
	Connection activator = CONNECTION_NULL, owner = CONNECTION_NULL;
	State *state = worker->state;
	size_t i, n;
	int r;

	r = activator_init(&activator, state->path, "attack.name");
	if (!r)
		r = connection_init(&owner, state->path, 16 << 20, 0, 0, NULL);
	if (!r)
		r = name_issue(&owner, KDBUS_CMD_NAME_ACQUIRE, "attack.name");
	for (i = 0; !r && i < state->n_connections; ++i)
		for (n = 0; n < 256; ++n)
			if (connection_send(&state->connections[i], NULL, &worker->message, 0,
					    NULL) < 0)
				break;
	if (!r)
		r = name_issue(&owner, KDBUS_CMD_NAME_RELEASE, "attack.name");

	connection_deinit(&owner);
	connection_deinit(&activator);
	return r;
}

/* list-names: 76,800 names, told again and again */

static int acquire_names(Connection *connection, size_t index)
{
	char name[64];
	size_t i;
	int r;

	for (i = 0; i < NAMES; ++i) {
		snprintf(name, sizeof(name), "attack.c%zu.n%zu", index, i);
		r = name_issue(connection, KDBUS_CMD_NAME_ACQUIRE, name);
		if (r < 0)
			return r;
	}

	return 0;
}

static int prepare_list_names(State *state)
{
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	if (!r)
		r = make_connections(state, 4, 64 << 20);
	if (!r)
		r = make_connections(state, 300, 1 << 16);
	for (i = 4; i < state->n_connections; ++i)
		if (acquire_names(&state->connections[i], i) < 0)
			break; /* no more than one's share */

	return r;
}

static int step_list_names(Worker *worker)
{
	struct kdbus_cmd_list list = { .size = sizeof(list), .flags = KDBUS_LIST_NAMES };
	int r;

	r = sample_ioctl(NULL, worker->connection->fd, KDBUS_CMD_LIST, &list);
	return r < 0 ? r : connection_free(worker->connection, NULL, list.offset);
}

/* bus-end: a bus ends whose connections have many names, and want to be told of all */

static int prepare_bus_end(State *state)
{
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	if (!r)
		r = make_connections(state, 120, 1 << 16);
	for (i = 0; !r && i < state->n_connections; ++i)
		r = acquire_names(&state->connections[i], i);
	for (i = 0; !r && i < state->n_connections; ++i)
		r = match_everything(&state->connections[i]);

	return r;
}

/* The first bus stands ready; by the time it ends, others measure. */
static int step_bus_end(Worker *worker)
{
	State *state = worker->state;

	usleep(500000);
	close(state->bus);
	while (state->n_connections)
		connection_deinit(&state->connections[--state->n_connections]);

	return prepare_bus_end(state);
}

/* calls of which nothing comes, and files that come and go */

static int step_failing_calls(Worker *worker)
{
	struct kdbus_cmd_free command = { .size = sizeof(command), .offset = 8 };
	Connection *connection = &worker->state->connections[worker->index % 4];
	int r;

	r = sample_ioctl(NULL, connection->fd, KDBUS_CMD_FREE, &command);
	return r == -ENXIO ? 0 : r;
}

static int step_stat(Worker *worker)
{
	struct stat st;

	return stat(worker->state->control, &st) < 0 ? -errno : 0;
}

static int step_open_close(Worker *worker)
{
	int fd;

	fd = open(worker->state->control, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;

	close(fd);
	return 0;
}

static int prepare_connect(State *state)
{
	return make_bus(state, BLOOM_SIZE);
}

static int step_connect(Worker *worker)
{
	Connection connection;
	int r;

	r = connection_init(&connection, worker->state->path, 1 << 20, 0, 0, NULL);
	if (!r)
		connection_deinit(&connection);
	return r;
}

/* vecs: a message of bytes that all lie on pages of their own */

static int init_vecs(Worker *worker)
{
	struct kdbus_vec vec = { .size = 8 };
	uint8_t *pages;
	size_t i;
	int r;

	pages = mmap(NULL, VECS * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (pages == MAP_FAILED)
		return -errno;

	r = message_init(&worker->message, worker->connection->id, 0);
	for (i = 0; !r && i < VECS; ++i) {
		vec.address = (uintptr_t)pages + i * PAGE;
		message_add(&worker->message, KDBUS_ITEM_PAYLOAD_VEC, &vec, sizeof(vec));
	}
	return r;
}

/* pool-pages: payload on pages of one's own pool that nobody has touched */

#define POOL_SIZE (UINT64_C(64) << 20)
#define POOL_PART (UINT64_C(256) << 10)

static int prepare_pool_pages(State *state)
{
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	if (!r)
		r = make_connections(state, 4, POOL_SIZE);
	for (i = 0; !r && i < state->n_connections; ++i)
		r = connection_map(&state->connections[i]);

	return r;
}

static int step_pool_pages(Worker *worker)
{
	uint64_t part = worker->n_steps % (POOL_SIZE / POOL_PART);
	int r;

	if (part == 0)
		posix_fadvise(worker->connection->fd, 0, 0, POSIX_FADV_DONTNEED);
	r = message_init(&worker->message, worker->connection->id, 0);
	if (r < 0)
		return r;

	message_add_payload(&worker->message, worker->connection->pool + part * POOL_PART,
			    POOL_PART);
	r = send_to_self(worker);
	message_deinit(&worker->message);
	return r;
}

/* exchange: many broadcasts in one call, each to many */

static int prepare_exchange(State *state)
{
	size_t i;
	int r;

	r = make_bus(state, BLOOM_SIZE);
	if (!r)
		r = make_connections(state, 200, 1 << 16);
	for (i = 4; !r && i < state->n_connections; ++i)
		r = connection_match_add_all(&state->connections[i]);

	return r;
}

static int init_exchange(Worker *worker)
{
	struct kdbusfs_cmd_exchange *exchange = &worker->buffer.exchange;
	size_t i;
	int r;

	r = init_broadcast(worker);
	if (r < 0)
		return r;

	*exchange = (struct kdbusfs_cmd_exchange){ .size = sizeof(*exchange),
						   .deadline_ns = UINT64_MAX,
						   .n_send = EXCHANGE_MESSAGES,
						   .cancel_fd = -1,
						   .fd_socket = -1 };
	for (i = 0; i < EXCHANGE_MESSAGES; ++i) {
		memcpy((uint8_t *)exchange + exchange->size, worker->message.msg,
		       worker->message.msg->size);
		exchange->size += ALIGN8(worker->message.msg->size);
	}
	return 0;
}

static int step_exchange(Worker *worker)
{
	struct kdbusfs_cmd_exchange *exchange = &worker->buffer.exchange;

	exchange->n_sent = 0;
	return sample_ioctl(NULL, worker->connection->fd, KDBUSFS_CMD_EXCHANGE(exchange->size),
			    exchange);
}

/* stalled-memory: payload on pages that take their time to come */

static int prepare_stalled(State *state)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int r;

	state->n_pages = 48;
	state->pages = mmap(NULL, state->n_pages * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (state->pages == MAP_FAILED || seteuid(0) < 0)
		return -errno;

	state->trap = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (state->trap < 0) {
		fail("userfaultfd", -errno);
		exit(SKIPPED);
	}
	range.range.start = (uintptr_t)state->pages;
	range.range.len = state->n_pages * PAGE;
	if (ioctl(state->trap, UFFDIO_API, &api) < 0 ||
	    ioctl(state->trap, UFFDIO_REGISTER, &range) < 0 || seteuid(state->uid) < 0)
		return fail("userfaultfd", -errno);

	r = make_bus(state, BLOOM_SIZE);
	return r < 0 ? r : make_connections(state, state->n_pages, 1 << 20);
}

static int init_stalled(Worker *worker)
{
	int r;

	r = message_init(&worker->message, worker->connection->id, 0);
	if (!r)
		message_add_payload(&worker->message, worker->state->pages + worker->index * PAGE,
				    PAGE);
	return r;
}

/* The first thread lets all pages come, now and then, and takes them away again. */
static int step_stalled(Worker *worker)
{
	State *state = worker->state;
	struct uffdio_zeropage zero = {};
	size_t i;

	if (worker->index)
		return send_to_self(worker);

	usleep(50000);
	for (i = 0; i < state->n_pages; ++i) {
		zero.range.start = (uintptr_t)state->pages + i * PAGE;
		zero.range.len = PAGE;
		(void)ioctl(state->trap, UFFDIO_ZEROPAGE, &zero);
	}
	madvise(state->pages, state->n_pages * PAGE, MADV_DONTNEED);
	return 0;
}

static const Attack attacks[] = {
	{ "compute", 4, NULL, NULL, step_compute },
	{ "bloom-masks", 4, prepare_bloom, init_bloom_masks, step_bloom_masks },
	{ "bloom-broadcasts", 4, prepare_bloom, init_bloom_broadcasts, step_send },
	{ "match-rules", 1, prepare_match_rules, init_broadcast, step_send },
	{ "name-release", 1, prepare_name_release, init_name_release, step_name_release },
	{ "list-names", 4, prepare_list_names, NULL, step_list_names },
	{ "bus-end", 1, prepare_bus_end, NULL, step_bus_end },
	{ "failing-calls", 48, prepare_bus, NULL, step_failing_calls },
	{ "stat", 300, NULL, NULL, step_stat },
	{ "open-close", 8, NULL, NULL, step_open_close },
	{ "connect", 4, prepare_connect, NULL, step_connect },
	{ "vecs", 4, prepare_bus, init_vecs, send_to_self },
	{ "pool-pages", 4, prepare_pool_pages, NULL, step_pool_pages },
	{ "exchange", 4, prepare_exchange, init_exchange, step_exchange },
	{ "stalled-memory", 48, prepare_stalled, init_stalled, step_stalled },
};

static void *work(void *userdata)
{
	Worker *worker = userdata;
	int r;

	r = worker->attack->init ? worker->attack->init(worker) : 0;
	if (r < 0) {
		fail(worker->attack->name, r);
		_exit(1);
	}

	for (;; ++worker->n_steps)
		count(worker->state, worker->attack->step(worker));

	return NULL;
}

/* As its own user from here on, but for what root has to prepare. */
static int attack_prepare(const Attack *attack, State *state)
{
	struct rlimit files;
	int r;

	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	if (setgroups(0, NULL) < 0 || setresgid(state->uid, state->uid, state->uid) < 0 ||
	    seteuid(state->uid) < 0)
		return fail("seteuid", -errno);

	r = attack->prepare ? attack->prepare(state) : 0;
	if (r < 0)
		return r;

	if (seteuid(0) < 0 || setresuid(state->uid, state->uid, state->uid) < 0)
		return fail("setresuid", -errno);
	return prctl(PR_SET_DUMPABLE, 1) < 0 ? fail("PR_SET_DUMPABLE", -errno) : 0;
}

static int attack_start(const Attack *attack, State *state)
{
	pthread_t thread;
	Worker *worker;
	size_t i;

	for (i = 0; i < attack->n_threads; ++i) {
		worker = calloc(1, sizeof(*worker));
		if (!worker)
			return -ENOMEM;

		worker->state = state;
		worker->attack = attack;
		worker->index = i;
		if (i < CONNECTIONS_MAX)
			worker->connection = &state->connections[i];
		if (pthread_create(&thread, NULL, work, worker))
			return fail("pthread_create", -EAGAIN);
	}

	return 0;
}

int main(int argc, char **argv)
{
	static State state = { .bus = -1, .trap = -1 };
	const Attack *attack = NULL;
	size_t i;

	for (i = 0; argc == 4 && i < sizeof(attacks) / sizeof(*attacks); ++i)
		if (!strcmp(attacks[i].name, argv[1]))
			attack = &attacks[i];
	if (!attack) {
		fprintf(stderr, "usage: %s NAME MOUNT UID\n", argv[0]);
		return 2;
	}

	state.mount = argv[2];
	state.uid = atoi(argv[3]);
	snprintf(state.control, sizeof(state.control), "%s/control", state.mount);
	if (attack_prepare(attack, &state) < 0 || attack_start(attack, &state) < 0)
		return 1;

	puts("ready");
	fflush(stdout);
	(void)getchar();
	printf("{\"done\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"error\": \"%s\"}\n",
	       state.n_done, state.n_refused, state.error ? strerrorname_np(state.error) : "");
	fflush(stdout);
	_exit(0); /* the threads may be in calls that do not return */
}
