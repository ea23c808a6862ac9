/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * unix-send PATH: send "foobar" over AF_UNIX, see unix-recv.c
 */

#include <err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	if (argc != 2 || strlen(argv[1]) >= sizeof(address.sun_path))
		errx(EXIT_FAILURE, "usage: unix-send PATH");
	strcpy(address.sun_path, argv[1]);

	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		err(EXIT_FAILURE, "socket");
	/* no path: the kernel chooses an address, so that the receiver sees one */
	if (bind(fd, (struct sockaddr *)&(struct sockaddr_un){ .sun_family = AF_UNIX },
		 sizeof(sa_family_t)) < 0)
		err(EXIT_FAILURE, "bind");
	if (sendto(fd, "foobar", 6, 0, (struct sockaddr *)&address, sizeof(address)) < 0)
		err(EXIT_FAILURE, "%s", argv[1]);

	close(fd);
	return EXIT_SUCCESS;
}
