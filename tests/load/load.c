// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Many connections, many messages
 *
 * load MOUNT crowd CONNECTIONS MESSAGES	everybody to everybody on one bus
 * load MOUNT buses MESSAGES			100 buses of 10 users, 10 connections each
 * load MOUNT flood MESSAGES			many fast senders, one receiver
 * load MOUNT deaf				receivers that do not read
 * load MOUNT massacre CONNECTIONS MESSAGES	everybody is killed in the midst of it
 *
 * Every message carries who sent it to whom and its number between the two; a
 * receiver accepts nothing but the next number. At the end each number that was
 * accepted must have been received. Says in JSON on stdout what was done; exits
 * with 1 if anything was lost, came twice, out of order or damaged.
 */

#include <errno.h>
#include <grp.h>
#include <inttypes.h>
#include <kdbus/kdbus.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct Board Board;
typedef struct Head Head;
typedef struct Member Member;
typedef struct Party Party;

#define N_MAX 1024
#define N_PARTIES 8
#define N_USERS 10
#define N_USER_BUSES 10
#define N_BUS_MEMBERS 10
#define N_DEAF 100
#define N_DEAF_SIGNALS 50
#define FIRST_UID 61000
#define POOL_SIZE (UINT64_C(256) << 10)
#define DATA_MAX 16384
#define LIMIT_BUSES 16
#define LIMIT_MESSAGES 256
#define BLOOM_SIZE 64
#define BATCH 16
#define PATIENCE_S 60.0

