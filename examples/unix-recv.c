/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * unix-recv PATH: receive one message over AF_UNIX
 *
 * The example that everyone knows, to hold the others against: a datagram
 * socket with a name in the filesystem, and the sender's credentials, vouched
 * for by the kernel, as ancillary data. See unix(7).
 */

#include <err.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void print_credentials(struct msghdr *message)
{
	struct ucred creds;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_CREDENTIALS)
			continue;
		memcpy(&creds, CMSG_DATA(c), sizeof(creds));
		printf("credentials: pid %d, uid %u, gid %u\n", creds.pid, creds.uid, creds.gid);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX }, sender = {};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(struct ucred))];
	} control;
	char text[4096];
	struct iovec iov = { .iov_base = text, .iov_len = sizeof(text) };
	struct msghdr message = {
		.msg_name = &sender,
		.msg_namelen = sizeof(sender),
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t size;
	int fd;

	if (argc != 2 || strlen(argv[1]) >= sizeof(address.sun_path))
		errx(EXIT_FAILURE, "usage: unix-recv PATH");
	strcpy(address.sun_path, argv[1]);

	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		err(EXIT_FAILURE, "socket");
	if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, sizeof(int)) < 0)
		err(EXIT_FAILURE, "SO_PASSCRED");
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		err(EXIT_FAILURE, "%s", argv[1]);
	printf("ready: %s\n", argv[1]);
	fflush(stdout);

	size = recvmsg(fd, &message, 0);
	if (size < 0)
		err(EXIT_FAILURE, "recvmsg");

	/* an address that the kernel chose starts with a NUL */
	printf("message: %.*s\nlength: %zd\nsender: @%.*s\n", (int)size, text, size,
	       (int)(message.msg_namelen - offsetof(struct sockaddr_un, sun_path) - 1),
	       sender.sun_path + 1);
	print_credentials(&message);

	close(fd);
	unlink(argv[1]);
	return EXIT_SUCCESS;
}
