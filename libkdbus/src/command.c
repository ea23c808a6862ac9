/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The commands on the way of each message
 */

#include <poll.h>
#include "command.h"
#include "deadline.h"
#include "exchange.h"
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

/* start an exchange with @msg; false: there is no such command, or no room for that message */
static bool command_exchange(KdbusExchange *exchange, struct kdbus_conn *conn,
			     const struct kdbus_msg *msg, uint64_t flags, size_t n_recv)
{
	if (!conn->has_exchange || !kdbus_exchange_fits(msg, n_recv))
		return false;

	kdbus_exchange_init(exchange, conn, flags, n_recv);
	kdbus_exchange_add(exchange, msg);
	return true;
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
	KdbusExchange exchange;

	if (!command_exchange(&exchange, conn, msg, 0, 0))
		return command_send(conn, &send, msg);
	return kdbus_exchange_run(&exchange, conn);
}

/**
 * kdbus_command_send_many() - send messages, as many as go together with one command
 * @conn:	connection to use
 * @msgs:	the messages
 * @n:		how many, at least one
 * @n_sentp:	how many were sent
 *
 * Return: 0 if as many were sent as go together, else why the one at *@n_sentp was not.
 */
int kdbus_command_send_many(struct kdbus_conn *conn, struct kdbus_msg *const *msgs, size_t n,
			    size_t *n_sentp)
{
	KdbusExchange exchange;
	int r;

	if (!command_exchange(&exchange, conn, msgs[0], 0, 0)) {
		r = kdbus_command_send(conn, msgs[0]);
		*n_sentp = r == 0;
		return r;
	}
	for (size_t i = 1; i < n && kdbus_exchange_add(&exchange, msgs[i]); ++i)
		;
	r = kdbus_exchange_run(&exchange, conn);
	*n_sentp = exchange.cmd.n_sent;
	return r;
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
	KdbusExchange exchange;
	int r;

	if (command_exchange(&exchange, conn, msg, KDBUSFS_EXCHANGE_CALL, 1)) {
		exchange.cmd.cancel_fd = cancel_fd;
		r = kdbus_exchange_run(&exchange, conn);
		if (r == 0)
			*replyp = *kdbus_exchange_received(&exchange);
		return r;
	}

	if (cancel_fd >= 0)
		send.cmd.size += send.cancel.size;

	r = command_send(conn, &send, msg);
	if (r < 0)
		return r;

	*replyp = send.cmd.reply;
	return 0;
}

/* receive by an exchange, which sends @msg before if there is one */
static int command_recv_many(struct kdbus_conn *conn, const struct kdbus_msg *msg, uint64_t flags,
			     uint64_t deadline, int cancel_fd, struct kdbus_msg_info *infos,
			     size_t n_max, size_t *np)
{
	KdbusExchange exchange;
	int r;

	kdbus_exchange_init(&exchange, conn, flags, n_max);
	if (msg)
		kdbus_exchange_add(&exchange, msg);
	exchange.cmd.deadline_ns = deadline;
	exchange.cmd.cancel_fd = cancel_fd;
	r = kdbus_exchange_run(&exchange, conn);
	if (r < 0)
		return r;

	*np = exchange.cmd.n_received;
	memcpy(infos, kdbus_exchange_received(&exchange), *np * sizeof(*infos));
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
	size_t n;
	int r;

	if (conn->has_exchange && !flags) {
		r = command_recv_many(conn, NULL, 0, 0, -1, infop, 1, &n);
		return r ?: n ? 0 : -EAGAIN;
	}

	r = kdbus_conn_ioctl(conn, code, &cmd);
	if ((r == 0 || r == -EAGAIN) && cmd.return_flags & KDBUS_RECV_RETURN_DROPPED_MSGS)
		atomic_fetch_add(&conn->n_lost, cmd.dropped_msgs);
	if (r < 0)
		return r;

	*infop = cmd.msg;
	return 0;
}

