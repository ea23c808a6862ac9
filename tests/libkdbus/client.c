/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * client MOUNTPOINT TEST: libkdbus against a real bus
 *
 * Compiled with PLAIN, the library is made to believe that there is no such
 * thing as a descriptor socket, as on a kernel with kdbus.
 */

#undef NDEBUG
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <kdbus/extension.h>
#include <kdbus/kdbus.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define _cleanup_(_x) __attribute__((__cleanup__(_x)))
#define SECOND 1000000000ULL
/* none of these tests waits longer than this if all is well */
#define PATIENCE (10 * SECOND)

static struct kdbus_bus *bus;

#ifdef PLAIN
static const bool plain = true;

int ioctl(int fd, unsigned long code, ...);

int ioctl(int fd, unsigned long code, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, code);
	argument = va_arg(arguments, void *);
	va_end(arguments);

	assert(code != KDBUSFS_CMD_RECV && code != KDBUSFS_CMD_SEND);
	if (_IOC_TYPE(code) == KDBUS_IOCTL_MAGIC && _IOC_NR(code) >= 0xf0) {
		errno = ENOTTY;
		return -1;
	}
	return syscall(SYS_ioctl, fd, code, argument);
}
#else
static const bool plain;
#endif

static struct kdbus_conn *connect_with(uint64_t attach_flags_recv)
{
	struct kdbus_conn_options options = {
		.flags = KDBUS_HELLO_ACCEPT_FD,
		.attach_flags_send = _KDBUS_ATTACH_ALL,
		.attach_flags_recv = attach_flags_recv,
		.pool_size = 1 << 20,
		.description = "client",
	};
	struct kdbus_conn *conn;

	assert(kdbus_conn_new(&conn, kdbus_bus_get_path(bus), &options) == 0);
	return conn;
}

static struct kdbus_message *message_to(uint64_t id, const char *text)
{
	struct kdbus_message *message;

	assert(kdbus_message_new(&message) == 0);
	assert(kdbus_message_set_dst_id(message, id) == 0);
	if (text)
		assert(kdbus_message_append_data(message, text, strlen(text)) == 0);
	return message;
}

static void send_text(struct kdbus_conn *conn, uint64_t id, const char *text)
{
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = message_to(id, text);

	assert(kdbus_conn_send(conn, message) == 0);
}

static void check_text(struct kdbus_message *message, const char *text)
{
	char buffer[256];
	size_t n;

	assert(kdbus_message_copy(message, 0, buffer, sizeof(buffer), &n) == 0);
	assert(n == strlen(text) && !memcmp(buffer, text, n));
}

static struct kdbus_message *receive(struct kdbus_conn *conn)
{
	struct kdbus_message *message;

	assert(kdbus_conn_wait(conn, kdbus_deadline(PATIENCE)) == 0);
	assert(kdbus_conn_recv(conn, &message) == 0);
	return message;
}

static size_t count_fds(void)
{
	DIR *directory = opendir("/proc/self/fd");
	size_t n = 0;

	assert(directory);
	while (readdir(directory))
		++n;
	closedir(directory);
	return n;
}

static void test_hello(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	struct kdbus_conn *conn = NULL;

	assert(kdbus_conn_get_id(a) > 0 && kdbus_conn_get_id(b) > kdbus_conn_get_id(a));
	assert(kdbus_conn_get_flags(a) == KDBUS_HELLO_ACCEPT_FD);
	assert(kdbus_conn_get_bus_flags(a) == KDBUS_MAKE_ACCESS_WORLD);
	assert(kdbus_conn_get_pool_size(a) == 1 << 20);
	assert(kdbus_conn_get_bloom(a)->size == 64 && kdbus_conn_get_bloom(a)->n_hash == 8);
	assert(!memcmp(kdbus_conn_get_bus_id(a), kdbus_conn_get_bus_id(b), 16));
	assert(kdbus_conn_get_bus_id(a)[6] >> 4 == 4);
	assert(kdbus_conn_has_fd_socket(a) == !plain);

	assert(kdbus_conn_new(&conn, "/nonexistent", NULL) == -ENOENT);
	assert(kdbus_conn_new(&conn, kdbus_bus_get_path(bus),
			      &(struct kdbus_conn_options){ .pool_size = 4097 }) == -EINVAL);
	assert(!conn);
}

static void test_unicast(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0);
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *b = connect_with(
		KDBUS_ATTACH_CREDS | KDBUS_ATTACH_PIDS | KDBUS_ATTACH_TIMESTAMP);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL, *in = NULL;
	const struct iovec *iov;
	size_t n;

	assert(kdbus_conn_recv(b, &in) == -EAGAIN);
	assert(kdbus_conn_wait(b, 0) == -ETIMEDOUT);
	assert(kdbus_conn_wait(b, kdbus_deadline(1)) == -ETIMEDOUT);

	out = message_to(kdbus_conn_get_id(b), "foobar");
	assert(kdbus_message_append_zeros(out, 3) == 0);
	assert(kdbus_message_append_data(out, "baz", 3) == 0);
	assert(kdbus_message_set_priority(out, -5) == 0);
	assert(kdbus_message_set_payload_type(out, 77) == 0);
	for (uint64_t cookie = 1; cookie <= 2; ++cookie) {
		assert(kdbus_conn_send(a, out) == 0);
		assert(kdbus_message_get_cookie(out) == cookie);
		in = receive(b);
		assert(kdbus_message_get_cookie(in) == cookie);
		assert(kdbus_message_get_src_id(in) == kdbus_conn_get_id(a));
		assert(kdbus_message_get_dst_id(in) == kdbus_conn_get_id(b));
		assert(kdbus_message_get_priority(in) == -5);
		assert(kdbus_message_get_payload_type(in) == 77);
		assert(kdbus_message_get_n_parts(in) == 3);
		assert(kdbus_message_get_iov(in, &iov, &n) == 0 && n == 3);
		assert(iov[0].iov_len == 6 && !memcmp(iov[0].iov_base, "foobar", 6));
		assert(iov[1].iov_len == 3 && !memcmp(iov[1].iov_base, "\0\0\0", 3));
		assert(iov[2].iov_len == 3 && !memcmp(iov[2].iov_base, "baz", 3));
		assert(kdbus_item_get_pids(kdbus_message_get_item(in, KDBUS_ITEM_PIDS))->pid ==
		       (__u64)getpid());
		assert(kdbus_item_get_creds(kdbus_message_get_item(in, KDBUS_ITEM_CREDS))->euid ==
		       geteuid());
		assert(kdbus_item_get_timestamp(kdbus_message_get_item(in, KDBUS_ITEM_TIMESTAMP))
			       ->monotonic_ns > 0);
		assert(!kdbus_message_get_item(in, KDBUS_ITEM_EXE));
		in = kdbus_message_free(in);
	}
	assert(kdbus_conn_recv(b, &in) == -EAGAIN);

	assert(kdbus_message_set_dst_id(out, 1ULL << 40) == 0);
	assert(kdbus_conn_send(a, out) == -ENXIO);
	assert(kdbus_message_set_dst_id(out, 0) == 0);
	assert(kdbus_conn_send(a, out) == -EDESTADDRREQ);
}

