// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A bystander: one who only wants to be served
 *
 * bystander MOUNT SECONDS UID
 *
 * It makes a bus of its own and calls there, on and on, with a pause of a
 * millisecond between rounds. In the end it prints, for each kind of call, how
 * long it took. A call that does not return for another ten seconds counts with
 * that time, and is said to be unfinished.
 */

#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "connection.h"

#define SAMPLES_MAX 1000000
#define PAUSE_NS 1000000
#define GRACE_SECONDS 10

enum {
	OPEN,
	RECV,
	MESSAGE,
	_OPERATION_N
};

static const char *const operations[] = { "open", "recv", "message" };

static struct Bystander {
	char control[4096];
	Connection connection;
	Message message;
	Sample samples[_OPERATION_N];
	_Atomic int current; /* operation under way, or -1 */
	_Atomic uint64_t since_ns;
	_Atomic bool stop;
} bystander = { .connection = CONNECTION_NULL, .current = -1 };

static int do_open(struct Bystander *b)
{
	int fd;

	fd = open(b->control, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;

	close(fd);
	return 0;
}

static int do_recv(struct Bystander *b)
{
	Received received;
	int r;

	r = connection_recv(&b->connection, NULL, &received);
	return r == -EAGAIN ? 0 : r < 0 ? r : -EBADMSG;
}

static int do_message(struct Bystander *b)
{
	Received received;
	int r;

	r = connection_send(&b->connection, NULL, &b->message, 0, NULL);
	if (r >= 0)
		r = connection_recv(&b->connection, NULL, &received);
	if (r >= 0)
		r = connection_free(&b->connection, NULL, received.offset);

	return r;
}

static int (*const functions[])(struct Bystander *) = { do_open, do_recv, do_message };

static void *measure(void *userdata)
{
	const struct timespec pause = { .tv_nsec = PAUSE_NS };
	struct Bystander *b = userdata;
	int i, r;

	while (!b->stop) {
		for (i = 0; i < _OPERATION_N; ++i) {
			b->since_ns = now_ns();
			b->current = i;
			r = functions[i](b);
			b->current = -1;
			sample_add(&b->samples[i], now_ns() - b->since_ns);
			if (r < 0) {
				fail(operations[i], r);
				_exit(1);
			}
		}
		nanosleep(&pause, NULL);
	}

	return NULL;
}

static int bystander_init(struct Bystander *b, const char *mount)
{
	static const uint8_t payload[64];
	char path[4096];
	int i, r, fd;

	for (i = 0; i < _OPERATION_N; ++i) {
		r = sample_init(&b->samples[i], SAMPLES_MAX);
		if (r < 0)
			return r;
	}

	snprintf(b->control, sizeof(b->control), "%s/control", mount);
	r = bus_make(&fd, path, sizeof(path), mount, "bystander", 0); /* kept until the end */
	if (!r)
		r = connection_init(&b->connection, path, 1 << 20, 0, 0, NULL);
	if (!r)
		r = message_init(&b->message, b->connection.id, 0);
	if (!r)
		message_add_payload(&b->message, payload, sizeof(payload));

	return r;
}

static void print_samples(struct Bystander *b)
{
	int i, current = b->current;
	uint64_t now = now_ns();
	Sample sample;

	for (i = 0; i < _OPERATION_N; ++i) {
		sample = b->samples[i];
		if (i == current)
			sample_add(&sample, now - b->since_ns);
		printf("{\"operation\": \"%s\", \"samples\": %zu, \"median_ns\": %" PRIu64
		       ", \"p99_ns\": %" PRIu64 ", \"worst_ns\": %" PRIu64
		       ", \"unfinished\": %s}\n",
		       operations[i], sample.n_ns, sample_quantile(&sample, 50),
		       sample_quantile(&sample, 99), sample_quantile(&sample, 100),
		       i == current ? "true" : "false");
	}
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct Bystander *b = &bystander;
	struct timespec until;
	pthread_t thread;
	unsigned int uid;

	if (argc != 4) {
		fprintf(stderr, "usage: %s MOUNT SECONDS UID\n", argv[0]);
		return 2;
	}

	uid = atoi(argv[3]);
	if (setgroups(0, NULL) < 0 || setresgid(uid, uid, uid) < 0 ||
	    setresuid(uid, uid, uid) < 0) {
		perror("setresuid");
		return 1;
	}
	if (bystander_init(b, argv[1]) < 0)
		return 1;

	puts("ready");
	fflush(stdout);
	if (getchar() != '\n')
		return 1;
	if (pthread_create(&thread, NULL, measure, b))
		return 1;

	usleep(atof(argv[2]) * 1e6);
	b->stop = true;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += GRACE_SECONDS;
	(void)pthread_timedjoin_np(thread, NULL, &until);
	print_samples(b);
	_exit(0); /* the thread may be in a call that does not return */
}
