// SPDX-License-Identifier: LGPL-2.1-or-later
#pragma once

/*
 * Samples
 *
 * One sample is the time of one operation between two readings of
 * CLOCK_MONOTONIC; the price of reading the clock is left in. Samples of the
 * operations of a table are taken in turn, together with one of the floor, so
 * that a machine that gets slower or faster does so for all of them.
 *
 * The first request to a server that has not run for a while finds its caches
 * cold. That would make the floor look higher, and all else lower, than it is;
 * so each server gets a request that is not counted before those that are.
 */

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

typedef struct Floor Floor;
typedef struct Sample Sample;

struct Sample {
	uint64_t *ns;
	size_t n_ns;
	size_t n_max;
};

struct Floor {
	int fd;
	Sample cold; /* the first ioctl of each round */
	Sample ioctl;
	Sample poll;
};

#define FLOOR_NULL { .fd = -1 }

int sample_init(Sample *sample, size_t n_max);
void sample_deinit(Sample *sample);
uint64_t sample_quantile(Sample *sample, unsigned int percent);
void sample_print(Sample *sample, Floor *floor, const char *table, const char *operation,
		  const char *variant, uint64_t n);

int floor_init(Floor *floor, const char *directory, size_t n_max);
void floor_deinit(Floor *floor);
void floor_reset(Floor *floor);
int floor_step(Floor *floor);

/* inline helpers */

static inline uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static inline void sample_add(Sample *sample, uint64_t ns)
{
	if (sample->n_ns < sample->n_max)
		sample->ns[sample->n_ns++] = ns;
}

static inline void sample_reset(Sample *sample)
{
	sample->n_ns = 0;
}

/* Returns 0 or -errno of the ioctl; both are timed alike. */
static inline int sample_ioctl(Sample *sample, int fd, unsigned long command, void *argument)
{
	uint64_t start, end;
	int r;

	start = now_ns();
	r = ioctl(fd, command, argument);
	end = now_ns();
	if (sample)
		sample_add(sample, end - start);

	return r < 0 ? -errno : 0;
}

/* Returns the events found, or -errno. */
static inline int sample_poll(Sample *sample, int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };
	uint64_t start, end;
	int r;

	start = now_ns();
	r = poll(&p, 1, 0);
	end = now_ns();
	sample_add(sample, end - start);

	return r < 0 ? -errno : p.revents;
}
