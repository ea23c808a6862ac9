// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The round trip of a call
 *
 * A server process answers each request with as many bytes, sent in the same
 * way. An asynchronous call is SEND, poll until there is something, RECV and
 * FREE; a synchronous one is SEND and FREE. The server polls, receives, frees
 * and sends in both cases. For comparison, an AF_UNIX stream carries the same
 * bytes to a third process and back.
 *
 * A memfd is made and sealed once and sent again in each call, so that its rows
 * tell what passing it costs, not what filling it does. The receivers close it
 * and do not map it.
 */

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include "connection.h"
#include "table.h"

#define POOL_SIZE (UINT64_C(64) << 20) /* one user may queue a sixth of it */
#define TIMEOUT_NS UINT64_C(30000000000)
#define SIZE_MAX_CALL (UINT64_C(8) << 20)

typedef struct Server Server;
typedef struct Stream Stream;

/* a server process, and our connection to talk to it */
struct Server {
	pid_t pid;
	uint64_t id;
	Connection connection;
};

#define SERVER_NULL { .pid = -1, .connection = CONNECTION_NULL }

struct Stream {
	pid_t pid;
	int fd;
};

#define STREAM_NULL { .pid = -1, .fd = -1 }

enum {
	RAW,
	SOCKET,
	_N_SERVERS,
};

static const uint64_t sizes[] = { 8, 4096, 65536, UINT64_C(1) << 20, SIZE_MAX_CALL };

static const struct {
	const char *operation;
	const char *variant;
	size_t server;
	bool sync;
	bool memfd;
} operations[] = {
	{ "async call", "vec", RAW, false, false },
	{ "sync call", "vec", RAW, true, false },
	{ "async call", "memfd, raw", RAW, false, true },
	{ "sync call", "memfd, raw", RAW, true, true },
	{ "async call", "memfd, socket", SOCKET, false, true },
	{ "sync call", "memfd, socket", SOCKET, true, true },
};

#define N_OPERATIONS (sizeof(operations) / sizeof(*operations))

static uint8_t data[SIZE_MAX_CALL];

static int wait_readable(Connection *connection)
{
	struct pollfd p = { .fd = connection->fd, .events = POLLIN };

	if (poll(&p, 1, 30000) < 0)
		return fail("poll", -errno);
	if (!(p.revents & POLLIN))
		return fail("poll", -ETIMEDOUT);

	return 0;
}

static int server_answer(Connection *connection)
{
	static int memfd = -1;
	static uint64_t memfd_size;
	Message message = {};
	Received received;
	int r;

	r = connection_recv(connection, NULL, &received);
	if (r < 0)
		return r == -EAGAIN ? 0 : fail("RECV of a request", r);

	r = message_init(&message, received.msg->src_id, 0);
	if (r < 0)
		return r;
	message.msg->cookie_reply = received.msg->cookie;

	if (received.n_memfd) {
		if (memfd_size != received.n_memfd) {
			if (memfd >= 0)
				close(memfd);
			memfd_size = received.n_memfd;
			r = sealed_memfd(&memfd, data, memfd_size);
			if (r < 0)
				return r;
		}
		message_add_memfd(&message, memfd, memfd_size);
	} else {
		message_add_payload(&message, data, received.n_data);
	}

	r = connection_drop(connection, &received);
	if (r < 0)
		return fail("FREE of a request", r);
	r = connection_send(connection, NULL, &message, 0, NULL);
	if (r < 0)
		return fail("SEND of a reply", r);

	message_deinit(&message);
	return 0;
}

static _Noreturn void server_run(const char *path, bool by_socket, int report)
{
	Connection connection;
	struct pollfd p;
	int r;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	r = connection_init(&connection, path, POOL_SIZE, KDBUS_HELLO_ACCEPT_FD, 0, NULL);
	if (!r)
		r = connection_map(&connection);
	if (!r && by_socket)
		r = connection_init_fd_socket(&connection);
	if (r < 0)
		connection.id = 0;
	if (write(report, &connection.id, sizeof(connection.id)) < 0)
		_exit(1);
	close(report);

	p = (struct pollfd){ .fd = connection.fd, .events = POLLIN };
	while (!r) {
		if (poll(&p, 1, -1) < 0)
			break;
		r = server_answer(&connection);
	}

	_exit(1);
}

