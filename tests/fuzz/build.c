// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Commands that could succeed, and what to do to them
 */

#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "fuzz.h"

#define ITEM_HEADER offsetof(struct kdbus_item, data)
#define BLOOM_SIZE 64

const unsigned int codes[N_CODES] = {
	KDBUS_CMD_BUS_MAKE,     KDBUS_CMD_ENDPOINT_MAKE, KDBUS_CMD_ENDPOINT_UPDATE,
	KDBUS_CMD_HELLO,        KDBUS_CMD_UPDATE,        KDBUS_CMD_BYEBYE,
	KDBUS_CMD_FREE,         KDBUS_CMD_CONN_INFO,     KDBUS_CMD_BUS_CREATOR_INFO,
	KDBUS_CMD_LIST,         KDBUS_CMD_SEND,          KDBUS_CMD_RECV,
	KDBUS_CMD_NAME_ACQUIRE, KDBUS_CMD_NAME_RELEASE,  KDBUS_CMD_MATCH_ADD,
	KDBUS_CMD_MATCH_REMOVE, KDBUSFS_CMD_FD_SOCKET,   KDBUSFS_CMD_RECV,
	KDBUSFS_CMD_SEND,
};

const char *const code_names[N_CODES] = {
	"BUS_MAKE",
	"ENDPOINT_MAKE",
	"ENDPOINT_UPDATE",
	"HELLO",
	"UPDATE",
	"BYEBYE",
	"FREE",
	"CONN_INFO",
	"BUS_CREATOR_INFO",
	"LIST",
	"SEND",
	"RECV",
	"NAME_ACQUIRE",
	"NAME_RELEASE",
	"MATCH_ADD",
	"MATCH_REMOVE",
	"FD_SOCKET",
	"RECV (extension)",
	"SEND (extension)",
};

static const char *const names[] = {
	"com.example.a",
	"com.example.b",
	"com.example.a.b",
	"com.example.*",
	"a.b",
	"a.*",
	"com",
	"com..a",
	".",
	"*",
	"com.example.\xc3\xa4",
};

/* --- what to put where */

/* Numbers at which something changes. */
uint64_t strange_number(Thread *thread)
{
	/* clang-format off */
	static const uint64_t numbers[] = {
		0, 1, 2, 7, 8, 15, 16, 17, 23, 24, 25, 32, 40, 56, 63, 64, 65, 96, 255, 256, 257,
		4095, 4096, 4097, 32760, 32767, 32768, 32769, 65536,
		UINT64_C(1) << 20, UINT64_C(2) << 20, (UINT64_C(2) << 20) + 1, UINT64_C(16) << 20,
		INT32_MAX, UINT64_C(1) << 31, UINT32_MAX, UINT64_C(1) << 32, UINT64_C(1) << 47,
		INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 8, UINT64_MAX - 7, UINT64_MAX - 1, UINT64_MAX,
	};
	/* clang-format on */

	switch (below(thread, 4)) {
	case 0:
		return rng_next(&thread->rng);
	case 1:
		return UINT64_C(1) << below(thread, 64);
	case 2:
		return shared->ids[below(thread, N_IDS)];
	default:
		return numbers[below(thread, N_ELEMENTS(numbers))];
	}
}

/* An address that is no good, or not for long, or belongs to a pool. */
uint64_t strange_address(Thread *thread)
{
	/* clang-format off */
	static const uint64_t addresses[] = {
		0, 1, 8, 4096, UINT64_C(0x7ffffffff000), UINT64_C(0x7ffffffffff8),
		UINT64_C(0xffff888000000000), UINT64_C(0xffffffff81000000), UINT64_MAX - 7,
		UINT64_MAX, UINT64_C(1) << 63, UINT64_C(1) << 47,
	};
	/* clang-format on */
	Map *map = &thread->client->maps[below(thread, N_MAPS)];

	switch (below(thread, 8)) {
	case 0:
		return rng_next(&thread->rng) & ~UINT64_C(7);
	case 1:
	case 2:
		return (uintptr_t)map->address + 8 * below(thread, map->size / 8 + 1);
	case 3:
		return (uintptr_t)thread->command.rw + ARENA_SIZE - 8 * below(thread, 16);
	case 4:
		return (uintptr_t)thread->client->page;
	case 5:
		return (uintptr_t)strange_address;
	default:
		return addresses[below(thread, N_ELEMENTS(addresses))];
	}
}

