// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Two pipes: the same bytes there and back, with both ends knowing how many
 */

#include <fcntl.h>
#include <unistd.h>
#include "peer.h"

#define PIPE_BYTES (1 << 20)

static int to_server[2], to_client[2];
static uint8_t *out, *in;

bool peer_can(void)
{
	return job.operation == ECHO || job.operation == STREAM;
}

void peer_prepare(void)
{
	out = buffer_new(TO_ECHO);
	in = buffer_new(0);
	check_errno(pipe(to_server), "pipe");
	check_errno(pipe(to_client), "pipe");
	fcntl(to_server[1], F_SETPIPE_SZ, PIPE_BYTES);
	fcntl(to_client[1], F_SETPIPE_SZ, PIPE_BYTES);
}

static void read_all(int fd, size_t n)
{
	ssize_t l;

	for (size_t done = 0; done < n; done += l) {
		l = read(fd, in + done, n - done);
		check_errno(l, "read");
		if (!l)
			_exit(EXIT_SUCCESS);
	}
}

static void write_all(int fd, const uint8_t *data, size_t n)
{
	ssize_t l;

	for (size_t done = 0; done < n; done += l) {
		l = write(fd, data + done, n - done);
		check_errno(l, "write");
	}
}

/* in a stream one byte comes back once all are there */
_Noreturn void peer_serve(size_t index)
{
	(void)index;
	close(to_server[1]);
	server_ready();
	for (;;) {
		for (size_t i = 0; i < job.n_messages; ++i)
			read_all(to_server[0], job.size);
		write_all(to_client[1], in, job.operation == STREAM ? 1 : job.size);
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
	for (size_t i = 0; i < job.n_messages; ++i)
		write_all(to_server[1], out, job.size);
	if (job.operation == STREAM) {
		read_all(to_client[0], 1);
		return;
	}
	read_all(to_client[0], job.size);
	echo_check(in, job.size);
}