#define CHECK(condition, ...)                                      \
	do {                                                       \
		if (!(condition)) {                                \
			fprintf(stderr, "load: %s: ", #condition); \
			fprintf(stderr, __VA_ARGS__);              \
			fprintf(stderr, "\n");                     \
			exit(1);                                   \
		}                                                  \
	} while (0)

/* What all processes share. Each number has one writer, but for the totals. */
struct Board {
	uint64_t n_sent;
	uint64_t n_received;
	uint64_t n_refused;
	uint64_t n_bytes;
	unsigned int n_ready;
	bool go;
	uint64_t ids[N_MAX];
	uint32_t sent[N_MAX][N_MAX]; /* from, to */
	uint32_t received[N_MAX][N_MAX];
};

/* Every message begins with this; the rest of it is a pattern. */
struct Head {
	uint32_t from;
	uint32_t to;
	uint32_t number;
	uint32_t size;
};

struct Member {
	struct kdbus_conn *conn;
	unsigned int number;
	unsigned int first, n; /* those it sends to */
};

/* A process and its connections. */
struct Party {
	Member members[N_MAX];
	unsigned int n_members;
	uint64_t n_left; /* messages to send */
	uint64_t random;
	bool forever;
};

static Board *board;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static void pause_ms(int ms)
{
	poll(NULL, 0, ms);
}

static uint64_t below(Party *party, uint64_t n)
{
	party->random ^= party->random << 13;
	party->random ^= party->random >> 7;
	party->random ^= party->random << 17;
	return party->random % n;
}

static uint64_t count(uint64_t *total, uint64_t n)
{
	return __atomic_add_fetch(total, n, __ATOMIC_RELAXED);
}

static uint64_t read_total(const uint64_t *total)
{
	return __atomic_load_n(total, __ATOMIC_RELAXED);
}

static void allow_files(void)
{
	struct rlimit files = { 8192, 8192 };

	CHECK(setrlimit(RLIMIT_NOFILE, &files) >= 0, "%m");
}

static struct kdbus_bus *make_bus(const char *mount, const char *name)
{
	struct kdbus_bus_options options = { .flags = KDBUS_MAKE_ACCESS_WORLD,
					     .bloom = { BLOOM_SIZE, 1 } };
	struct kdbus_bus *bus;
	int r;

	r = kdbus_bus_new(&bus, mount, name, &options);
	CHECK(!r, "%s: %s", name, strerror(-r));
	return bus;
}

static struct kdbus_conn *connect_to(const char *path, uint64_t pool_size)
{
	struct kdbus_conn_options options = { .pool_size = pool_size };
	struct kdbus_conn *conn;
	int r;

	r = kdbus_conn_new(&conn, path, &options);
	CHECK(!r, "%s: %s", path, strerror(-r));
	return conn;
}

/* --- a message */

static uint32_t message_fill(Head *head, uint32_t from, uint32_t to, uint32_t number)
{
	uint32_t size = number % 64 ? 16 + (number * 131 + from) % 1000 : DATA_MAX;
	uint8_t *data = (uint8_t *)head;

	for (uint32_t i = sizeof(*head); i < size; i++)
		data[i] = (uint8_t)(number + i);
	*head = (Head){ from, to, number, size };
	return size;
}

static void message_check(const Head *head, size_t size, uint32_t to)
{
	static uint8_t expected[DATA_MAX] __attribute__((__aligned__(8)));
	uint32_t *received;

	CHECK(size >= sizeof(*head) && head->size == size, "%zu bytes", size);
	CHECK(head->to == to, "message to %u at %u", head->to, to);
	CHECK(head->from < N_MAX, "message from %u", head->from);
	received = &board->received[head->from][to];
	CHECK(head->number == *received + 1, "from %u to %u: %u after %u", head->from, to,
	      head->number, *received);
	message_fill((Head *)expected, head->from, to, head->number);
	CHECK(!memcmp(head, expected, size), "from %u to %u: %u is damaged", head->from, to,
	      head->number);
	++*received;
}

/* Whether it was accepted. */
static bool member_send(Member *member, unsigned int to)
{
	static uint8_t data[DATA_MAX] __attribute__((__aligned__(8)));
	uint32_t *sent = &board->sent[member->number][to];
	struct kdbus_message *message;
	size_t size;
	int r;

	size = message_fill((Head *)data, member->number, to, *sent + 1);
	CHECK(kdbus_message_new(&message) >= 0, "no memory");
	kdbus_message_set_dst_id(message, board->ids[to]);
	kdbus_message_append_data(message, data, size);
	r = kdbus_conn_send(member->conn, message);
	kdbus_message_free(message);
	CHECK(!r || r == -ENOBUFS || r == -EXFULL, "from %u to %u: %s", member->number, to,
	      strerror(-r));
	if (r < 0) {
		count(&board->n_refused, 1);
		return false;
	}
	++*sent;
	count(&board->n_bytes, size);
	return true;
}

/* Whether there was one. */
static bool member_recv(Member *member)
{
	struct kdbus_message *message;
	const void *data;
	size_t size;
	int r;

	r = kdbus_conn_recv(member->conn, &message);
	if (r == -EAGAIN)
		return false;
	CHECK(!r, "at %u: %s", member->number, strerror(-r));
	r = kdbus_message_get_part(message, 0, &data, &size);
	CHECK(!r, "at %u: %s", member->number, strerror(-r));
	message_check(data, size, member->number);
	kdbus_message_free(message);
	return true;
}

/* --- a party */

static void party_join(Party *party, const char *path, unsigned int number, unsigned int first,
		       unsigned int n)
{
	struct kdbus_conn *conn = connect_to(path, POOL_SIZE);

	party->members[party->n_members++] = (Member){ conn, number, first, n };
	board->ids[number] = kdbus_conn_get_id(conn);
}

/* Returns how many of at most BATCH messages were accepted. */
static unsigned int party_send(Party *party)
{
	unsigned int n = 0, to;
	Member *member;

	while (n < BATCH && n < party->n_left) {
		member = &party->members[below(party, party->n_members)];
		to = member->first + (unsigned int)below(party, member->n);
		if (!member_send(member, to))
			break;
		++n;
	}
	party->n_left -= party->forever ? 0 : n;
	return n;
}

/* Sends what is to be sent, and receives until all that anybody sent has been. */
static void party_run(Party *party, uint64_t total)
{
	struct epoll_event events[64], event = { .events = EPOLLIN };
	uint64_t n_received, n_seen = 0;
	double deadline = now() + PATIENCE_S;
	unsigned int n_sent;
	int epoll, n;

	epoll = epoll_create1(EPOLL_CLOEXEC);
	CHECK(epoll >= 0, "%m");
	for (unsigned int i = 0; i < party->n_members; i++) {
		event.data.u32 = i;
		CHECK(!epoll_ctl(epoll, EPOLL_CTL_ADD, kdbus_conn_get_fd(party->members[i].conn),
				 &event),
		      "%m");
	}

	__atomic_add_fetch(&board->n_ready, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&board->go, __ATOMIC_SEQ_CST))
		pause_ms(1);

	while (party->forever || read_total(&board->n_received) < total) {
		n_sent = party_send(party);
		count(&board->n_sent, n_sent);
		n = epoll_wait(epoll, events, 64, n_sent == BATCH ? 0 : 2);
		CHECK(n >= 0, "%m");
		n_received = 0;
		for (int i = 0; i < n; i++)
			for (unsigned int j = 0;
			     j < BATCH && member_recv(&party->members[events[i].data.u32]); j++)
				++n_received;
		n_received = count(&board->n_received, n_received);
		if (n_received > n_seen) {
			n_seen = n_received;
			deadline = now() + PATIENCE_S;
		}
		CHECK(now() < deadline, "%" PRIu64 " of %" PRIu64 " received, then no more", n_seen,
		      total);
	}
	close(epoll);
}

