/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Owners
 */

#include <stdbool.h>
#include <sys/mman.h>
#include "owner.h"
#include "util.h"

#define MARK_SIZE 1

/**
 * kdbus_owner_init() - note who makes an object
 * @owner:	note to initialise
 *
 * Return: 0 on success, -ENOMEM.
 */
int kdbus_owner_init(KdbusOwner *owner)
{
	void *mark;

	*owner = (KdbusOwner){ .pid = getpid() };
	mark = mmap(NULL, MARK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mark == MAP_FAILED)
		return -errno;

	if (madvise(mark, MARK_SIZE, MADV_WIPEONFORK) < 0) {
		munmap(mark, MARK_SIZE);
		return 0;
	}
	owner->mark = mark;
	*owner->mark = 1;
	return 0;
}

/**
 * kdbus_owner_deinit() - release a note
 * @owner:	note to release; one that was never initialised, but zero, is fine
 */
void kdbus_owner_deinit(KdbusOwner *owner)
{
	if (owner->mark)
		munmap((void *)owner->mark, MARK_SIZE);
	*owner = (KdbusOwner){};
}

/**
 * kdbus_owner_check() - check that an object is ours
 * @owner:	note of who made it
 *
 * Return: 0 if it is, -ECHILD if we were forked from who made it.
 */
int kdbus_owner_check(const KdbusOwner *owner)
{
	bool ours = owner->mark ? *owner->mark : owner->pid == getpid();

	return ours ? 0 : -ECHILD;
}
