// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * kdbus by libkdbus, with its calls that do most at once
 */

#include <kdbus/kdbus.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>
#include "peer.h"

#define POOL_SIZE (32UL << 20)
#define POOL_SIZE_CROWD (16UL << 10)
#define BLOOM_SIZE 64
#define BATCH 64
#define NEVER KDBUS_DEADLINE_NEVER
/* no user may have more connections, no connection more names or matches */
#define CONNECTIONS_PER_USER 1000
#define THINGS_PER_CONNECTION 250
#define FIRST_UID 61000

static char path[256];
static struct kdbus_conn *client;
static struct kdbus_message *request, *tell, *stream[BATCH];
static uint8_t *out;

bool peer_can(void)
{
	return true;
}

void peer_prepare(void)
{
	struct kdbus_bus_options options = { .flags = KDBUS_MAKE_ACCESS_WORLD };
	struct kdbus_bus *bus;
	char name[64];

	out = buffer_new(job.operation == STREAM ? TO_COUNT : TO_ECHO);
	snprintf(name, sizeof(name), "%u-peers%d", geteuid(), getpid());
	check(kdbus_bus_new(&bus, job.address, name, &options), "bus");
	snprintf(path, sizeof(path), "%s", kdbus_bus_get_path(bus));
}

static struct kdbus_conn *connection_new(void)
{
	struct kdbus_conn_options options = {
		.flags = KDBUS_HELLO_ACCEPT_FD,
		.pool_size = POOL_SIZE,
	};
	struct kdbus_conn *conn;

	if (job.operation == CREDENTIALS)
		options.attach_flags_recv = options.attach_flags_send = KDBUS_ATTACH_CREDS |
									KDBUS_ATTACH_PIDS;
	check(kdbus_conn_new(&conn, path, &options), "connection");
	return conn;
}

static struct kdbus_message *message_new(const void *data, size_t n)
{
	struct kdbus_message *message;

	check(kdbus_message_new(&message), "message");
	check(kdbus_message_append_data(message, data, n), "payload");
	return message;
}

static void credentials_check(const struct kdbus_message *message)
{
	if (job.operation == CREDENTIALS && (!kdbus_message_get_item(message, KDBUS_ITEM_CREDS) ||
					     !kdbus_message_get_item(message, KDBUS_ITEM_PIDS)))
		errx(EXIT_FAILURE, "no credentials");
}

/* all of a message's bytes are one part */
static const uint8_t *message_data(struct kdbus_message *message, size_t *np)
{
	const void *data;

	check(kdbus_message_get_part(message, 0, &data, np), "payload");
	return data;
}

static struct kdbus_message *reply_to(struct kdbus_message *message, uint64_t *n_countedp)
{
	static uint64_t n_told;
	const uint8_t *data;
	size_t n;
	int fd;

	if (job.operation == DESCRIPTOR || job.operation == MEMFD) {
		if (job.operation == DESCRIPTOR)
			check(kdbus_message_get_fd(message, 0, &fd), "descriptor");
		else
			check(kdbus_message_get_memfd(message, 0, &fd, NULL, NULL), "memfd");
		if (job.operation == MEMFD)
			memfd_check(fd);
		return message_new("x", 1);
	}

	credentials_check(message);
	data = message_data(message, &n);
	if (data[0] != TO_TELL)
		return message_new(data, n);
	n_told = *n_countedp;
	*n_countedp = 0;
	return message_new(&n_told, sizeof(n_told));
}

static _Noreturn void calls_serve(struct kdbus_conn *conn)
{
	struct kdbus_message *message, *next, *reply;

	check(kdbus_conn_recv_wait(conn, NEVER, -1, &message), "receive");
	for (;;) {
		reply = reply_to(message, &(uint64_t){ 0 });
		check(kdbus_conn_reply_recv(conn, message, reply, NEVER, -1, &next), "reply");
		kdbus_message_free(reply);
		kdbus_message_free(message);
		message = next;
	}
}

static void message_take(struct kdbus_conn *conn, struct kdbus_message *message,
			 uint64_t *n_countedp)
{
	struct kdbus_message *reply;
	size_t n;

	if (job.operation == BROADCAST) {
		broadcast_received();
	} else if (message_data(message, &n)[0] == TO_COUNT) {
		++*n_countedp;
	} else {
		reply = reply_to(message, n_countedp);
		check(kdbus_conn_reply(conn, message, reply), "reply");
		kdbus_message_free(reply);
	}
	kdbus_message_free(message);
}

static _Noreturn void streams_serve(struct kdbus_conn *conn)
{
	struct kdbus_message *messages[BATCH];
	uint64_t n_counted = 0;
	size_t n;

	for (;;) {
		check(kdbus_conn_recv_many(conn, NEVER, -1, messages, BATCH, &n), "receive");
		for (size_t i = 0; i < n; ++i)
			message_take(conn, messages[i], &n_counted);
	}
}

_Noreturn void peer_serve(size_t index)
{
	static const uint8_t mask[BLOOM_SIZE];
	struct kdbus_conn *conn = connection_new();
	struct kdbus_match *match;

	(void)index;
	if (job.operation == BROADCAST) {
		check(kdbus_match_new(&match), "match");
		check(kdbus_match_add_bloom_mask(match, mask, sizeof(mask)), "match");
		check(kdbus_conn_add_match(conn, 1, 0, match), "match");
	} else {
		check(kdbus_conn_acquire_name(conn, SERVER_NAME, 0, NULL), "name");
	}
	server_ready();
	if (operation_is_call() || job.operation == DESCRIPTOR || job.operation == MEMFD)
		calls_serve(conn);
	streams_serve(conn);
}