/**
 * kdbus_command_wait() - wait until there is something to receive
 * @conn:	connection to use
 * @deadline:	when to give up; KDBUS_DEADLINE_NEVER, or 0 to just look
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 *
 * Return: 0 if there is, or was, -ETIMEDOUT at the deadline, -ECANCELED, -ECONNRESET if the
 *         connection is disconnected, -EINTR after a signal.
 */
int kdbus_command_wait(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd)
{
	struct pollfd fds[] = { { .fd = conn->fd, .events = POLLIN },
				{ .fd = cancel_fd, .events = POLLIN } };
	struct timespec timeout = {};
	uint64_t now;
	int r;

	r = kdbus_owner_check(&conn->owner);
	if (r < 0)
		return r;

	now = deadline ? kdbus_now() : 0;
	if (deadline > now) {
		timeout.tv_sec = (deadline - now) / NSEC_PER_SEC;
		timeout.tv_nsec = (deadline - now) % NSEC_PER_SEC;
	}

	r = ppoll(fds, 2, deadline == KDBUS_DEADLINE_NEVER ? NULL : &timeout, NULL);
	if (r < 0)
		return -errno;
	if (r == 0)
		return -ETIMEDOUT;
	if ((fds[0].revents | fds[1].revents) & POLLNVAL)
		return -EBADF;
	if (fds[0].revents & (POLLERR | POLLHUP))
		return -ECONNRESET;
	return fds[0].revents ? 0 : -ECANCELED;
}

/* where EXCHANGE is unknown: poll, and again if another thread was faster */
static int command_poll_recv(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd,
			     struct kdbus_msg_info *infop)
{
	int r;

	do {
		r = kdbus_command_wait(conn, deadline, cancel_fd);
		if (r == 0)
			r = kdbus_command_recv(conn, 0, 0, infop);
	} while (r == -EAGAIN);
	return r;
}

/**
 * kdbus_command_recv_wait() - wait for messages, and receive them
 * @conn:	connection to use
 * @reply:	message to send before that, or NULL
 * @deadline:	when to give up
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @infos:	where the messages are
 * @n_max:	how many to receive at most, up to KDBUS_EXCHANGE_RECV_MAX
 * @np:		how many were received: at least one, or none if messages were lost
 *
 * Return: As kdbus_command_send() and kdbus_command_wait().
 */
int kdbus_command_recv_wait(struct kdbus_conn *conn, const struct kdbus_msg *reply,
			    uint64_t deadline, int cancel_fd, struct kdbus_msg_info *infos,
			    size_t n_max, size_t *np)
{
	int r;

	if (reply && !(conn->has_exchange && kdbus_exchange_fits(reply, n_max))) {
		r = kdbus_command_send(conn, reply);
		if (r < 0)
			return r;
		reply = NULL;
	}
	if (conn->has_exchange)
		return command_recv_many(conn, reply, KDBUSFS_EXCHANGE_WAIT, deadline, cancel_fd,
					 infos, n_max, np);

	r = command_poll_recv(conn, deadline, cancel_fd, infos);
	*np = r == 0;
	return r;
}

/**
 * kdbus_command_free() - give a slice back
 * @conn:	connection to use
 * @offset:	where the slice starts
 * @size:	its size; it may be freed by a later call
 *
 * Return: 0 on success, -ENXIO if there is none, -EOPNOTSUPP on the connection
 *         of a policy holder, -ECHILD if another process made @conn.
 */
int kdbus_command_free(struct kdbus_conn *conn, uint64_t offset, uint64_t size)
{
	if (kdbus_conn_defer_free(conn, offset, size))
		return 0;
	return kdbus_command_free_now(conn, offset);
}

/**
 * kdbus_command_free_now() - give a slice back
 * @conn:	connection to use
 * @offset:	where the slice starts
 *
 * For a slice that another command may show again at the same place.
 *
 * Return: As kdbus_command_free().
 */
int kdbus_command_free_now(struct kdbus_conn *conn, uint64_t offset)
{
	struct kdbus_cmd_free cmd = { .size = sizeof(cmd), .offset = offset };

	return kdbus_conn_ioctl(conn, KDBUS_CMD_FREE, &cmd);
}