static void test_slices_are_freed(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = message_to(kdbus_conn_get_id(b),
									      NULL);
	static uint8_t data[100000];
	struct kdbus_message *in;

	/* together many times the pool */
	assert(kdbus_message_append_data(out, data, sizeof(data)) == 0);
	for (size_t i = 0; i < 64; ++i) {
		assert(kdbus_conn_send(a, out) == 0);
		in = receive(b);
		assert(kdbus_message_get_size(in) == sizeof(data));
		kdbus_message_free(in);
	}
}

static void test_forward(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL, *in = NULL, *again = NULL;
	const void *data;
	size_t size;

	/* what was received is sent on, straight from the pool */
	send_text(a, kdbus_conn_get_id(b), "pass it on");
	in = receive(b);
	out = message_to(kdbus_conn_get_id(a), NULL);
	assert(kdbus_message_get_part(in, 0, &data, &size) == 0);
	assert(kdbus_message_append_data(out, data, size) == 0);
	assert(kdbus_conn_send(b, out) == 0);
	again = receive(a);
	check_text(again, "pass it on");
}

static void test_peek_drop_priority(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	static const int priorities[] = { 3, -2, 1 };
	struct kdbus_message *out, *in = NULL;
	char text[2] = {};

	for (size_t i = 0; i < 3; ++i) {
		text[0] = '0' + i;
		out = message_to(kdbus_conn_get_id(b), text);
		assert(kdbus_message_set_priority(out, priorities[i]) == 0);
		assert(kdbus_conn_send(a, out) == 0);
		kdbus_message_free(out);
	}

	for (size_t i = 0; i < 3; ++i) {
		assert(kdbus_conn_peek(b, &in) == 0);
		check_text(in, "0");
		in = kdbus_message_free(in);
	}
	assert(kdbus_conn_peek_priority(b, 100, &in) == 0);
	check_text(in, "1");
	in = kdbus_message_free(in);
	assert(kdbus_conn_recv_priority(b, -3, &in) == -EAGAIN);
	assert(kdbus_conn_recv_priority(b, 2, &in) == 0);
	check_text(in, "1");
	in = kdbus_message_free(in);
	assert(kdbus_conn_drop(b) == 0);
	in = receive(b);
	check_text(in, "2");
	in = kdbus_message_free(in);
	assert(kdbus_conn_drop(b) == -EAGAIN);
}