static void party_leave(Party *party)
{
	for (unsigned int i = 0; i < party->n_members; i++)
		CHECK(!kdbus_conn_byebye(party->members[i].conn), "%u has more messages",
		      party->members[i].number);
}

static Party *party_new(unsigned int number, uint64_t n_left)
{
	Party *party = calloc(1, sizeof(*party));

	CHECK(party, "no memory");
	party->n_left = n_left;
	party->random = UINT64_C(0x9e3779b97f4a7c15) * (number + 1);
	return party;
}

/* --- the children */

static pid_t child_new(void)
{
	pid_t child = fork();

	CHECK(child >= 0, "%m");
	if (!child)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return child;
}

static void wait_until_ready(unsigned int n)
{
	double deadline = now() + PATIENCE_S;

	while (__atomic_load_n(&board->n_ready, __ATOMIC_SEQ_CST) < n) {
		CHECK(waitpid(-1, NULL, WNOHANG) <= 0, "a process has ended");
		CHECK(now() < deadline, "%u of %u are ready", board->n_ready, n);
		pause_ms(1);
	}
}

static void go(void)
{
	__atomic_store_n(&board->go, true, __ATOMIC_SEQ_CST);
}

static void wait_for_children(unsigned int n)
{
	int status;

	while (n--) {
		CHECK(waitpid(-1, &status, 0) > 0, "%m");
		CHECK(!status, "a process ended with %#x", status);
	}
}

static void check_board(uint64_t total)
{
	uint64_t n = 0;

	for (unsigned int i = 0; i < N_MAX; i++)
		for (unsigned int j = 0; j < N_MAX; j++) {
			CHECK(board->sent[i][j] == board->received[i][j],
			      "from %u to %u: %u sent, %u received", i, j, board->sent[i][j],
			      board->received[i][j]);
			n += board->sent[i][j];
		}
	CHECK(n == total, "%" PRIu64 " messages, not %" PRIu64, n, total);
}

static void say(unsigned int n_connections, double seconds)
{
	printf("{\"connections\": %u, \"messages\": %" PRIu64 ", \"refused\": %" PRIu64
	       ", \"bytes\": %" PRIu64 ", \"seconds\": %.2f}\n",
	       n_connections, board->n_received, board->n_refused, board->n_bytes, seconds);
}

/* --- what can be done */

static void crowd_child(const char *path, unsigned int number, unsigned int n, uint64_t total,
			bool forever)
{
	Party *party = party_new(number, total / N_PARTIES + (number < total % N_PARTIES));

	party->forever = forever;
	for (unsigned int i = number; i < n; i += N_PARTIES)
		party_join(party, path, i, 0, n);
	party_run(party, total);
	party_leave(party);
	exit(0);
}

static void run_crowd(const char *mount, unsigned int n, uint64_t total)
{
	struct kdbus_bus *bus = make_bus(mount, "0-crowd");
	double start;

	for (unsigned int i = 0; i < N_PARTIES; i++)
		if (!child_new())
			crowd_child(kdbus_bus_get_path(bus), i, n, total, false);
	wait_until_ready(N_PARTIES);
	start = now();
	go();
	wait_for_children(N_PARTIES);
	check_board(total);
	say(n, now() - start);
	kdbus_bus_free(bus);
}

/* As many as a user may have, and not one more. */
static void check_bus_limit(const char *mount, unsigned int uid, unsigned int n)
{
	struct kdbus_bus *more[LIMIT_BUSES] = {}, *none;
	char name[64];
	int r;

	for (unsigned int i = n; i < LIMIT_BUSES; i++) {
		snprintf(name, sizeof(name), "%u-more-%u", uid, i);
		more[i] = make_bus(mount, name);
	}
	snprintf(name, sizeof(name), "%u-too-many", uid);
	r = kdbus_bus_new(&none, mount, name, NULL);
	CHECK(r == -EMFILE, "%u: bus %u: %s", uid, LIMIT_BUSES + 1, strerror(-r));
	for (unsigned int i = n; i < LIMIT_BUSES; i++)
		kdbus_bus_free(more[i]);
}

