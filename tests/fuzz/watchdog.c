// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A pair that must not notice
 *
 * watchdog MOUNT
 *
 * Makes a bus for everybody, says where it is, and sends numbered messages from
 * one process to another over it, until stdin is closed. Each message that was
 * accepted has to arrive, once, in order and intact, with its memfd or descriptor
 * if it has one; each call that says it was answered has to have the right
 * answer. Others may fill both pools and queues meanwhile, so to be refused is
 * fine. Says on stdout, in JSON, how many there were; exits with 1 if anything
 * was wrong.
 */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <kdbus/kdbus.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define DATA_MAX 8192
#define SECOND UINT64_C(1000000000)
#define PATIENCE (30 * SECOND)
/* Cookies: the number of a message, or one of these. */
#define CALL (UINT64_C(1) << 62)
#define END (UINT64_C(1) << 63)
#define EVERY_CALL 8
#define EVERY_MEMFD 16
#define EVERY_FD 32

#define CHECK(condition, ...)                                          \
	do {                                                           \
		if (!(condition)) {                                    \
			fprintf(stderr, "watchdog: %s: ", #condition); \
			fprintf(stderr, __VA_ARGS__);                  \
			fprintf(stderr, "\n");                         \
			exit(1);                                       \
		}                                                      \
	} while (0)

static uint64_t n_refused;

static size_t data_fill(uint8_t *data, uint64_t n)
{
	size_t size = 1 + n * 37 % (n % 64 ? 500 : DATA_MAX - 1);

	for (size_t i = 0; i < size; i++)
		data[i] = (uint8_t)(n * 31 + i);
	return size;
}

static void data_check(struct kdbus_message *message, uint64_t n)
{
	uint8_t expected[DATA_MAX], found[DATA_MAX];
	size_t size = data_fill(expected, n), copied;
	int r;

	r = kdbus_message_copy(message, 0, found, sizeof(found), &copied);
	CHECK(r >= 0, "message %" PRIu64 ": %s", n, strerror(-r));
	CHECK(copied == size, "message %" PRIu64 ": %zu bytes, not %zu", n, copied, size);
	CHECK(!memcmp(found, expected, size), "message %" PRIu64, n);
}

/* What a receiver that others write to as well, or a sender, may be told. */
static bool is_refusal(int r)
{
	return r == -ENOBUFS || r == -EXFULL || r == -EMFILE;
}

/* --- the receiver */

static void check_number(int fd, uint64_t n)
{
	uint64_t number = 0;

	CHECK(read(fd, &number, sizeof(number)) == sizeof(number), "message %" PRIu64 ": %m", n);
	CHECK(number == n, "%" PRIu64 " instead of %" PRIu64, number, n);
}

static void answer(struct kdbus_conn *conn, struct kdbus_message *request)
{
	struct kdbus_message *reply;
	uint8_t data[DATA_MAX];
	size_t size = data_fill(data, kdbus_message_get_cookie(request) & ~CALL);
	int r;

	data_check(request, kdbus_message_get_cookie(request) & ~CALL);
	CHECK(kdbus_message_new(&reply) >= 0, "no memory");
	CHECK(kdbus_message_append_data(reply, data, size) >= 0, "no memory");
	r = kdbus_conn_reply(conn, request, reply);
	/* The caller may have run out of patience, or have no room: then it knows. */
	CHECK(r >= 0 || is_refusal(r) || r == -EBADSLT || r == -ECONNRESET, "%s", strerror(-r));
	kdbus_message_free(reply);
}

static void check_message(struct kdbus_message *message, uint64_t n)
{
	int fd;

	data_check(message, n);
	if (n % EVERY_FD == 0) {
		CHECK(!kdbus_message_is_incomplete(message), "message %" PRIu64, n);
		CHECK(kdbus_message_get_fd(message, 0, &fd) >= 0, "message %" PRIu64, n);
		check_number(fd, n);
	}
}

static void receive(struct kdbus_conn *conn, uint64_t sender)
{
	struct kdbus_message *message;
	uint64_t cookie, next = 1;
	int r;

	for (;;) {
		r = kdbus_conn_recv(conn, &message);
		if (r == -EAGAIN) {
			r = kdbus_conn_wait(conn, kdbus_deadline(PATIENCE));
			CHECK(r >= 0, "after message %" PRIu64 ": %s", next - 1, strerror(-r));
			continue;
		}
		CHECK(r >= 0, "%s", strerror(-r));
		cookie = kdbus_message_get_cookie(message);
		if (kdbus_message_get_src_id(message) == sender) {
			if (cookie & CALL) {
				answer(conn, message);
			} else if (cookie & END) {
				CHECK(cookie == (END | next), "message %" PRIu64 " is the last",
				      next - 1);
				exit(0);
			} else {
				CHECK(cookie == next, "%" PRIu64 " instead of %" PRIu64, cookie,
				      next);
				check_message(message, cookie);
				++next;
			}
		}
		kdbus_message_free(message);
	}
}

/* --- the sender */

static void empty_queue(struct kdbus_conn *conn)
{
	int r;

	do {
		r = kdbus_conn_drop(conn);
		CHECK(r >= 0 || r == -EAGAIN, "%s", strerror(-r));
	} while (!r);
}

/* Whether it was accepted. */
static bool send_number(struct kdbus_conn *conn, uint64_t receiver, uint64_t n, uint64_t cookie)
{
	struct kdbus_message *message;
	int r, memfd = -1, ends[2] = { -1, -1 };
	uint8_t data[DATA_MAX];
	size_t size = data_fill(data, n);

	CHECK(kdbus_message_new(&message) >= 0, "no memory");
	kdbus_message_set_dst_id(message, receiver);
	kdbus_message_set_cookie(message, cookie);
	if (n % EVERY_MEMFD == 0) {
		CHECK(kdbus_memfd_new_data(&memfd, "watchdog", data, size) >= 0, "%m");
		kdbus_message_append_memfd(message, memfd, 0, size);
	} else {
		kdbus_message_append_data(message, data, size);
	}
	if (n % EVERY_FD == 0) {
		CHECK(pipe2(ends, O_CLOEXEC) >= 0, "%m");
		CHECK(write(ends[1], &n, sizeof(n)) == sizeof(n), "%m");
		kdbus_message_append_fds(message, ends, 1);
	}

	r = kdbus_conn_send(conn, message);
	CHECK(r >= 0 || is_refusal(r), "message %" PRIu64 ": %s", n, strerror(-r));
	n_refused += r < 0;

	kdbus_message_free(message);
	close(memfd);
	close(ends[0]);
	close(ends[1]);
	return r >= 0;
}

/* Whether it was answered. */
static bool call_number(struct kdbus_conn *conn, uint64_t receiver, uint64_t n)
{
	struct kdbus_message *message, *reply;
	uint8_t data[DATA_MAX];
	size_t size = data_fill(data, n);
	int r;

	CHECK(kdbus_message_new(&message) >= 0, "no memory");
	kdbus_message_set_dst_id(message, receiver);
	kdbus_message_set_cookie(message, CALL | n);
	kdbus_message_append_data(message, data, size);
	r = kdbus_conn_call(conn, message, kdbus_deadline(PATIENCE), -1, &reply);
	CHECK(r >= 0 || is_refusal(r), "call %" PRIu64 ": %s", n, strerror(-r));
	kdbus_message_free(message);
	if (r < 0) {
		++n_refused;
		return false;
	}
	data_check(reply, n);
	kdbus_message_free(reply);
	return true;
}

static bool is_over(void)
{
	struct pollfd standard = { .fd = STDIN_FILENO, .events = POLLIN };

	/* The pace: others are to have their turn. */
	return poll(&standard, 1, 1) != 0;
}

static struct kdbus_conn *connect_to(const char *path)
{
	struct kdbus_conn_options options = { .flags = KDBUS_HELLO_ACCEPT_FD };
	struct kdbus_conn *conn;
	int r;

	r = kdbus_conn_new(&conn, path, &options);
	CHECK(r >= 0, "%s", strerror(-r));
	return conn;
}

int main(int argc, char **argv)
{
	struct kdbus_bus_options options = { .flags = KDBUS_MAKE_ACCESS_WORLD };
	uint64_t n_sent = 0, n_calls = 0, n_answered = 0;
	struct kdbus_conn *conn, *other;
	struct kdbus_bus *bus;
	int r, status, link[2];
	uint64_t ids[2];
	pid_t child;

	if (argc != 2)
		return 2;
	r = kdbus_bus_new(&bus, argv[1], "0-watched", &options);
	CHECK(r >= 0, "%s", strerror(-r));
	CHECK(pipe2(link, O_CLOEXEC) >= 0, "%m");
	conn = connect_to(kdbus_bus_get_path(bus));
	ids[0] = kdbus_conn_get_id(conn);

	child = fork();
	CHECK(child >= 0, "%m");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		other = connect_to(kdbus_bus_get_path(bus));
		ids[1] = kdbus_conn_get_id(other);
		CHECK(write(link[1], &ids[1], sizeof(ids[1])) == sizeof(ids[1]), "%m");
		receive(other, ids[0]);
	}
	close(link[1]);
	CHECK(read(link[0], &ids[1], sizeof(ids[1])) == sizeof(ids[1]),
	      "the receiver does not start");

	printf("%s\n", kdbus_bus_get_path(bus));
	fflush(stdout);
	while (!is_over()) {
		empty_queue(conn);
		n_sent += send_number(conn, ids[1], n_sent + 1, n_sent + 1);
		if (n_sent % EVERY_CALL == 0)
			n_answered += call_number(conn, ids[1], ++n_calls);
	}
	while (!send_number(conn, ids[1], 1, END | (n_sent + 1)))
		is_over();
	CHECK(waitpid(child, &status, 0) == child, "%m");
	CHECK(status == 0, "the receiver ended with %#x", status);

	printf("{\"sent\": %" PRIu64 ", \"calls\": %" PRIu64 ", \"answered\": %" PRIu64
	       ", \"refused\": %" PRIu64 "}\n",
	       n_sent, n_calls, n_answered, n_refused);
	kdbus_conn_free(conn);
	kdbus_bus_free(bus);
	return 0;
}
