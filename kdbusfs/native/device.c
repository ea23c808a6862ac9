/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The wait of the router: for a request on the device, for an event on a second descriptor, or
 * for a deadline, whichever is first. Before it sleeps it may poll for a while (@spin_ns): on a
 * machine with several CPUs, waking a sleeper on another one costs far more than most requests.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

#define READ_AHEAD 32
#define LOOK_EVERY 8

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Only one thread reads a device, and this process serves one. */
static int blocking = -1;
static unsigned int n_plain;

static void set_blocking(int device, int on)
{
	int flags = fcntl(device, F_GETFL);

	fcntl(device, F_SETFL, on ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
	blocking = on;
}

/* As many requests as there are, up to READ_AHEAD and as they fit behind the first @n bytes. */
static int64_t read_on(int device, char *buffer, uint64_t size, int64_t n)
{
	for (int i = 1; i < READ_AHEAD && n + KDBUSFS_REQUEST_SIZE <= (int64_t)size; i++) {
		ssize_t r = read(device, buffer + n, KDBUSFS_REQUEST_SIZE);

		if (r < 0)
			break;
		n += r;
	}
	return n;
}

/*
 * Writes @reply, the answer to the request before, if there is one, and waits for the next:
 * two things in one call, since each entry from Python costs as much as a small system call.
 *
 * Returns the bytes read, 0 if the timeout passed (-1: none) or @events (-1: none) is readable,
 * -errno otherwise. If a request is there already, others may be, too, and are read with it, one
 * behind the other (KDBUSFS_REQUEST_SIZE is what room each must find): so that the caller can
 * choose whom to serve first. One that had to be waited for comes alone.
 *
 * With nothing but the device to wait for, and no spinning, a blocking read does it all, which
 * saves a system call a request. It does not tell whether it waited; so now and then one looks.
 */
int64_t kdbusfs_next(int device, const void *reply, uint64_t reply_size, int events, void *buffer,
		     uint64_t size, int64_t timeout_ns, int64_t spin_ns)
{
	int plain = events < 0 && timeout_ns < 0 && spin_ns <= 0;
	struct pollfd fds[2] = { { device, POLLIN, 0 }, { events, POLLIN, 0 } };
	struct timespec ts = { timeout_ns / 1000000000LL, timeout_ns % 1000000000LL };
	ssize_t n;

	/* ENOENT: the caller is gone, or the mount */
	if (reply_size && write(device, reply, reply_size) < 0 && errno != ENOENT &&
	    errno != ENODEV)
		return -errno;
	if (plain != blocking)
		set_blocking(device, plain);
	if (plain) {
		n = read(device, buffer, KDBUSFS_REQUEST_SIZE);
		if (n < 0)
			return -errno;
		if (++n_plain % LOOK_EVERY || poll(fds, 1, 0) <= 0)
			return n;
		set_blocking(device, 0);
		return read_on(device, buffer, size, n);
	}
	n = read(device, buffer, KDBUSFS_REQUEST_SIZE);
	if (n >= 0)
		return read_on(device, buffer, size, n);
	if (errno != EAGAIN)
		return -errno;
	if (!timeout_ns)
		return 0;
	if (spin_ns > 0 && (timeout_ns < 0 || timeout_ns > spin_ns)) {
		int64_t end = now_ns() + spin_ns;

		do {
			sched_yield();
			n = read(device, buffer, KDBUSFS_REQUEST_SIZE);
			if (n >= 0)
				return n;
			if (errno != EAGAIN)
				return -errno;
		} while (now_ns() < end);
	}
	if (ppoll(fds, 2, timeout_ns < 0 ? NULL : &ts, NULL) < 0)
		return errno == EINTR ? 0 : -errno;
	if (fds[1].revents || !fds[0].revents)
		return 0;
	n = read(device, buffer, KDBUSFS_REQUEST_SIZE);
	return n < 0 ? (errno == EAGAIN ? 0 : -errno) : n;
}