static struct kdbus_message *signal_new(void)
{
	static const uint8_t filter[BLOOM_SIZE];
	struct kdbus_message *message = message_new(out, job.size);

	check(kdbus_message_set_dst_id(message, KDBUS_DST_ID_BROADCAST), "broadcast");
	check(kdbus_message_set_flags(message, KDBUS_MSG_SIGNAL), "broadcast");
	check(kdbus_message_set_bloom_filter(message, 0, filter, sizeof(filter)), "broadcast");
	return message;
}

static struct kdbus_message *request_new(const void *data, size_t n)
{
	struct kdbus_message *message = message_new(data, n);

	check(kdbus_message_set_dst_name(message, SERVER_NAME), "name");
	return message;
}

void peer_open(void)
{
	static const uint8_t to_tell = TO_TELL;
	int fd;

	client = connection_new();
	if (job.operation == MEMFD) {
		check(kdbus_message_new(&request), "message");
		check(kdbus_message_append_memfd(request, memfd_get(), 0, MEMFD_SIZE), "memfd");
		check(kdbus_message_set_dst_name(request, SERVER_NAME), "name");
		return;
	}
	request = job.operation == BROADCAST ? signal_new() : request_new(out, job.size);
	if (job.operation == DESCRIPTOR) {
		fd = descriptor_get();
		check(kdbus_message_append_fds(request, &fd, 1), "descriptor");
	}
	tell = request_new(&to_tell, 1);
	for (size_t i = 0; job.operation == STREAM && i < BATCH; ++i)
		stream[i] = request_new(out, job.size);
}

/* other connections, of another user, in a process of its own, which ends with us */
static void connections_add(uid_t uid, size_t n)
{
	struct kdbus_conn_options options = { .pool_size = POOL_SIZE_CROWD };
	struct kdbus_conn *conn;
	char byte;
	int ready[2];

	check_errno(pipe(ready), "pipe");
	if (child_new()) {
		check_errno(setresuid(uid, uid, uid), "setresuid");
		for (size_t i = 0; i < n; ++i)
			check(kdbus_conn_new(&conn, path, &options), "connection");
		check_errno(write(ready[1], "r", 1), "ready");
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		errx(EXIT_FAILURE, "the others did not connect");
	close(ready[0]);
}

static void thing_add(struct kdbus_conn *holder, size_t i)
{
	struct kdbus_match *match;
	char name[64];

	if (job.operation == NAMES) {
		snprintf(name, sizeof(name), "%s.n%zu", SERVER_NAME, i);
		check(kdbus_conn_acquire_name(holder, name, 0, NULL), "name");
		return;
	}
	check(kdbus_match_new(&match), "match");
	check(kdbus_match_add_src_id(match, (UINT64_C(1) << 40) + i), "match");
	check(kdbus_conn_add_match(holder, i, 0, match), "match");
	kdbus_match_free(match);
}

void peer_crowd(size_t n)
{
	struct kdbus_conn *holder = NULL;
	size_t more;

	if (job.operation == CONNECTIONS) {
		for (size_t i = 0; i < n; i += more) {
			more = n - i < CONNECTIONS_PER_USER ? n - i : CONNECTIONS_PER_USER;
			connections_add(FIRST_UID + i / CONNECTIONS_PER_USER, more);
		}
		return;
	}
	for (size_t i = 0; i < n; ++i) {
		if (i % THINGS_PER_CONNECTION == 0)
			holder = connection_new();
		thing_add(holder, i);
	}
}

/* whether to send again, since the receiver had no room */
static bool must_wait(int r)
{
	if (r != -ENOBUFS && r != -EXFULL)
		return false;
	sched_yield();
	return true;
}

static void call(struct kdbus_message *message, struct kdbus_message **replyp)
{
	int r;

	do
		r = kdbus_conn_call(client, message, NEVER, -1, replyp);
	while (must_wait(r));
	check(r, "call");
}

static void stream_once(void)
{
	struct kdbus_message *reply;
	size_t n, n_sent, n_told;
	int r;

	for (size_t done = 0; done < job.n_messages; done += n) {
		n = job.n_messages - done < BATCH ? job.n_messages - done : BATCH;
		for (size_t sent = 0; sent < n; sent += n_sent) {
			r = kdbus_conn_send_many(client, stream + sent, n - sent, &n_sent);
			if (!must_wait(r))
				check(r, "send");
		}
	}
	call(tell, &reply);
	if (*(const uint64_t *)message_data(reply, &n_told) != job.n_messages)
		errx(EXIT_FAILURE, "messages were lost");
	kdbus_message_free(reply);
}

void peer_once(void)
{
	struct kdbus_message *reply;
	const uint8_t *data;
	size_t n;

	switch (job.operation) {
	case STREAM:
		stream_once();
		return;
	case BROADCAST:
		broadcast_arm();
		check(kdbus_conn_send(client, request), "send");
		broadcast_wait();
		return;
	case CONNECT:
		kdbus_conn_free(connection_new());
		return;
	default:
		call(request, &reply);
		break;
	}
	credentials_check(reply);
	data = message_data(reply, &n);
	if (operation_is_call())
		echo_check(data, n);
	kdbus_message_free(reply);
}
