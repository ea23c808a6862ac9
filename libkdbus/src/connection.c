/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Connections
 */

#include <fcntl.h>

#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include "command.h"
#include "exchange.h"
#include "deadline.h"
#include "item.h"
#include "policy.h"
#include "util.h"

/**
 * kdbus_conn_ioctl() - have a connection do something
 * @conn:	connection to use
 * @code:	KDBUS_CMD_*
 * @cmd:	its struct
 *
 * Return: 0 on success, -ECHILD if another process made @conn, the errno of the
 *         command.
 */
int kdbus_conn_ioctl(const struct kdbus_conn *conn, unsigned long code, void *cmd)
{
	int r;

	r = kdbus_owner_check(&conn->owner);
	if (r < 0)
		return r;
	return kdbus_ioctl(conn->fd, code, cmd);
}

/**
 * kdbus_conn_ioctl_chain() - have a connection do what a chain holds
 * @conn:	connection to use
 * @code:	KDBUS_CMD_*
 * @chain:	its struct, with items behind it
 *
 * Return: As kdbus_conn_ioctl().
 */
int kdbus_conn_ioctl_chain(const struct kdbus_conn *conn, unsigned long code, KdbusChain *chain)
{
	int r;

	r = kdbus_owner_check(&conn->owner);
	if (r < 0)
		return r;
	return kdbus_chain_ioctl(chain, conn->fd, code);
}

/**
 * kdbus_conn_copy_slice() - copy a slice to the heap, and free it
 * @conn:	connection to use
 * @offset:	where the slice starts
 * @size:	bytes
 * @n_front:	bytes to leave in front of the copy
 * @copyp:	the memory, which belongs to the caller
 *
 * The slice is freed on failure too, unless it is not in the pool.
 *
 * Return: 0 on success, -EBADMSG if the slice is not in the pool, -ENOMEM, the
 *         errno of the command.
 */
int kdbus_conn_copy_slice(struct kdbus_conn *conn, uint64_t offset, uint64_t size, size_t n_front,
			  void *copyp)
{
	_cleanup_(freep) uint8_t *copy = NULL;
	int r;

	if (offset > conn->pool_size || size > conn->pool_size - offset)
		return -EBADMSG;

	copy = malloc(n_front + size ?: 1);
	if (copy)
		copy_shared(copy + n_front, conn->pool + offset, size);

	r = kdbus_command_free_now(conn, offset);
	if (!copy)
		return -ENOMEM;
	/* policy holders may not free */
	if (r < 0 && r != -EOPNOTSUPP)
		return r;

	*(void **)copyp = copy;
	copy = NULL;
	return 0;
}

/**
 * kdbus_slice_link() - note that a slice is in use
 * @slice:	slice to initialise
 * @conn:	connection in whose pool it lies
 * @offset:	where it starts
 * @size:	bytes
 */
void kdbus_slice_link(KdbusSlice *slice, struct kdbus_conn *conn, uint64_t offset, uint64_t size)
{
	*slice = (KdbusSlice){ .conn = conn, .offset = offset, .size = size };
	atomic_fetch_add(&conn->n_refs, 1);

	pthread_mutex_lock(&conn->slice_lock);
	slice->next = conn->slices;
	if (slice->next)
		slice->next->previous = slice;
	conn->slices = slice;
	pthread_mutex_unlock(&conn->slice_lock);
}

static void conn_unmap(struct kdbus_conn *conn)
{
	if (conn->pool)
		munmap(conn->pool, conn->pool_size);
	conn->pool = NULL;
}

static void conn_unref(struct kdbus_conn *conn)
{
	if (atomic_fetch_sub(&conn->n_refs, 1) > 1)
		return;

	conn_unmap(conn);
	if (kdbus_owner_check(&conn->owner) == 0) {
		pthread_mutex_destroy(&conn->slice_lock);
		pthread_mutex_destroy(&conn->free_lock);
		pthread_rwlock_destroy(&conn->queue_lock);
	}
	kdbus_owner_deinit(&conn->owner);
	free(conn);
}

static void slice_give_back(KdbusSlice *slice)
{
	struct kdbus_conn *conn = slice->conn;
	bool closed;

	pthread_mutex_lock(&conn->slice_lock);
	if (slice->previous)
		slice->previous->next = slice->next;
	else
		conn->slices = slice->next;
	if (slice->next)
		slice->next->previous = slice->previous;
	closed = conn->closed;
	pthread_mutex_unlock(&conn->slice_lock);

	if (!closed)
		kdbus_command_free(conn, slice->offset, slice->size);
}

