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
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <unistd.h>

#include "memory.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#define PIDFD_THREAD_ O_EXCL /* Linux 6.9 */
#define PAGE 4096ULL

/* Odd while an operation is under way; an operation that finds another value at its end has
 * been overtaken. One thread at a time begins operations. */
static _Atomic uint64_t operation;

uint64_t kdbusfs_operation_begin(void)
{
	return atomic_fetch_add(&operation, 1) + 1;
}

int kdbusfs_operation_end(uint64_t number)
{
	return atomic_compare_exchange_strong(&operation, &number, number + 1) ? 0 : -ESTALE;
}

uint64_t kdbusfs_operation(void)
{
	return atomic_load(&operation);
}

/* Returns 0 if operation @number was still under way, and is no more. */
int kdbusfs_operation_overtake(uint64_t number)
{
	return kdbusfs_operation_end(number);
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
	uint64_t number = kdbusfs_operation_begin();
	int64_t r = vm_read(tid, address, to, size);

	return kdbusfs_operation_end(number) < 0 ? -ESTALE : r;
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
	number = kdbusfs_operation_begin();
	r = process_vm_readv(tid, &here, 1, there, n, 0);
	if (kdbusfs_operation_end(number) < 0)
		return -ESTALE;
	return r <= 0 ? -EFAULT : r;
}

int64_t kdbusfs_vm_write(int32_t tid, uint64_t address, const void *from, uint64_t size)
{
	uint64_t number = kdbusfs_operation_begin();
	int64_t r = kdbusfs_vm_write_held(tid, address, from, size);

	return kdbusfs_operation_end(number) < 0 ? -ESTALE : r;
}

/* The same for a thread of ours that does not touch the bus, and so may wait. */
int64_t kdbusfs_vm_write_held(int32_t tid, uint64_t address, const void *from, uint64_t size)
{
	struct iovec here = { (void *)(uintptr_t)from, size };
	struct iovec there = { (void *)(uintptr_t)address, size };

	if (size && process_vm_writev(tid, &here, 1, &there, 1, 0) != (ssize_t)size)
		return -EFAULT;
	return size;
}

/* Copy (address, size) pairs back to back; address 0 stands for zeros. */
int64_t kdbusfs_vm_fill(int32_t tid, void *to, const uint64_t *segments, uint64_t n_segments)
{
	uint64_t number = kdbusfs_operation_begin();
	char *at = to;
	int failed = 0;

	for (uint64_t i = 0; i < n_segments && !failed; i++) {
		uint64_t address = segments[2 * i], size = segments[2 * i + 1];

		if (!address)
			memset(at, 0, size);
		else if (vm_read(tid, address, at, size) < 0)
			failed = 1;
		at += size;
	}
	if (kdbusfs_operation_end(number) < 0)
		return -ESTALE;
	return failed ? -EFAULT : at - (char *)to;
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
