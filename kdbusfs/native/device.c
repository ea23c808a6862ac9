/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The wait of the router: for a request on the device, for an event on a second descriptor, or
 * for a deadline, whichever is first. Before it sleeps it may poll for a while (@spin_ns): on a
 * machine with several CPUs, waking a sleeper on another one costs far more than most requests.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Returns the bytes read, 0 if the timeout passed (-1: none) or @events is readable, -errno
 * otherwise; the device is non-blocking. */
int64_t kdbusfs_next(int device, int events, void *buffer, uint64_t size, int64_t timeout_ns, int64_t spin_ns)
{
	struct pollfd fds[2] = { { device, POLLIN, 0 }, { events, POLLIN, 0 } };
	struct timespec ts = { timeout_ns / 1000000000LL, timeout_ns % 1000000000LL };
	ssize_t n;

	if (spin_ns > 0 && (timeout_ns < 0 || timeout_ns > spin_ns)) {
		int64_t end = now_ns() + spin_ns;

		do {
			n = read(device, buffer, size);
			if (n >= 0)
				return n;
			if (errno != EAGAIN)
				return -errno;
			sched_yield();
		} while (now_ns() < end);
	}
	if (ppoll(fds, 2, timeout_ns < 0 ? NULL : &ts, NULL) < 0)
		return errno == EINTR ? 0 : -errno;
	if (fds[1].revents || !fds[0].revents)
		return 0;
	n = read(device, buffer, size);
	return n < 0 ? (errno == EAGAIN ? 0 : -errno) : n;
}
