// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Samples and the floor they are held against
 */

#include <fcntl.h>
#include <inttypes.h>
#include <linux/kdbus.h>
#include <stdio.h>
#include <unistd.h>
#include "connection.h"
#include "sample.h"

int sample_init(Sample *sample, size_t n_max)
{
	*sample = (Sample){ .n_max = n_max };
	sample->ns = calloc(n_max, sizeof(*sample->ns));
	if (!sample->ns)
		return -ENOMEM;

	return 0;
}

void sample_deinit(Sample *sample)
{
	free(sample->ns);
	*sample = (Sample){};
}

static int compare_ns(const void *ap, const void *bp)
{
	uint64_t a = *(const uint64_t *)ap, b = *(const uint64_t *)bp;

	return (a > b) - (a < b);
}

uint64_t sample_quantile(Sample *sample, unsigned int percent)
{
	if (!sample->n_ns)
		return 0;

	qsort(sample->ns, sample->n_ns, sizeof(*sample->ns), compare_ns);
	return sample->ns[(sample->n_ns - 1) * percent / 100];
}

/**
 * sample_print() - write one row as a line of JSON
 * @sample:		samples of the operation
 * @floor:		floor measured in the same rounds
 * @table:		table the row belongs to
 * @operation:		what was timed
 * @variant:		in which way, or ""
 * @n:			the number the row depends on (bytes, receivers, ...)
 */
void sample_print(Sample *sample, Floor *floor, const char *table, const char *operation,
		  const char *variant, uint64_t n)
{
	printf("{\"table\": \"%s\", \"operation\": \"%s\", \"variant\": \"%s\", \"n\": %" PRIu64
	       ", \"samples\": %zu, \"median_ns\": %" PRIu64 ", \"p10_ns\": %" PRIu64
	       ", \"p90_ns\": %" PRIu64 ", \"min_ns\": %" PRIu64 ", \"floor_ns\": %" PRIu64 "}\n",
	       table, operation, variant, n, sample->n_ns, sample_quantile(sample, 50),
	       sample_quantile(sample, 10), sample_quantile(sample, 90), sample_quantile(sample, 0),
	       sample_quantile(&floor->ioctl, 50));
	fflush(stdout);
}

int floor_init(Floor *floor, const char *directory, size_t n_max)
{
	char path[4096];
	int r;

	*floor = (Floor)FLOOR_NULL;
	r = sample_init(&floor->cold, n_max);
	if (!r)
		r = sample_init(&floor->ioctl, n_max);
	if (!r)
		r = sample_init(&floor->poll, n_max);
	if (r < 0)
		return r;

	snprintf(path, sizeof(path), "%s/bus", directory);
	floor->fd = open(path, O_RDWR | O_CLOEXEC);
	if (floor->fd < 0)
		return -errno;

	return 0;
}

void floor_deinit(Floor *floor)
{
	if (floor->fd >= 0)
		close(floor->fd);
	sample_deinit(&floor->cold);
	sample_deinit(&floor->ioctl);
	sample_deinit(&floor->poll);
	*floor = (Floor)FLOOR_NULL;
}

void floor_reset(Floor *floor)
{
	sample_reset(&floor->cold);
	sample_reset(&floor->ioctl);
	sample_reset(&floor->poll);
}

/* The floor is sent what SEND is sent, so that the kernel copies as much. */
int floor_step(Floor *floor)
{
	struct kdbus_cmd_send command = { .size = sizeof(command) };
	int r;

	r = sample_ioctl(&floor->cold, floor->fd, KDBUS_CMD_SEND, &command);
	if (!r)
		r = sample_ioctl(NULL, floor->fd, KDBUS_CMD_SEND, &command);
	if (!r)
		r = sample_ioctl(&floor->ioctl, floor->fd, KDBUS_CMD_SEND, &command);
	if (r < 0)
		return fail("floor", r);

	r = sample_poll(&floor->poll, floor->fd);
	return r < 0 ? fail("floor", r) : 0;
}