static uint64_t any_id(Thread *thread)
{
	uint64_t id = thread->client->ids[below(thread, N_FILES)];

	if (one_in(thread, 16))
		return strange_number(thread);
	return id && !one_in(thread, 4) ? id : shared->ids[below(thread, N_IDS)];
}

static uint64_t any_cookie(Thread *thread)
{
	return one_in(thread, 32) ? strange_number(thread) : 1 + below(thread, 8);
}

static uint64_t any_mask(Thread *thread)
{
	switch (below(thread, 4)) {
	case 0:
		return one_in(thread, 8) ? strange_number(thread) : 0;
	case 1:
		return _KDBUS_ATTACH_ANY;
	case 2:
		return _KDBUS_ATTACH_ALL;
	default:
		return rng_next(&thread->rng) & _KDBUS_ATTACH_ALL;
	}
}

/* Mostly one that is valid. */
static const char *any_name(Thread *thread)
{
	return names[below(thread, one_in(thread, 8) ? N_ELEMENTS(names) : 3)];
}

static int any_other(Thread *thread)
{
	Client *client = thread->client;

	switch (below(thread, 12)) {
	case 0:
		return client->files[below(thread, N_FILES)];
	case 1:
		return (int)below(thread, 64) - 1;
	case 2:
		return (int)strange_number(thread);
	default:
		return client->others[below(thread, N_OTHERS)];
	}
}

/* others[] starts with memfds that are sealed, and of PAYLOAD_SIZE / 64 bytes. */
static int any_memfd(Thread *thread)
{
	return one_in(thread, 8) ? any_other(thread) : thread->client->others[below(thread, 2)];
}

/* --- items */

static void *put(Command *command, uint64_t type, const void *data, uint64_t size)
{
	struct kdbus_item *item = (void *)((uint8_t *)command->data + command->size);

	if (command->size + ALIGN8(ITEM_HEADER + size) > COMMAND_MAX)
		return NULL;

	item->size = ITEM_HEADER + size;
	item->type = type;
	memset(item->data, 0, ALIGN8(size));
	if (data)
		memcpy(item->data, data, size);
	command->size += ALIGN8(item->size);
	return item->data;
}

static void put_u64(Command *command, uint64_t type, uint64_t value)
{
	put(command, type, &value, sizeof(value));
}

static void put_string(Command *command, uint64_t type, const char *string)
{
	put(command, type, string, strlen(string) + 1);
}

static void put_policy(Thread *thread, Command *command)
{
	struct kdbus_policy_access access;

	for (uint64_t n = below(thread, 5); n > 0; n--) {
		access.type = 1 + below(thread, 3);
		access.access = below(thread, 3);
		access.id = one_in(thread, 8) ? strange_number(thread) : below(thread, 2) * 65534;
		put(command, KDBUS_ITEM_POLICY_ACCESS, &access, sizeof(access));
	}
}

static void put_make_name(Thread *thread, Command *command)
{
	unsigned int uid = one_in(thread, 32) ? 1 : thread->client->uid;
	char name[80];

	snprintf(name, sizeof(name), "%u-fuzz-%u", uid, (unsigned int)below(thread, 24));
	if (one_in(thread, 32))
		memset(name, 'a' + (int)below(thread, 26), below(thread, sizeof(name) - 1));
	name[sizeof(name) - 1] = 0;
	put_string(command, KDBUS_ITEM_MAKE_NAME, name);
}

static void put_fakes(Thread *thread, Command *command)
{
	uint64_t ids[8];

	if (one_in(thread, 2)) {
		for (unsigned int i = 0; i < N_ELEMENTS(ids); i++)
			ids[i] = one_in(thread, 4) ? strange_number(thread) : below(thread, 3);
		put(command, KDBUS_ITEM_CREDS, ids, sizeof(ids));
	}
	if (one_in(thread, 2)) {
		for (unsigned int i = 0; i < 3; i++)
			ids[i] = one_in(thread, 8) ? strange_number(thread) : below(thread, 2);
		put(command, KDBUS_ITEM_PIDS, ids, 24);
	}
	if (one_in(thread, 2))
		put_string(command, KDBUS_ITEM_SECLABEL, "fuzz");
}

static void put_negotiate(Thread *thread, Command *command)
{
	uint64_t types[8], n = below(thread, N_ELEMENTS(types));

	for (uint64_t i = 0; i < n; i++)
		types[i] = one_in(thread, 4) ? strange_number(thread) : 1 + below(thread, 16);
	put(command, KDBUS_ITEM_NEGOTIATE, types, 8 * n);
}

