/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sends messages while a second thread changes them under way.
 *
 * usage: hammer ENDPOINT ID size|unmap|items ROUNDS
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

#define PAYLOAD_SIZE (256 * 1024)

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
			memset(payload, n, 4096 * (n % 64));
		}
	}
	return NULL;
}

static int hello(int fd)
{
	struct kdbus_cmd_hello cmd = { .size = sizeof(cmd), .pool_size = 1 << 20 };

	return ioctl(fd, KDBUS_CMD_HELLO, &cmd);
}

int main(int argc, char **argv)
{
	static unsigned int counts[256];
	static uint64_t room[32768 / 8 + 8];
	struct kdbus_cmd_send cmd = { .size = sizeof(cmd) };
	unsigned int i, rounds;
	pthread_t thread;
	int fd;

	if (argc != 5)
		return 2;
	trick = argv[3];
	rounds = atoi(argv[4]);
	fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (fd < 0 || hello(fd) < 0)
		return 1;
	payload = mmap(NULL, PAYLOAD_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (payload == MAP_FAILED)
		return 1;
	memcpy(payload, "12345678", 8);
	message = room;
	message[0] = 96;
	message[3] = strtoull(argv[2], NULL, 10);
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
		counts[ioctl(fd, KDBUS_CMD_SEND, &cmd) < 0 ? errno : 0]++;
	}
	atomic_store(&done, true);
	pthread_join(thread, NULL);
	for (i = 0; i < 256; i++)
		if (counts[i])
			printf("%u %u\n", i, counts[i]);
	return 0;
}
