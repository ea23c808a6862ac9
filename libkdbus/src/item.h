/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Items
 *
 * A chain is a command struct (or a part of one) with items behind it, growing
 * on the heap. Items are appended unpadded at the next multiple of 8, so that
 * chain->size is what belongs into the size field of the struct.
 */

#include <kdbus/kdbus.h>
#include <stddef.h>
#include <stdint.h>

typedef struct KdbusChain KdbusChain;

struct KdbusChain {
	uint8_t *data;
	size_t size;
	size_t n_allocated;
};

#define KDBUS_CHAIN_NULL { 0 }

int kdbus_chain_init(KdbusChain *chain, const void *head, size_t size);
void kdbus_chain_deinit(KdbusChain *chain);
int kdbus_chain_append(KdbusChain *chain, uint64_t type, const void *data, size_t size);
int kdbus_chain_append_two(KdbusChain *chain, uint64_t type, const void *first, size_t n_first,
			   const void *second, size_t n_second);
int kdbus_chain_append_string(KdbusChain *chain, uint64_t type, const char *string);
int kdbus_chain_append_items(KdbusChain *chain, const KdbusChain *items);
int kdbus_chain_ioctl(KdbusChain *chain, int fd, unsigned long code);

const struct kdbus_item *kdbus_items_next(const void *items, size_t size,
					  const struct kdbus_item *item);
const struct kdbus_item *kdbus_items_find(const void *items, size_t size, uint64_t type);
int kdbus_items_check(const void *items, size_t size);
