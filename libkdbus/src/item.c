/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Items
 */

#include <string.h>
#include "item.h"
#include "util.h"

/**
 * kdbus_chain_init() - start a chain
 * @chain:	chain to initialise
 * @head:	struct to copy to its front, or NULL if there is none
 * @size:	size of @head, a multiple of 8
 *
 * Return: 0 on success, -ENOMEM.
 */
int kdbus_chain_init(KdbusChain *chain, const void *head, size_t size)
{
	size_t n_allocated = size + 256;
	uint8_t *data;

	data = malloc(n_allocated);
	if (!data)
		return -ENOMEM;

	if (head)
		memcpy(data, head, size);
	*chain = (KdbusChain){ .data = data, .size = size, .n_allocated = n_allocated };
	return 0;
}

/**
 * kdbus_chain_deinit() - release the memory of a chain
 * @chain:	chain to release; one that was never started is fine
 */
void kdbus_chain_deinit(KdbusChain *chain)
{
	free(chain->data);
	*chain = (KdbusChain)KDBUS_CHAIN_NULL;
}

static int chain_reserve(KdbusChain *chain, size_t size)
{
	size_t needed = align8(chain->size) + align8(size);
	size_t n_allocated;
	uint8_t *data;

	if (needed <= chain->n_allocated)
		return 0;

	n_allocated = needed * 2;
	data = realloc(chain->data, n_allocated);
	if (!data)
		return -ENOMEM;

	chain->data = data;
	chain->n_allocated = n_allocated;
	return 0;
}

/**
 * kdbus_chain_append_two() - append an item whose payload has two pieces
 * @chain:	chain to append to
 * @type:	type of the item
 * @first:	first piece
 * @n_first:	its size
 * @second:	what follows it
 * @n_second:	its size
 *
 * Return: 0 on success, -EMSGSIZE if no command could carry the item, -ENOMEM.
 */
int kdbus_chain_append_two(KdbusChain *chain, uint64_t type, const void *first, size_t n_first,
			   const void *second, size_t n_second)
{
	struct kdbus_item head = { .type = type };
	size_t start = align8(chain->size);
	uint8_t *p;
	int r;

	if (n_first > UINT16_MAX || n_second > UINT16_MAX)
		return -EMSGSIZE;

	head.size = offsetof(struct kdbus_item, data) + n_first + n_second;
	r = chain_reserve(chain, head.size);
	if (r < 0)
		return r;

	/* zero the padding: commands are read as a whole */
	memset(chain->data + chain->size, 0, start - chain->size);
	p = chain->data + start;
	memcpy(p, &head, offsetof(struct kdbus_item, data));
	p += offsetof(struct kdbus_item, data);
	if (n_first)
		memcpy(p, first, n_first);
	if (n_second)
		memcpy(p + n_first, second, n_second);
	chain->size = start + head.size;
	return 0;
}

/**
 * kdbus_chain_append() - append an item
 * @chain:	chain to append to
 * @type:	type of the item
 * @data:	payload
 * @size:	its size
 *
 * Return: 0 on success, -EMSGSIZE if no command could carry the item, -ENOMEM.
 */
int kdbus_chain_append(KdbusChain *chain, uint64_t type, const void *data, size_t size)
{
	return kdbus_chain_append_two(chain, type, data, size, NULL, 0);
}

/**
 * kdbus_chain_append_string() - append an item that holds a string
 * @chain:	chain to append to
 * @type:	type of the item
 * @string:	string, which goes in with its NUL
 *
 * Return: 0 on success, -EMSGSIZE if no command could carry the item, -ENOMEM.
 */
int kdbus_chain_append_string(KdbusChain *chain, uint64_t type, const char *string)
{
	return kdbus_chain_append(chain, type, string, strlen(string) + 1);
}

/**
 * kdbus_chain_append_items() - append all items of another chain
 * @chain:	chain to append to
 * @items:	chain without a struct at its front
 *
 * Return: 0 on success, -ENOMEM.
 */
int kdbus_chain_append_items(KdbusChain *chain, const KdbusChain *items)
{
	size_t start = align8(chain->size);
	int r;

	if (!items->size)
		return 0;

	r = chain_reserve(chain, items->size);
	if (r < 0)
		return r;

	memset(chain->data + chain->size, 0, start - chain->size);
	memcpy(chain->data + start, items->data, items->size);
	chain->size = start + items->size;
	return 0;
}

/**
 * kdbus_chain_ioctl() - issue the command that a chain holds
 * @chain:	command struct, which gets its size here, with items behind it
 * @fd:		file to issue it on
 * @code:	KDBUS_CMD_*
 *
 * Return: 0 on success, the errno of the command.
 */
