/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading and writing the memory of a process that is held in its call.
 *
 * process_vm_readv(2) never faults on our side: what the peer has not mapped comes out as a short
 * count or EFAULT. A caller's own error (it may be dying) is EFAULT too: nothing else is
 * documented for its ioctl.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#define PIDFD_THREAD_ O_EXCL /* Linux 6.9 */
#define PAGE 4096ULL
/* What one call gathers at most: so many pairs, and no further one once it has so much. */
#define GATHER 64
#define GATHER_SIZE (1ULL << 20)

/* Odd while an operation is under way; an operation that finds another value at its end has
 * been overtaken. One thread at a time begins operations: which, is in @worker. */
static _Atomic uint64_t operation;
static _Atomic int32_t worker;
/* Whether kdbusfs_watch() sleeps until there is an operation. */
static _Atomic int watch_asleep;
static _Atomic int watch_ended;

static void futex(int op, uint32_t value, const struct timespec *timeout)
{
	/* the low half of @operation, which is the first one on little-endian machines */
	char *half = (char *)&operation + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4 : 0);

	syscall(SYS_futex, half, op | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

static uint64_t begin(void)
{
	static _Thread_local int32_t self;
	uint64_t number;

	if (!self)
		self = syscall(SYS_gettid);
	atomic_store_explicit(&worker, self, memory_order_relaxed);
	number = atomic_fetch_add(&operation, 1) + 1;
	if (atomic_load(&watch_asleep))
		futex(FUTEX_WAKE, 1, NULL);
	return number;
}

static int end(uint64_t number)
{
	return atomic_compare_exchange_strong(&operation, &number, number + 1) ? 0 : -ESTALE;
}

/* Returns 0 if operation @number was still under way, and is no more. */
int kdbusfs_overtake(uint64_t number)
{
	return end(number);
}

/* Whether a thread of ours waits for something, as opposed to running or wanting a CPU. */
static int is_asleep(int32_t tid)
{
	char path[64], text[128];
	const char *state;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 1; /* no descriptor to look with; whoever can't be told of holds up nobody */
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	state = strrchr(text, ')');
	return state && (state[2] == 'S' || state[2] == 'D');
}

/*
 * Waits until an operation stalls: it is the same at two looks, @period_ns apart, and its thread
 * asleep. Returns its number, 0 after kdbusfs_watch_end(). Looks only while there are operations:
 * after some fruitless looks it sleeps until there is one.
 */
uint64_t kdbusfs_watch(int64_t period_ns)
{
	struct timespec period = { period_ns / 1000000000, period_ns % 1000000000 };
	uint64_t number, seen = 0;
	int n_quiet = 0;

	while (!atomic_load(&watch_ended)) {
		number = atomic_load(&operation);
		if (number != seen) {
			seen = number;
			n_quiet = 0;
		} else if (number & 1) {
			if (is_asleep(atomic_load(&worker)))
				return number;
		} else if (++n_quiet > 20) {
			atomic_store(&watch_asleep, 1);
			futex(FUTEX_WAIT, (uint32_t)number, NULL);
			atomic_store(&watch_asleep, 0);
			n_quiet = 0;
			continue;
		}
		nanosleep(&period, NULL);
	}
	return 0;
}

void kdbusfs_watch_end(void)
{
	atomic_store(&watch_ended, 1);
	/* So that a futex that is about to sleep finds another value. */
	atomic_fetch_add(&operation, 2);
	futex(FUTEX_WAKE, 1, NULL);
}

static int64_t vm_read(int32_t tid, uint64_t address, void *to, uint64_t size)
{
	struct iovec here = { to, size }, there = { (void *)(uintptr_t)address, size };

	if (size && process_vm_readv(tid, &here, 1, &there, 1, 0) != (ssize_t)size)
		return -EFAULT;
	return size;
}

int64_t kdbusfs_vm_read(int32_t tid, uint64_t address, void *to, uint64_t size)
{
	uint64_t number = begin();
	int64_t r = vm_read(tid, address, to, size);

	return end(number) < 0 ? -ESTALE : r;
}

/* As much of the range as is there, at least one byte. An iovec is read in full or not at all,
 * so the range is cut at page boundaries. */
int64_t kdbusfs_vm_read_some(int32_t tid, uint64_t address, void *to, uint64_t size)
{
	struct iovec here = { to, size }, there[18];
	unsigned int n = 0;
	uint64_t number;
	ssize_t r;

	while (size > 0 && n < sizeof(there) / sizeof(*there)) {
		uint64_t piece = PAGE - (address & (PAGE - 1));

		if (piece > size)
			piece = size;
		there[n++] = (struct iovec){ (void *)(uintptr_t)address, piece };
		address += piece;
		size -= piece;
	}
	number = begin();
	r = process_vm_readv(tid, &here, 1, there, n, 0);
	if (end(number) < 0)
		return -ESTALE;
	return r <= 0 ? -EFAULT : r;
}

static int64_t vm_write(int32_t tid, uint64_t address, const void *from, uint64_t size)
{
	struct iovec here = { (void *)(uintptr_t)from, size };
	struct iovec there = { (void *)(uintptr_t)address, size };

	if (size && process_vm_writev(tid, &here, 1, &there, 1, 0) != (ssize_t)size)
		return -EFAULT;
	return size;
}

int64_t kdbusfs_vm_write(int32_t tid, uint64_t address, const void *from, uint64_t size)
{
	uint64_t number = begin();
	int64_t r = vm_write(tid, address, from, size);

	return end(number) < 0 ? -ESTALE : r;
}

/* The same for what is to be written in any case, even if the operation is overtaken: then 1 for
 * what was written, 2 for what could not be. Else 0 or -EFAULT. */
int64_t kdbusfs_vm_store(int32_t tid, uint64_t address, const void *from, uint64_t size)
{
	uint64_t number = begin();
	int failed = vm_write(tid, address, from, size) < 0;

	if (end(number) < 0)
		return failed ? 2 : 1;
	return failed ? -EFAULT : 0;
}

/* As much of /proc/@tid/cmdline as fits, which is memory of that process. */
int64_t kdbusfs_read_cmdline(int32_t tid, void *to, uint64_t size)
{
	uint64_t number;
	char path[64];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/cmdline", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	number = begin();
	n = read(fd, to, size);
	n = n < 0 ? -errno : n;
	close(fd);
	return end(number) < 0 ? -ESTALE : n;
}

static int64_t push(int device, const void *header, uint64_t n_header, const void *data,
		    uint64_t size)
{
	struct iovec parts[] = {
		{ (void *)(uintptr_t)header, n_header },
		{ (void *)(uintptr_t)data, size },
	};

	return writev(device, parts, 2) < 0 ? -errno : 0;
}

/* Writes a notification that puts @data into a page cache, which waits for the pages' locks. */
int64_t kdbusfs_push(int device, const void *header, uint64_t n_header, const void *data,
		     uint64_t size)
{
	uint64_t number = begin();
	int64_t r = push(device, header, n_header, data, size);

	return end(number) < 0 ? -ESTALE : r;
}

/* The same for a thread of ours that does not touch the bus, and so may wait. */
int64_t kdbusfs_push_held(int device, const void *header, uint64_t n_header, const void *data,
			  uint64_t size)
{
	return push(device, header, n_header, data, size);
}

/* Reads pairs that have an address, as many as one call is to take: returns how many, and adds
 * their size to @sizep. All of a call comes from the memory of who @tid was when it began. */
static int64_t vm_gather(int32_t tid, char *to, const uint64_t *segments, uint64_t n_segments,
			 uint64_t *sizep)
{
	struct iovec here = { to, 0 }, there[GATHER];
	uint64_t n;

	for (n = 0; n < n_segments && n < GATHER && here.iov_len < GATHER_SIZE; n++) {
		uint64_t address = segments[2 * n], size = segments[2 * n + 1];

		if (!address)
			break;
		there[n] = (struct iovec){ (void *)(uintptr_t)address, size };
		here.iov_len += size;
	}
	if (process_vm_readv(tid, &here, 1, there, n, 0) != (ssize_t)here.iov_len)
		return -EFAULT;
	*sizep += here.iov_len;
	return n;
}

/* Copy (address, size) pairs back to back; address 0 stands for zeros. */
int64_t kdbusfs_vm_fill(int32_t tid, void *to, const uint64_t *segments, uint64_t n_segments)
{
	uint64_t number = begin(), done = 0, i = 0;
	int64_t r = 0;

	while (i < n_segments && r >= 0) {
		/* Overtaken: the caller may have been let go. */
		if (atomic_load(&operation) != number)
			break;
		if (segments[2 * i]) {
			r = vm_gather(tid, (char *)to + done, segments + 2 * i, n_segments - i,
				      &done);
			i += r > 0 ? r : 0;
		} else {
			memset((char *)to + done, 0, segments[2 * i + 1]);
			done += segments[2 * i + 1];
			i++;
		}
	}
	if (end(number) < 0)
		return -ESTALE;
	return r < 0 ? r : (int64_t)done;
}

/* A shared mapping of @fd, or with -1 private memory that takes no room until it is touched.
 * Returns NULL with errno set. */
void *kdbusfs_map(int fd, uint64_t size)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

	return p == MAP_FAILED ? NULL : p;
}

