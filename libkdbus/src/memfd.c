/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memfds
 *
 * A memfd can be sent once nobody can change it any more: sealed against
 * writing, growing and shrinking, and against further seals. See
 * memfd_create(2) and fcntl(2).
 */

#include <fcntl.h>
#include <kdbus/kdbus.h>
#include <sys/mman.h>
#include "util.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL)

/**
 * kdbus_memfd_new() - make an empty memfd that can be sealed
 * @fdp:	the new descriptor, owned by the caller
 * @name:	a label for /proc, or NULL
 *
 * Return: 0 on success, the errno of memfd_create(2).
 */
_public_ int kdbus_memfd_new(int *fdp, const char *name)
{
	int fd;

	fd = memfd_create(name ?: "kdbus-memfd", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;

	*fdp = fd;
	return 0;
}

/**
 * kdbus_memfd_new_data() - make a sealed memfd with data in it
 * @fdp:	the new descriptor, owned by the caller
 * @name:	a label for /proc, or NULL
 * @data:	what it is to hold
 * @size:	bytes of @data
 *
 * Return: 0 on success, the errno of memfd_create(2) or write(2).
 */
_public_ int kdbus_memfd_new_data(int *fdp, const char *name, const void *data, size_t size)
{
	_cleanup_(closep) int fd = -1;
	const uint8_t *p = data;
	ssize_t n;
	int r;

	r = kdbus_memfd_new(&fd, name);
	if (r < 0)
		return r;

	for (; size > 0; p += n, size -= n) {
		n = write(fd, p, size);
		if (n < 0) {
			if (errno != EINTR)
				return -errno;
			n = 0;
		}
	}

	r = kdbus_memfd_seal(fd);
	if (r < 0)
		return r;

	*fdp = fd;
	fd = -1;
	return 0;
}

/**
 * kdbus_memfd_seal() - make a memfd fit to be sent
 * @fd:		memfd that nobody has mapped for writing
 *
 * Return: 0 on success, also if it was sealed before; the errno of fcntl(2):
 *         -EBUSY while it is mapped for writing, -EPERM if it can't be sealed,
 *         -EINVAL if it is no memfd.
 */
_public_ int kdbus_memfd_seal(int fd)
{
	int seals;

	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return -errno;
	if ((seals & SEALS) == SEALS)
		return 0;
	return fcntl(fd, F_ADD_SEALS, SEALS) < 0 ? -errno : 0;
}
