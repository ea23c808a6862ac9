/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Does one thing after the other on a bus until it is killed: connects, sends large and small
 * messages with descriptors, receives, calls that nobody answers, takes names, asks, leaves.
 *
 * usage: victim ENDPOINT ID SEED
 * ID is a connection that ignores what it gets. Prints "ready" once.
 */
#include <fcntl.h>
#include <linux/kdbus.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define POOL_SIZE (1 << 20)
#define PAYLOAD_SIZE (128 * 1024)

static char payload[PAYLOAD_SIZE];
static uint64_t self;

static uint64_t soon(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec + 3000000;
}

static void send_one(int fd, uint64_t to, int sync)
{
	static int pipes[2] = { -1, -1 };
	uint64_t buffer[64] = {};
	struct kdbus_msg *msg = (void *)buffer;
	struct kdbus_item *item = msg->items;
	struct kdbus_cmd_send cmd = {
		.size = sizeof(cmd),
		.flags = sync ? KDBUS_SEND_SYNC_REPLY : 0,
		.msg_address = (uintptr_t)msg,
	};

	if (pipes[0] < 0 && pipe2(pipes, O_CLOEXEC) < 0)
		exit(1);
	msg->dst_id = to;
	msg->payload_type = KDBUS_PAYLOAD_DBUS;
	msg->cookie = rand() % 100 + 1;
	if (sync) {
		msg->flags = KDBUS_MSG_EXPECT_REPLY;
		msg->timeout_ns = soon();
	}
	item->size = 32;
	item->type = KDBUS_ITEM_PAYLOAD_VEC;
	item->vec.size = rand() % 2 ? rand() % PAYLOAD_SIZE + 1 : 8;
	item->vec.address = (uintptr_t)payload;
	item = (void *)((char *)item + 32);
	if (rand() % 3 == 0) {
		item->size = 24;
		item->type = KDBUS_ITEM_FDS;
		item->fds[0] = pipes[0];
		item->fds[1] = pipes[1];
		item = (void *)((char *)item + 24);
	}
	msg->size = (char *)item - (char *)msg;
	ioctl(fd, KDBUS_CMD_SEND, &cmd);
}

static void receive(int fd, const char *pool)
{
	struct kdbus_cmd_recv recv = { .size = sizeof(recv) };
	struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free) };
	const struct kdbus_item *item;
	const struct kdbus_msg *msg;
	uint64_t at = sizeof(*msg);

	if (rand() % 8 == 0)
		recv.flags = rand() % 2 ? KDBUS_RECV_PEEK : KDBUS_RECV_DROP;
	if (ioctl(fd, KDBUS_CMD_RECV, &recv) < 0 || recv.flags & KDBUS_RECV_DROP)
		return;
	msg = (const void *)(pool + recv.msg.offset);
	while (at < msg->size) {
		item = (const void *)((const char *)msg + at);
		if (item->type == KDBUS_ITEM_FDS && !recv.flags) {
			close(item->fds[0]);
			close(item->fds[1]);
		}
		at += (item->size + 7) & ~7ULL;
	}
	cmd_free.offset = recv.msg.offset;
	ioctl(fd, KDBUS_CMD_FREE, &cmd_free);
}

static void name(int fd, unsigned long code)
{
	uint64_t buffer[16] = { 0 };
	struct kdbus_cmd *cmd = (void *)buffer;
	int n;

	n = snprintf(cmd->items[0].str, 40, "com.example.victim%d", rand() % 5);
	cmd->items[0].size = 16 + n + 1;
	cmd->items[0].type = KDBUS_ITEM_NAME;
	cmd->size = sizeof(*cmd) + cmd->items[0].size;
	if (code == KDBUS_CMD_NAME_ACQUIRE)
		cmd->flags = KDBUS_NAME_QUEUE;
	ioctl(fd, code, cmd);
}

static void ask(int fd)
{
	struct kdbus_cmd_list list = { .size = sizeof(list), .flags = KDBUS_LIST_UNIQUE };
	struct kdbus_cmd_info info = { .size = sizeof(info), .id = self, .attach_flags = 0x3fff };
	struct kdbus_cmd_match match = { .size = sizeof(match),
					 .cookie = 1,
					 .flags = KDBUS_MATCH_REPLACE };
	struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free) };

	if (ioctl(fd, KDBUS_CMD_LIST, &list) == 0) {
		cmd_free.offset = list.offset;
		ioctl(fd, KDBUS_CMD_FREE, &cmd_free);
	}
	if (ioctl(fd, KDBUS_CMD_CONN_INFO, &info) == 0) {
		cmd_free.offset = info.offset;
		ioctl(fd, KDBUS_CMD_FREE, &cmd_free);
	}
	ioctl(fd, KDBUS_CMD_MATCH_ADD, &match);
}

static void do_anything(int fd, char *pool, uint64_t to)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };

	switch (rand() % 8) {
	case 0:
	case 1:
		send_one(fd, to, 0);
		break;
	case 2:
	case 3:
		send_one(fd, self, 0);
		break;
	case 4:
		receive(fd, pool);
		break;
	case 5:
		name(fd, rand() % 2 ? KDBUS_CMD_NAME_ACQUIRE : KDBUS_CMD_NAME_RELEASE);
		break;
	case 6:
		ask(fd);
		poll(&poller, 1, 0);
		break;
	case 7:
		if (rand() % 4 == 0)
			send_one(fd, to, 1);
		break;
	}
}

int main(int argc, char **argv)
{
	uint64_t to;

	if (argc != 4)
		return 2;
	to = strtoull(argv[2], NULL, 10);
	srand(atoi(argv[3]));
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		struct kdbus_cmd_hello hello = {
			.size = sizeof(hello),
			.flags = KDBUS_HELLO_ACCEPT_FD,
			.attach_flags_send = 0x3fff,
			.attach_flags_recv = rand() % 2 ? 0x3fff : 0,
			.pool_size = POOL_SIZE,
		};
		struct kdbus_cmd bye = { .size = sizeof(bye) };
		char *pool;
		int fd;

		fd = open(argv[1], O_RDWR | O_CLOEXEC);
		if (fd < 0)
			return 1;
		if (ioctl(fd, KDBUS_CMD_HELLO, &hello) < 0)
			return 1;
		self = hello.id;
		pool = mmap(NULL, POOL_SIZE, PROT_READ, MAP_SHARED, fd, 0);
		if (pool == MAP_FAILED)
			return 1;
		for (int n = rand() % 40; n > 0; n--) {
			do_anything(fd, pool, to);
		}
		if (rand() % 2)
			ioctl(fd, KDBUS_CMD_BYEBYE, &bye);
		munmap(pool, POOL_SIZE);
		close(fd);
	}
}
