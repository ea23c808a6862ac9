/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for the next request on /dev/fuse.
 */
/* The room a request must find: max_write (fuse/relay.py) and a header. */
#define KDBUSFS_REQUEST_SIZE 66560
int64_t kdbusfs_next(int device, const void *reply, uint64_t reply_size, int events, void *buffer,
		     uint64_t size, int64_t timeout_ns, int64_t spin_ns);
