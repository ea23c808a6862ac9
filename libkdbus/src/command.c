/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The commands on the way of each message
 */

#include <kdbus/extension.h>
#include "command.h"
#include "util.h"

typedef struct SendCommand SendCommand;

/* SEND with room for a cancel descriptor */
struct SendCommand {
	struct kdbus_cmd_send cmd;
	struct {
		uint64_t size;
		uint64_t type;
		int fd;
	} cancel;
};

static int command_send(struct kdbus_conn *conn, SendCommand *send, const struct kdbus_msg *msg)
{
	unsigned long code = conn->fd_socket.fd >= 0 ? KDBUSFS_CMD_SEND : KDBUS_CMD_SEND;

	send->cmd.msg_address = (uintptr_t)msg;
	return kdbus_conn_ioctl(conn, code, send);
}

/**
 * kdbus_command_send() - send a message
 * @conn:	connection to use
 * @msg:	the message
 *
 * Return: 0 on success, -ECHILD if another process made @conn, the errno of the
 *         command.
 */
int kdbus_command_send(struct kdbus_conn *conn, const struct kdbus_msg *msg)
{
	SendCommand send = { .cmd.size = sizeof(send.cmd) };

	return command_send(conn, &send, msg);
}

/**
 * kdbus_command_call() - send a request and wait for its reply
 * @conn:	connection to use
 * @msg:	the request
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @replyp:	where the reply is
 *
 * Return: As kdbus_command_send(); -EINTR after a signal.
 */
int kdbus_command_call(struct kdbus_conn *conn, const struct kdbus_msg *msg, int cancel_fd,
		       struct kdbus_msg_info *replyp)
{
	SendCommand send = {
		.cmd.size = sizeof(send.cmd),
		.cmd.flags = KDBUS_SEND_SYNC_REPLY,
		.cancel.size = offsetof(struct kdbus_item, data) + sizeof(int),
		.cancel.type = KDBUS_ITEM_CANCEL_FD,
		.cancel.fd = cancel_fd,
	};
	int r;

	if (cancel_fd >= 0)
		send.cmd.size += send.cancel.size;

	r = command_send(conn, &send, msg);
	if (r < 0)
		return r;

	*replyp = send.cmd.reply;
	return 0;
}

/**
 * kdbus_command_recv() - receive a message, or look at it, or drop it
 * @conn:	connection to use
 * @flags:	KDBUS_RECV_*
 * @priority:	with KDBUS_RECV_USE_PRIORITY, the highest value to accept
 * @infop:	where the message is; nothing if it was dropped
 *
 * Messages that were lost meanwhile are counted.
 *
 * Return: 0 on success, -EAGAIN if there is none, -ECHILD if another process
 *         made @conn, the errno of the command.
 */
int kdbus_command_recv(struct kdbus_conn *conn, uint64_t flags, int64_t priority,
		       struct kdbus_msg_info *infop)
{
	unsigned long code = conn->fd_socket.fd >= 0 ? KDBUSFS_CMD_RECV : KDBUS_CMD_RECV;
	struct kdbus_cmd_recv cmd = { .size = sizeof(cmd), .flags = flags, .priority = priority };
	int r;

	r = kdbus_conn_ioctl(conn, code, &cmd);
	if ((r == 0 || r == -EAGAIN) && cmd.return_flags & KDBUS_RECV_RETURN_DROPPED_MSGS)
		atomic_fetch_add(&conn->n_lost, cmd.dropped_msgs);
	if (r < 0)
		return r;

	*infop = cmd.msg;
	return 0;
}

/**
 * kdbus_command_free() - give a slice back
 * @conn:	connection to use
 * @offset:	where the slice starts
 *
 * Return: 0 on success, -ENXIO if there is none, -EOPNOTSUPP on the connection
 *         of a policy holder, -ECHILD if another process made @conn.
 */
int kdbus_command_free(struct kdbus_conn *conn, uint64_t offset)
{
	struct kdbus_cmd_free cmd = { .size = sizeof(cmd), .offset = offset };

	return kdbus_conn_ioctl(conn, KDBUS_CMD_FREE, &cmd);
}