static void test_fds(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	size_t n_open = count_fds();
	struct kdbus_message *out, *in;
	int pipe_fds[2], memfd, fd, taken;
	struct stat st;
	uint64_t start, size;
	char byte;

	assert(pipe(pipe_fds) == 0);
	assert(kdbus_memfd_new_data(&memfd, NULL, "0123456789", 10) == 0);
	out = message_to(kdbus_conn_get_id(b), "x");
	assert(kdbus_message_append_fds(out, pipe_fds, 2) == 0);
	assert(kdbus_message_append_memfd(out, memfd, 2, 5) == 0);
	assert(kdbus_conn_send(a, out) == 0);
	assert(kdbus_conn_send(a, out) == 0);
	/* neither the numbers nor the originals matter any more */
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	close(memfd);
	kdbus_message_free(out);
	assert(count_fds() == n_open);

	/* a look at it installs nothing */
	assert(kdbus_conn_peek(b, &in) == 0);
	assert(kdbus_message_is_incomplete(in));
	assert(kdbus_message_get_n_fds(in) == 2);
	assert(kdbus_message_get_fd(in, 0, &fd) == -EBADF);
	kdbus_message_free(in);
	assert(count_fds() == n_open);

	in = receive(b);
	assert(!kdbus_message_is_incomplete(in));
	assert(count_fds() == n_open + 3);
	check_text(in, "x23456");
	assert(kdbus_message_get_memfd(in, 1, &fd, &start, &size) == 0);
	assert(start == 2 && size == 5 && fstat(fd, &st) == 0 && st.st_size == 10);
	assert(kdbus_message_get_fd(in, 1, &fd) == 0);
	assert(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	assert(write(fd, "!", 1) == 1);
	assert(kdbus_message_take_fd(in, 0, &taken) == 0);
	kdbus_message_free(in);
	assert(count_fds() == n_open + 1);
	assert(read(taken, &byte, 1) == 1 && byte == '!');

	/* the second copy still holds the other end */
	assert(kdbus_conn_drop(b) == 0);
	assert(read(taken, &byte, 1) == 0);
	close(taken);
	assert(count_fds() == n_open);
}

static void test_accept_fd(void)
{
	struct kdbus_conn_options options = { .pool_size = 1 << 20 };
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = NULL;
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL;

	/* a connection that takes none gets no message with any */
	assert(kdbus_conn_new(&b, kdbus_bus_get_path(bus), &options) == 0);
	out = message_to(kdbus_conn_get_id(b), "x");
	assert(kdbus_message_append_fds(out, (int[]){ 0 }, 1) == 0);
	assert(kdbus_conn_send(a, out) == -ECOMM);
}

static void *answer(void *userdata)
{
	struct kdbus_conn *conn = userdata;
	struct kdbus_message *request = receive(conn), *reply = message_to(0, "pong");
	int fds[2];

	check_text(request, "ping");
	assert(kdbus_message_get_flags(request) & KDBUS_MSG_EXPECT_REPLY);
	assert(kdbus_message_get_deadline(request) > 0);
	assert(pipe(fds) == 0);
	assert(kdbus_message_append_fds(reply, fds, 2) == 0);
	assert(kdbus_conn_reply(conn, request, reply) == 0);
	assert(kdbus_conn_reply(conn, request, reply) == -EBADSLT);
	close(fds[0]);
	close(fds[1]);
	kdbus_message_free(request);
	kdbus_message_free(reply);
	return NULL;
}

static void test_call(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *request = NULL;
	struct kdbus_message *reply = NULL;
	pthread_t thread;
	int cancel, fd;

	request = message_to(kdbus_conn_get_id(b), "ping");
	assert(pthread_create(&thread, NULL, answer, b) == 0);
	assert(kdbus_conn_call(a, request, kdbus_deadline(PATIENCE), -1, &reply) == 0);
	assert(pthread_join(thread, NULL) == 0);
	check_text(reply, "pong");
	assert(kdbus_message_get_cookie_reply(reply) == kdbus_message_get_cookie(request));
	assert(kdbus_message_get_n_fds(reply) == 2);
	assert(kdbus_message_get_fd(reply, 0, &fd) == 0 && fcntl(fd, F_GETFD) >= 0);
	reply = kdbus_message_free(reply);
	assert(fcntl(fd, F_GETFD) < 0);

	assert(kdbus_conn_call(a, request, kdbus_deadline(SECOND / 100), -1, &reply) == -ETIMEDOUT);
	assert(kdbus_conn_drop(b) == 0);

	cancel = eventfd(1, EFD_CLOEXEC);
	assert(cancel >= 0);
	assert(kdbus_conn_call(a, request, KDBUS_DEADLINE_NEVER, cancel, &reply) == -ECANCELED);
	assert(kdbus_conn_drop(b) == 0);
	close(cancel);

	/* as a request that is not waited for */
	assert(kdbus_message_set_deadline(request, kdbus_deadline(PATIENCE)) == 0);
	assert(kdbus_conn_send(a, request) == 0);
	answer(b);
	reply = receive(a);
	assert(kdbus_message_get_cookie_reply(reply) == kdbus_message_get_cookie(request));
	check_text(reply, "pong");
	reply = kdbus_message_free(reply);

	/* dropped */
	assert(kdbus_conn_send(a, request) == 0);
	assert(kdbus_conn_drop(b) == 0);
	reply = receive(a);
	assert(kdbus_message_get_notification(reply)->type == KDBUS_ITEM_REPLY_DEAD);
	reply = kdbus_message_free(reply);
}

static void on_signal(int number)
{
	(void)number;
}

struct interrupter {
	struct kdbus_conn *conn;
	pthread_t victim;
	_Atomic bool interrupted;
};

static void *interrupt_and_answer(void *userdata)
{
	struct interrupter *interrupter = userdata;

	/* the request is there: the call waits, or is about to */
	assert(kdbus_conn_wait(interrupter->conn, kdbus_deadline(PATIENCE)) == 0);
	while (!interrupter->interrupted) {
		assert(pthread_kill(interrupter->victim, SIGUSR1) == 0);
		usleep(1000);
	}
	return answer(interrupter->conn);
}

static void test_interrupted_call(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *request = NULL, *reply = NULL;
	struct interrupter interrupter = { .conn = b, .victim = pthread_self() };
	struct sigaction action = { .sa_handler = on_signal };
	uint64_t cookie, deadline = kdbus_deadline(PATIENCE);
	pthread_t thread;
	int r;

	assert(sigaction(SIGUSR1, &action, NULL) == 0);
	request = message_to(kdbus_conn_get_id(b), "ping");
	assert(pthread_create(&thread, NULL, interrupt_and_answer, &interrupter) == 0);
	assert(kdbus_conn_call(a, request, deadline, -1, &reply) == -EINTR);
	interrupter.interrupted = true;
	cookie = kdbus_message_get_cookie(request);

	/* goes on waiting for the same reply; signals may still be on their way */
	do {
		r = kdbus_conn_call(a, request, deadline, -1, &reply);
	} while (r == -EINTR);
	assert(r == 0);
	assert(kdbus_message_get_cookie(request) == cookie);
	check_text(reply, "pong");
	assert(pthread_join(thread, NULL) == 0);
	/* it was sent once */
	assert(kdbus_conn_drop(b) == -EAGAIN);
}

static void test_many(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	enum {
		N = 200
	};
	struct kdbus_message *out[N], *in[N];
	static uint8_t large[20000];
	size_t n, n_sent, n_received = 0;

	for (uint32_t i = 0; i < N; ++i) {
		out[i] = message_to(kdbus_conn_get_id(b), NULL);
		memcpy(large, &i, sizeof(i));
		/* some of it does not fit in a call with others */
		assert(kdbus_message_append_data(out[i], i % 50 ? "x" : (void *)large,
						 i % 50 ? 1 : sizeof(large)) == 0);
	}
	assert(kdbus_conn_send_many(a, out, N, &n_sent) == 0 && n_sent == N);
	while (n_received < N) {
		assert(kdbus_conn_recv_many(b, kdbus_deadline(PATIENCE), -1, in + n_received, 64,
					    &n) == 0);
		assert(n > 0 && n <= 64);
		n_received += n;
	}
	assert(n_received == N);
	for (size_t i = 0; i < N; ++i) {
		assert(kdbus_message_get_cookie(in[i]) == i + 1);
		assert(kdbus_message_get_size(in[i]) == (i % 50 ? 1 : sizeof(large)));
		kdbus_message_free(in[i]);
	}
	assert(kdbus_conn_recv_many(b, 0, -1, in, 1, &n) == -ETIMEDOUT);
	assert(kdbus_conn_recv_many(b, 0, -1, in, 0, &n) == -EINVAL);

	/* the first that is refused ends it */
	assert(kdbus_message_set_dst_id(out[100], 1ULL << 40) == 0);
	assert(kdbus_conn_send_many(a, out, N, &n_sent) == -ENXIO && n_sent == 100);
	for (size_t i = 0; i < N; ++i)
		kdbus_message_free(out[i]);
}

static void *serve(void *userdata)
{
	struct kdbus_conn *conn = userdata;
	struct kdbus_message *request, *reply, *next = NULL;

	assert(kdbus_conn_recv_wait(conn, KDBUS_DEADLINE_NEVER, -1, &request) == 0);
	while (kdbus_message_get_size(request) > 1) {
		assert(kdbus_message_new(&reply) == 0);
		assert(kdbus_message_append_data(reply, "pong", 4) == 0);
		assert(kdbus_conn_reply_recv(conn, request, reply, KDBUS_DEADLINE_NEVER, -1,
					     &next) == 0);
		/* nobody waits for it a second time */
		assert(kdbus_conn_reply(conn, request, reply) == -EBADSLT);
		kdbus_message_free(reply);
		kdbus_message_free(request);
		request = next;
	}
	kdbus_message_free(request);
	return NULL;
}

static void test_reply_recv(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *request = NULL;
	struct kdbus_message *reply;
	pthread_t thread;
	int cancel;

	request = message_to(kdbus_conn_get_id(b), "ping");
	assert(pthread_create(&thread, NULL, serve, b) == 0);
	for (size_t i = 0; i < 100; ++i) {
		assert(kdbus_conn_call(a, request, kdbus_deadline(PATIENCE), -1, &reply) == 0);
		check_text(reply, "pong");
		kdbus_message_free(reply);
	}
	send_text(a, kdbus_conn_get_id(b), "!");
	assert(pthread_join(thread, NULL) == 0);

	assert(kdbus_conn_recv_wait(b, 0, -1, &reply) == -ETIMEDOUT);
	assert(kdbus_conn_recv_wait(b, kdbus_deadline(SECOND / 100), -1, &reply) == -ETIMEDOUT);
	cancel = eventfd(1, EFD_CLOEXEC);
	assert(cancel >= 0);
	assert(kdbus_conn_recv_wait(b, KDBUS_DEADLINE_NEVER, cancel, &reply) == -ECANCELED);
	close(cancel);
	assert(kdbus_conn_byebye(b) == 0);
	assert(kdbus_conn_recv_wait(b, KDBUS_DEADLINE_NEVER, -1, &reply) == -ECONNRESET);
}

static void test_names(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL, *in = NULL;
	_cleanup_(kdbus_info_list_freep) struct kdbus_info_list *list = NULL;
	const struct kdbus_info *info = NULL;
	const struct kdbus_name *name;
	uint64_t flags;
	size_t n = 0;

	assert(kdbus_conn_acquire_name(a, "com.example.a", 0, &flags) == 0);
	assert(flags == (KDBUS_NAME_PRIMARY | KDBUS_NAME_ACQUIRED));
	assert(kdbus_conn_acquire_name(b, "com.example.a", 0, &flags) == -EEXIST);
	assert(kdbus_conn_acquire_name(b, "com.example.a", KDBUS_NAME_QUEUE, &flags) == 0);
	assert(flags & KDBUS_NAME_IN_QUEUE);
	assert(kdbus_conn_acquire_name(b, "nonsense", 0, NULL) == -EINVAL);
	assert(kdbus_conn_release_name(b, "com.example.none") == -ESRCH);

	assert(kdbus_conn_list(a, KDBUS_LIST_NAMES | KDBUS_LIST_QUEUED, &list) == 0);
	while ((info = kdbus_info_list_next(list, info))) {
		name = kdbus_item_get_name(kdbus_info_get_item(info, KDBUS_ITEM_OWNED_NAME));
		assert(name && !strcmp(name->name, "com.example.a"));
		assert(info->id == kdbus_conn_get_id(name->flags & KDBUS_NAME_PRIMARY ? a : b));
		++n;
	}
	assert(n == 2);

	out = message_to(0, "by name");
	assert(kdbus_message_set_dst_name(out, "com.example.a") == 0);
	assert(kdbus_conn_send(b, out) == 0);
	in = receive(a);
	assert(!strcmp(kdbus_message_get_dst_name(in), "com.example.a"));
	assert(kdbus_message_get_dst_id(in) == KDBUS_DST_ID_NAME);
	/* name and id have to agree */
	assert(kdbus_message_set_dst_id(out, kdbus_conn_get_id(b)) == 0);
	assert(kdbus_conn_send(b, out) == -EREMCHG);

	assert(kdbus_conn_release_name(a, "com.example.a") == 0);
	assert(kdbus_conn_release_name(a, "com.example.a") == -EADDRINUSE);
	assert(kdbus_conn_release_name(b, "com.example.a") == 0);
	assert(kdbus_message_set_dst_id(out, 0) == 0);
	assert(kdbus_conn_send(b, out) == -ESRCH);
}

static void test_info(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0);
	struct kdbus_info_list *list = NULL;
	const struct kdbus_info *info;
	const char *string;

	assert(kdbus_conn_info(a, kdbus_conn_get_id(a), NULL, _KDBUS_ATTACH_ALL, &list) == 0);
	info = kdbus_info_list_next(list, NULL);
	assert(info->id == kdbus_conn_get_id(a) && info->flags == KDBUS_HELLO_ACCEPT_FD);
	assert(!kdbus_info_list_next(list, info));
	string = kdbus_item_get_string(kdbus_info_get_item(info, KDBUS_ITEM_CONN_DESCRIPTION));
	assert(!strcmp(string, "client"));
	assert(kdbus_item_get_pids(kdbus_info_get_item(info, KDBUS_ITEM_PIDS))->pid ==
	       (__u64)getpid());
	list = kdbus_info_list_free(list);

	assert(kdbus_conn_info(a, 0, "com.example.none", 0, &list) == -ESRCH);
	assert(kdbus_conn_info(a, 1ULL << 40, NULL, 0, &list) == -ENXIO);

	assert(kdbus_conn_creator_info(a, KDBUS_ATTACH_CREDS, &list) == 0);
	info = kdbus_info_list_next(list, NULL);
	string = kdbus_item_get_string(kdbus_info_get_item(info, KDBUS_ITEM_MAKE_NAME));
	assert(strstr(kdbus_bus_get_path(bus), string));
	assert(kdbus_item_get_creds(kdbus_info_get_item(info, KDBUS_ITEM_CREDS))->euid ==
	       geteuid());
	list = kdbus_info_list_free(list);
}

