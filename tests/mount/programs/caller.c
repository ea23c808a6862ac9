/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Makes synchronous calls and says how they end.
 *
 * usage: caller ENDPOINT ID once NONE|RESTART|PLAIN MILLISECONDS
 *            One call with cookie 1, with a handler for SIGUSR1 that was installed with SA_RESTART,
 *            without it, or none at all. Prints "ready", then per attempt the errno of the call and
 *            how often the handler has run; after EINTR it makes the same call again.
 *        caller ENDPOINT ID threads N MILLISECONDS
 *            N threads with a call each, cookies 1 to N, on one connection. Prints "ready", and at
 *            the end N lines: cookie, errno, and the cookie_reply of the reply or 0.
 *        caller ENDPOINT ID storm N MILLISECONDS
 *            N calls one after the other in each of three threads, while signals are sent to the
 *            process, handled, ignored, or taken by a thread of its own, whoever is first. Prints
 *            "ready", and at the end each errno that came, once.
 *        caller ENDPOINT ID byebye - MILLISECONDS
 *            One call, while another thread says BYEBYE as soon as there is a byte on stdin. Prints
 *            the errno of the call and of BYEBYE.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kdbus.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define POOL_SIZE (1 << 20)
#define MAX_THREADS 128

struct call {
	uint64_t cookie;
	int error;
	uint64_t cookie_reply;
};

static volatile sig_atomic_t n_signals;
static uint64_t destination, deadline;
static const char *pool;
static int bus;

static void on_signal(int number)
{
	(void)number;
	n_signals++;
}

static void *make_call(void *argument)
{
	struct call *call = argument;
	struct kdbus_msg msg = {
		.size = sizeof(msg),
		.flags = KDBUS_MSG_EXPECT_REPLY,
		.dst_id = destination,
		.payload_type = KDBUS_PAYLOAD_DBUS,
		.cookie = call->cookie,
		.timeout_ns = deadline,
	};
	struct kdbus_cmd_send cmd = {
		.size = sizeof(cmd),
		.flags = KDBUS_SEND_SYNC_REPLY,
		.msg_address = (uintptr_t)&msg,
	};

	call->error = ioctl(bus, KDBUS_CMD_SEND, &cmd) < 0 ? errno : 0;
	call->cookie_reply = 0;
	if (!call->error) {
		struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free),
						   .offset = cmd.reply.offset };
		const struct kdbus_msg *reply = (const void *)(pool + cmd.reply.offset);

		call->cookie_reply = reply->cookie_reply;
		if (ioctl(bus, KDBUS_CMD_FREE, &cmd_free) < 0)
			call->error = -errno;
	}
	return NULL;
}

static int once(const char *handler)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct call call = { .cookie = 1 };

	if (!strcmp(handler, "RESTART"))
		action.sa_flags = SA_RESTART;
	if (strcmp(handler, "NONE") && sigaction(SIGUSR1, &action, NULL) < 0)
		return 1;
	printf("ready\n");
	fflush(stdout);
	do {
		make_call(&call);
		printf("%d %d\n", call.error, (int)n_signals);
		fflush(stdout);
	} while (call.error == EINTR);
	return 0;
}

static int many(int n)
{
	pthread_t threads[MAX_THREADS];
	struct call calls[MAX_THREADS];

	if (n > MAX_THREADS)
		return 2;
	printf("ready\n");
	fflush(stdout);
	for (int i = 0; i < n; i++) {
		calls[i].cookie = i + 1;
		if (pthread_create(&threads[i], NULL, make_call, &calls[i]))
			return 1;
	}
	for (int i = 0; i < n; i++) {
		pthread_join(threads[i], NULL);
		printf("%llu %d %llu\n", (unsigned long long)calls[i].cookie, calls[i].error,
		       (unsigned long long)calls[i].cookie_reply);
	}
	return 0;
}

static atomic_bool seen[1024], is_over;
static int n_calls;

static void *make_calls(void *argument)
{
	struct call call = { .cookie = (uintptr_t)argument };

	for (int i = 0; i < n_calls; i++, call.cookie += 8) {
		do {
			make_call(&call);
			seen[call.error & 1023] = true;
		} while (call.error == EINTR);
	}
	return NULL;
}

static void *take_signals(void *argument)
{
	struct timespec moment = { 0, 100000 };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	while (!is_over)
		sigtimedwait(&set, NULL, &moment);
	return argument;
}

static void *send_signals(void *argument)
{
	struct sigaction actions[] = {
		{ .sa_handler = on_signal },
		{ .sa_handler = on_signal, .sa_flags = SA_RESTART },
		{ .sa_handler = SIG_IGN },
	};
	struct timespec moment = { 0, 50000 };

	for (unsigned int i = 0; !is_over; i++) {
		sigaction(SIGUSR1, &actions[i / 3 % 3], NULL);
		kill(getpid(), SIGUSR1);
		nanosleep(&moment, NULL);
	}
	return argument;
}

static int storm(int n)
{
	struct sigaction ignore = { .sa_handler = SIG_IGN };
	pthread_t threads[5];

	n_calls = n;
	sigaction(SIGUSR1, &ignore, NULL);
	printf("ready\n");
	fflush(stdout);
	for (int i = 0; i < 5; i++) {
		void *(*run)(void *) = i < 3 ? make_calls : i == 3 ? take_signals : send_signals;

		if (pthread_create(&threads[i], NULL, run, (void *)(uintptr_t)(i + 1)))
			return 1;
	}
	for (int i = 0; i < 5; i++) {
		is_over = i >= 3;
		pthread_join(threads[i], NULL);
	}
	for (int i = 0; i < 1024; i++)
		if (seen[i])
			printf("%d\n", i);
	return 0;
}

static int leave(void)
{
	struct kdbus_cmd cmd = { .size = sizeof(cmd) };
	struct call call = { .cookie = 1 };
	pthread_t thread;
	int error;
	char byte;

	if (pthread_create(&thread, NULL, make_call, &call))
		return 1;
	printf("ready\n");
	fflush(stdout);
	if (read(0, &byte, 1) < 0)
		return 1;
	error = ioctl(bus, KDBUS_CMD_BYEBYE, &cmd) < 0 ? errno : 0;
	pthread_join(thread, NULL);
	printf("%d %d\n", call.error, error);
	return 0;
}

int main(int argc, char **argv)
{
	struct kdbus_cmd_hello hello = { .size = sizeof(hello), .pool_size = POOL_SIZE };
	struct timespec now;

	if (argc != 6)
		return 2;
	bus = open(argv[1], O_RDWR | O_CLOEXEC);
	if (bus < 0 || ioctl(bus, KDBUS_CMD_HELLO, &hello) < 0)
		return 1;
	pool = mmap(NULL, POOL_SIZE, PROT_READ, MAP_SHARED, bus, 0);
	if (pool == MAP_FAILED)
		return 1;
	destination = strtoull(argv[2], NULL, 10);
	clock_gettime(CLOCK_MONOTONIC, &now);
	deadline = now.tv_sec * 1000000000ULL + now.tv_nsec + atoll(argv[5]) * 1000000ULL;
	if (!strcmp(argv[3], "once"))
		return once(argv[4]);
	if (!strcmp(argv[3], "threads"))
		return many(atoi(argv[4]));
	if (!strcmp(argv[3], "storm"))
		return storm(atoi(argv[4]));
	return leave();
}