/* Returns -ENOTTY if there is no private socket and it is asked for. */
static int server_init(Server *server, const char *path, bool by_socket)
{
	int r, report[2];

	*server = (Server)SERVER_NULL;
	r = connection_init(&server->connection, path, POOL_SIZE, KDBUS_HELLO_ACCEPT_FD, 0, NULL);
	if (!r)
		r = connection_map(&server->connection);
	if (!r && by_socket)
		r = connection_init_fd_socket(&server->connection);
	if (r < 0)
		return r;

	if (pipe(report) < 0)
		return -errno;
	server->pid = fork();
	if (server->pid < 0) {
		r = -errno;
	} else if (!server->pid) {
		close(report[0]);
		server_run(path, by_socket, report[1]);
	}
	close(report[1]);
	if (!r &&
	    (read(report[0], &server->id, sizeof(server->id)) != sizeof(server->id) || !server->id))
		r = fail("server", -EPIPE);
	close(report[0]);

	return r;
}

static void child_end(pid_t pid)
{
	if (pid > 0) {
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
	}
}

static void server_deinit(Server *server)
{
	child_end(server->pid);
	connection_deinit(&server->connection);
	*server = (Server)SERVER_NULL;
}

static int server_call(Server *server, Sample *sample, Message *message, bool sync, bool memfd,
		       uint64_t size)
{
	Connection *connection = &server->connection;
	Received reply;
	uint64_t start;
	int r;

	message->msg->timeout_ns = now_ns() + TIMEOUT_NS;

	start = now_ns();
	if (sync) {
		r = connection_send(connection, NULL, message, KDBUS_SEND_SYNC_REPLY, &reply);
		if (r < 0)
			return fail("SEND of a synchronous call", r);
	} else {
		r = connection_send(connection, NULL, message, 0, NULL);
		if (r < 0)
			return fail("SEND of a call", r);
		r = wait_readable(connection);
		if (r < 0)
			return r;
		r = connection_recv(connection, NULL, &reply);
		if (r < 0)
			return fail("RECV of a reply", r);
	}
	r = connection_drop(connection, &reply);
	sample_add(sample, now_ns() - start);
	if (r < 0)
		return fail("FREE of a reply", r);

	if ((memfd ? reply.n_memfd : reply.n_data) != size)
		return fail("reply does not carry what was asked for", -EBADMSG);

	return 0;
}

/* The number of bytes goes in front, so that the server knows when it has all. */
static int stream_write(int fd, uint64_t size)
{
	uint64_t done;
	ssize_t l;

	if (write(fd, &size, sizeof(size)) != sizeof(size))
		return -errno;
	for (done = 0; done < size; done += l) {
		l = write(fd, data + done, size - done);
		if (l < 0)
			return -errno;
	}

	return 0;
}

static int stream_read(int fd, uint64_t *sizep)
{
	uint64_t size, done;
	ssize_t l;

	if (recv(fd, &size, sizeof(size), MSG_WAITALL) != sizeof(size) || size > sizeof(data))
		return -EPIPE;
	for (done = 0; done < size; done += l) {
		l = read(fd, data + done, size - done);
		if (l <= 0)
			return -EPIPE;
	}

	*sizep = size;
	return 0;
}

static int stream_init(Stream *stream)
{
	uint64_t size;
	int pair[2];

	*stream = (Stream)STREAM_NULL;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;

	stream->pid = fork();
	if (!stream->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(pair[0]);
		while (!stream_read(pair[1], &size) && !stream_write(pair[1], size))
			;
		_exit(0);
	}

	close(pair[1]);
	stream->fd = pair[0];
	return stream->pid < 0 ? -EAGAIN : 0;
}

static void stream_deinit(Stream *stream)
{
	child_end(stream->pid);
	if (stream->fd >= 0)
		close(stream->fd);
	*stream = (Stream)STREAM_NULL;
}

