/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* flood ENDPOINT THREADS: each thread asks its own connection for a message that is not there, for
 * as long as standard input is open. */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/kdbus.h>

static const char *path;

static void *run(void *unused)
{
	struct kdbus_cmd_hello hello = { .size = sizeof(hello), .pool_size = 4096 };
	struct kdbus_cmd_recv recv = { .size = sizeof(recv) };
	int fd = open(path, O_RDWR | O_CLOEXEC);

	(void)unused;
	if (fd < 0 || ioctl(fd, KDBUS_CMD_HELLO, &hello) < 0)
		_exit(1);
	for (;;)
		ioctl(fd, KDBUS_CMD_RECV, &recv);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	char c;

	if (argc != 3)
		return 2;
	path = argv[1];
	for (int i = 0; i < atoi(argv[2]); i++)
		if (pthread_create(&thread, NULL, run, NULL))
			return 1;
	puts("up");
	fflush(stdout);
	return read(0, &c, 1) < 0;
}