static void put_rule(Thread *thread, Command *command)
{
	struct kdbus_notify_name_change *change;
	uint64_t mask[4 * BLOOM_SIZE / 8] = {};

	switch (below(thread, 6)) {
	case 0:
		for (uint64_t n = below(thread, 4); n > 0; n--)
			mask[below(thread, N_ELEMENTS(mask))] |= UINT64_C(1) << below(thread, 64);
		put(command, KDBUS_ITEM_BLOOM_MASK, mask, BLOOM_SIZE * (1 + below(thread, 4)));
		break;
	case 1:
		put_u64(command, one_in(thread, 2) ? KDBUS_ITEM_ID : KDBUS_ITEM_DST_ID,
			one_in(thread, 2) ? KDBUS_MATCH_ID_ANY : any_id(thread));
		break;
	case 2:
		put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		break;
	case 3:
		change = put(command, KDBUS_ITEM_NAME_ADD + below(thread, 3), NULL,
			     sizeof(*change) + 14 * below(thread, 2));
		change->old_id.id = change->new_id.id = KDBUS_MATCH_ID_ANY;
		if (((uint64_t *)change)[-2] > ITEM_HEADER + sizeof(*change))
			memcpy(change->name, names[0], 14);
		break;
	default:
		change = put(command, KDBUS_ITEM_ID_ADD + below(thread, 2), NULL,
			     sizeof(change->old_id));
		change->old_id.id = one_in(thread, 2) ? KDBUS_MATCH_ID_ANY : any_id(thread);
		break;
	}
}

/* --- commands */

static uint64_t fixed_size(unsigned int code)
{
	return (code >> 16) & 0x3fff;
}

static void build_hello(Thread *thread, Command *command)
{
	struct kdbus_cmd_hello *hello = (void *)command->data;
	uint64_t kind = below(thread, 12);

	hello->flags = below(thread, 2) * KDBUS_HELLO_ACCEPT_FD;
	hello->attach_flags_send = any_mask(thread);
	hello->attach_flags_recv = any_mask(thread);
	hello->pool_size = UINT64_C(4096) << below(thread, 11);
	if (one_in(thread, 64))
		hello->pool_size = strange_number(thread);
	if (kind < 3)
		hello->flags |= KDBUS_HELLO_ACTIVATOR << kind;
	if (kind < 2 || one_in(thread, 64)) {
		put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		put_policy(thread, command);
	}
	if (one_in(thread, 8))
		put_string(command, KDBUS_ITEM_CONN_DESCRIPTION, "a fuzzer");
	if (one_in(thread, 12))
		put_fakes(thread, command);
}

static void build_send(Thread *thread, Command *command)
{
	struct kdbus_cmd_send *send = (void *)command->data;
	int fd;

	/* The message's address is put in by who sends it. */
	if (one_in(thread, 3))
		send->flags = KDBUS_SEND_SYNC_REPLY;
	if (one_in(thread, 8)) {
		fd = any_other(thread);
		put(command, KDBUS_ITEM_CANCEL_FD, &fd, sizeof(fd));
	}
}

static void build_update(Thread *thread, Command *command)
{
	if (one_in(thread, 2))
		put_u64(command, KDBUS_ITEM_ATTACH_FLAGS_SEND, any_mask(thread));
	if (one_in(thread, 2))
		put_u64(command, KDBUS_ITEM_ATTACH_FLAGS_RECV, any_mask(thread));
	if (one_in(thread, 3)) {
		put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		put_policy(thread, command);
	}
}

/**
 * build() - build a command
 * @thread:		who asks
 * @command:		where to
 * @code:		its code
 */
