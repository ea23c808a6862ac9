// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Whether a user still has what he is entitled to
 *
 * shares MOUNT UID
 *
 * As that user, with no connection or bus of his around: takes every limit of
 * kdbus to its end, and one further. Whatever was not given back after use shows
 * up as a limit that is reached too soon. Says on stdout, in JSON, how far it
 * got; exits with 1 if that is not as far as it should be.
 */

#include <errno.h>
#include <grp.h>
#include <kdbus/kdbus.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define N_BUSES 16
#define N_CONNECTIONS 1024
#define N_MESSAGES 256
#define N_REQUESTS 128
#define N_NAMES 256
#define N_MATCHES 256
#define N_FDS 16
#define PAGE 4096
#define POOL_SIZE (1 << 20)
#define SECOND UINT64_C(1000000000)

#define CHECK(condition, ...)                                        \
	do {                                                         \
		if (!(condition)) {                                  \
			fprintf(stderr, "shares: %s: ", #condition); \
			fprintf(stderr, __VA_ARGS__);                \
			fprintf(stderr, "\n");                       \
			exit(1);                                     \
		}                                                    \
	} while (0)

/* The count that was reached, and the error that ended it. */
static void check_limit(const char *what, unsigned int found, int r, unsigned int limit, int error)
{
	CHECK(found == limit && r == -error, "%u %s, then: %s", found, what, strerror(-r));
	printf("\"%s\": %u, ", what, found);
}

static struct kdbus_message *message_to(struct kdbus_conn *receiver)
{
	struct kdbus_message *message;

	CHECK(kdbus_message_new(&message) >= 0, "no memory");
	kdbus_message_set_dst_id(message, kdbus_conn_get_id(receiver));
	return message;
}

static void check_buses(const char *mount, unsigned int uid)
{
	struct kdbus_bus *buses[N_BUSES + 1] = {};
	unsigned int n = 0;
	char name[64];
	int r = 0;

	while (n <= N_BUSES && !r) {
		snprintf(name, sizeof(name), "%u-shares-%u", uid, n);
		r = kdbus_bus_new(&buses[n], mount, name, NULL);
		n += !r;
	}
	check_limit("buses", n, r, N_BUSES, EMFILE);
	for (n = 0; n <= N_BUSES; n++)
		kdbus_bus_free(buses[n]);
}

static void check_connections(const char *path)
{
	static struct kdbus_conn *conns[N_CONNECTIONS + 1];
	struct kdbus_conn_options options = { .pool_size = PAGE };
	unsigned int n = 0;
	int r = 0;

	while (n <= N_CONNECTIONS && !r) {
		r = kdbus_conn_new(&conns[n], path, &options);
		n += !r;
	}
	check_limit("connections", n, r, N_CONNECTIONS, EMFILE);
	for (n = 0; n <= N_CONNECTIONS; n++)
		kdbus_conn_free(conns[n]);
}

static unsigned int drain(struct kdbus_conn *conn)
{
	struct kdbus_message *message;
	unsigned int n = 0;

	while (kdbus_conn_recv(conn, &message) == 0) {
		kdbus_message_free(message);
		++n;
	}
	return n;
}

static void check_messages(struct kdbus_conn *from, struct kdbus_conn *to)
{
	struct kdbus_message *message = message_to(to);
	unsigned int n = 0;
	int r;

	while (!(r = kdbus_conn_send(from, message)))
		++n;
	check_limit("messages", n, r, N_MESSAGES, ENOBUFS);
	CHECK(drain(to) == N_MESSAGES, "messages have been lost");
	kdbus_message_free(message);
}

/* One user gets a third of half a pool. */
static void check_bytes(struct kdbus_conn *from, struct kdbus_conn *to)
{
	struct kdbus_message *message = message_to(to);
	static char data[POOL_SIZE / 2 / 3 - 2 * PAGE];
	int r;

	kdbus_message_append_data(message, data, sizeof(data));
	r = kdbus_conn_send(from, message);
	CHECK(!r, "%zu bytes: %s", sizeof(data), strerror(-r));
	r = kdbus_conn_send(from, message);
	check_limit("big messages", 1, r, 1, ENOBUFS);
	drain(to);
	kdbus_message_free(message);
}

static void check_fds(struct kdbus_conn *from, struct kdbus_conn *to)
{
	struct kdbus_message *message = message_to(to);
	int r, fd = STDIN_FILENO;
	unsigned int n = 0;

	kdbus_message_append_fds(message, &fd, 1);
	while (!(r = kdbus_conn_send(from, message)))
		++n;
	check_limit("descriptors", n, r, N_FDS, EMFILE);
	drain(to);
	kdbus_message_free(message);
}

static void check_requests(struct kdbus_conn *from, struct kdbus_conn *to)
{
	struct kdbus_message *message = message_to(to);
	unsigned int n = 0;
	int r;

	kdbus_message_set_deadline(message, kdbus_deadline(1000 * SECOND));
	for (;;) {
		kdbus_message_set_cookie(message, n + 1);
		r = kdbus_conn_send(from, message);
		if (r < 0)
			break;
		++n;
	}
	check_limit("requests", n, r, N_REQUESTS, EMLINK);
	drain(to);
	kdbus_message_free(message);
}

static void check_names(struct kdbus_conn *conn)
{
	unsigned int n = 0;
	char name[64];
	int r;

	do {
		snprintf(name, sizeof(name), "shares.n%u", n);
		r = kdbus_conn_acquire_name(conn, name, 0, NULL);
		n += !r;
	} while (!r);
	check_limit("names", n, r, N_NAMES, E2BIG);
}

static void check_matches(struct kdbus_conn *conn)
{
	struct kdbus_match *match;
	unsigned int n = 0;
	int r;

	CHECK(kdbus_match_new(&match) >= 0, "no memory");
	while (!(r = kdbus_conn_add_match(conn, n, 0, match)))
		++n;
	check_limit("matches", n, r, N_MATCHES, EMFILE);
	kdbus_match_free(match);
}

int main(int argc, char **argv)
{
	struct kdbus_conn_options options = { .flags = KDBUS_HELLO_ACCEPT_FD,
					      .pool_size = POOL_SIZE };
	struct rlimit files = { 4096, 4096 };
	struct kdbus_conn *from, *to;
	struct kdbus_bus *bus;
	unsigned int uid;
	char name[64];
	int r;

	if (argc != 3)
		return 2;
	uid = (unsigned int)atoi(argv[2]);
	CHECK(setrlimit(RLIMIT_NOFILE, &files) >= 0, "%m");
	CHECK(setgroups(0, NULL) >= 0 && setresgid(uid, uid, uid) >= 0 &&
		      setresuid(uid, uid, uid) >= 0,
	      "%m");

	printf("{");
	check_buses(argv[1], uid);
	snprintf(name, sizeof(name), "%u-shares", uid);
	r = kdbus_bus_new(&bus, argv[1], name, NULL);
	CHECK(!r, "%s", strerror(-r));
	check_connections(kdbus_bus_get_path(bus));
	r = kdbus_conn_new(&from, kdbus_bus_get_path(bus), &options);
	CHECK(!r, "%s", strerror(-r));
	r = kdbus_conn_new(&to, kdbus_bus_get_path(bus), &options);
	CHECK(!r, "%s", strerror(-r));
	check_messages(from, to);
	check_bytes(from, to);
	check_fds(from, to);
	check_requests(from, to);
	check_names(from);
	check_matches(from);
	printf("\"uid\": %u}\n", uid);

	kdbus_conn_free(from);
	kdbus_conn_free(to);
	kdbus_bus_free(bus);
	return 0;
}