static void test_signals(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL;
	_cleanup_(kdbus_match_freep) struct kdbus_match *match = NULL;
	const struct kdbus_bloom_parameter *bloom = kdbus_conn_get_bloom(a);
	uint8_t mask[64] = {}, filter[64] = {}, other[64] = {};
	struct kdbus_message *in = NULL;

	kdbus_bloom_add(bloom, mask, "wanted", 6);
	kdbus_bloom_add(bloom, filter, "wanted", 6);
	kdbus_bloom_add(bloom, filter, "more", 4);
	kdbus_bloom_add(bloom, other, "other", 5);

	assert(kdbus_match_new(&match) == 0);
	assert(kdbus_match_add_bloom_mask(match, mask, sizeof(mask)) == 0);
	assert(kdbus_match_add_src_id(match, kdbus_conn_get_id(a)) == 0);
	assert(kdbus_conn_add_match(b, 1, 0, match) == 0);

	out = message_to(KDBUS_DST_ID_BROADCAST, "signal");
	assert(kdbus_message_set_bloom_filter(out, 0, other, sizeof(other)) == 0);
	assert(kdbus_conn_send(a, out) == 0);
	assert(kdbus_conn_recv(b, &in) == -EAGAIN);
	assert(kdbus_message_set_bloom_filter(out, 0, filter, sizeof(filter)) == 0);
	assert(kdbus_conn_send(a, out) == 0);
	in = receive(b);
	assert(kdbus_message_get_flags(in) == KDBUS_MSG_SIGNAL);
	assert(kdbus_message_get_dst_id(in) == KDBUS_DST_ID_BROADCAST);
	check_text(in, "signal");
	in = kdbus_message_free(in);

	assert(kdbus_conn_remove_matches(b, 1) == 0);
	assert(kdbus_conn_remove_matches(b, 1) == -EBADSLT);
	assert(kdbus_conn_send(a, out) == 0);
	assert(kdbus_conn_recv(b, &in) == -EAGAIN);

	match = kdbus_match_free(match);
	assert(kdbus_match_new(&match) == 0);
	assert(kdbus_match_add_name_change(match, KDBUS_ITEM_ID_ADD, 0, 0, NULL) == -EINVAL);
	assert(kdbus_match_add_name_change(match, KDBUS_ITEM_NAME_ADD, KDBUS_MATCH_ID_ANY,
					   KDBUS_MATCH_ID_ANY, "com.example.b") == 0);
	assert(kdbus_conn_add_match(b, 2, 0, match) == 0);
	assert(kdbus_conn_acquire_name(a, "com.example.c", 0, NULL) == 0);
	assert(kdbus_conn_acquire_name(a, "com.example.b", 0, NULL) == 0);
	in = receive(b);
	assert(!strcmp(kdbus_item_get_name_change(kdbus_message_get_notification(in))->name,
		       "com.example.b"));
	in = kdbus_message_free(in);
	assert(kdbus_conn_recv(b, &in) == -EAGAIN);
}

