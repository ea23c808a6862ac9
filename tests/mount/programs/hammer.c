/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sends messages to itself while a second thread changes them under way, and looks at what comes
 * out of it.
 *
 * usage: hammer ENDPOINT size|unmap|items ROUNDS
 * Prints how often each errno came back, as "ERRNO COUNT" lines.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kdbus.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAYLOAD_SIZE (64 * 1024)

static atomic_bool done;
static volatile uint64_t *message;
static char *payload;
static const char *trick;

static void *play(void *unused)
{
	unsigned int n = 0;

	(void)unused;
	while (!atomic_load(&done)) {
		n++;
		if (!strcmp(trick, "size")) {
			static const uint64_t sizes[] = { 64, 96, 8, 96, 1ULL << 40, 96, 32768 };

			message[0] = sizes[n % 7];
		} else if (!strcmp(trick, "items")) {
			static const uint64_t sizes[] = { 32, 0, 32, 16, 32, 1ULL << 63, 32, 40 };

			message[8] = sizes[n % 8];
			message[10] = n % 3 ? 8 : 1ULL << 62;
		} else {
			munmap(payload, PAYLOAD_SIZE);
			mmap(payload, PAYLOAD_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			memset(payload, n, 4096 * (n % 16));
		}
	}
	return NULL;
}

/* Whether a message that got through is sound: its items fill its size, within its slice. */
static bool receive(int fd, const char *pool)
{
	struct kdbus_cmd_recv recv = { .size = sizeof(recv) };
	struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free) };
	const struct kdbus_item *item;
	const struct kdbus_msg *msg;
	uint64_t at = sizeof(*msg);

	if (ioctl(fd, KDBUS_CMD_RECV, &recv) < 0)
		return false;
	msg = (const void *)(pool + recv.msg.offset);
	if (msg->size > recv.msg.msg_size)
		return false;
	while (at < msg->size) {
		item = (const void *)((const char *)msg + at);
		if (item->size < 16 || item->size > msg->size - at)
			return false;
		if (item->type == KDBUS_ITEM_PAYLOAD_OFF &&
		    item->vec.offset + item->vec.size > recv.msg.msg_size)
			return false;
		at += (item->size + 7) & ~7ULL;
	}
	cmd_free.offset = recv.msg.offset;
	return ioctl(fd, KDBUS_CMD_FREE, &cmd_free) == 0;
}

int main(int argc, char **argv)
{
	static unsigned int counts[256];
	static uint64_t room[32768 / 8 + 8];
	struct kdbus_cmd_hello hello = { .size = sizeof(hello), .pool_size = 1 << 20 };
	struct kdbus_cmd_send cmd = { .size = sizeof(cmd) };
	unsigned int i, rounds;
	pthread_t thread;
	const char *pool;
	int fd;

	if (argc != 4)
		return 2;
	trick = argv[2];
	rounds = atoi(argv[3]);
	fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, KDBUS_CMD_HELLO, &hello) < 0)
		return 1;
	pool = mmap(NULL, 1 << 20, PROT_READ, MAP_SHARED, fd, 0);
	if (pool == MAP_FAILED)
		return 1;
	payload = mmap(NULL, PAYLOAD_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		       0);
	if (payload == MAP_FAILED)
		return 1;
	memcpy(payload, "12345678", 8);
	message = room;
	message[0] = 96;
	message[3] = hello.id;
	message[5] = KDBUS_PAYLOAD_DBUS;
	message[6] = 1;
	message[8] = 32;
	message[9] = KDBUS_ITEM_PAYLOAD_VEC;
	message[10] = !strcmp(trick, "unmap") ? PAYLOAD_SIZE : 8;
	message[11] = (uintptr_t)payload;
	if (pthread_create(&thread, NULL, play, NULL))
		return 1;
	for (i = 0; i < rounds; i++) {
		cmd.msg_address = (uintptr_t)room;
		if (ioctl(fd, KDBUS_CMD_SEND, &cmd) < 0)
			counts[errno]++;
		else if (receive(fd, pool))
			counts[0]++;
		else
			return 3;
	}
	atomic_store(&done, true);
	pthread_join(thread, NULL);
	for (i = 0; i < 256; i++)
		if (counts[i])
			printf("%u %u\n", i, counts[i]);
	return 0;
}