int kdbus_chain_ioctl(KdbusChain *chain, int fd, unsigned long code)
{
	/* every command struct starts with its size */
	memcpy(chain->data, &(uint64_t){ chain->size }, sizeof(uint64_t));
	return kdbus_ioctl(fd, code, chain->data);
}

/**
 * kdbus_items_next() - walk a chain of items
 * @items:	start of the chain
 * @size:	its size
 * @item:	the item before, or NULL to get the first
 *
 * Return: The next item, or NULL if there is none that fits in the chain.
 */
const struct kdbus_item *kdbus_items_next(const void *items, size_t size,
					  const struct kdbus_item *item)
{
	size_t position = 0;

	if (item)
		position = (const uint8_t *)item - (const uint8_t *)items + align8(item->size);
	if (position > size || size - position < offsetof(struct kdbus_item, data))
		return NULL;

	item = (const void *)((const uint8_t *)items + position);
	if (item->size < offsetof(struct kdbus_item, data) || item->size > size - position)
		return NULL;
	return item;
}

/**
 * kdbus_items_find() - find the first item of a type
 * @items:	start of the chain
 * @size:	its size
 * @type:	type to look for
 *
 * Return: The item, or NULL if there is none.
 */
const struct kdbus_item *kdbus_items_find(const void *items, size_t size, uint64_t type)
{
	const struct kdbus_item *item = NULL;

	while ((item = kdbus_items_next(items, size, item)))
		if (item->type == type)
			return item;
	return NULL;
}

/**
 * kdbus_items_check() - check that items fill a chain
 * @items:	start of the chain
 * @size:	its size
 *
 * Return: 0 if they do, -EBADMSG if a walk would stop before the end.
 */
int kdbus_items_check(const void *items, size_t size)
{
	const struct kdbus_item *item = NULL;
	size_t end = 0;

	while ((item = kdbus_items_next(items, size, item)))
		end = (const uint8_t *)item - (const uint8_t *)items + align8(item->size);
	return end >= size ? 0 : -EBADMSG;
}

/**
 * kdbus_item_get_payload_size() - get the size of what an item holds
 * @item:	item to look at
 *
 * Return: Bytes behind its header, padding not counted.
 */
_public_ size_t kdbus_item_get_payload_size(const struct kdbus_item *item)
{
	return item->size - offsetof(struct kdbus_item, data);
}

static const void *item_get(const struct kdbus_item *item, uint64_t type, size_t size)
{
	if (!item || item->type != type || kdbus_item_get_payload_size(item) != size)
		return NULL;
	return item->data;
}

/* @string, if it ends where the item ends and not before */
static const char *item_check_string(const struct kdbus_item *item, const char *string)
{
	const char *end = (const char *)item + item->size;

	if (string >= end || memchr(string, 0, end - string) != end - 1)
		return NULL;
	return string;
}

/**
 * kdbus_item_get_string() - get the string of an item
 * @item:	item of a type that holds a string only, or NULL
 *
 * These are DST_NAME, MAKE_NAME, NAME, TID_COMM, PID_COMM, EXE, CMDLINE, CGROUP,
 * SECLABEL and CONN_DESCRIPTION. See kdbus_item_get_name() for OWNED_NAME.
 *
 * Return: The string, or NULL if @item is of another type or broken.
 */
_public_ const char *kdbus_item_get_string(const struct kdbus_item *item)
{
	if (!item)
		return NULL;

	switch (item->type) {
	case KDBUS_ITEM_DST_NAME:
	case KDBUS_ITEM_MAKE_NAME:
	case KDBUS_ITEM_NAME:
	case KDBUS_ITEM_TID_COMM:
	case KDBUS_ITEM_PID_COMM:
	case KDBUS_ITEM_EXE:
	case KDBUS_ITEM_CMDLINE:
	case KDBUS_ITEM_CGROUP:
	case KDBUS_ITEM_SECLABEL:
	case KDBUS_ITEM_CONN_DESCRIPTION:
		return item_check_string(item, item->str);
	default:
		return NULL;
	}
}

/**
 * kdbus_item_get_creds() - get user and group ids
 * @item:	item of type CREDS, or NULL
 *
 * Return: The ids, in the user namespace of the receiver; or NULL.
 */
_public_ const struct kdbus_creds *kdbus_item_get_creds(const struct kdbus_item *item)
{
	return item_get(item, KDBUS_ITEM_CREDS, sizeof(struct kdbus_creds));
}