static void test_lost(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL;
	struct kdbus_message *in;
	uint8_t filter[64] = {};
	size_t n = 0;
	int r;

	assert(kdbus_conn_add_match(b, 0, 0, NULL) == 0);
	out = message_to(KDBUS_DST_ID_BROADCAST, NULL);
	assert(kdbus_message_set_bloom_filter(out, 0, filter, sizeof(filter)) == 0);
	for (size_t i = 0; i < 300; ++i)
		assert(kdbus_conn_send(a, out) == 0);
	while ((r = kdbus_conn_recv(b, &in)) == 0) {
		kdbus_message_free(in);
		++n;
	}
	assert(r == -EAGAIN);
	assert(n == 256);
	assert(kdbus_conn_take_lost(b) == 300 - n);
	assert(kdbus_conn_take_lost(b) == 0);
}

static void test_update(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0);
	_cleanup_(kdbus_message_freep) struct kdbus_message *in = NULL;
	uint64_t flags = KDBUS_ATTACH_TIMESTAMP, bad = 1 << 14;

	assert(kdbus_conn_update(a, NULL, &bad, NULL) == -EINVAL);
	assert(kdbus_conn_update(a, NULL, &flags, NULL) == 0);
	send_text(a, kdbus_conn_get_id(a), "self");
	in = receive(a);
	assert(kdbus_message_get_item(in, KDBUS_ITEM_TIMESTAMP));
}

