/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef _KDBUS_KDBUS_H
#define _KDBUS_KDBUS_H

/*
 * libkdbus: a client of kdbus
 *
 * A thin layer over the ioctls of <linux/kdbus.h>. It manages the pool, the
 * slices and the descriptors of a connection. What a message means is up to the
 * program.
 *
 * Rules for all functions:
 *
 *  - A function that returns int returns 0, or a negative errno, which is the
 *    one of kdbus if a command failed. Nothing is printed, and there is no
 *    global state.
 *  - Sizes are in bytes.
 *  - Parameters that end in p are results. They are set on success only, and
 *    those named optional may be NULL.
 *  - _new() makes an object and _free() ends it; _free() takes NULL, and always
 *    returns NULL. _freep() is for __attribute__((__cleanup__())).
 *  - Descriptors are made with O_CLOEXEC.
 *  - A deadline is an absolute time on CLOCK_MONOTONIC in nanoseconds, see
 *    kdbus_deadline().
 *
 * Threads: all functions that take a struct kdbus_conn may be called on the
 * same connection by several threads at once, and so may kdbus_message_free()
 * on different messages of it; only kdbus_conn_free() must be alone. Any other
 * object is to be used by one thread at a time.
 *
 * Processes: connections and custom endpoints belong to the process that made
 * them. In a child that was forked from it, every function that would issue a
 * command or wait returns -ECHILD and does nothing (kdbus_conn_take_lost()
 * returns 0). The getters still work. Messages that were received can be read as
 * long as the parent keeps them. _free() releases memory and descriptors of the
 * child alone, whatever the threads of the parent were doing at the fork. A child
 * that shares the memory of its parent, as after vfork(), counts as its parent.
 *
 * A connection or bus ends when the last process that has its file closes it. So
 * a child that goes on without execve() should free what it inherited, or it
 * keeps the connections and buses of its parent alive.
 */

