/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Messages in and out
 */

#include "command.h"
#include "exchange.h"
#include "message.h"
#include "util.h"

static void message_number(struct kdbus_message *message, struct kdbus_conn *conn)
{
	if (!message->has_cookie && !message->resume)
		message->head.cookie = atomic_fetch_add(&conn->cookie, 1) + 1;
}

/* give a message a number of its own, unless its user has given it one */
static void message_renumber(struct kdbus_message *message, struct kdbus_conn *conn)
{
	message->resume = false;
	message_number(message, conn);
}

/* put a message together, under a number of its own */
static int message_make(struct kdbus_message *message, struct kdbus_conn *conn,
			struct kdbus_msg **msgp)
{
	message_renumber(message, conn);
	return kdbus_message_build(message, msgp);
}

/**
 * kdbus_conn_send() - send a message
 * @conn:	connection to use
 * @message:	message that was built; it can be sent again
 *
 * It is in the queue of its receiver before this returns. With a deadline set it
 * is a request: its reply, or a notification that there will be none, comes as a
 * message with its cookie as cookie_reply.
 *
 * Return: 0 on success, or as kdbus has it: -ESRCH if nobody owns the name,
 *         -ENXIO if there is no such connection, -EADDRNOTAVAIL if there is only
 *         an activator, -EPERM if the policy forbids it, -ENOBUFS if the quota at
 *         the receiver is used up, -EXFULL if its pool is, -ECOMM if it takes no
 *         descriptors, -EMLINK if there are too many requests, -EBADSLT if nobody
 *         waits for this reply, -ECONNRESET if the connection is disconnected.
 */
_public_ int kdbus_conn_send(struct kdbus_conn *conn, struct kdbus_message *message)
{
	struct kdbus_msg *msg;
	int r;

	r = message_make(message, conn, &msg);
	if (r < 0)
		return r;
	return kdbus_command_send(conn, msg);
}

/**
 * kdbus_conn_send_many() - send messages
 * @conn:	connection to use
 * @messages:	messages that were built, all different; in this order
 * @n:		how many
 * @n_sentp:	how many were sent
 *
 * As kdbus_conn_send() for each of them, but on kdbusfs many go with one system
 * call. The first that is refused ends it.
 *
 * Return: 0 if all were sent, else why the one at *@n_sentp was not.
 */
_public_ int kdbus_conn_send_many(struct kdbus_conn *conn, struct kdbus_message *const *messages,
				  size_t n, size_t *n_sentp)
{
	struct kdbus_msg *msgs[KDBUS_EXCHANGE_SEND_MAX];
	size_t n_msgs, n_sent, n_numbered = 0;
	int r = 0;

	*n_sentp = 0;
	while (r == 0 && *n_sentp < n) {
		for (n_msgs = 0; n_msgs < KDBUS_EXCHANGE_SEND_MAX && *n_sentp + n_msgs < n;
		     ++n_msgs) {
			/* one that did not fit into the call before has its number */
			if (*n_sentp + n_msgs == n_numbered)
				message_renumber(messages[n_numbered++], conn);
			r = kdbus_message_build(messages[*n_sentp + n_msgs], &msgs[n_msgs]);
			if (r < 0)
				break;
		}
		if (!n_msgs)
			return r;
		r = kdbus_command_send_many(conn, msgs, n_msgs, &n_sent);
		*n_sentp += n_sent;
	}
	return r;
}

/**
 * kdbus_conn_call() - send a request and wait for its reply
 * @conn:	connection to use
 * @message:	message that was built; it need not be marked as a request
 * @deadline:	when to give up, KDBUS_DEADLINE_NEVER
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @replyp:	the reply
 *
 * Return: 0 on success, as kdbus_conn_send(); -ETIMEDOUT, -ECANCELED, -EPIPE if
 *         the receiver ended or dropped the request, -EREMOTEIO if the reply
 *         brought descriptors and @conn takes none. -EINTR after a signal: called
 *         again with the same unchanged message, it goes on waiting.
 */
_public_ int kdbus_conn_call(struct kdbus_conn *conn, struct kdbus_message *message,
			     uint64_t deadline, int cancel_fd, struct kdbus_message **replyp)
{
	struct kdbus_msg_info reply;
	struct kdbus_msg *msg;
	int r;

	message_number(message, conn);
	r = kdbus_message_build(message, &msg);
	if (r < 0)
		return r;

	msg->flags |= KDBUS_MSG_EXPECT_REPLY;
	/* what is later than this has passed, to kdbus */
	msg->timeout_ns = deadline > INT64_MAX ? INT64_MAX : deadline;
	r = kdbus_command_call(conn, msg, cancel_fd, &reply);
	message->resume = r == -EINTR;
	if (r < 0)
		return r;
	return kdbus_message_new_from_slice(replyp, conn, &reply);
}

