// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * AF_UNIX, SOCK_SEQPACKET: from process to process, with nobody between
 */

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "peer.h"

#define SOCKET_BUFFER (8 << 20)

typedef union Control {
	struct cmsghdr header;
	uint8_t bytes[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
} Control;

static int *receivers; /* the client's ends: of the server, or of all receivers */
static uint8_t *out, *in;

bool peer_can(void)
{
	return job.operation != CONNECTIONS && job.operation != NAMES && job.operation != MATCHES;
}

void peer_prepare(void)
{
	out = buffer_new(job.operation == STREAM ? TO_COUNT : TO_ECHO);
	in = buffer_new(0);
}

static struct sockaddr_un address_of(size_t index)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	snprintf(address.sun_path, sizeof(address.sun_path), "%s/unix-%zu", job.address, index);
	return address;
}

static void socket_prepare(int fd)
{
	int size = SOCKET_BUFFER, one = 1;

	check_errno(setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)), "SO_SNDBUF");
	if (job.operation == CREDENTIALS)
		check_errno(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &one, sizeof(one)),
			    "SO_PASSCRED");
}

static void message_send(int fd, const void *data, size_t n, int passed)
{
	Control control = {};
	struct iovec iov = { (void *)data, n };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (passed >= 0) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int));
		control.header = (struct cmsghdr){
			.cmsg_level = SOL_SOCKET,
			.cmsg_type = SCM_RIGHTS,
			.cmsg_len = CMSG_LEN(sizeof(int)),
		};
		memcpy(CMSG_DATA(&control.header), &passed, sizeof(int));
	}
	check_errno(sendmsg(fd, &msg, 0), "sendmsg");
}

/* returns the length; 0 at the end */
static size_t message_recv(int fd, void *data, int *passedp)
{
	Control control;
	struct iovec iov = { data, BUFFER_SIZE };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	bool told = false;
	ssize_t n;

	*passedp = -1;
	n = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);
	check_errno(n, "recvmsg");
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_type == SCM_RIGHTS)
			memcpy(passedp, CMSG_DATA(c), sizeof(int));
		else if (c->cmsg_type == SCM_CREDENTIALS)
			told = ((struct ucred *)CMSG_DATA(c))->pid > 0;
	}
	if (n && job.operation == CREDENTIALS && !told)
		errx(EXIT_FAILURE, "no credentials");
	return n;
}

static void serve_one(int fd)
{
	uint64_t n_counted = 0;
	size_t n;
	int passed;

	while ((n = message_recv(fd, in, &passed))) {
		if (passed >= 0) {
			if (job.operation == MEMFD)
				memfd_check(passed);
			close(passed);
			message_send(fd, in, 1, -1);
		} else if (job.operation == BROADCAST) {
			broadcast_received();
		} else if (in[0] == TO_COUNT) {
			++n_counted;
		} else if (in[0] == TO_TELL) {
			message_send(fd, &n_counted, sizeof(n_counted), -1);
			n_counted = 0;
		} else {
			message_send(fd, in, n, -1);
		}
	}
}

_Noreturn void peer_serve(size_t index)
{
	struct sockaddr_un address = address_of(index);
	int listener, fd;

	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	check_errno(listener, "socket");
	unlink(address.sun_path);
	check_errno(bind(listener, (struct sockaddr *)&address, sizeof(address)), "bind");
	check_errno(listen(listener, 16), "listen");
	server_ready();
	for (;;) {
		fd = accept(listener, NULL, NULL);
		check_errno(fd, "accept");
		socket_prepare(fd);
		serve_one(fd);
		close(fd);
	}
}

static int socket_connect(size_t index)
{
	struct sockaddr_un address = address_of(index);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	check_errno(fd, "socket");
	socket_prepare(fd);
	check_errno(connect(fd, (struct sockaddr *)&address, sizeof(address)), "connect");
	return fd;
}

void peer_open(void)
{
	receivers = calloc(job.n_servers, sizeof(*receivers));
	if (!receivers)
		err(EXIT_FAILURE, "calloc");
	for (size_t i = 0; i < job.n_servers; ++i)
		receivers[i] = socket_connect(i);
}

void peer_crowd(size_t n)
{
	(void)n;
}

static void echo(int fd)
{
	int passed;

	message_send(fd, out, job.size, -1);
	echo_check(in, message_recv(fd, in, &passed));
}

static void stream(int fd)
{
	static const uint8_t tell = TO_TELL;
	uint64_t n;
	int passed;

	for (size_t i = 0; i < job.n_messages; ++i)
		message_send(fd, out, job.size, -1);
	message_send(fd, &tell, 1, -1);
	message_recv(fd, in, &passed);
	memcpy(&n, in, sizeof(n));
	if (n != job.n_messages)
		errx(EXIT_FAILURE, "messages were lost");
}

static void broadcast(void)
{
	broadcast_arm();
	for (size_t i = 0; i < job.n_servers; ++i)
		message_send(receivers[i], out, job.size, -1);
	broadcast_wait();
}

void peer_once(void)
{
	int fd, passed;

	switch (job.operation) {
	case STREAM:
		stream(receivers[0]);
		break;
	case BROADCAST:
		broadcast();
		break;
	case DESCRIPTOR:
	case MEMFD:
		fd = job.operation == MEMFD ? memfd_get() : descriptor_get();
		message_send(receivers[0], out, job.size, fd);
		message_recv(receivers[0], in, &passed);
		break;
	case CONNECT:
		fd = socket_connect(0);
		echo(fd);
		close(fd);
		break;
	default:
		echo(receivers[0]);
	}
}
