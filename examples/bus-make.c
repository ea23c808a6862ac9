/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * bus-make MOUNTPOINT NAME: make a bus, and keep it until a signal ends us
 *
 * The bus is called UID-NAME, and its default endpoint UID-NAME/bus. It is there
 * as long as the descriptor that it was made with, which the end of a process
 * closes like all others. See kdbus.bus(7).
 */

#include <err.h>
#include <fcntl.h>
#include <linux/kdbus.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* append an item behind the command, at the next multiple of 8 */
static void append(struct kdbus_cmd *cmd, __u64 type, const void *data, size_t size)
{
	struct kdbus_item *item;

	cmd->size = (cmd->size + 7) & ~7ULL;
	item = (struct kdbus_item *)((char *)cmd + cmd->size);
	item->size = offsetof(struct kdbus_item, data) + size;
	item->type = type;
	memcpy(item->data, data, size);
	cmd->size += item->size;
}

int main(int argc, char **argv)
{
	struct kdbus_bloom_parameter bloom = { .size = 64, .n_hash = 8 };
	union {
		struct kdbus_cmd cmd;
		char bytes[512];
	} make = { .cmd.size = sizeof(make.cmd) };
	char name[64], path[4096];
	int fd;

	if (argc != 3)
		errx(EXIT_FAILURE, "usage: bus-make MOUNTPOINT NAME");
	if (snprintf(name, sizeof(name), "%u-%s", geteuid(), argv[2]) >= (int)sizeof(name))
		errx(EXIT_FAILURE, "%s: too long", argv[2]);

	snprintf(path, sizeof(path), "%s/control", argv[1]);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		err(EXIT_FAILURE, "%s", path);

	append(&make.cmd, KDBUS_ITEM_MAKE_NAME, name, strlen(name) + 1);
	append(&make.cmd, KDBUS_ITEM_BLOOM_PARAMETER, &bloom, sizeof(bloom));
	if (ioctl(fd, KDBUS_CMD_BUS_MAKE, &make) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_BUS_MAKE %s", name);
	printf("ready: %s/%s/bus\n", argv[1], name);
	fflush(stdout);

	for (;;)
		pause();
}
