/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Connections
 *
 * A connection keeps a list of the slices that messages refer to. It may be
 * freed before them: it then leaves a private copy of these slices at the place
 * of its pool, and the last message takes the memory away with it. For on FUSE a
 * mapping keeps the file open; as long as it is there close() would not
 * disconnect.
 *
 * Connection and slices hold a reference each on what is in memory. In a process
 * that was forked from the owner that is all that is kept in order: it may have
 * been forked while another thread held a lock, which nobody will ever release
 * there, and was half-way through a change. So neither the locks nor the list of
 * slices are touched there.
 */

#include <kdbus/kdbus.h>
#include <pthread.h>
#include <stdatomic.h>
#include "fd_socket.h"
#include "item.h"
#include "owner.h"

typedef struct KdbusSlice KdbusSlice;

/* slices that may wait to be freed */
#define KDBUS_DEFERRED_MAX 32

struct KdbusSlice {
	struct kdbus_conn *conn;
	uint64_t offset;
	uint64_t size;
	KdbusSlice *previous;
	KdbusSlice *next;
};

struct kdbus_conn {
	/* constant from HELLO on */
	int fd;
	uint64_t id;
	uint64_t flags;
	uint64_t bus_flags;
	uint8_t bus_id[16];
	struct kdbus_bloom_parameter bloom;
	uint8_t *pool;
	uint64_t pool_size;

	KdbusOwner owner;
	_Atomic size_t n_refs;

	_Atomic uint64_t cookie;
	_Atomic uint64_t n_lost;
	KdbusFdSocket fd_socket;

	/* held for writing by PEEK: what it shows must not be received by
	 * another thread before its slice has been copied and freed */
	pthread_rwlock_t queue_lock;

	pthread_mutex_t slice_lock;
	KdbusSlice *slices;
	bool closed;

	/* EXCHANGE is known here, and these slices wait for the next one to be freed */
	bool has_exchange;
	pthread_mutex_t free_lock;
	_Atomic size_t n_deferred;
	size_t deferred_size;
	uint64_t deferred[KDBUS_DEFERRED_MAX];

	/* threads in an exchange that waits: what comes is theirs */
	_Atomic size_t n_waiting;
};

int kdbus_conn_ioctl(const struct kdbus_conn *conn, unsigned long code, void *cmd);
int kdbus_conn_ioctl_chain(const struct kdbus_conn *conn, unsigned long code, KdbusChain *chain);
int kdbus_conn_copy_slice(struct kdbus_conn *conn, uint64_t offset, uint64_t size, size_t n_front,
			  void *copyp);

void kdbus_slice_link(KdbusSlice *slice, struct kdbus_conn *conn, uint64_t offset, uint64_t size);
void kdbus_slice_unlink(KdbusSlice *slice);