static int stream_call(Stream *stream, Sample *sample, uint64_t size)
{
	uint64_t start, n = 0;
	int r;

	start = now_ns();
	r = stream_write(stream->fd, size);
	if (!r)
		r = stream_read(stream->fd, &n);
	sample_add(sample, now_ns() - start);

	return r < 0 || n != size ? fail("AF_UNIX", r < 0 ? r : -EBADMSG) : 0;
}

static int run_size(const Options *options, Server *servers, const bool *usable, Stream *stream,
		    uint64_t size)
{
	Sample samples[N_OPERATIONS] = {}, stream_sample = {}, uncounted = {};
	size_t i, round, n_rounds, n_warm_up;
	Message messages[N_OPERATIONS] = {};
	Floor floor = FLOOR_NULL;
	int r, memfd = -1;

	/* about as long for each size */
	n_rounds = options->n_rounds / 5 / (1 + size / 65536) + 10;
	n_warm_up = N_WARM_UP(n_rounds);

	r = floor_init(&floor, options->floor, n_rounds);
	if (!r)
		r = sample_init(&stream_sample, n_rounds);
	if (!r)
		r = sealed_memfd(&memfd, data, size);
	for (i = 0; !r && i < N_OPERATIONS; ++i) {
		r = sample_init(&samples[i], n_rounds);
		if (!r)
			r = message_init(&messages[i], servers[operations[i].server].id,
					 KDBUS_MSG_EXPECT_REPLY);
		if (r < 0)
			break;
		messages[i].msg->cookie = i + 1;
		if (operations[i].memfd)
			message_add_memfd(&messages[i], memfd, size);
		else
			message_add_payload(&messages[i], data, size);
	}

	for (round = 0; !r && round < n_warm_up + n_rounds; ++round) {
		if (round == n_warm_up) {
			floor_reset(&floor);
			sample_reset(&stream_sample);
			for (i = 0; i < N_OPERATIONS; ++i)
				sample_reset(&samples[i]);
		}

		r = floor_step(&floor);
		if (!r)
			r = stream_call(stream, &stream_sample, size);
		if (!r)
			r = server_call(&servers[RAW], &uncounted, &messages[0], false, false,
					size);
		for (i = 0; !r && i < N_OPERATIONS; ++i)
			if (usable[operations[i].server])
				r = server_call(&servers[operations[i].server], &samples[i],
						&messages[i], operations[i].sync,
						operations[i].memfd, size);
	}

	if (!r)
		sample_print(&stream_sample, &floor, "calls", "AF_UNIX", "stream", size);
	for (i = 0; !r && i < N_OPERATIONS; ++i)
		if (usable[operations[i].server])
			sample_print(&samples[i], &floor, "calls", operations[i].operation,
				     operations[i].variant, size);

	for (i = 0; i < N_OPERATIONS; ++i) {
		message_deinit(&messages[i]);
		sample_deinit(&samples[i]);
	}
	if (memfd >= 0)
		close(memfd);
	sample_deinit(&stream_sample);
	floor_deinit(&floor);
	return r;
}

int table_calls(const Options *options)
{
	Server servers[_N_SERVERS] = { SERVER_NULL, SERVER_NULL };
	bool usable[_N_SERVERS] = { true, true };
	Stream stream = STREAM_NULL;
	char path[4096];
	int r, bus = -1;
	size_t i;

	memset(data, 0x5a, sizeof(data));
	r = bus_make(&bus, path, sizeof(path), options->directory, "bench-calls", 0);
	if (!r)
		r = stream_init(&stream);
	if (!r)
		r = server_init(&servers[RAW], path, false);
	if (!r) {
		r = server_init(&servers[SOCKET], path, true);
		if (r == -ENOTTY) {
			fail("no private socket, its rows are left out", r);
			usable[SOCKET] = false;
			r = 0;
		}
	}

	for (i = 0; !r && i < sizeof(sizes) / sizeof(*sizes); ++i)
		r = run_size(options, servers, usable, &stream, sizes[i]);

	for (i = 0; i < _N_SERVERS; ++i)
		server_deinit(&servers[i]);
	stream_deinit(&stream);
	if (bus >= 0)
		close(bus);
	return r;
}