static void buses_child(const char *mount, unsigned int number, uint64_t total)
{
	Party *party = party_new(number, total / N_USERS + (number < total % N_USERS));
	unsigned int uid = FIRST_UID + number, first;
	struct kdbus_bus *buses[N_USER_BUSES];
	char name[64];

	CHECK(setgroups(0, NULL) >= 0 && setresgid(uid, uid, uid) >= 0 &&
		      setresuid(uid, uid, uid) >= 0,
	      "%m");
	for (unsigned int i = 0; i < N_USER_BUSES; i++) {
		snprintf(name, sizeof(name), "%u-load-%u", uid, i);
		buses[i] = make_bus(mount, name);
		first = (number * N_USER_BUSES + i) * N_BUS_MEMBERS;
		for (unsigned int j = 0; j < N_BUS_MEMBERS; j++)
			party_join(party, kdbus_bus_get_path(buses[i]), first + j, first,
				   N_BUS_MEMBERS);
	}
	check_bus_limit(mount, uid, N_USER_BUSES);
	party_run(party, total);
	party_leave(party);
	for (unsigned int i = 0; i < N_USER_BUSES; i++)
		kdbus_bus_free(buses[i]);
	exit(0);
}

static void run_buses(const char *mount, uint64_t total)
{
	double start;

	for (unsigned int i = 0; i < N_USERS; i++)
		if (!child_new())
			buses_child(mount, i, total);
	wait_until_ready(N_USERS);
	start = now();
	go();
	wait_for_children(N_USERS);
	check_board(total);
	say(N_USERS * N_USER_BUSES * N_BUS_MEMBERS, now() - start);
}

static void flood_child(const char *path, unsigned int number, uint64_t total)
{
	uint64_t n_left = total / N_PARTIES + (number < total % N_PARTIES);
	Party *party = party_new(number, number == N_PARTIES ? 0 : n_left);

	/* The last one is the receiver of all. */
	party_join(party, path, number, N_PARTIES, 1);
	party_run(party, total);
	party_leave(party);
	exit(0);
}

static void run_flood(const char *mount, uint64_t total)
{
	struct kdbus_bus *bus = make_bus(mount, "0-flood");
	double start;

	for (unsigned int i = 0; i <= N_PARTIES; i++)
		if (!child_new())
			flood_child(kdbus_bus_get_path(bus), i, total);
	wait_until_ready(N_PARTIES + 1);
	start = now();
	go();
	wait_for_children(N_PARTIES + 1);
	check_board(total);
	CHECK(board->n_refused, "the senders were not faster");
	say(N_PARTIES + 1, now() - start);
	kdbus_bus_free(bus);
}

static void match_all(struct kdbus_conn *conn)
{
	struct kdbus_match *match;

	CHECK(!kdbus_match_new(&match), "no memory");
	CHECK(!kdbus_match_add_src_id(match, KDBUS_MATCH_ID_ANY), "no memory");
	CHECK(!kdbus_conn_add_match(conn, 1, 0, match), "no match");
	kdbus_match_free(match);
}

static void send_signals(struct kdbus_conn *conn, unsigned int n)
{
	uint64_t filter[BLOOM_SIZE / 8] = {};
	struct kdbus_message *message;
	int r;

	CHECK(!kdbus_message_new(&message), "no memory");
	kdbus_message_set_dst_id(message, KDBUS_DST_ID_BROADCAST);
	kdbus_message_set_flags(message, KDBUS_MSG_SIGNAL);
	kdbus_message_set_bloom_filter(message, 0, filter, sizeof(filter));
	while (n--) {
		r = kdbus_conn_send(conn, message);
		CHECK(!r, "%s", strerror(-r));
	}
	kdbus_message_free(message);
}

/* Fills those that do not read, sends signals on top, lets a pair that does read talk meanwhile,
 * then looks what is in the queues. Half of the deaf never look. */
