/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * The commands on the way of each message
 *
 * Every message is sent, every message is received and every slice is freed
 * here and nowhere else, whatever they are sent, received or freed for.
 */

#include "connection.h"

int kdbus_command_send(struct kdbus_conn *conn, const struct kdbus_msg *msg);
int kdbus_command_call(struct kdbus_conn *conn, const struct kdbus_msg *msg, int cancel_fd,
		       struct kdbus_msg_info *replyp);
int kdbus_command_recv(struct kdbus_conn *conn, uint64_t flags, int64_t priority,
		       struct kdbus_msg_info *infop);
int kdbus_command_free(struct kdbus_conn *conn, uint64_t offset);
