// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * kdbus by the ioctls of 2015, as a careful program without libkdbus uses them
 *
 * With SYNC defined, calls wait within SEND for their replies.
 */

#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>
#include "../connection.h"
#include "peer.h"

#ifdef SYNC
#define SEND_FLAGS KDBUS_SEND_SYNC_REPLY
#else
#define SEND_FLAGS 0
#endif
#define POOL_SIZE (UINT64_C(32) << 20)
#define TIMEOUT_NS (20 * UINT64_C(1000000000))
#define CREDENTIAL_ITEMS (KDBUS_ATTACH_CREDS | KDBUS_ATTACH_PIDS)

static char path[256];
static int bus_fd;
static Connection client;
static Message request, tell;
static uint8_t *out;

bool peer_can(void)
{
	return job.operation != CONNECTIONS && job.operation != NAMES && job.operation != MATCHES;
}

void peer_prepare(void)
{
	char name[64];

	out = buffer_new(job.operation == STREAM ? TO_COUNT : TO_ECHO);
	snprintf(name, sizeof(name), "peers%d", getpid());
	check(bus_make(&bus_fd, path, sizeof(path), job.address, name, 0), "bus");
}

static Connection connection_new(void)
{
	Connection connection;

	check(connection_init(&connection, path, POOL_SIZE, KDBUS_HELLO_ACCEPT_FD,
			      job.operation == CREDENTIALS ? CREDENTIAL_ITEMS : 0, NULL),
	      "connection");
	check(connection_map(&connection), "mmap");
	return connection;
}

static void credentials_check(const Received *received)
{
	const uint8_t *at = (const uint8_t *)received->msg->items;
	const uint8_t *end = (const uint8_t *)received->msg + received->msg->size;
	const struct kdbus_item *item;
	size_t n = 0;

	for (; job.operation == CREDENTIALS && at < end; at += (item->size + 7) & ~UINT64_C(7)) {
		item = (const void *)at;
		n += item->type == KDBUS_ITEM_CREDS || item->type == KDBUS_ITEM_PIDS;
	}
	if (job.operation == CREDENTIALS && n != 2)
		errx(EXIT_FAILURE, "no credentials");
}

/* waits for a message */
static Received receive(Connection *connection)
{
	struct pollfd p = { .fd = connection->fd, .events = POLLIN };
	Received received;
	int r;

	while ((r = connection_recv(connection, NULL, &received)) == -EAGAIN)
		check_errno(poll(&p, 1, -1), "poll");
	check(r, "RECV");
	return received;
}

/* what the receiver has no room for is sent again */
static void send_patiently(Message *message, uint64_t flags, Received *replyp)
{
	int r;

	while ((r = connection_send(&client, NULL, message, flags, replyp)) == -ENOBUFS ||
	       r == -EXFULL)
		sched_yield();
	check(r, "SEND");
}

static void answer(Connection *connection, Message *reply, const Received *to, const void *data,
		   size_t n)
{
	reply->msg->size = sizeof(*reply->msg); /* begun anew */
	reply->msg->dst_id = to->msg->src_id;
	reply->msg->cookie_reply = to->msg->cookie;
	message_add_payload(reply, data, n);
	check(connection_send(connection, NULL, reply, 0, NULL), "SEND of a reply");
}

_Noreturn void peer_serve(size_t index)
{
	Connection connection = connection_new();
	uint64_t n_counted = 0;
	Received received;
	Message reply;

	(void)index;
	check(message_init(&reply, 0, 0), "message");
	if (job.operation == BROADCAST)
		check(connection_match_add_all(&connection), "match");
	else
		check(connection_name_acquire(&connection, SERVER_NAME), "name");
	server_ready();
	for (;;) {
		received = receive(&connection);
		credentials_check(&received);
		if (job.operation == MEMFD)
			memfd_check(received.fds[0]);
		if (received.n_fds) {
			answer(&connection, &reply, &received, "x", 1);
		} else if (job.operation == BROADCAST) {
			broadcast_received();
		} else if (received.data[0] == TO_COUNT) {
			++n_counted;
		} else if (received.data[0] == TO_TELL) {
			answer(&connection, &reply, &received, &n_counted, sizeof(n_counted));
			n_counted = 0;
		} else {
			answer(&connection, &reply, &received, received.data, received.n_data);
		}
		check(connection_drop(&connection, &received), "FREE");
	}
}

static void request_init(Message *message)
{
	check(message_init(message, KDBUS_DST_ID_NAME, KDBUS_MSG_EXPECT_REPLY), "message");
	message_add_name(message, SERVER_NAME);
}

void peer_open(void)
{
	static const uint8_t to_tell = TO_TELL;
	int fd;

	client = connection_new();
	request_init(&tell);
	message_add_payload(&tell, &to_tell, 1);

	if (job.operation == BROADCAST) {
		check(message_init(&request, KDBUS_DST_ID_BROADCAST, KDBUS_MSG_SIGNAL), "message");
		message_add_bloom(&request);
	} else {
		request_init(&request);
	}
	if (job.operation == STREAM) {
		request.msg->flags = 0; /* no reply */
		request.msg->timeout_ns = 0;
	}
	if (job.operation == MEMFD) {
		message_add_memfd(&request, memfd_get(), MEMFD_SIZE);
		return;
	}
	message_add_payload(&request, out, job.size);
	if (job.operation == DESCRIPTOR) {
		fd = descriptor_get();
		message_add_fds(&request, &fd, 1);
	}
}

void peer_crowd(size_t n)
{
	(void)n;
}

/* a request and its reply, to be dropped by the caller */
static Received call(Message *message)
{
	struct timespec now;
	Received reply = {};

	clock_gettime(CLOCK_MONOTONIC, &now);
	++message->msg->cookie;
	message->msg->timeout_ns = now.tv_sec * UINT64_C(1000000000) + now.tv_nsec + TIMEOUT_NS;
	send_patiently(message, SEND_FLAGS, SEND_FLAGS ? &reply : NULL);
	if (!SEND_FLAGS)
		reply = receive(&client);
	if (reply.msg->cookie_reply != message->msg->cookie)
		errx(EXIT_FAILURE, "another reply");
	return reply;
}

static void stream_once(void)
{
	Received reply;

	for (size_t i = 0; i < job.n_messages; ++i)
		send_patiently(&request, 0, NULL);
	reply = call(&tell);
	if (*(const uint64_t *)reply.data != job.n_messages)
		errx(EXIT_FAILURE, "messages were lost");
	check(connection_drop(&client, &reply), "FREE");
}

void peer_once(void)
{
	Connection connection;
	Received reply;

	switch (job.operation) {
	case STREAM:
		stream_once();
		return;
	case BROADCAST:
		broadcast_arm();
		check(connection_send(&client, NULL, &request, 0, NULL), "SEND");
		broadcast_wait();
		return;
	case CONNECT:
		connection = connection_new();
		connection_deinit(&connection);
		return;
	default:
		reply = call(&request);
	}
	credentials_check(&reply);
	if (operation_is_call())
		echo_check(reply.data, reply.n_data);
	check(connection_drop(&client, &reply), "FREE");
}