static void run_deaf(const char *mount)
{
	struct kdbus_bus *bus = make_bus(mount, "0-deaf");
	unsigned int sender = N_DEAF, reader = N_DEAF + 1;
	Party *party = party_new(0, 0);
	double start = now();

	/* Room enough, so that it is their number that ends it. */
	for (unsigned int i = 0; i < N_DEAF + 2; i++) {
		struct kdbus_conn *conn = connect_to(kdbus_bus_get_path(bus),
						     i < N_DEAF ? 8 << 20 : POOL_SIZE);

		party->members[party->n_members++] = (Member){ conn, i, 0, 0 };
		board->ids[i] = kdbus_conn_get_id(conn);
		if (i < N_DEAF)
			match_all(conn);
	}
	for (unsigned int i = 0; i < N_DEAF; i++) {
		while (member_send(&party->members[sender], i))
			++board->n_sent;
		CHECK(board->sent[sender][i] == LIMIT_MESSAGES, "%u of %u", board->sent[sender][i],
		      LIMIT_MESSAGES);
	}
	send_signals(party->members[sender].conn, N_DEAF_SIGNALS);
	for (unsigned int i = 0; i < 4 * LIMIT_MESSAGES; i++) {
		CHECK(member_send(&party->members[sender], reader), "the deaf are in the way");
		CHECK(member_recv(&party->members[reader]), "the deaf are in the way");
		++board->n_received;
	}
	for (unsigned int i = 0; i < N_DEAF; i += 2) {
		Member *member = &party->members[i];

		while (member_recv(member))
			++board->n_received;
		CHECK(board->received[sender][i] == LIMIT_MESSAGES, "%u received",
		      board->received[sender][i]);
		CHECK(kdbus_conn_take_lost(member->conn) == N_DEAF_SIGNALS,
		      "signals are not counted");
	}
	say(N_DEAF, now() - start);
}

static void wait_until_gone(struct kdbus_conn *witness, unsigned int n, double start)
{
	struct kdbus_message *message;
	uint64_t n_gone = 0;
	int r;

	/* What did not fit into the queue is counted as lost. */
	while (n_gone < n) {
		r = kdbus_conn_recv(witness, &message);
		n_gone += kdbus_conn_take_lost(witness);
		if (r == -EAGAIN) {
			kdbus_conn_wait(witness, kdbus_deadline(UINT64_C(1000000)));
			CHECK(now() - start < PATIENCE_S, "%" PRIu64 " of %u are gone", n_gone, n);
			continue;
		}
		CHECK(!r, "%s", strerror(-r));
		++n_gone;
		kdbus_message_free(message);
	}
	CHECK(n_gone == n, "%" PRIu64 " of %u are gone", n_gone, n);
}

/* Everybody dies at the same time, with messages and calls under way. */
static void run_massacre(const char *mount, unsigned int n, uint64_t enough)
{
	struct kdbus_bus *bus = make_bus(mount, "0-massacre");
	struct kdbus_conn *witness = connect_to(kdbus_bus_get_path(bus), 4 << 20);
	struct kdbus_info_list *list;
	struct kdbus_match *match;
	pid_t children[N_PARTIES];
	double start;

	for (unsigned int i = 0; i < N_PARTIES; i++) {
		children[i] = child_new();
		if (!children[i])
			crowd_child(kdbus_bus_get_path(bus), i, n, enough, true);
	}
	wait_until_ready(N_PARTIES);
	CHECK(!kdbus_match_new(&match), "no memory");
	kdbus_match_add_id_change(match, KDBUS_ITEM_ID_REMOVE, KDBUS_MATCH_ID_ANY);
	CHECK(!kdbus_conn_add_match(witness, 1, 0, match), "no match");
	kdbus_match_free(match);
	go();
	while (read_total(&board->n_received) < enough) {
		CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a process has ended");
		pause_ms(1);
	}

	start = now();
	for (unsigned int i = 0; i < N_PARTIES; i++)
		CHECK(!kill(children[i], SIGKILL), "%m");
	wait_until_gone(witness, n, start);
	for (unsigned int i = 0; i < N_PARTIES; i++)
		CHECK(waitpid(children[i], NULL, 0) == children[i], "%m");
	say(n, now() - start);

	CHECK(!kdbus_conn_list(witness, KDBUS_LIST_UNIQUE, &list), "no list");
	CHECK(!kdbus_info_list_next(list, kdbus_info_list_next(list, NULL)), "somebody is left");
	kdbus_info_list_free(list);
	kdbus_conn_free(witness);
	kdbus_bus_free(bus);
}

int main(int argc, char **argv)
{
	uint64_t last;

	if (argc < 3)
		return 2;
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		     0);
	CHECK(board != MAP_FAILED, "%m");
	allow_files();
	last = strtoull(argv[argc - 1], NULL, 0);

	if (!strcmp(argv[2], "crowd") && argc == 5)
		run_crowd(argv[1], (unsigned int)atoi(argv[3]), last);
	else if (!strcmp(argv[2], "buses") && argc == 4)
		run_buses(argv[1], last);
	else if (!strcmp(argv[2], "flood") && argc == 4)
		run_flood(argv[1], last);
	else if (!strcmp(argv[2], "deaf") && argc == 3)
		run_deaf(argv[1]);
	else if (!strcmp(argv[2], "massacre") && argc == 5)
		run_massacre(argv[1], (unsigned int)atoi(argv[3]), last);
	else
		return 2;
	return 0;
}
