/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Closing files that others handed over. It takes no time, mostly; but it may wait for whoever serves
 * the file, or for a socket that lingers, and then the thread that runs the bus must not. So a
 * thread of a *lane* does it, one file at a time, and who asked waits for as long as he likes. What
 * is not closed by then keeps its lane until somebody has joined it; when all lanes are taken nothing
 * is done here, and the caller has to close in another way (peer/closers.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "closing.h"

#define N_LANES 4
#define STACK_SIZE (1 << 16)

enum {
	IDLE,
	ASKED,
	CLOSED
};

static struct lane {
	atomic_flag taken;
	_Atomic uint32_t state;
	int fd;
	int has_thread;
} lanes[N_LANES];

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Until @state is not @value any more, as far as can be told, or @timeout_ns are over (-1: never). */
static void wait_while(_Atomic uint32_t *state, uint32_t value, int64_t timeout_ns)
{
	struct timespec ts = { timeout_ns / 1000000000LL, timeout_ns % 1000000000LL };

	syscall(SYS_futex, state, FUTEX_WAIT_PRIVATE, value, timeout_ns < 0 ? NULL : &ts, NULL, 0);
}

static void set(_Atomic uint32_t *state, uint32_t value)
{
	atomic_store(state, value);
	syscall(SYS_futex, state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void *work(void *data)
{
	struct lane *lane = data;

	for (;;) {
		uint32_t state = atomic_load(&lane->state);

		if (state != ASKED) {
			wait_while(&lane->state, state, -1);
			continue;
		}
		close(lane->fd);
		set(&lane->state, CLOSED);
	}
	return NULL;
}

static int start(struct lane *lane)
{
	sigset_t all, before;
	pthread_attr_t attr;
	pthread_t thread;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	r = pthread_create(&thread, &attr, work, lane);
	pthread_attr_destroy(&attr);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return r;
}

static void give_back(struct lane *lane)
{
	atomic_store(&lane->state, IDLE);
	atomic_flag_clear(&lane->taken);
}

static struct lane *take(void)
{
	for (struct lane *lane = lanes; lane < lanes + N_LANES; lane++) {
		if (atomic_flag_test_and_set(&lane->taken))
			continue;
		if (lane->has_thread || start(lane) == 0) {
			lane->has_thread = 1;
			return lane;
		}
		atomic_flag_clear(&lane->taken);
	}
	return NULL;
}

/*
 * Returns 0 if @fd is closed; the number of a lane, which has to be joined, if that is still under
 * way after @timeout_ns; -EAGAIN if nothing has been done with it.
 */
int kdbusfs_close_quickly(int fd, int64_t timeout_ns)
{
	struct lane *lane = take();
	int64_t end, left;

	if (!lane)
		return -EAGAIN;
	end = now_ns() + timeout_ns;
	lane->fd = fd;
	set(&lane->state, ASKED);
	while (atomic_load(&lane->state) == ASKED) {
		left = end - now_ns();
		if (left <= 0)
			return lane - lanes + 1;
		wait_while(&lane->state, ASKED, left);
	}
	give_back(lane);
	return 0;
}

/* Waits until what @lane closes is closed. */
void kdbusfs_close_join(int number)
{
	struct lane *lane = &lanes[number - 1];

	while (atomic_load(&lane->state) == ASKED)
		wait_while(&lane->state, ASKED, -1);
	give_back(lane);
}