int kdbusfs_unmap(void *address, uint64_t size)
{
	return munmap(address, size) < 0 ? -errno : 0;
}

int kdbusfs_inotify_init(void)
{
	int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

/* Watch the file behind @fd until its inode is gone (IN_IGNORED), without keeping it. Returns the
 * number of the watch. */
int kdbusfs_inotify_add(int inotify, int fd)
{
	char path[32];
	int watch;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	watch = inotify_add_watch(inotify, path, IN_DELETE_SELF);
	return watch < 0 ? -errno : watch;
}

int kdbusfs_pidfd_open(int32_t tid)
{
	int fd = syscall(SYS_pidfd_open, tid, PIDFD_THREAD_);

	return fd < 0 ? -errno : fd;
}

int kdbusfs_pidfd_open_process(int32_t pid)
{
	int fd = syscall(SYS_pidfd_open, pid, 0);

	return fd < 0 ? -errno : fd;
}

/*
 * Whether a thread of which @pidfd is (-1: none) still lives, and the kernel still holds callers
 * for @device: when that connection is aborted, it lets go of all of them by itself.
 */
int kdbusfs_is_held(int device, int pidfd)
{
	struct pollfd fds[2] = { { device, 0, 0 }, { pidfd, POLLIN, 0 } };

	return poll(fds, 2, 0) >= 0 && !(fds[0].revents & (POLLERR | POLLNVAL)) && !fds[1].revents;
}

int kdbusfs_pidfd_getfd(int pidfd, int fd)
{
	int copy = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

	return copy < 0 ? -errno : copy;
}

/* Type and device of an open file, without asking whoever serves its file system: that may be
 * ourselves. */
int kdbusfs_stat(int fd, uint32_t *mode, uint32_t *major, uint32_t *minor)
{
	struct statx st;

	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &st) < 0)
		return -errno;
	*mode = st.stx_mode;
	*major = st.stx_dev_major;
	*minor = st.stx_dev_minor;
	return 0;
}