static int message_address_reply(struct kdbus_message *reply, const struct kdbus_message *request)
{
	int r;

	if ((r = kdbus_message_set_dst_name(reply, NULL)) < 0 ||
	    (r = kdbus_message_set_dst_id(reply, request->msg->src_id)) < 0)
		return r;
	return kdbus_message_set_cookie_reply(reply, request->msg->cookie);
}

/**
 * kdbus_conn_reply() - answer a request
 * @conn:	connection that received it
 * @request:	the request
 * @reply:	message that was built; its destination is set here
 *
 * Return: As kdbus_conn_send().
 */
_public_ int kdbus_conn_reply(struct kdbus_conn *conn, const struct kdbus_message *request,
			      struct kdbus_message *reply)
{
	int r;

	r = message_address_reply(reply, request);
	return r < 0 ? r : kdbus_conn_send(conn, reply);
}

/* @lock the queue; another process's lock may be held for ever, and is not tried */
static int conn_lock_queue(struct kdbus_conn *conn, int (*lock)(pthread_rwlock_t *))
{
	int r;

	r = kdbus_owner_check(&conn->owner);
	if (r < 0)
		return r;

	lock(&conn->queue_lock);
	return 0;
}

static int conn_recv_message(struct kdbus_conn *conn, uint64_t flags, int64_t priority,
			     struct kdbus_message **messagep)
{
	struct kdbus_msg_info info;
	int r;

	r = conn_lock_queue(conn, pthread_rwlock_rdlock);
	if (r < 0)
		return r;

	r = kdbus_command_recv(conn, flags, priority, &info);
	pthread_rwlock_unlock(&conn->queue_lock);
	if (r < 0)
		return r;
	return kdbus_message_new_from_slice(messagep, conn, &info);
}

static int conn_peek_message(struct kdbus_conn *conn, uint64_t flags, int64_t priority,
			     struct kdbus_message **messagep)
{
	struct kdbus_msg_info info;
	void *copy = NULL;
	int r;

	r = conn_lock_queue(conn, pthread_rwlock_wrlock);
	if (r < 0)
		return r;

	/* what comes is theirs who wait for it */
	r = conn->n_waiting ? -EAGAIN
			    : kdbus_command_recv(conn, KDBUS_RECV_PEEK | flags, priority, &info);
	/* this frees nothing: the message keeps its slice */
	if (r == 0)
		r = kdbus_conn_copy_slice(conn, info.offset, info.msg_size, 0, &copy);
	pthread_rwlock_unlock(&conn->queue_lock);
	if (r < 0)
		return r;
	return kdbus_message_new_from_copy(messagep, copy, info.msg_size);
}

/**
 * kdbus_conn_recv() - receive the oldest message
 * @conn:	connection to use
 * @messagep:	the message
 *
 * Return: 0 on success, -EAGAIN if there is none, -ECONNRESET if the connection
 *         is disconnected, -EBADMSG if the message makes no sense, -ENOMEM.
 */
_public_ int kdbus_conn_recv(struct kdbus_conn *conn, struct kdbus_message **messagep)
{
	return conn_recv_message(conn, 0, 0, messagep);
}

/* wait for messages, after @reply has been sent if there is one */
static int conn_recv_wait(struct kdbus_conn *conn, const struct kdbus_msg *reply, uint64_t deadline,
			  int cancel_fd, struct kdbus_message **messages, size_t n_max, size_t *np)
{
	struct kdbus_msg_info infos[KDBUS_EXCHANGE_RECV_MAX];
	size_t n = 0, n_received = 0;
	int r, k;

	if (n_max > KDBUS_EXCHANGE_RECV_MAX)
		n_max = KDBUS_EXCHANGE_RECV_MAX;

	r = conn_lock_queue(conn, pthread_rwlock_rdlock);
	if (r < 0)
		return r;
	++conn->n_waiting;
	pthread_rwlock_unlock(&conn->queue_lock);

	r = kdbus_command_recv_wait(conn, reply, deadline, cancel_fd, infos, n_max, &n_received);
	--conn->n_waiting;
	if (r < 0)
		return r;

	for (size_t i = 0; i < n_received; ++i) {
		k = kdbus_message_new_from_slice(&messages[n], conn, &infos[i]);
		if (k < 0)
			r = k;
		else
			++n;
	}
	*np = n;
	return n ? 0 : r ?: -EAGAIN;
}

/**
 * kdbus_conn_recv_wait() - wait for a message, and receive it
 * @conn:	connection to use
 * @deadline:	when to give up; KDBUS_DEADLINE_NEVER, or 0 to just look
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @messagep:	the oldest message
 *
 * As kdbus_conn_wait() and kdbus_conn_recv(), in one system call on kdbusfs.
 *
 * Return: 0 on success, -ETIMEDOUT at the deadline, -ECANCELED, -EINTR after a
 *         signal, -EAGAIN if messages were lost, and nothing else came
 *         (kdbus_conn_take_lost()); as kdbus_conn_recv().
 */