void build(Thread *thread, Command *command, unsigned int code)
{
	struct kdbus_bloom_parameter bloom = { .size = BLOOM_SIZE, .n_hash = 1 };
	struct kdbus_cmd *head = (void *)command->data;
	uint64_t *fields = command->data + 3;

	command->size = ALIGN8(fixed_size(code));
	memset(command->data, 0, command->size);

	switch (code) {
	case KDBUS_CMD_BUS_MAKE:
		head->flags = below(thread, 4);
		put_make_name(thread, command);
		put(command, KDBUS_ITEM_BLOOM_PARAMETER, &bloom, sizeof(bloom));
		if (one_in(thread, 2))
			put_u64(command, KDBUS_ITEM_ATTACH_FLAGS_SEND, any_mask(thread));
		break;
	case KDBUS_CMD_ENDPOINT_MAKE:
		head->flags = below(thread, 4);
		put_make_name(thread, command);
		break;
	case KDBUS_CMD_ENDPOINT_UPDATE:
		for (uint64_t n = below(thread, 4); n > 0; n--) {
			put_string(command, KDBUS_ITEM_NAME, any_name(thread));
			put_policy(thread, command);
		}
		break;
	case KDBUS_CMD_HELLO:
		build_hello(thread, command);
		break;
	case KDBUS_CMD_UPDATE:
		build_update(thread, command);
		break;
	case KDBUS_CMD_FREE:
		fields[0] = one_in(thread, 16) ? strange_number(thread)
					       : thread->client->offsets[below(thread, N_OFFSETS)];
		break;
	case KDBUS_CMD_CONN_INFO:
	case KDBUS_CMD_BUS_CREATOR_INFO:
		fields[0] = any_id(thread);
		fields[1] = any_mask(thread);
		if (code == KDBUS_CMD_CONN_INFO && one_in(thread, 3)) {
			fields[0] = 0;
			put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		}
		break;
	case KDBUS_CMD_LIST:
		head->flags = below(thread, 16);
		break;
	case KDBUS_CMD_SEND:
	case KDBUSFS_CMD_SEND:
		build_send(thread, command);
		break;
	case KDBUS_CMD_RECV:
	case KDBUSFS_CMD_RECV:
		if (one_in(thread, 3))
			head->flags = below(thread, 8);
		fields[0] = below(thread, 4) - 1;
		break;
	case KDBUS_CMD_NAME_ACQUIRE:
		head->flags = below(thread, 8);
		put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		break;
	case KDBUS_CMD_NAME_RELEASE:
		put_string(command, KDBUS_ITEM_NAME, any_name(thread));
		break;
	case KDBUS_CMD_MATCH_ADD:
		head->flags = below(thread, 2);
		fields[0] = any_cookie(thread);
		for (uint64_t n = below(thread, 3); n > 0; n--)
			put_rule(thread, command);
		break;
	case KDBUS_CMD_MATCH_REMOVE:
		fields[0] = any_cookie(thread);
		break;
	case KDBUSFS_CMD_FD_SOCKET:
		*(int *)fields = any_other(thread);
		break;
	}

	if (one_in(thread, 32))
		put_negotiate(thread, command);
	if (one_in(thread, 64))
		head->flags |= KDBUS_FLAG_NEGOTIATE;
	head->size = command->size;
}

/* --- messages */

static uint64_t deadline(Thread *thread)
{
	struct timespec now;

	if (one_in(thread, 32))
		return strange_number(thread);
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec +
	       (UINT64_C(1000) << below(thread, 15));
}

static void put_payload(Thread *thread, Command *command)
{
	struct kdbus_memfd memfd = {};
	struct kdbus_vec vec = {};
	int fds[20];
	uint64_t n;

	switch (below(thread, 8)) {
	case 0:
		memfd.fd = any_memfd(thread);
		memfd.size = 1 + below(thread, PAYLOAD_SIZE / 64);
		memfd.start = one_in(thread, 8) ? below(thread, 4096) : 0;
		put(command, KDBUS_ITEM_PAYLOAD_MEMFD, &memfd, sizeof(memfd));
		break;
	case 1:
		n = one_in(thread, 8) ? below(thread, N_ELEMENTS(fds)) : 1 + below(thread, 2);
		for (uint64_t i = 0; i < n; i++)
			fds[i] = one_in(thread, 8) ? any_other(thread)
						   : thread->client->others[2 + below(thread, 4)];
		put(command, KDBUS_ITEM_FDS, fds, n * sizeof(*fds));
		break;
	default:
		vec.size = 1 + below(thread,
				     UINT64_C(2) << below(thread, one_in(thread, 32) ? 21 : 10));
		vec.address = (uintptr_t)payload + below(thread, PAYLOAD_SIZE / 4);
		if (one_in(thread, 8))
			vec.address = one_in(thread, 2) ? 0 : strange_address(thread);
		put(command, KDBUS_ITEM_PAYLOAD_VEC, &vec, sizeof(vec));
		break;
	}
}