static void test_kinds(void)
{
	_cleanup_(kdbus_policy_freep) struct kdbus_policy *policy = NULL;
	struct kdbus_conn_options options = { .pool_size = 1 << 20 };
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *monitor = NULL, *activator = NULL,
						      *holder = NULL, *again = NULL,
						      *a = connect_with(0);
	struct kdbus_message *out, *in = NULL;

	options.flags = KDBUS_HELLO_MONITOR;
	assert(kdbus_conn_new(&monitor, kdbus_bus_get_path(bus), &options) == 0);
	send_text(a, kdbus_conn_get_id(a), "watched");
	in = receive(monitor);
	check_text(in, "watched");
	in = kdbus_message_free(in);
	assert(kdbus_conn_acquire_name(monitor, "com.example.m", 0, NULL) == -EOPNOTSUPP);

	options.flags = KDBUS_HELLO_ACTIVATOR;
	options.name = "com.example.activated";
	assert(kdbus_conn_new(&activator, kdbus_bus_get_path(bus), &options) == 0);
	assert(kdbus_conn_new(&again, kdbus_bus_get_path(bus), &options) == -EEXIST);
	out = message_to(0, "wake up");
	assert(kdbus_message_set_dst_name(out, options.name) == 0);
	assert(kdbus_conn_send(a, out) == 0);
	assert(kdbus_message_set_flags(out, KDBUS_MSG_NO_AUTO_START) == 0);
	assert(kdbus_conn_send(a, out) == -EADDRNOTAVAIL);
	out = kdbus_message_free(out);
	assert(kdbus_conn_peek(activator, &in) == 0);
	check_text(in, "wake up");
	in = kdbus_message_free(in);
	assert(kdbus_conn_drop(a) == 0);
	assert(kdbus_conn_acquire_name(a, options.name, 0, NULL) == 0);
	in = receive(a);
	check_text(in, "wake up");
	in = kdbus_message_free(in);

	assert(kdbus_policy_new(&policy) == 0);
	assert(kdbus_policy_add_name(policy, "com.example.*") == 0);
	assert(kdbus_policy_add_access(policy, KDBUS_POLICY_ACCESS_WORLD, 0, KDBUS_POLICY_TALK) ==
	       0);
	options.flags = KDBUS_HELLO_POLICY_HOLDER;
	options.name = NULL;
	options.policy = policy;
	assert(kdbus_conn_new(&holder, kdbus_bus_get_path(bus), &options) == 0);
	assert(kdbus_conn_new(&again, kdbus_bus_get_path(bus), &options) == -EEXIST);
	assert(kdbus_conn_recv(holder, &in) == -EOPNOTSUPP);
	policy = kdbus_policy_free(policy);
	assert(kdbus_policy_new(&policy) == 0);
	assert(kdbus_policy_add_name(policy, "com.example.x") == 0);
	options.policy = policy;
	assert(kdbus_conn_update(holder, NULL, NULL, policy) == 0);
	assert(kdbus_conn_new(&again, kdbus_bus_get_path(bus), &options) == -EEXIST);
}

static void test_endpoint(void)
{
	_cleanup_(kdbus_endpoint_freep) struct kdbus_endpoint *endpoint = NULL, *again = NULL;
	_cleanup_(kdbus_policy_freep) struct kdbus_policy *policy = NULL;
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *a = connect_with(0), *b = NULL;
	_cleanup_(kdbus_message_freep) struct kdbus_message *out = NULL, *in = NULL;
	char name[32];

	snprintf(name, sizeof(name), "%u-custom", geteuid());
	assert(kdbus_endpoint_new(&endpoint, kdbus_bus_get_path(bus), name, 0) == 0);
	assert(kdbus_endpoint_new(&again, kdbus_bus_get_path(bus), name, 0) == -EEXIST);
	assert(kdbus_endpoint_new(&again, kdbus_bus_get_path(bus), "custom", 0) == -EINVAL);
	assert(kdbus_conn_new(&b, kdbus_endpoint_get_path(endpoint), NULL) == 0);

	assert(kdbus_conn_acquire_name(a, "com.example.e", 0, NULL) == 0);
	out = message_to(0, "through");
	assert(kdbus_message_set_dst_name(out, "com.example.e") == 0);
	assert(kdbus_conn_send(b, out) == -EPERM);
	assert(kdbus_policy_new(&policy) == 0);
	assert(kdbus_policy_add_name(policy, "com.example.e") == 0);
	assert(kdbus_policy_add_access(policy, KDBUS_POLICY_ACCESS_USER, geteuid(),
				       KDBUS_POLICY_TALK) == 0);
	assert(kdbus_endpoint_update(endpoint, policy) == 0);
	assert(kdbus_conn_send(b, out) == 0);
	in = receive(a);
	check_text(in, "through");
	assert(kdbus_endpoint_update(endpoint, NULL) == 0);
	assert(kdbus_conn_send(b, out) == -EPERM);

	endpoint = kdbus_endpoint_free(endpoint);
	assert(kdbus_conn_wait(b, kdbus_deadline(PATIENCE)) == -ECONNRESET);
	assert(kdbus_conn_send(b, out) == -ECONNRESET);
}

static void test_end(void)
{
	struct kdbus_conn *a = connect_with(0), *b = connect_with(0);
	struct kdbus_message *in, *out = message_to(kdbus_conn_get_id(b), "stays");
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *c = connect_with(0);
	const void *data;
	size_t size;

	assert(kdbus_conn_send(a, out) == 0);
	assert(kdbus_conn_byebye(b) == -EBUSY);
	in = receive(b);
	assert(kdbus_message_get_part(in, 0, &data, &size) == 0);
	assert(kdbus_conn_byebye(b) == 0);
	assert(kdbus_conn_byebye(b) == -ECONNRESET);
	assert(kdbus_conn_send(a, out) == -ENXIO);
	assert(kdbus_conn_wait(b, kdbus_deadline(PATIENCE)) == -ECONNRESET);

	/* the message outlives its connection, the pointer too */
	b = kdbus_conn_free(b);
	check_text(in, "stays");
	assert(size == 5 && !memcmp(data, "stays", 5));
	in = kdbus_message_free(in);
	out = kdbus_message_free(out);

	/* free without byebye disconnects, even with a message in use */
	send_text(c, kdbus_conn_get_id(a), "kept");
	in = receive(a);
	out = message_to(kdbus_conn_get_id(a), "late");
	a = kdbus_conn_free(a);
	assert(kdbus_conn_send(c, out) == -ENXIO);
	check_text(in, "kept");
	kdbus_message_free(in);
	kdbus_message_free(out);
}

