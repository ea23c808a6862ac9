/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Owners: the process that made an object
 *
 * fork() copies an object, but both copies stand for the same file. Whatever the
 * child did to it, be it only that it tidies up, it would do to its parent. So
 * an object notes who made it, and all others leave its file alone.
 *
 * The note is a page that the kernel clears in every child that gets a copy of
 * the memory, by fork(), clone() or anything else. To look at it costs no system
 * call, and it is not deceived when a process number comes again, which getpid()
 * would be in a new PID namespace. Who shares the memory is the same to it:
 * threads, and the child of a vfork(). Before Linux 4.14 there is no such page;
 * numbers are compared there.
 */

#include <stdint.h>
#include <sys/types.h>

typedef struct KdbusOwner KdbusOwner;

struct KdbusOwner {
	/* 1 for the owner, 0 for its children; NULL: compare pid */
	volatile uint8_t *mark;
	pid_t pid;
};

int kdbus_owner_init(KdbusOwner *owner);
void kdbus_owner_deinit(KdbusOwner *owner);
int kdbus_owner_check(const KdbusOwner *owner);