/**
 * kdbus_slice_unlink() - give back a slice that was in use
 * @slice:	slice to give back; one that was never linked is fine
 *
 * Only its owner gives it back. Where it was the last one of a freed connection,
 * that goes too.
 */
void kdbus_slice_unlink(KdbusSlice *slice)
{
	struct kdbus_conn *conn = slice->conn;

	if (!conn)
		return;

	if (kdbus_owner_check(&conn->owner) == 0)
		slice_give_back(slice);
	slice->conn = NULL;
	conn_unref(conn);
}

/* put a private copy of the slices that are in use at the place of the pool */
static void conn_replace_pool(struct kdbus_conn *conn)
{
	uint8_t *copy;

	copy = mmap(NULL, conn->pool_size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (copy == MAP_FAILED)
		return;

	for (KdbusSlice *slice = conn->slices; slice; slice = slice->next)
		memcpy(copy + slice->offset, conn->pool + slice->offset, slice->size);

	if (mremap(copy, conn->pool_size, conn->pool_size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   conn->pool) == MAP_FAILED)
		munmap(copy, conn->pool_size);
}

/* items of the bus, in a slice that is still to be freed */
static int conn_read_bloom(struct kdbus_conn *conn, uint64_t offset, uint64_t size)
{
	_cleanup_(freep) void *items = NULL;
	const struct kdbus_item *item;

	if (offset > conn->pool_size || size > conn->pool_size - offset)
		return -EBADMSG;

	items = malloc(size ?: 1);
	if (!items)
		return -ENOMEM;

	copy_shared(items, conn->pool + offset, size);
	item = kdbus_items_find(items, size, KDBUS_ITEM_BLOOM_PARAMETER);
	if (item && kdbus_item_get_payload_size(item) == sizeof(conn->bloom))
		conn->bloom = item->bloom_parameter;
	return 0;
}

/*
 * Free the slice of HELLO, and agree on a socket for descriptors: by an exchange, which tells
 * whether there is such a command here.
 */
static void conn_extend(struct kdbus_conn *conn, uint64_t offset)
{
	KdbusExchange exchange;
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) >= 0) {
		conn->has_exchange = true;
		kdbus_conn_defer_free(conn, offset, 0);
		kdbus_exchange_init(&exchange, conn, 0, 0);
		exchange.cmd.fd_socket = fds[1];
		conn->has_exchange = kdbus_exchange_run(&exchange, conn) == 0;
		safe_close(fds[1]);
		if (conn->has_exchange) {
			conn->fd_socket.fd = fds[0];
			return;
		}
		safe_close(fds[0]);
	}
	/* policy holders may not free, and don't need to */
	kdbus_command_free_now(conn, offset);
}

static int conn_hello(struct kdbus_conn *conn, const struct kdbus_conn_options *options)
{
	struct kdbus_cmd_hello head = {
		.flags = options->flags,
		.attach_flags_send = options->attach_flags_send,
		.attach_flags_recv = options->attach_flags_recv,
		.pool_size = options->pool_size ?: KDBUS_POOL_SIZE_DEFAULT,
	};
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	struct kdbus_cmd_hello *cmd;
	void *pool;
	int r;

	if ((r = kdbus_chain_init(&chain, &head, sizeof(head))) < 0 ||
	    (options->name &&
	     (r = kdbus_chain_append_string(&chain, KDBUS_ITEM_NAME, options->name)) < 0) ||
	    (options->policy &&
	     (r = kdbus_chain_append_items(&chain, &options->policy->items)) < 0) ||
	    (options->description &&
	     (r = kdbus_chain_append_string(&chain, KDBUS_ITEM_CONN_DESCRIPTION,
					    options->description)) < 0) ||
	    (options->creds && (r = kdbus_chain_append(&chain, KDBUS_ITEM_CREDS, options->creds,
						       sizeof(*options->creds))) < 0) ||
	    (options->pids && (r = kdbus_chain_append(&chain, KDBUS_ITEM_PIDS, options->pids,
						      sizeof(*options->pids))) < 0) ||
	    (options->seclabel &&
	     (r = kdbus_chain_append_string(&chain, KDBUS_ITEM_SECLABEL, options->seclabel)) < 0))
		return r;

	r = kdbus_chain_ioctl(&chain, conn->fd, KDBUS_CMD_HELLO);
	if (r < 0)
		return r;
	cmd = (void *)chain.data;

	pool = mmap(NULL, cmd->pool_size, PROT_READ, MAP_SHARED, conn->fd, 0);
	if (pool == MAP_FAILED)
		return -errno;

	conn->pool = pool;
	conn->pool_size = cmd->pool_size;
	conn->id = cmd->id;
	conn->flags = cmd->flags;
	conn->bus_flags = cmd->bus_flags;
	memcpy(conn->bus_id, cmd->id128, sizeof(conn->bus_id));

	r = conn_read_bloom(conn, cmd->offset, cmd->items_size);
	if (r < 0)
		return r;

	conn_extend(conn, cmd->offset);
	return 0;
}

