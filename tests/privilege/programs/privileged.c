/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stands for any setuid program: says who it is, after a moment in which it could be tampered with.
 */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
	struct timespec until = { .tv_nsec = 500000000 };

	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &until, &until))
		;
	return printf("as it was written, euid %d\n", (int)geteuid()) < 0;
}
