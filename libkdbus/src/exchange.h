/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Exchanges: slices freed, messages sent, and messages awaited in one system call
 *
 * Not for itself, but for the commands in command.h and the functions that offer
 * it. A slice that is given back waits for the next exchange, which frees it on the
 * way; of those that wait there are few, so that the pool does not fill up with them.
 * Anywhere but on kdbusfs there is no such command, which is found out at HELLO.
 */

#include <kdbus/extension.h>
#include "message.h"

typedef struct KdbusExchange KdbusExchange;

/* payload up to here goes with the call, what is larger is read by the daemon */
#define KDBUS_INLINE_MAX 8192
#define KDBUS_EXCHANGE_SEND_MAX 64
#define KDBUS_EXCHANGE_RECV_MAX 64

struct KdbusExchange {
	union {
		struct kdbusfs_cmd_exchange cmd;
		uint8_t block[KDBUSFS_EXCHANGE_SIZE_MAX];
	};
	/* where the first message is, how much payload is to follow, what rules out others */
	size_t first;
	size_t n_payload;
	bool alone;
};

void kdbus_exchange_init(KdbusExchange *exchange, struct kdbus_conn *conn, uint64_t flags,
			 size_t n_recv);
bool kdbus_exchange_fits(const struct kdbus_msg *msg, size_t n_recv);
bool kdbus_exchange_add(KdbusExchange *exchange, const struct kdbus_msg *msg);
int kdbus_exchange_run(KdbusExchange *exchange, struct kdbus_conn *conn);

/* received messages, cmd.n_received of them */
static inline const struct kdbus_msg_info *kdbus_exchange_received(const KdbusExchange *exchange)
{
	return (const void *)(&exchange->cmd + 1);
}

bool kdbus_conn_defer_free(struct kdbus_conn *conn, uint64_t offset, uint64_t size);