/**
 * kdbus_conn_new_from_fd() - connect through an open endpoint
 * @connp:	the new connection
 * @fd:		an endpoint opened for reading and writing; belongs to the
 *		connection on success, stays with the caller otherwise
 * @options:	how to connect, or NULL
 *
 * Return: As kdbus_conn_new().
 */
_public_ int kdbus_conn_new_from_fd(struct kdbus_conn **connp, int fd,
				    const struct kdbus_conn_options *options)
{
	static const struct kdbus_conn_options defaults;
	struct kdbus_conn *conn;
	int r;

	conn = calloc(1, sizeof(*conn));
	if (!conn)
		return -ENOMEM;

	conn->fd = fd;
	conn->fd_socket = (KdbusFdSocket)KDBUS_FD_SOCKET_INIT;
	pthread_mutex_init(&conn->slice_lock, NULL);
	pthread_rwlock_init(&conn->queue_lock, NULL);
	pthread_mutex_init(&conn->free_lock, NULL);
	conn->n_refs = 1;

	r = kdbus_owner_init(&conn->owner);
	if (r >= 0)
		r = conn_hello(conn, options ?: &defaults);
	if (r < 0) {
		kdbus_fd_socket_deinit(&conn->fd_socket);
		conn_unref(conn);
		return r;
	}

	*connp = conn;
	return 0;
}

/**
 * kdbus_conn_new() - connect to a bus
 * @connp:	the new connection
 * @path:	an endpoint
 * @options:	how to connect, or NULL
 *
 * Return: 0 on success, the errno of open(2) and mmap(2); -EINVAL if options
 *         are bad or don't go together, -EPERM if they are for the owner of the
 *         bus only, -EEXIST if the name has such a connection, -EMFILE if the
 *         user has too many connections, -ESHUTDOWN if the bus is gone, -ENOMEM.
 */
_public_ int kdbus_conn_new(struct kdbus_conn **connp, const char *path,
			    const struct kdbus_conn_options *options)
{
	_cleanup_(closep) int fd = -1;
	int r;

	fd = open_node(path);
	if (fd < 0)
		return fd;

	r = kdbus_conn_new_from_fd(connp, fd, options);
	if (r < 0)
		return r;

	fd = -1;
	return 0;
}

/* messages are to outlive the pool */
static void conn_keep_slices(struct kdbus_conn *conn)
{
	pthread_mutex_lock(&conn->slice_lock);
	if (conn->slices)
		conn_replace_pool(conn);
	conn->closed = true;
	pthread_mutex_unlock(&conn->slice_lock);
}

/**
 * kdbus_conn_free() - disconnect
 * @conn:	connection to end, or NULL
 *
 * Messages in the queue are lost, see kdbus_conn_byebye(). Messages received
 * stay as they are, and are still to be freed. No other call may be going on.
 *
 * In a process that was forked from the one that made it, this gives back memory
 * and descriptors of that process alone, and the connection lives on. The last
 * process that has a copy of it disconnects: by this, by execve() or by its end.
 *
 * Return: NULL.
 */
_public_ struct kdbus_conn *kdbus_conn_free(struct kdbus_conn *conn)
{
	if (!conn)
		return NULL;

	kdbus_fd_socket_deinit(&conn->fd_socket);
	if (kdbus_owner_check(&conn->owner) == 0)
		conn_keep_slices(conn);

	/* the mapping goes first: it holds the file, see connection.h */
	if (conn->n_refs == 1)
		conn_unmap(conn);
	conn->fd = safe_close(conn->fd);
	conn_unref(conn);
	return NULL;
}

/**
 * kdbus_conn_byebye() - disconnect, unless messages are queued
 * @conn:	connection to use; it is still to be freed
 *
 * Return: 0 on success, -EBUSY if messages are queued, -ECONNRESET if it was
 *         disconnected before.
 */
_public_ int kdbus_conn_byebye(struct kdbus_conn *conn)
{
	struct kdbus_cmd cmd = { .size = sizeof(cmd) };

	return kdbus_conn_ioctl(conn, KDBUS_CMD_BYEBYE, &cmd);
}

