/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * kdbus-recv ENDPOINT NAME: receive one message over kdbus
 *
 * With nothing but <linux/kdbus.h>: open an endpoint, say hello, map the pool,
 * take a well-known name, wait, and find message, sender and credentials in the
 * pool. A receiver gets the metadata that it asked for, and the bus vouches for
 * it.
 */

#include <err.h>
#include <fcntl.h>
#include <linux/kdbus.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define POOL_SIZE (1 << 20)

static void pool_free(int fd, __u64 offset)
{
	struct kdbus_cmd_free cmd = { .size = sizeof(cmd), .offset = offset };

	if (ioctl(fd, KDBUS_CMD_FREE, &cmd) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_FREE");
}

static void name_acquire(int fd, const char *name)
{
	union {
		struct kdbus_cmd cmd;
		char bytes[512];
	} acquire = {};
	struct kdbus_item *item = acquire.cmd.items;
	size_t size = strlen(name) + 1;

	if (size > 256)
		errx(EXIT_FAILURE, "%s: too long", name);

	item->size = offsetof(struct kdbus_item, str) + size;
	item->type = KDBUS_ITEM_NAME;
	memcpy(item->str, name, size);
	acquire.cmd.size = sizeof(acquire.cmd) + item->size;
	if (ioctl(fd, KDBUS_CMD_NAME_ACQUIRE, &acquire) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_NAME_ACQUIRE %s", name);
}

static void print_message(const struct kdbus_msg *msg)
{
	const char *end = (const char *)msg + msg->size;
	const struct kdbus_item *item, *creds = NULL, *pids = NULL;
	__u64 length = 0;

	printf("message: ");
	for (item = msg->items; (const char *)item < end;
	     item = (const void *)((const char *)item + ((item->size + 7) & ~7ULL))) {
		switch (item->type) {
		case KDBUS_ITEM_PAYLOAD_OFF:
			fwrite((const char *)msg + item->vec.offset, 1, item->vec.size, stdout);
			length += item->vec.size;
			break;
		case KDBUS_ITEM_CREDS:
			creds = item;
			break;
		case KDBUS_ITEM_PIDS:
			pids = item;
			break;
		}
	}

	printf("\nlength: %llu\nsender: connection %llu\n", length, msg->src_id);
	if (creds && pids)
		printf("credentials: pid %llu, uid %llu, gid %llu\n", pids->pids.pid,
		       creds->creds.euid, creds->creds.egid);
}

int main(int argc, char **argv)
{
	struct kdbus_cmd_hello hello = {
		.size = sizeof(hello),
		.attach_flags_recv = KDBUS_ATTACH_CREDS | KDBUS_ATTACH_PIDS,
		.pool_size = POOL_SIZE,
	};
	struct kdbus_cmd_recv recv = { .size = sizeof(recv) };
	struct pollfd pfd = { .events = POLLIN };
	const char *pool;

	if (argc != 3)
		errx(EXIT_FAILURE, "usage: kdbus-recv ENDPOINT NAME");

	pfd.fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (pfd.fd < 0)
		err(EXIT_FAILURE, "%s", argv[1]);
	if (ioctl(pfd.fd, KDBUS_CMD_HELLO, &hello) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_HELLO");
	pool = mmap(NULL, POOL_SIZE, PROT_READ, MAP_SHARED, pfd.fd, 0);
	if (pool == MAP_FAILED)
		err(EXIT_FAILURE, "mmap");
	/* it told of the bus's bloom parameters, which are not needed here */
	pool_free(pfd.fd, hello.offset);
	name_acquire(pfd.fd, argv[2]);
	printf("ready: %s\n", argv[2]);
	fflush(stdout);

	if (poll(&pfd, 1, -1) < 0)
		err(EXIT_FAILURE, "poll");
	if (ioctl(pfd.fd, KDBUS_CMD_RECV, &recv) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_RECV");
	print_message((const void *)(pool + recv.msg.offset));
	pool_free(pfd.fd, recv.msg.offset);

	munmap((void *)pool, POOL_SIZE);
	close(pfd.fd);
	return EXIT_SUCCESS;
}
