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

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Only one thread reads a device, and this process serves one. */
static int blocking = -1;

static void set_blocking(int device, int on)
{
	int flags = fcntl(device, F_GETFL);

	fcntl(device, F_SETFL, on ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
	blocking = on;
}

/*
 * Writes @reply, the answer to the request before, if there is one, and waits for the next:
 * two things in one call, since each entry from Python costs as much as a small system call.
 *
 * Returns the bytes read, 0 if the timeout passed (-1: none) or @events (-1: none) is readable,
 * -errno otherwise. With nothing but the device to wait for, and no spinning, a blocking read
 * does it all, which saves a system call a request.
 */
int64_t kdbusfs_next(int device, const void *reply, uint64_t reply_size, int events,
		     void *buffer, uint64_t size, int64_t timeout_ns, int64_t spin_ns)
{
	int plain = events < 0 && timeout_ns < 0 && spin_ns <= 0;
	struct pollfd fds[2] = { { device, POLLIN, 0 }, { events, POLLIN, 0 } };
	struct timespec ts = { timeout_ns / 1000000000LL, timeout_ns % 1000000000LL };
	ssize_t n;

	/* ENOENT: the caller is gone, or the mount */
	if (reply_size && write(device, reply, reply_size) < 0 && errno != ENOENT && errno != ENODEV)
		return -errno;
	if (plain != blocking)
		set_blocking(device, plain);
	if (plain) {
		n = read(device, buffer, size);
		return n < 0 ? -errno : n;
	}
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
