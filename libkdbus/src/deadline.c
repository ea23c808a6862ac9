/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Deadlines
 */

#include "deadline.h"
#include "util.h"

uint64_t kdbus_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC_PER_SEC + ts.tv_nsec;
}

/**
 * kdbus_deadline() - turn a timeout into a deadline
 * @timeout_ns:	nanoseconds from now
 *
 * Return: Absolute time on CLOCK_MONOTONIC in nanoseconds; for a timeout that
 *         lies beyond what kdbus can express, the latest time that it can.
 */
_public_ uint64_t kdbus_deadline(uint64_t timeout_ns)
{
	uint64_t now = kdbus_now();

	return timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}