#ifdef __cplusplus
extern "C" {
#endif

#include <linux/kdbus.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct kdbus_bus;
struct kdbus_conn;
struct kdbus_endpoint;
struct kdbus_info_list;
struct kdbus_match;
struct kdbus_message;
struct kdbus_policy;

/* a deadline that never comes */
#define KDBUS_DEADLINE_NEVER UINT64_MAX
/* the pool of a connection that did not ask for a size: 16 MiB */
#define KDBUS_POOL_SIZE_DEFAULT (16ULL << 20)

/**
 * struct kdbus_bus_options - how to make a bus; all zero is fine
 * @flags:		KDBUS_MAKE_*: who may open the bus
 * @attach_flags:	KDBUS_ATTACH_*: what kdbus_conn_creator_info() may tell
 * @bloom:		bloom filters; size 0: 64 bytes and 8 hash functions
 */
struct kdbus_bus_options {
	uint64_t flags;
	uint64_t attach_flags;
	struct kdbus_bloom_parameter bloom;
};

/**
 * struct kdbus_conn_options - how to connect; all zero is fine
 * @flags:		KDBUS_HELLO_*
 * @attach_flags_send:	KDBUS_ATTACH_*: what kdbus_conn_info() may tell of us
 * @attach_flags_recv:	KDBUS_ATTACH_*: metadata wanted on messages
 * @pool_size:		bytes, whole pages; 0: KDBUS_POOL_SIZE_DEFAULT
 * @description:	a label for people, or NULL
 * @name:		activator, policy holder: its well-known name, or NULL if
 *			@policy has it
 * @policy:		activator, policy holder: access to the name, or NULL
 * @creds:		pretend these credentials (owner of the bus only), or NULL
 * @pids:		pretend these ids (owner of the bus only), or NULL
 * @seclabel:		pretend this label (owner of the bus only), or NULL
 */
struct kdbus_conn_options {
	uint64_t flags;
	uint64_t attach_flags_send;
	uint64_t attach_flags_recv;
	uint64_t pool_size;
	const char *description;
	const char *name;
	const struct kdbus_policy *policy;
	const struct kdbus_creds *creds;
	const struct kdbus_pids *pids;
	const char *seclabel;
};

/* bus.c: a bus, alive as long as the object */

int kdbus_bus_new(struct kdbus_bus **busp, const char *root, const char *name,
		  const struct kdbus_bus_options *options);
struct kdbus_bus *kdbus_bus_free(struct kdbus_bus *bus);
const char *kdbus_bus_get_path(const struct kdbus_bus *bus);
int kdbus_bus_get_fd(const struct kdbus_bus *bus);

/* endpoint.c: a custom endpoint, alive as long as the object */

int kdbus_endpoint_new(struct kdbus_endpoint **endpointp, const char *bus_path, const char *name,
		       uint64_t flags);
struct kdbus_endpoint *kdbus_endpoint_free(struct kdbus_endpoint *endpoint);
const char *kdbus_endpoint_get_path(const struct kdbus_endpoint *endpoint);
int kdbus_endpoint_get_fd(const struct kdbus_endpoint *endpoint);
int kdbus_endpoint_update(struct kdbus_endpoint *endpoint, const struct kdbus_policy *policy);

/* connection.c: a connection of any kind */

int kdbus_conn_new(struct kdbus_conn **connp, const char *path,
		   const struct kdbus_conn_options *options);
int kdbus_conn_new_from_fd(struct kdbus_conn **connp, int fd,
			   const struct kdbus_conn_options *options);
struct kdbus_conn *kdbus_conn_free(struct kdbus_conn *conn);
int kdbus_conn_byebye(struct kdbus_conn *conn);
int kdbus_conn_update(struct kdbus_conn *conn, const uint64_t *attach_flags_send,
		      const uint64_t *attach_flags_recv, const struct kdbus_policy *policy);
int kdbus_conn_wait(struct kdbus_conn *conn, uint64_t deadline);
int kdbus_conn_get_fd(const struct kdbus_conn *conn);
uint64_t kdbus_conn_get_id(const struct kdbus_conn *conn);
uint64_t kdbus_conn_get_flags(const struct kdbus_conn *conn);
uint64_t kdbus_conn_get_bus_flags(const struct kdbus_conn *conn);
const uint8_t *kdbus_conn_get_bus_id(const struct kdbus_conn *conn);
const struct kdbus_bloom_parameter *kdbus_conn_get_bloom(const struct kdbus_conn *conn);
uint64_t kdbus_conn_get_pool_size(const struct kdbus_conn *conn);
bool kdbus_conn_has_fd_socket(const struct kdbus_conn *conn);

/* transfer.c: messages in and out */

int kdbus_conn_send(struct kdbus_conn *conn, struct kdbus_message *message);
int kdbus_conn_send_many(struct kdbus_conn *conn, struct kdbus_message *const *messages, size_t n,
			 size_t *n_sentp);
int kdbus_conn_call(struct kdbus_conn *conn, struct kdbus_message *message, uint64_t deadline,
		    int cancel_fd, struct kdbus_message **replyp);
int kdbus_conn_reply(struct kdbus_conn *conn, const struct kdbus_message *request,
		     struct kdbus_message *reply);
int kdbus_conn_reply_recv(struct kdbus_conn *conn, const struct kdbus_message *request,
			  struct kdbus_message *reply, uint64_t deadline, int cancel_fd,
			  struct kdbus_message **nextp);
int kdbus_conn_recv(struct kdbus_conn *conn, struct kdbus_message **messagep);
int kdbus_conn_recv_wait(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd,
			 struct kdbus_message **messagep);
int kdbus_conn_recv_many(struct kdbus_conn *conn, uint64_t deadline, int cancel_fd,
			 struct kdbus_message **messages, size_t n_max, size_t *np);
int kdbus_conn_recv_priority(struct kdbus_conn *conn, int64_t priority,
			     struct kdbus_message **messagep);
int kdbus_conn_peek(struct kdbus_conn *conn, struct kdbus_message **messagep);
int kdbus_conn_peek_priority(struct kdbus_conn *conn, int64_t priority,
			     struct kdbus_message **messagep);
int kdbus_conn_drop(struct kdbus_conn *conn);
uint64_t kdbus_conn_take_lost(struct kdbus_conn *conn);

/* message-build.c: building a message. Data and descriptors are referred to, not
 * copied: they have to be there until it has been sent for the last time. */

int kdbus_message_new(struct kdbus_message **messagep);
struct kdbus_message *kdbus_message_free(struct kdbus_message *message);
int kdbus_message_append_data(struct kdbus_message *message, const void *data, size_t size);
int kdbus_message_append_zeros(struct kdbus_message *message, size_t size);
int kdbus_message_append_memfd(struct kdbus_message *message, int fd, uint64_t start,
			       uint64_t size);
int kdbus_message_append_fds(struct kdbus_message *message, const int *fds, size_t n_fds);
int kdbus_message_set_bloom_filter(struct kdbus_message *message, uint64_t generation,
				   const void *filter, size_t size);
int kdbus_message_set_dst_name(struct kdbus_message *message, const char *name);
int kdbus_message_set_dst_id(struct kdbus_message *message, uint64_t id);
int kdbus_message_set_flags(struct kdbus_message *message, uint64_t flags);
int kdbus_message_set_priority(struct kdbus_message *message, int64_t priority);
int kdbus_message_set_payload_type(struct kdbus_message *message, uint64_t payload_type);
int kdbus_message_set_cookie(struct kdbus_message *message, uint64_t cookie);
int kdbus_message_set_cookie_reply(struct kdbus_message *message, uint64_t cookie_reply);
int kdbus_message_set_deadline(struct kdbus_message *message, uint64_t deadline);

/* message.c: the head of a message, built or received */

uint64_t kdbus_message_get_flags(const struct kdbus_message *message);
int64_t kdbus_message_get_priority(const struct kdbus_message *message);
uint64_t kdbus_message_get_dst_id(const struct kdbus_message *message);
uint64_t kdbus_message_get_src_id(const struct kdbus_message *message);
uint64_t kdbus_message_get_payload_type(const struct kdbus_message *message);
uint64_t kdbus_message_get_cookie(const struct kdbus_message *message);
uint64_t kdbus_message_get_cookie_reply(const struct kdbus_message *message);
uint64_t kdbus_message_get_deadline(const struct kdbus_message *message);

/* message-read.c: reading a message that was received. Pointers are good until it
 * is freed. */

/**
 * enum kdbus_part_type - how a part of the payload came
 * @KDBUS_PART_DATA:	in the pool
 * @KDBUS_PART_ZEROS:	as a number of zero bytes
 * @KDBUS_PART_MEMFD:	as a piece of a memfd
 */
enum kdbus_part_type {
	KDBUS_PART_DATA,
	KDBUS_PART_ZEROS,
	KDBUS_PART_MEMFD
};

uint64_t kdbus_message_get_size(const struct kdbus_message *message);
size_t kdbus_message_get_n_parts(const struct kdbus_message *message);
int kdbus_message_get_part_type(const struct kdbus_message *message, size_t part);
uint64_t kdbus_message_get_part_size(const struct kdbus_message *message, size_t part);
int kdbus_message_get_part(struct kdbus_message *message, size_t part, const void **datap,
			   size_t *sizep);
int kdbus_message_get_iov(struct kdbus_message *message, const struct iovec **iovp, size_t *n_iovp);
int kdbus_message_copy(struct kdbus_message *message, uint64_t offset, void *buffer, size_t size,
		       size_t *copiedp);
int kdbus_message_get_memfd(const struct kdbus_message *message, size_t part, int *fdp,
			    uint64_t *startp, uint64_t *sizep);
int kdbus_message_take_memfd(struct kdbus_message *message, size_t part, int *fdp);
size_t kdbus_message_get_n_fds(const struct kdbus_message *message);
int kdbus_message_get_fd(const struct kdbus_message *message, size_t index, int *fdp);
int kdbus_message_take_fd(struct kdbus_message *message, size_t index, int *fdp);
bool kdbus_message_is_incomplete(const struct kdbus_message *message);
const char *kdbus_message_get_dst_name(const struct kdbus_message *message);
const struct kdbus_item *kdbus_message_get_notification(const struct kdbus_message *message);
const struct kdbus_item *kdbus_message_get_item(const struct kdbus_message *message, uint64_t type);
const struct kdbus_item *kdbus_message_next_item(const struct kdbus_message *message,
						 const struct kdbus_item *item);

/* item.c: what an item holds, or NULL if it is not one of these */

size_t kdbus_item_get_payload_size(const struct kdbus_item *item);
const char *kdbus_item_get_string(const struct kdbus_item *item);
const struct kdbus_creds *kdbus_item_get_creds(const struct kdbus_item *item);
const struct kdbus_pids *kdbus_item_get_pids(const struct kdbus_item *item);
const struct kdbus_timestamp *kdbus_item_get_timestamp(const struct kdbus_item *item);
const struct kdbus_audit *kdbus_item_get_audit(const struct kdbus_item *item);
const struct kdbus_caps *kdbus_item_get_caps(const struct kdbus_item *item, size_t *n_wordsp);
const __u64 *kdbus_item_get_auxgroups(const struct kdbus_item *item, size_t *n_groupsp);
const struct kdbus_name *kdbus_item_get_name(const struct kdbus_item *item);
const struct kdbus_notify_id_change *kdbus_item_get_id_change(const struct kdbus_item *item);
const struct kdbus_notify_name_change *kdbus_item_get_name_change(const struct kdbus_item *item);

/* name.c: well-known names */

int kdbus_conn_acquire_name(struct kdbus_conn *conn, const char *name, uint64_t flags,
			    uint64_t *flagsp);
int kdbus_conn_release_name(struct kdbus_conn *conn, const char *name);

/* info.c: what the bus knows */

int kdbus_conn_list(struct kdbus_conn *conn, uint64_t flags, struct kdbus_info_list **listp);
int kdbus_conn_info(struct kdbus_conn *conn, uint64_t id, const char *name, uint64_t attach_flags,
		    struct kdbus_info_list **listp);
int kdbus_conn_creator_info(struct kdbus_conn *conn, uint64_t attach_flags,
			    struct kdbus_info_list **listp);
struct kdbus_info_list *kdbus_info_list_free(struct kdbus_info_list *list);
const struct kdbus_info *kdbus_info_list_next(const struct kdbus_info_list *list,
					      const struct kdbus_info *info);
const struct kdbus_item *kdbus_info_get_item(const struct kdbus_info *info, uint64_t type);
const struct kdbus_item *kdbus_info_next_item(const struct kdbus_info *info,
					      const struct kdbus_item *item);

/* match.c: which signals and notifications to receive */

int kdbus_match_new(struct kdbus_match **matchp);
struct kdbus_match *kdbus_match_free(struct kdbus_match *match);
int kdbus_match_add_bloom_mask(struct kdbus_match *match, const void *mask, size_t size);
int kdbus_match_add_src_id(struct kdbus_match *match, uint64_t id);
int kdbus_match_add_dst_id(struct kdbus_match *match, uint64_t id);
int kdbus_match_add_src_name(struct kdbus_match *match, const char *name);
int kdbus_match_add_id_change(struct kdbus_match *match, uint64_t type, uint64_t id);
int kdbus_match_add_name_change(struct kdbus_match *match, uint64_t type, uint64_t old_id,
				uint64_t new_id, const char *name);
int kdbus_conn_add_match(struct kdbus_conn *conn, uint64_t cookie, uint64_t flags,
			 const struct kdbus_match *match);
int kdbus_conn_remove_matches(struct kdbus_conn *conn, uint64_t cookie);

/* bloom.c: one way to fill bloom filters and masks */

void kdbus_bloom_add(const struct kdbus_bloom_parameter *parameter, void *bits, const void *element,
		     size_t size);

/* policy.c: who may see, talk to and own names */

int kdbus_policy_new(struct kdbus_policy **policyp);
struct kdbus_policy *kdbus_policy_free(struct kdbus_policy *policy);
int kdbus_policy_add_name(struct kdbus_policy *policy, const char *name);
int kdbus_policy_add_access(struct kdbus_policy *policy, uint64_t type, uint64_t id,
			    uint64_t access);

/* memfd.c: memory to hand over */

int kdbus_memfd_new(int *fdp, const char *name);
int kdbus_memfd_new_data(int *fdp, const char *name, const void *data, size_t size);
int kdbus_memfd_seal(int fd);

/* deadline.c */

uint64_t kdbus_deadline(uint64_t timeout_ns);

/* for __attribute__((__cleanup__())) */

#define _KDBUS_DEFINE_FREEP(_type)                               \
	static inline void _type##_freep(struct _type **objectp) \
	{                                                        \
		*objectp = _type##_free(*objectp);               \
	}
_KDBUS_DEFINE_FREEP(kdbus_bus)
_KDBUS_DEFINE_FREEP(kdbus_conn)
_KDBUS_DEFINE_FREEP(kdbus_endpoint)
_KDBUS_DEFINE_FREEP(kdbus_info_list)
_KDBUS_DEFINE_FREEP(kdbus_match)
_KDBUS_DEFINE_FREEP(kdbus_message)
_KDBUS_DEFINE_FREEP(kdbus_policy)
#undef _KDBUS_DEFINE_FREEP

#ifdef __cplusplus
}
#endif

#endif /* _KDBUS_KDBUS_H */