/* run in a child, which has to come to a good end */
static void in_child(void (*function)(void *userdata), void *userdata)
{
	int status;
	pid_t pid;

	pid = fork();
	assert(pid >= 0);
	if (pid == 0) {
		/* what hangs is to be seen as a signal, not as patience */
		alarm(PATIENCE / SECOND);
		function(userdata);
		_exit(EXIT_SUCCESS);
	}
	assert(waitpid(pid, &status, 0) == pid);
	assert(status == 0);
}

struct family {
	struct kdbus_conn *a, *b;
	struct kdbus_endpoint *endpoint;
	struct kdbus_message *in, *out;
};

/* all that would change what belongs to the parent */
static void child_tries(void *userdata)
{
	struct family *family = userdata;
	struct kdbus_conn *conn = family->b;
	struct kdbus_info_list *list;
	struct kdbus_message *in;
	uint64_t none = 0;

	assert(kdbus_conn_send(conn, family->out) == -ECHILD);
	assert(kdbus_conn_call(conn, family->out, 0, -1, &in) == -ECHILD);
	assert(kdbus_conn_reply(conn, family->in, family->out) == -ECHILD);
	assert(kdbus_conn_wait(conn, 0) == -ECHILD);
	assert(kdbus_conn_recv(conn, &in) == -ECHILD);
	assert(kdbus_conn_recv_priority(conn, 0, &in) == -ECHILD);
	assert(kdbus_conn_peek(conn, &in) == -ECHILD);
	assert(kdbus_conn_peek_priority(conn, 0, &in) == -ECHILD);
	assert(kdbus_conn_drop(conn) == -ECHILD);
	assert(kdbus_conn_take_lost(conn) == 0);
	assert(kdbus_conn_acquire_name(conn, "com.example.c", 0, NULL) == -ECHILD);
	assert(kdbus_conn_release_name(conn, "com.example.f") == -ECHILD);
	assert(kdbus_conn_list(conn, KDBUS_LIST_UNIQUE, &list) == -ECHILD);
	assert(kdbus_conn_info(conn, 1, NULL, 0, &list) == -ECHILD);
	assert(kdbus_conn_creator_info(conn, 0, &list) == -ECHILD);
	assert(kdbus_conn_add_match(conn, 1, 0, NULL) == -ECHILD);
	assert(kdbus_conn_remove_matches(conn, 0) == -ECHILD);
	assert(kdbus_conn_update(conn, &none, &none, NULL) == -ECHILD);
	assert(kdbus_conn_byebye(conn) == -ECHILD);
	assert(kdbus_endpoint_update(family->endpoint, NULL) == -ECHILD);

	/* what is known can be told, and what was received be read */
	assert(kdbus_conn_get_id(conn) > 0 && kdbus_conn_get_fd(conn) >= 0);
	check_text(family->in, "kept");
}

static void child_tidies_up(void *userdata)
{
	struct family *family = userdata;
	size_t n_open = count_fds();

	kdbus_conn_free(family->b);
	check_text(family->in, "kept");
	kdbus_message_free(family->in);
	kdbus_message_free(family->out);
	kdbus_conn_free(family->a);
	kdbus_endpoint_free(family->endpoint);
	kdbus_bus_free(bus);
	/* two connections, their sockets, endpoint, bus */
	assert(n_open - count_fds() == (plain ? 4 : 6));
}

static void child_has_a_child(void *userdata)
{
	in_child(child_tries, userdata);
	in_child(child_tidies_up, userdata);
	child_tidies_up(userdata);
}

static void child_connects(void *userdata)
{
	struct family *family = userdata;
	struct kdbus_conn *conn = connect_with(0);

	send_text(conn, kdbus_conn_get_id(family->b), "from the child");
	kdbus_conn_free(conn);
}

static void test_fork(void)
{
	_cleanup_(kdbus_match_freep) struct kdbus_match *signals = NULL;
	struct family family = { .a = connect_with(0), .b = connect_with(0) };
	struct kdbus_message *in;
	char name[32];

	snprintf(name, sizeof(name), "%u-forked", geteuid());
	assert(kdbus_endpoint_new(&family.endpoint, kdbus_bus_get_path(bus), name, 0) == 0);
	assert(kdbus_conn_acquire_name(family.b, "com.example.f", 0, NULL) == 0);
	assert(kdbus_match_new(&signals) == 0);
	assert(kdbus_match_add_src_id(signals, KDBUS_MATCH_ID_ANY) == 0);
	assert(kdbus_conn_add_match(family.b, 0, 0, signals) == 0);
	send_text(family.a, kdbus_conn_get_id(family.b), "kept");
	family.in = receive(family.b);
	send_text(family.a, kdbus_conn_get_id(family.b), "queued");
	family.out = message_to(kdbus_conn_get_id(family.a), "never");

	in_child(child_tries, &family);
	in_child(child_tidies_up, &family);
	in_child(child_has_a_child, &family);
	in_child(child_connects, &family);

	/* nothing took the place of the message, nothing was received or sent */
	check_text(family.in, "kept");
	in = receive(family.b);
	check_text(in, "queued");
	kdbus_message_free(in);
	in = receive(family.b);
	check_text(in, "from the child");
	kdbus_message_free(in);
	assert(kdbus_conn_recv(family.a, &in) == -EAGAIN);

	/* and all is still ours to use */
	assert(kdbus_conn_send(family.b, family.out) == 0);
	assert(kdbus_conn_acquire_name(family.b, "com.example.c", 0, NULL) == 0);
	assert(kdbus_conn_release_name(family.b, "com.example.f") == 0);
	assert(kdbus_conn_remove_matches(family.b, 0) == 0);
	assert(kdbus_endpoint_update(family.endpoint, NULL) == 0);
	child_tidies_up(&family);
	bus = NULL;
}