_public_ int kdbus_conn_recv_wait(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd,
				  struct kdbus_message **messagep)
{
	size_t n;

	return conn_recv_wait(conn, NULL, deadline, cancel_fd, messagep, 1, &n);
}

/**
 * kdbus_conn_recv_many() - wait for messages, and receive all that are there
 * @conn:	connection to use
 * @deadline:	when to give up; KDBUS_DEADLINE_NEVER, or 0 to just look
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @messages:	room for @n_max messages; the oldest is first
 * @n_max:	how many to receive at most, at least one; more than 64 are left for
 *		the next time, and so is what comes after one with descriptors
 * @np:		how many were received
 *
 * Return: As kdbus_conn_recv_wait().
 */
_public_ int kdbus_conn_recv_many(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd,
				  struct kdbus_message **messages, size_t n_max, size_t *np)
{
	*np = 0;
	if (!n_max)
		return -EINVAL;
	return conn_recv_wait(conn, NULL, deadline, cancel_fd, messages, n_max, np);
}

/**
 * kdbus_conn_reply_recv() - answer a request, and wait for the next message
 * @conn:	connection that received it
 * @request:	the request
 * @reply:	message that was built; its destination is set here
 * @deadline:	when to give up waiting; KDBUS_DEADLINE_NEVER
 * @cancel_fd:	a descriptor to give up at once when it becomes readable, or -1
 * @nextp:	the next message
 *
 * What a service does all day, in one system call on kdbusfs.
 *
 * Return: 0 on success. If the reply is refused, as kdbus_conn_reply(), without
 *         having waited; else as kdbus_conn_recv_wait(), with the reply sent.
 */
_public_ int kdbus_conn_reply_recv(struct kdbus_conn *conn, const struct kdbus_message *request,
				   struct kdbus_message *reply, uint64_t deadline, int cancel_fd,
				   struct kdbus_message **nextp)
{
	struct kdbus_msg *msg;
	size_t n;
	int r;

	r = message_address_reply(reply, request);
	if (r < 0)
		return r;
	r = message_make(reply, conn, &msg);
	if (r < 0)
		return r;
	return conn_recv_wait(conn, msg, deadline, cancel_fd, nextp, 1, &n);
}

/**
 * kdbus_conn_recv_priority() - receive the most urgent message
 * @conn:	connection to use
 * @priority:	only messages of this priority value or a lower one
 * @messagep:	the message; of equal ones, the oldest
 *
 * Return: As kdbus_conn_recv().
 */
_public_ int kdbus_conn_recv_priority(struct kdbus_conn *conn, int64_t priority,
				      struct kdbus_message **messagep)
{
	return conn_recv_message(conn, KDBUS_RECV_USE_PRIORITY, priority, messagep);
}

/**
 * kdbus_conn_peek() - look at the oldest message and leave it in the queue
 * @conn:	connection to use
 * @messagep:	a copy of the message, without descriptors
 *
 * Return: As kdbus_conn_recv().
 */
_public_ int kdbus_conn_peek(struct kdbus_conn *conn, struct kdbus_message **messagep)
{
	return conn_peek_message(conn, 0, 0, messagep);
}

/**
 * kdbus_conn_peek_priority() - look at the most urgent message
 * @conn:	connection to use
 * @priority:	only messages of this priority value or a lower one
 * @messagep:	a copy of the message, without descriptors
 *
 * Return: As kdbus_conn_recv().
 */
_public_ int kdbus_conn_peek_priority(struct kdbus_conn *conn, int64_t priority,
				      struct kdbus_message **messagep)
{
	return conn_peek_message(conn, KDBUS_RECV_USE_PRIORITY, priority, messagep);
}

/**
 * kdbus_conn_drop() - throw the oldest message away
 * @conn:	connection to use
 *
 * If it is a request, its sender is told that there will be no reply.
 *
 * Return: As kdbus_conn_recv().
 */
_public_ int kdbus_conn_drop(struct kdbus_conn *conn)
{
	struct kdbus_msg_info info;
	int r;

	r = conn_lock_queue(conn, pthread_rwlock_rdlock);
	if (r < 0)
		return r;

	r = kdbus_command_recv(conn, KDBUS_RECV_DROP, 0, &info);
	pthread_rwlock_unlock(&conn->queue_lock);
	return r;
}

/**
 * kdbus_conn_take_lost() - get the number of lost messages
 * @conn:	connection to use
 *
 * The bus counts signals and notifications that did not fit in the pool, and
 * tells with the next message, or with its absence: -EAGAIN.
 *
 * Return: How many were reported since this was called last; 0 in a process that
 *         was forked from the one that made @conn.
 */
_public_ uint64_t kdbus_conn_take_lost(struct kdbus_conn *conn)
{
	if (kdbus_owner_check(&conn->owner) < 0)
		return 0;
	return atomic_exchange(&conn->n_lost, 0);
}