/**
 * kdbus_item_get_pids() - get process, thread and parent
 * @item:	item of type PIDS, or NULL
 *
 * Return: The ids, in the pid namespace of the receiver; or NULL.
 */
_public_ const struct kdbus_pids *kdbus_item_get_pids(const struct kdbus_item *item)
{
	return item_get(item, KDBUS_ITEM_PIDS, sizeof(struct kdbus_pids));
}

/**
 * kdbus_item_get_timestamp() - get time and number of a message
 * @item:	item of type TIMESTAMP, or NULL
 *
 * Return: The timestamp, or NULL.
 */
_public_ const struct kdbus_timestamp *kdbus_item_get_timestamp(const struct kdbus_item *item)
{
	return item_get(item, KDBUS_ITEM_TIMESTAMP, sizeof(struct kdbus_timestamp));
}

/**
 * kdbus_item_get_audit() - get audit session and login user
 * @item:	item of type AUDIT, or NULL
 *
 * Return: The ids, 2^32-1 where unset; or NULL.
 */
_public_ const struct kdbus_audit *kdbus_item_get_audit(const struct kdbus_item *item)
{
	return item_get(item, KDBUS_ITEM_AUDIT, sizeof(struct kdbus_audit));
}

/**
 * kdbus_item_get_caps() - get capability sets
 * @item:	item of type CAPS, or NULL
 * @n_wordsp:	optional, number of 32-bit words in each of the four sets
 *
 * Return: The sets inheritable, permitted, effective, bounding; or NULL.
 */
_public_ const struct kdbus_caps *kdbus_item_get_caps(const struct kdbus_item *item,
						      size_t *n_wordsp)
{
	size_t size, n_words;

	if (!item || item->type != KDBUS_ITEM_CAPS)
		return NULL;

	size = kdbus_item_get_payload_size(item);
	if (size < offsetof(struct kdbus_caps, caps))
		return NULL;

	n_words = item->caps.last_cap / 32 + 1;
	if (size - offsetof(struct kdbus_caps, caps) != n_words * 4 * sizeof(__u32))
		return NULL;

	if (n_wordsp)
		*n_wordsp = n_words;
	return &item->caps;
}

/**
 * kdbus_item_get_auxgroups() - get supplementary groups
 * @item:	item of type AUXGROUPS, or NULL
 * @n_groupsp:	number of groups, which may be 0
 *
 * Return: The group ids, or NULL.
 */
_public_ const __u64 *kdbus_item_get_auxgroups(const struct kdbus_item *item, size_t *n_groupsp)
{
	if (!item || item->type != KDBUS_ITEM_AUXGROUPS ||
	    kdbus_item_get_payload_size(item) % sizeof(__u64))
		return NULL;

	*n_groupsp = kdbus_item_get_payload_size(item) / sizeof(__u64);
	return item->data64;
}

/**
 * kdbus_item_get_name() - get a well-known name and its flags
 * @item:	item of type OWNED_NAME, or NULL
 *
 * Return: Name and KDBUS_NAME_* flags, or NULL.
 */
_public_ const struct kdbus_name *kdbus_item_get_name(const struct kdbus_item *item)
{
	if (!item || item->type != KDBUS_ITEM_OWNED_NAME ||
	    !item_check_string(item, item->name.name))
		return NULL;
	return &item->name;
}

/**
 * kdbus_item_get_id_change() - get the connection that came or went
 * @item:	item of type ID_ADD or ID_REMOVE, or NULL
 *
 * Return: Id and KDBUS_HELLO_* flags, or NULL.
 */
_public_ const struct kdbus_notify_id_change *
kdbus_item_get_id_change(const struct kdbus_item *item)
{
	if (!item || (item->type != KDBUS_ITEM_ID_ADD && item->type != KDBUS_ITEM_ID_REMOVE) ||
	    kdbus_item_get_payload_size(item) != sizeof(struct kdbus_notify_id_change))
		return NULL;
	return &item->id_change;
}

/**
 * kdbus_item_get_name_change() - get the change of owner of a name
 * @item:	item of type NAME_ADD, NAME_REMOVE or NAME_CHANGE, or NULL
 *
 * Return: Old owner, new owner and name, or NULL.
 */
_public_ const struct kdbus_notify_name_change *
kdbus_item_get_name_change(const struct kdbus_item *item)
{
	if (!item || item->type < KDBUS_ITEM_NAME_ADD || item->type > KDBUS_ITEM_NAME_CHANGE ||
	    !item_check_string(item, item->name_change.name))
		return NULL;
	return &item->name_change;
}
