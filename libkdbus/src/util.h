/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * What every file here needs: scopes that clean up, alignment, copies, ioctl()
 */

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define _cleanup_(_x) __attribute__((__cleanup__(_x)))
#define _printf_(_text, _first) __attribute__((__format__(printf, _text, _first)))
#define _public_ __attribute__((__visibility__("default")))

static inline uint64_t align8(uint64_t n)
{
	return (n + 7) & ~UINT64_C(7);
}

/* close(), keeping errno; returns -1 to be stored where the number was */
static inline int safe_close(int fd)
{
	int saved = errno;

	if (fd >= 0)
		close(fd);
	errno = saved;
	return -1;
}

static inline void closep(int *fdp)
{
	*fdp = safe_close(*fdp);
}

static inline void freep(void *p)
{
	free(*(void **)p);
}

/* memcpy() from memory that others may write to, such as a pool. It is read here
 * and never again: no compiler may take what it knows of one for the other.
 */
static inline void copy_shared(void *to, const void *from, size_t size)
{
	memcpy(to, from, size);
	__asm__ volatile("" : : : "memory");
}

/* asprintf() that says nothing of the length, and leaves NULL on failure */
_printf_(2, 3) static inline int format(char **stringp, const char *text, ...)
{
	va_list arguments;
	int n;

	va_start(arguments, text);
	n = vasprintf(stringp, text, arguments);
	va_end(arguments);
	if (n >= 0)
		return 0;
	*stringp = NULL;
	return -ENOMEM;
}

/* A node, close-on-exec: for reading only where it is mounted read-only, as a
 * container may have it. No command asks how a node was opened.
 */
static inline int open_node(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0 && errno == EROFS)
		fd = open(path, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static inline int kdbus_ioctl(int fd, unsigned long code, void *cmd)
{
	return ioctl(fd, code, cmd) < 0 ? -errno : 0;
}
