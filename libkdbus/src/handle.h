/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Handles: open files that keep what was made through them
 *
 * A bus lives as long as the file of control that made it, a custom endpoint as
 * long as that of the default endpoint.
 */

#include "item.h"

typedef struct KdbusHandle KdbusHandle;

struct KdbusHandle {
	int fd;
	/* where what was made is opened */
	char *path;
};

#define KDBUS_HANDLE_NULL { .fd = -1 }

int kdbus_handle_init_command(KdbusChain *chain, uint64_t flags, const char *name);
int kdbus_handle_make(KdbusHandle *handle, const char *node, unsigned long code, KdbusChain *chain);
void kdbus_handle_deinit(KdbusHandle *handle);