enum {
	N_SENDERS = 3,
	N_RECEIVERS = 3,
	N_MESSAGES = 100
};

struct crowd {
	struct kdbus_conn *conn;
	_Atomic unsigned int n_received;
	_Atomic unsigned int seen[N_SENDERS * N_MESSAGES];
	_Atomic unsigned int n_sender;
};

static void *crowd_send(void *userdata)
{
	struct crowd *crowd = userdata;
	unsigned int first = crowd->n_sender++ * N_MESSAGES;
	int r, memfd, fds[2];

	for (unsigned int n = first; n < first + N_MESSAGES; ++n) {
		struct kdbus_message *out = message_to(kdbus_conn_get_id(crowd->conn), NULL);

		assert(kdbus_message_append_data(out, &n, sizeof(n)) == 0);
		/* those with descriptors overtake those without */
		assert(kdbus_memfd_new_data(&memfd, NULL, &n, sizeof(n)) == 0);
		assert(pipe(fds) == 0);
		assert(write(fds[1], &n, sizeof(n)) == sizeof(n));
		if (n % 2)
			assert(kdbus_message_append_memfd(out, memfd, 0, sizeof(n)) == 0);
		if (n % 3)
			assert(kdbus_message_append_fds(out, fds, 1) == 0);
		do {
			r = kdbus_conn_send(crowd->conn, out);
			/* 16 descriptors, 256 messages at a time */
		} while (r == -EMFILE || r == -ENOBUFS);
		assert(r == 0);
		close(memfd);
		close(fds[0]);
		close(fds[1]);
		kdbus_message_free(out);
	}
	return NULL;
}

static void *crowd_receive(void *userdata)
{
	struct crowd *crowd = userdata;
	struct kdbus_message *in;
	unsigned int n, m;
	size_t size;
	int r, fd;

	while (crowd->n_received < N_SENDERS * N_MESSAGES) {
		r = kdbus_conn_wait(crowd->conn, kdbus_deadline(SECOND / 100));
		if (r == -ETIMEDOUT)
			continue;
		assert(r == 0);
		r = kdbus_conn_recv(crowd->conn, &in);
		if (r == -EAGAIN)
			continue;
		assert(r == 0);
		++crowd->n_received;
		assert(!kdbus_message_is_incomplete(in));
		assert(kdbus_message_copy(in, 0, &n, sizeof(n), &size) == 0 && size == sizeof(n));
		++crowd->seen[n];
		assert(kdbus_message_get_n_parts(in) == (n % 2 ? 2 : 1));
		assert(kdbus_message_get_n_fds(in) == (n % 3 ? 1 : 0));
		if (n % 2) {
			assert(kdbus_message_copy(in, sizeof(n), &m, sizeof(m), &size) == 0);
			assert(size == sizeof(m) && m == n);
		}
		if (n % 3) {
			assert(kdbus_message_get_fd(in, 0, &fd) == 0);
			assert(read(fd, &m, sizeof(m)) == sizeof(m) && m == n);
		}
		kdbus_message_free(in);
	}
	return NULL;
}

static void test_threads(void)
{
	static struct crowd crowd;
	pthread_t threads[N_SENDERS + N_RECEIVERS];
	size_t n_open = count_fds();

	crowd.conn = connect_with(0);
	for (size_t i = 0; i < N_SENDERS + N_RECEIVERS; ++i)
		assert(pthread_create(&threads[i], NULL, i < N_SENDERS ? crowd_send : crowd_receive,
				      &crowd) == 0);
	for (size_t i = 0; i < N_SENDERS + N_RECEIVERS; ++i)
		assert(pthread_join(threads[i], NULL) == 0);
	for (size_t i = 0; i < N_SENDERS * N_MESSAGES; ++i)
		assert(crowd.seen[i] == 1);
	crowd.conn = kdbus_conn_free(crowd.conn);
	assert(count_fds() == n_open);
}

#define TEST(_name) { #_name, test_##_name }

static const struct {
	const char *name;
	void (*function)(void);
} tests[] = {
	TEST(hello),
	TEST(unicast),
	TEST(slices_are_freed),
	TEST(forward),
	TEST(peek_drop_priority),
	TEST(fds),
	TEST(accept_fd),
	TEST(call),
	TEST(interrupted_call),
	TEST(many),
	TEST(reply_recv),
	TEST(names),
	TEST(info),
	TEST(signals),
	TEST(lost),
	TEST(update),
	TEST(kinds),
	TEST(endpoint),
	TEST(end),
	TEST(fork),
	TEST(threads),
};

/* client: list the tests; client MOUNTPOINT TEST: run one */
int main(int argc, char **argv)
{
	struct kdbus_bus_options options = {
		.flags = KDBUS_MAKE_ACCESS_WORLD,
		.attach_flags = _KDBUS_ATTACH_ALL,
	};
	struct kdbus_bus *again;
	char name[64];

	if (argc == 1) {
		for (size_t i = 0; i < sizeof(tests) / sizeof(*tests); ++i)
			puts(tests[i].name);
		return 0;
	}
	assert(argc == 3);

	snprintf(name, sizeof(name), "%u-client-%u", geteuid(), getpid());
	assert(kdbus_bus_new(&bus, argv[1], name, &options) == 0);
	assert(kdbus_bus_new(&again, argv[1], name, &options) == -EEXIST);
	assert(kdbus_bus_new(&again, argv[1], "nobody", &options) == -EINVAL);
	assert(access(kdbus_bus_get_path(bus), F_OK) == 0);

	for (size_t i = 0; i < sizeof(tests) / sizeof(*tests); ++i) {
		if (!strcmp(tests[i].name, argv[2])) {
			tests[i].function();
			kdbus_bus_free(bus);
			return 0;
		}
	}
	return 1;
}
