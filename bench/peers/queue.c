// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * POSIX message queues, mq_overview(7): one to the server, one back
 */

#include <fcntl.h>
#include <mqueue.h>
#include <stdio.h>
#include <unistd.h>
#include "peer.h"

#define MESSAGE_MAX (8L << 10) /* of msgsize_max, as it is unless changed */

static mqd_t queues[2]; /* to the server, to the client */
static uint8_t *out, *in;

bool peer_can(void)
{
	return (job.operation == ECHO || job.operation == STREAM) && job.size <= MESSAGE_MAX;
}

void peer_prepare(void)
{
	struct mq_attr attr = { .mq_maxmsg = 10, .mq_msgsize = MESSAGE_MAX };
	char name[64];

	out = buffer_new(job.operation == STREAM ? TO_COUNT : TO_ECHO);
	in = buffer_new(0);
	for (size_t i = 0; i < 2; ++i) {
		snprintf(name, sizeof(name), "/kdbusfs-bench-%d-%zu", getpid(), i);
		queues[i] = mq_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600, &attr);
		check_errno(queues[i], "mq_open");
		mq_unlink(name); /* it lives on in us and our server */
	}
}

static size_t message_recv(mqd_t queue)
{
	ssize_t n = mq_receive(queue, (char *)in, BUFFER_SIZE, NULL);

	check_errno(n, "mq_receive");
	return n;
}

static void message_send(mqd_t queue, const void *data, size_t n)
{
	check_errno(mq_send(queue, data, n, 0), "mq_send");
}

_Noreturn void peer_serve(size_t index)
{
	uint64_t n_counted = 0;
	size_t n;

	(void)index;
	server_ready();
	for (;;) {
		n = message_recv(queues[0]);
		if (in[0] == TO_COUNT) {
			++n_counted;
		} else if (in[0] == TO_TELL) {
			message_send(queues[1], &n_counted, sizeof(n_counted));
			n_counted = 0;
		} else {
			message_send(queues[1], in, n);
		}
	}
}

void peer_open(void)
{
}

void peer_crowd(size_t n)
{
	(void)n;
}

void peer_once(void)
{
	static const uint8_t tell = TO_TELL;
	uint64_t n;

	for (size_t i = 0; i < job.n_messages; ++i)
		message_send(queues[0], out, job.size);
	if (job.operation == ECHO) {
		echo_check(in, message_recv(queues[1]));
		return;
	}
	message_send(queues[0], &tell, 1);
	message_recv(queues[1]);
	memcpy(&n, in, sizeof(n));
	if (n != job.n_messages)
		errx(EXIT_FAILURE, "messages were lost");
}
