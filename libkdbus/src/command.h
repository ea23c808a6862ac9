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
int kdbus_command_send_many(struct kdbus_conn *conn, struct kdbus_msg *const *msgs, size_t n,
			    size_t *n_sentp);
int kdbus_command_call(struct kdbus_conn *conn, const struct kdbus_msg *msg, int cancel_fd,
		       struct kdbus_msg_info *replyp);
int kdbus_command_recv(struct kdbus_conn *conn, uint64_t flags, int64_t priority,
		       struct kdbus_msg_info *infop);
int kdbus_command_wait(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd);
int kdbus_command_recv_wait(struct kdbus_conn *conn, const struct kdbus_msg *reply,
			    uint64_t deadline, int cancel_fd, struct kdbus_msg_info *infos,
			    size_t n_max, size_t *np);
int kdbus_command_free(struct kdbus_conn *conn, uint64_t offset, uint64_t size);
int kdbus_command_free_now(struct kdbus_conn *conn, uint64_t offset);
