/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * kdbus-send ENDPOINT NAME: send "foobar" over kdbus, see kdbus-recv.c
 *
 * A sender that expects no answer never looks into its pool, and need not map
 * it.
 */

#include <err.h>
#include <fcntl.h>
#include <linux/kdbus.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const char text[] = "foobar";

/* append an item to the message, at the next multiple of 8 */
static struct kdbus_item *append(struct kdbus_msg *msg, __u64 type, size_t size)
{
	struct kdbus_item *item;

	msg->size = (msg->size + 7) & ~7ULL;
	item = (struct kdbus_item *)((char *)msg + msg->size);
	item->size = offsetof(struct kdbus_item, data) + size;
	item->type = type;
	msg->size += item->size;
	return item;
}

int main(int argc, char **argv)
{
	struct kdbus_cmd_hello hello = { .size = sizeof(hello), .pool_size = 1 << 20 };
	union {
		struct kdbus_msg msg;
		char bytes[1024];
	} message = {
		.msg.size = sizeof(message.msg),
		.msg.dst_id = KDBUS_DST_ID_NAME,
		.msg.payload_type = KDBUS_PAYLOAD_DBUS,
		.msg.cookie = 1,
	};
	struct kdbus_cmd_send send = {
		.size = sizeof(send),
		.msg_address = (uintptr_t)&message,
	};
	struct kdbus_item *item;
	int fd;

	if (argc != 3 || strlen(argv[2]) > 255)
		errx(EXIT_FAILURE, "usage: kdbus-send ENDPOINT NAME");

	fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (fd < 0)
		err(EXIT_FAILURE, "%s", argv[1]);
	if (ioctl(fd, KDBUS_CMD_HELLO, &hello) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_HELLO");

	item = append(&message.msg, KDBUS_ITEM_DST_NAME, strlen(argv[2]) + 1);
	strcpy(item->str, argv[2]);
	item = append(&message.msg, KDBUS_ITEM_PAYLOAD_VEC, sizeof(struct kdbus_vec));
	item->vec.address = (uintptr_t)text;
	item->vec.size = strlen(text);
	if (ioctl(fd, KDBUS_CMD_SEND, &send) < 0)
		err(EXIT_FAILURE, "KDBUS_CMD_SEND to %s", argv[2]);

	close(fd);
	return EXIT_SUCCESS;
}