/**
 * kdbus_conn_update() - change what a connection asked for
 * @conn:	connection to use
 * @attach_flags_send: KDBUS_ATTACH_*, or NULL to leave it
 * @attach_flags_recv: KDBUS_ATTACH_*, or NULL to leave it
 * @policy:	policy holder: name and access, or NULL to leave it
 *
 * Return: 0 on success, -EINVAL, -EOPNOTSUPP if connections of its kind have no
 *         such thing, -E2BIG if there is more than one name, -EEXIST if another
 *         connection has the name, -ENOMEM. Nothing is changed on failure.
 */
_public_ int kdbus_conn_update(struct kdbus_conn *conn, const uint64_t *attach_flags_send,
			       const uint64_t *attach_flags_recv, const struct kdbus_policy *policy)
{
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	int r;

	if ((r = kdbus_chain_init(&chain, &(struct kdbus_cmd){}, sizeof(struct kdbus_cmd))) < 0 ||
	    (attach_flags_send &&
	     (r = kdbus_chain_append(&chain, KDBUS_ITEM_ATTACH_FLAGS_SEND, attach_flags_send,
				     sizeof(*attach_flags_send))) < 0) ||
	    (attach_flags_recv &&
	     (r = kdbus_chain_append(&chain, KDBUS_ITEM_ATTACH_FLAGS_RECV, attach_flags_recv,
				     sizeof(*attach_flags_recv))) < 0) ||
	    (policy && (r = kdbus_chain_append_items(&chain, &policy->items)) < 0))
		return r;

	return kdbus_conn_ioctl_chain(conn, KDBUS_CMD_UPDATE, &chain);
}

/**
 * kdbus_conn_wait() - wait until there is something to receive
 * @conn:	connection to use
 * @deadline:	when to give up; KDBUS_DEADLINE_NEVER, or 0 to just look
 *
 * Another thread may be faster, and lost messages alone end the wait too: be
 * prepared for kdbus_conn_recv() to return -EAGAIN.
 *
 * Return: 0 if there is, -ETIMEDOUT at the deadline, -ECONNRESET if the
 *         connection is disconnected, -EINTR after a signal.
 */
_public_ int kdbus_conn_wait(struct kdbus_conn *conn, uint64_t deadline)
{
	return kdbus_command_wait(conn, deadline, -1);
}

/**
 * kdbus_conn_get_fd() - get the descriptor of a connection
 * @conn:	connection to look at
 *
 * It is readable while there is something to receive, and reports a hang-up once
 * the connection is disconnected.
 *
 * Return: The descriptor, which stays with @conn.
 */
_public_ int kdbus_conn_get_fd(const struct kdbus_conn *conn)
{
	return conn->fd;
}

/**
 * kdbus_conn_get_id() - get the id of a connection
 * @conn:	connection to look at
 *
 * Return: The id, which no other connection of the domain ever has.
 */
_public_ uint64_t kdbus_conn_get_id(const struct kdbus_conn *conn)
{
	return conn->id;
}

/**
 * kdbus_conn_get_flags() - get the flags of a connection
 * @conn:	connection to look at
 *
 * Return: KDBUS_HELLO_*
 */
_public_ uint64_t kdbus_conn_get_flags(const struct kdbus_conn *conn)
{
	return conn->flags;
}

/**
 * kdbus_conn_get_bus_flags() - get the flags of the bus
 * @conn:	connection to look at
 *
 * Return: KDBUS_MAKE_*
 */
_public_ uint64_t kdbus_conn_get_bus_flags(const struct kdbus_conn *conn)
{
	return conn->bus_flags;
}

/**
 * kdbus_conn_get_bus_id() - get the UUID of the bus
 * @conn:	connection to look at
 *
 * Return: 16 bytes
 */
_public_ const uint8_t *kdbus_conn_get_bus_id(const struct kdbus_conn *conn)
{
	return conn->bus_id;
}

/**
 * kdbus_conn_get_bloom() - get the bloom parameters of the bus
 * @conn:	connection to look at
 *
 * Return: Size of a filter in bytes, and number of hash functions.
 */
_public_ const struct kdbus_bloom_parameter *kdbus_conn_get_bloom(const struct kdbus_conn *conn)
{
	return &conn->bloom;
}

/**
 * kdbus_conn_get_pool_size() - get the size of the pool
 * @conn:	connection to look at
 *
 * Return: Bytes
 */
_public_ uint64_t kdbus_conn_get_pool_size(const struct kdbus_conn *conn)
{
	return conn->pool_size;
}

/**
 * kdbus_conn_has_fd_socket() - tell how descriptors arrive
 * @conn:	connection to look at
 *
 * Return: true if through a socket, see <kdbus/extension.h>; false if as in
 *         plain kdbus.
 */
_public_ bool kdbus_conn_has_fd_socket(const struct kdbus_conn *conn)
{
	return conn->fd_socket.fd >= 0;
}