static void put_bloom_filter(Thread *thread, Command *command)
{
	uint64_t filter[1 + BLOOM_SIZE / 8];

	for (unsigned int i = 0; i < N_ELEMENTS(filter); i++)
		filter[i] = i ? rng_next(&thread->rng) : below(thread, 5);
	put(command, KDBUS_ITEM_BLOOM_FILTER, filter, sizeof(filter));
}

/**
 * build_message() - build what a SEND is about
 * @thread:		who asks
 * @command:		where to
 * @sync:		the SEND wants to wait for a reply
 */
void build_message(Thread *thread, Command *command, bool sync)
{
	struct kdbus_msg *msg = (void *)command->data;
	Mail *mail = &thread->client->mail[below(thread, N_MAIL)];

	command->size = sizeof(*msg);
	memset(msg, 0, sizeof(*msg));
	msg->payload_type = KDBUS_PAYLOAD_DBUS;
	msg->cookie = any_cookie(thread);
	msg->priority = (int64_t)below(thread, 4) - 1;
	msg->dst_id = any_id(thread);

	switch (below(thread, 6)) {
	case 0:
		msg->flags = KDBUS_MSG_SIGNAL;
		if (one_in(thread, 2))
			msg->dst_id = KDBUS_DST_ID_BROADCAST;
		put_bloom_filter(thread, command);
		break;
	case 1:
		msg->flags = below(thread, 2) * KDBUS_MSG_NO_AUTO_START;
		msg->dst_id = one_in(thread, 16) ? any_id(thread) : 0;
		put_string(command, KDBUS_ITEM_DST_NAME, any_name(thread));
		break;
	case 2:
	case 3:
		if (mail->src_id) {
			msg->dst_id = mail->src_id;
			msg->cookie_reply = mail->cookie;
		}
		break;
	default:
		break;
	}
	if (sync || (!msg->cookie_reply && !(msg->flags & KDBUS_MSG_SIGNAL) && one_in(thread, 3))) {
		msg->flags |= KDBUS_MSG_EXPECT_REPLY;
		msg->timeout_ns = deadline(thread);
	}
	for (uint64_t n = below(thread, 4); n > 0; n--)
		put_payload(thread, command);
	if (one_in(thread, 64))
		for (uint64_t n = below(thread, 600); n > 0; n--)
			put_payload(thread, command);
	if (one_in(thread, 64))
		put_negotiate(thread, command);
	msg->size = command->size;
}

/* --- damage */

static struct kdbus_item *any_item(Thread *thread, Command *command)
{
	uint64_t at = 24 + 8 * below(thread, command->size / 8 - 2);

	return (void *)((uint8_t *)command->data + at);
}

/**
 * damage() - spoil a command, or a message
 * @thread:		who asks
 * @command:		what to spoil; its size may change, up to COMMAND_MAX
 *
 * What was a valid chain mostly stays one here and there, so that the checks
 * behind the first are reached as well.
 */
void damage(Thread *thread, Command *command)
{
	uint8_t *bytes = (uint8_t *)command->data;
	uint64_t n_words = command->size / 8, *word = &command->data[below(thread, n_words)], size;

	switch (below(thread, 9)) {
	case 0:
		bytes[below(thread, command->size)] ^= 1 << below(thread, 8);
		break;
	case 1:
		*word = strange_number(thread);
		break;
	case 2:
		*word += below(thread, 2) ? 1 : -1;
		break;
	case 3:
		command->data[0] = one_in(thread, 2) ? strange_number(thread)
						     : command->size - 16 + below(thread, 32);
		break;
	case 4:
		command->data[1] ^= UINT64_C(1) << below(thread, 64);
		break;
	case 5:
		any_item(thread, command)->size = below(thread, 2) ? below(thread, 64)
								   : strange_number(thread);
		break;
	case 6:
		/* The tail once more. */
		size = 8 * (1 + below(thread, n_words));
		if (command->size + size <= COMMAND_MAX) {
			memcpy(bytes + command->size, bytes + command->size - size, size);
			command->size += size;
			command->data[0] = command->size;
		}
		break;
	case 7:
		/* Without its tail. */
		command->data[0] = command->size = 24 + below(thread, command->size - 23);
		break;
	default:
		/* As long as can be, or longer. */
		size = 32768 - 16 + 8 * below(thread, 5);
		memset(bytes + command->size, 0,
		       size - (command->size < size ? command->size : size));
		command->size = command->data[0] = size;
		break;
	}
	if (command->size < 24)
		command->size = 24;
}
