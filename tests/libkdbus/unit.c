/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tests of libkdbus's inside, without a bus: items, building and parsing of
 * messages, descriptors that arrive on a socket, and who closes what.
 */

#undef NDEBUG
#include <assert.h>
#include <fcntl.h>
#include <kdbus/extension.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "../../libkdbus/src/connection.h"
#include "../../libkdbus/src/deadline.h"
#include "../../libkdbus/src/fd_socket.h"
#include "../../libkdbus/src/item.h"
#include "../../libkdbus/src/message.h"
#include "../../libkdbus/src/owner.h"
#include "../../libkdbus/src/util.h"

#define POOL_SIZE (64UL << 10)

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

static int open_null(void)
{
	int fd;

	fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	assert(fd >= 0);
	return fd;
}

/* a connection to nowhere, with memory as its pool */
static struct kdbus_conn *conn_new_fake(int *daemon_fdp)
{
	struct kdbus_conn *conn;
	int fds[2];

	conn = calloc(1, sizeof(*conn));
	assert(conn);
	conn->fd = -1;
	conn->n_refs = 1;
	assert(kdbus_owner_init(&conn->owner) == 0);
	conn->fd_socket = (KdbusFdSocket)KDBUS_FD_SOCKET_INIT;
	pthread_mutex_init(&conn->slice_lock, NULL);
	pthread_rwlock_init(&conn->queue_lock, NULL);
	conn->pool_size = POOL_SIZE;
	conn->pool = mmap(NULL, POOL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
			  0);
	assert(conn->pool != MAP_FAILED);

	if (daemon_fdp) {
		assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) == 0);
		conn->fd_socket.fd = fds[0];
		*daemon_fdp = fds[1];
	}
	return conn;
}

/* bit n of @lost: the nth descriptor is not in @fds */
static void send_packet_lost(int fd, uint64_t offset, const int *fds, size_t n_fds, uint64_t lost)
{
	struct kdbusfs_fd_packet_lost data = {
		.packet = {
			.offset = offset,
			.n_fds = lost ? (n_fds + __builtin_popcountll(lost)) | KDBUSFS_FD_PACKET_LOST : n_fds,
		},
		.lost = lost,
	};
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(16 * sizeof(int))];
	} control = {};
	struct iovec iov = { .iov_base = &data,
			     .iov_len = lost ? sizeof(data) : sizeof(data.packet) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = CMSG_SPACE(n_fds * sizeof(int)),
	};

	assert(n_fds <= 16);
	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
	memcpy(CMSG_DATA(&control.header), fds, n_fds * sizeof(int));
	assert(sendmsg(fd, &msg, 0) == (ssize_t)iov.iov_len);
	/* what the receiver gets are duplicates */
	for (size_t i = 0; i < n_fds; ++i)
		close(fds[i]);
}

static void send_packet(int fd, uint64_t offset, const int *fds, size_t n_fds)
{
	send_packet_lost(fd, offset, fds, n_fds, 0);
}

/* a received message at @offset: "foo", two zeros, a memfd, two descriptors */
static struct kdbus_msg_info put_message(struct kdbus_conn *conn, uint64_t offset, const int fds[2],
					 int memfd)
{
	struct kdbus_msg head = {
		.src_id = 7,
		.dst_id = 8,
		.payload_type = KDBUS_PAYLOAD_DBUS,
		.cookie = 9,
		.cookie_reply = 10,
		.priority = -11,
	};
	struct kdbus_vec data = { .size = 3 }, zeros = { .size = 2, .offset = ~0ULL };
	struct kdbus_memfd piece = { .start = 4097, .size = 5, .fd = memfd };
	KdbusChain chain;
	struct kdbus_msg *msg;
	size_t size;

	assert(kdbus_chain_init(&chain, &head, sizeof(head)) == 0);
	assert(kdbus_chain_append(&chain, KDBUS_ITEM_PAYLOAD_OFF, &data, sizeof(data)) == 0);
	assert(kdbus_chain_append(&chain, KDBUS_ITEM_PAYLOAD_OFF, &zeros, sizeof(zeros)) == 0);
	assert(kdbus_chain_append(&chain, KDBUS_ITEM_PAYLOAD_MEMFD, &piece, sizeof(piece)) == 0);
	assert(kdbus_chain_append(&chain, KDBUS_ITEM_FDS, fds, 2 * sizeof(int)) == 0);
	assert(kdbus_chain_append_string(&chain, KDBUS_ITEM_DST_NAME, "a.b") == 0);
	size = align8(chain.size);

	msg = (void *)(conn->pool + offset);
	memcpy(msg, chain.data, chain.size);
	msg->size = chain.size;
	msg->items[0].vec.offset = size;
	memcpy((char *)msg + size, "foo", 3);
	kdbus_chain_deinit(&chain);
	return (struct kdbus_msg_info){ .offset = offset, .msg_size = size + 8 };
}

/* a sealed memfd in which byte n holds n % 251 */
static int make_memfd(void)
{
	uint8_t data[8192];
	int fd;

	for (size_t i = 0; i < sizeof(data); ++i)
		data[i] = i % 251;
	assert(kdbus_memfd_new_data(&fd, NULL, data, sizeof(data)) == 0);
	return fd;
}

static void test_items(void)
{
	_cleanup_(kdbus_chain_deinit) KdbusChain chain = KDBUS_CHAIN_NULL;
	const struct kdbus_item *first, *second;
	uint64_t id = 5;

	assert(kdbus_chain_append_string(&chain, KDBUS_ITEM_NAME, "a.b") == 0);
	assert(chain.size == 20);
	assert(kdbus_chain_append(&chain, KDBUS_ITEM_ID, &id, sizeof(id)) == 0);
	assert(chain.size == 48);
	/* padding is zero: a command is read as a whole */
	assert(!memcmp(chain.data + 20, "\0\0\0\0", 4));

	first = kdbus_items_next(chain.data, chain.size, NULL);
	assert((const uint8_t *)first == chain.data);
	assert(!strcmp(kdbus_item_get_string(first), "a.b"));
	second = kdbus_items_next(chain.data, chain.size, first);
	assert(second->id == 5 && second->size == 24);
	assert(!kdbus_item_get_string(second));
	assert(!kdbus_items_next(chain.data, chain.size, second));
	assert(kdbus_items_find(chain.data, chain.size, KDBUS_ITEM_ID) == second);
	assert(!kdbus_items_find(chain.data, chain.size, KDBUS_ITEM_FDS));
	assert(kdbus_items_check(chain.data, chain.size) == 0);

	/* cut, nothing that reaches beyond the end is seen */
	assert(!kdbus_items_next(chain.data, 47, first));
	assert(kdbus_items_check(chain.data, 47) == -EBADMSG);
	assert(!kdbus_items_next(chain.data, 15, NULL));
	/* neither is an item that would be followed by itself */
	((struct kdbus_item *)second)->size = 0;
	assert(!kdbus_items_next(chain.data, chain.size, first));
	((struct kdbus_item *)second)->size = UINT64_MAX - 3;
	assert(!kdbus_items_next(chain.data, chain.size, first));

	assert(kdbus_chain_append(&chain, KDBUS_ITEM_BLOOM_MASK, NULL, 65536) == -EMSGSIZE);
}

static void test_typed_items(void)
{
	union {
		struct kdbus_item item;
		uint8_t bytes[256];
	} u = {};
	size_t n;

	u.item.type = KDBUS_ITEM_CREDS;
	u.item.size = 16 + 64;
	assert(kdbus_item_get_creds(&u.item) == &u.item.creds);
	u.item.size = 16 + 56;
	assert(!kdbus_item_get_creds(&u.item));
	assert(!kdbus_item_get_creds(NULL));
	assert(!kdbus_item_get_pids(&u.item));

	u.item.type = KDBUS_ITEM_CAPS;
	u.item.size = 16 + 4 + 4 * 2 * 4;
	u.item.caps.last_cap = 40;
	assert(kdbus_item_get_caps(&u.item, &n) == &u.item.caps && n == 2);
	u.item.caps.last_cap = 70;
	assert(!kdbus_item_get_caps(&u.item, &n));

	u.item.type = KDBUS_ITEM_AUXGROUPS;
	u.item.size = 16;
	assert(kdbus_item_get_auxgroups(&u.item, &n) && n == 0);
	u.item.size = 20;
	assert(!kdbus_item_get_auxgroups(&u.item, &n));

	u.item.type = KDBUS_ITEM_EXE;
	u.item.size = 16 + 4;
	memcpy(u.item.str, "abc", 4);
	assert(!strcmp(kdbus_item_get_string(&u.item), "abc"));
	u.item.size = 16 + 3;
	assert(!kdbus_item_get_string(&u.item));
	u.item.size = 16 + 5;
	u.item.str[4] = 0;
	assert(!kdbus_item_get_string(&u.item));
	u.item.size = 16;
	assert(!kdbus_item_get_string(&u.item));

	u.item.type = KDBUS_ITEM_NAME_ADD;
	u.item.size = 16 + 32;
	assert(!kdbus_item_get_name_change(&u.item));
	u.item.size = 16 + 32 + 2;
	u.item.name_change.name[0] = 'x';
	u.item.name_change.name[1] = 0;
	assert(!strcmp(kdbus_item_get_name_change(&u.item)->name, "x"));
	assert(!kdbus_item_get_id_change(&u.item));
}

/* name, data, zeros, memfd and descriptors, in this order and nothing behind them */
static void check_items(const struct kdbus_msg *msg, const int *fds, size_t n_fds)
{
	const struct kdbus_item *item;

	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), NULL);
	assert(item->type == KDBUS_ITEM_DST_NAME && !strcmp(item->str, "com.example"));
	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), item);
	assert(item->type == KDBUS_ITEM_PAYLOAD_VEC && item->size == 32 && item->vec.size == 3);
	assert(!memcmp((const void *)(uintptr_t)item->vec.address, "foo", 3));
	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), item);
	assert(item->type == KDBUS_ITEM_PAYLOAD_VEC && item->vec.size == 5 && !item->vec.address);
	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), item);
	assert(item->type == KDBUS_ITEM_PAYLOAD_MEMFD && item->size == 40);
	assert(item->memfd.fd == 3 && item->memfd.start == 8 && item->memfd.size == 16);
	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), item);
	assert(item->type == KDBUS_ITEM_FDS && item->size == 16 + n_fds);
	assert(!memcmp(item->fds, fds, n_fds));
	assert((const uint8_t *)item + item->size == (const uint8_t *)msg + msg->size);
}

static void test_build(void)
{
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	const struct kdbus_item *item;
	struct kdbus_msg *msg;
	int fds[3] = { 4, 5, 6 };

	assert(kdbus_message_new(&message) == 0);
	assert(kdbus_message_build(message, &msg) == 0);
	assert(msg->size == sizeof(*msg) && msg->payload_type == KDBUS_PAYLOAD_DBUS);
	assert(msg->flags == 0 && msg->dst_id == KDBUS_DST_ID_NAME);

	assert(kdbus_message_append_data(message, "foo", 3) == 0);
	assert(kdbus_message_append_data(message, NULL, 0) == 0);
	assert(kdbus_message_append_data(message, NULL, 1) == -EFAULT);
	assert(kdbus_message_append_zeros(message, 5) == 0);
	assert(kdbus_message_append_memfd(message, 3, 8, 16) == 0);
	assert(kdbus_message_append_fds(message, fds, 2) == 0);
	assert(kdbus_message_append_fds(message, fds + 2, 1) == 0);
	assert(kdbus_message_append_fds(message, fds, 5000) == -EMFILE);
	assert(kdbus_message_set_dst_name(message, "com.example") == 0);
	assert(kdbus_message_set_dst_id(message, 12) == 0);
	assert(kdbus_message_set_priority(message, -3) == 0);
	assert(kdbus_message_set_cookie(message, 99) == 0);
	assert(kdbus_message_set_deadline(message, 1000) == 0);
	assert(kdbus_message_get_deadline(message) == 1000);
	assert(kdbus_message_get_cookie_reply(message) == 0);
	assert(kdbus_message_build(message, &msg) == 0);
	assert(msg->dst_id == 12 && msg->priority == -3 && msg->cookie == 99);
	assert(msg->flags == KDBUS_MSG_EXPECT_REPLY && msg->timeout_ns == 1000);

	check_items(msg, fds, sizeof(fds));

	/* what was there can be replaced, and taken back */
	assert(kdbus_message_set_dst_name(message, "x.y") == 0);
	assert(kdbus_message_set_dst_name(message, NULL) == 0);
	assert(kdbus_message_set_bloom_filter(message, 1, "12345678", 8) == 0);
	assert(kdbus_message_build(message, &msg) == 0);
	assert(msg->flags == (KDBUS_MSG_EXPECT_REPLY | KDBUS_MSG_SIGNAL));
	item = kdbus_items_next(msg->items, msg->size - sizeof(*msg), NULL);
	assert(item->type == KDBUS_ITEM_BLOOM_FILTER && item->size == 16 + 8 + 8);
	assert(item->bloom_filter.generation == 1 &&
	       !memcmp(item->bloom_filter.data, "12345678", 8));
	assert(kdbus_message_get_n_parts(message) == 0);
	assert(!kdbus_message_next_item(message, NULL));
}

static void check_parts(struct kdbus_message *message)
{
	const struct iovec *iov;
	char buffer[16];
	size_t n;

	assert(kdbus_message_get_n_parts(message) == 3);
	assert(kdbus_message_get_size(message) == 10);
	assert(kdbus_message_get_part_type(message, 0) == KDBUS_PART_DATA);
	assert(kdbus_message_get_part_type(message, 1) == KDBUS_PART_ZEROS);
	assert(kdbus_message_get_part_type(message, 2) == KDBUS_PART_MEMFD);
	assert(kdbus_message_get_part_type(message, 3) == -ERANGE);

	assert(kdbus_message_get_iov(message, &iov, &n) == 0 && n == 3);
	assert(iov[0].iov_len == 3 && !memcmp(iov[0].iov_base, "foo", 3));
	assert(iov[1].iov_len == 2 && !memcmp(iov[1].iov_base, "\0\0", 2));
	/* 4097 % 251 is 81 */
	assert(iov[2].iov_len == 5 && !memcmp(iov[2].iov_base, "QRSTU", 5));

	assert(kdbus_message_copy(message, 0, buffer, sizeof(buffer), &n) == 0);
	assert(n == 10 && !memcmp(buffer, "foo\0\0QRSTU", 10));
	assert(kdbus_message_copy(message, 2, buffer, 4, &n) == 0);
	assert(n == 4 && !memcmp(buffer, "o\0\0Q", 4));
	assert(kdbus_message_copy(message, 10, buffer, 4, &n) == 0 && n == 0);
}

static void test_receive_installed(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	int fds[2] = { open_null(), open_null() }, memfd = make_memfd(), fd;
	struct kdbus_msg_info info = put_message(conn, 64, fds, memfd);

	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	assert(kdbus_message_get_src_id(message) == 7 && kdbus_message_get_dst_id(message) == 8);
	assert(kdbus_message_get_cookie(message) == 9);
	assert(kdbus_message_get_cookie_reply(message) == 10);
	assert(kdbus_message_get_priority(message) == -11);
	assert(!strcmp(kdbus_message_get_dst_name(message), "a.b"));
	assert(!kdbus_message_get_notification(message));
	assert(!kdbus_message_is_incomplete(message));
	assert(kdbus_message_set_cookie(message, 1) == -EROFS);
	check_parts(message);

	assert(kdbus_message_get_n_fds(message) == 2);
	assert(kdbus_message_get_fd(message, 0, &fd) == 0 && fd == fds[0]);
	assert(kdbus_message_take_fd(message, 1, &fd) == 0 && fd == fds[1]);
	assert(kdbus_message_take_fd(message, 1, &fd) == -EBADF);
	assert(kdbus_message_take_fd(message, 2, &fd) == -ERANGE);
	assert(kdbus_message_get_memfd(message, 2, &fd, NULL, NULL) == 0 && fd == memfd);
	assert(kdbus_message_get_memfd(message, 0, &fd, NULL, NULL) == -EMEDIUMTYPE);

	message = kdbus_message_free(message);
	assert(!is_open(fds[0]) && is_open(fds[1]) && !is_open(memfd));
	close(fds[1]);
	assert(!conn->slices);
}

/* all that was told of a message, once more after others wrote into the pool */
static void test_pool_is_read_once(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	int fds[2] = { open_null(), open_null() }, memfd = make_memfd(), fd;
	struct kdbus_msg_info info = put_message(conn, 64, fds, memfd);
	const struct kdbus_item *item = NULL;
	size_t n_items = 0;

	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	memset(conn->pool, 0xff, 64 + info.msg_size - 8);

	while ((item = kdbus_message_next_item(message, item)))
		++n_items;
	assert(n_items == 5);
	assert(kdbus_message_get_src_id(message) == 7 && kdbus_message_get_cookie(message) == 9);
	assert(kdbus_message_get_deadline(message) == 0);
	assert(!strcmp(kdbus_message_get_dst_name(message), "a.b"));
	assert(kdbus_message_get_fd(message, 0, &fd) == 0 && fd == fds[0]);
	check_parts(message);
}

struct writer {
	struct kdbus_msg *msg;
	_Atomic uint64_t n_rounds;
	_Atomic bool stop;
};

/* a hundred descriptors, nonsense, too much of it: in turn, as fast as possible */
static void *write_all_the_time(void *userdata)
{
	struct writer *writer = userdata;
	volatile struct kdbus_msg *msg = writer->msg;
	volatile struct kdbus_item *item = msg->items;
	uint64_t size = msg->size, item_size = item->size;

	while (!writer->stop) {
		item->type = KDBUS_ITEM_PAYLOAD_OFF;
		item->size = 32;
		msg->size = UINT64_MAX;
		item->size = 3;
		msg->size = size;
		item->size = item_size;
		item->type = KDBUS_ITEM_FDS;
		++writer->n_rounds;
	}
	return NULL;
}

static void test_pool_that_changes(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	struct kdbus_message *message = NULL;
	struct writer writer = { .msg = (void *)conn->pool };
	struct kdbus_item *fds = writer.msg->items;
	uint64_t n_good = 0, n_bad = 0;
	const struct kdbus_item *item;
	struct kdbus_msg_info info;
	pthread_t thread;

	/* numbers of descriptors that nobody has: they are closed each time */
	fds->size = offsetof(struct kdbus_item, data) + 100 * sizeof(int);
	memset(fds->fds, 0xff, 100 * sizeof(int));
	fds->type = KDBUS_ITEM_FDS;
	writer.msg->size = sizeof(*writer.msg) + fds->size;
	info = (struct kdbus_msg_info){ .msg_size = writer.msg->size };

	assert(pthread_create(&thread, NULL, write_all_the_time, &writer) == 0);
	while (n_good < 1000 || n_bad < 1000 || writer.n_rounds < 100000) {
		if (kdbus_message_new_from_slice(&message, conn, &info) < 0) {
			++n_bad;
			continue;
		}
		item = NULL;
		while ((item = kdbus_message_next_item(message, item)))
			assert(item->size >= 16 && item->size <= info.msg_size);
		message = kdbus_message_free(message);
		++n_good;
	}
	writer.stop = true;
	assert(pthread_join(thread, NULL) == 0);
}

static void test_memfd_that_is_too_short(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	struct kdbus_msg_info info = put_message(conn, 0, (int[]){ -1, -1 }, make_memfd());
	struct kdbus_item *piece = (void *)(conn->pool + sizeof(struct kdbus_msg) + 2 * 32);
	const uint64_t bad[][2] = { { 8192, 1 }, { 4097, 4096 }, { 9000, 1 }, { 1, UINT64_MAX } };
	const void *data;
	int memfd = piece->memfd.fd;

	assert(piece->type == KDBUS_ITEM_PAYLOAD_MEMFD);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); ++i) {
		piece->memfd.fd = dup(memfd);
		piece->memfd.start = bad[i][0];
		piece->memfd.size = bad[i][1];
		assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
		assert(kdbus_message_get_part(message, 2, &data, NULL) == -EBADMSG);
		message = kdbus_message_free(message);
	}
	close(memfd);
}

static void wait_for(pid_t pid)
{
	int status;

	assert(waitpid(pid, &status, 0) == pid);
	assert(status == 0);
}

static void test_owner(void)
{
	KdbusOwner owner, by_number = { .pid = getpid() };
	pid_t pid;

	assert(kdbus_owner_init(&owner) == 0);
	assert(owner.mark);
	assert(kdbus_owner_check(&owner) == 0);
	assert(kdbus_owner_check(&by_number) == 0);

	pid = fork();
	assert(pid >= 0);
	if (pid == 0) {
		/* with the number of the parent, as in a new PID namespace */
		owner.pid = getpid();
		_exit(!(kdbus_owner_check(&owner) == -ECHILD &&
			kdbus_owner_check(&by_number) == -ECHILD));
	}
	wait_for(pid);

	/* no handler of pthread_atfork() gets to know of this one */
	pid = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
	assert(pid >= 0);
	if (pid == 0)
		_exit(kdbus_owner_check(&owner) != -ECHILD);
	wait_for(pid);

	assert(kdbus_owner_check(&owner) == 0);
	kdbus_owner_deinit(&owner);
}

/* a thread of the parent was in the middle of everything when another one forked */
static void test_fork_while_locked(void)
{
	struct kdbus_message *messages[2] = {}, *more;
	int daemon_fd, none[2] = { -1, -1 };
	struct kdbus_conn *conn = conn_new_fake(&daemon_fd);
	struct kdbus_msg_info info;
	pid_t pid;

	for (size_t i = 0; i < 2; ++i) {
		info = put_message(conn, i * 4096, none, -1);
		assert(kdbus_message_new_from_slice(&messages[i], conn, &info) == 0);
	}
	pthread_rwlock_wrlock(&conn->queue_lock);
	pthread_mutex_lock(&conn->slice_lock);
	pthread_mutex_lock(&conn->fd_socket.lock);
	messages[1]->slice.next = (void *)1;

	pid = fork();
	assert(pid >= 0);
	if (pid == 0) {
		alarm(10);
		assert(kdbus_conn_recv(conn, &more) == -ECHILD);
		assert(kdbus_conn_peek(conn, &more) == -ECHILD);
		assert(kdbus_conn_drop(conn) == -ECHILD);
		kdbus_message_free(messages[1]);
		kdbus_conn_free(conn);
		assert(!strcmp(kdbus_message_get_dst_name(messages[0]), "a.b"));
		kdbus_message_free(messages[0]);
		_exit(0);
	}
	wait_for(pid);

	messages[1]->slice.next = &messages[0]->slice;
	pthread_mutex_unlock(&conn->fd_socket.lock);
	pthread_mutex_unlock(&conn->slice_lock);
	pthread_rwlock_unlock(&conn->queue_lock);
	kdbus_conn_free(conn);
	kdbus_message_free(messages[0]);
	kdbus_message_free(messages[1]);
	close(daemon_fd);
}

static void test_receive_by_socket(void)
{
	struct kdbus_message *first = NULL, *second = NULL;
	int none[2] = { -1, -1 }, fd, daemon_fd;
	struct kdbus_conn *conn = conn_new_fake(&daemon_fd);
	struct kdbus_msg_info info[2];

	info[0] = put_message(conn, 0, none, -1);
	info[1] = put_message(conn, 4096, none, -1);
	/* a message that got lost on its way, at the place of the second */
	send_packet(daemon_fd, 4096, (int[]){ open_null() }, 1);
	send_packet(daemon_fd, 4096, (int[]){ open_null(), open_null(), make_memfd() }, 3);
	send_packet(daemon_fd, 0, (int[]){ open_null(), open_null(), make_memfd() }, 3);
	/* no packet at all makes no sense */
	assert(send(daemon_fd, "?", 1, 0) == 1);

	assert(kdbus_message_new_from_slice(&first, conn, &info[0]) == 0);
	assert(!kdbus_message_is_incomplete(first));
	check_parts(first);
	assert(conn->fd_socket.packets && !conn->fd_socket.packets->next);
	assert(kdbus_message_new_from_slice(&second, conn, &info[1]) == 0);
	assert(!kdbus_message_is_incomplete(second));
	assert(!conn->fd_socket.packets);
	assert(kdbus_message_get_fd(second, 1, &fd) == 0 && is_open(fd));
	assert(fcntl(fd, F_GETFD) & FD_CLOEXEC);

	/* taken before it is mapped, the data is gone */
	assert(kdbus_message_take_memfd(second, 2, &fd) == 0);
	assert(kdbus_message_get_part(second, 2, &(const void *){ NULL }, NULL) == -EBADF);
	close(fd);

	/* the connection goes first; what was received stays */
	conn = kdbus_conn_free(conn);
	check_parts(first);
	first = kdbus_message_free(first);
	assert(kdbus_message_get_src_id(second) == 7);
	second = kdbus_message_free(second);
	close(daemon_fd);
}

/* Those that could not be sent are missing, and no others, wherever they are. */
static void test_receive_by_socket_lost(void)
{
	int none[2] = { -1, -1 }, fd, daemon_fd;
	struct kdbus_conn *conn = conn_new_fake(&daemon_fd);

	for (uint64_t lost = 1; lost < 7; ++lost) {
		struct kdbus_message *message = NULL;
		struct kdbus_msg_info info = put_message(conn, 0, none, -1);
		int fds[3];
		size_t n = 0;

		for (int i = 0; i < 3; ++i)
			if (!(lost >> i & 1))
				fds[n++] = i < 2 ? open_null() : make_memfd();
		send_packet_lost(daemon_fd, 0, fds, n, lost);
		for (size_t i = 0; i < n; ++i)
			if (is_open(fds[i]))
				close(fds[i]);
		assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
		assert(kdbus_message_is_incomplete(message));
		for (int i = 0; i < 2; ++i)
			assert((kdbus_message_get_fd(message, i, &fd) == 0) == !(lost >> i & 1));
		assert((kdbus_message_get_memfd(message, 2, &fd, NULL, NULL) == 0) == !(lost >> 2));
		if (!(lost >> 2))
			check_parts(message);
		kdbus_message_free(message);
	}
	kdbus_conn_free(conn);
	close(daemon_fd);
}

static void test_receive_withheld(void)
{
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = NULL;
	_cleanup_(closep) int daemon_fd = -1;
	int none[2] = { -1, -1 }, fd;
	struct kdbus_msg_info info;

	/* memfds come even to who takes no descriptors */
	conn = conn_new_fake(&daemon_fd);
	info = put_message(conn, 0, none, -1);
	send_packet(daemon_fd, 0, (int[]){ make_memfd() }, 1);
	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	assert(kdbus_message_is_incomplete(message));
	assert(kdbus_message_get_fd(message, 0, &fd) == -EBADF);
	check_parts(message);
	message = kdbus_message_free(message);

	/* none at all */
	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	assert(kdbus_message_is_incomplete(message));
	assert(kdbus_message_get_part(message, 2, &(const void *){ NULL }, NULL) == -EBADF);
}

static void test_receive_no_descriptors(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	struct kdbus_msg *msg = (void *)conn->pool;

	msg->items[0].type = KDBUS_ITEM_FDS;
	msg->items[0].size = 16;
	msg->size = sizeof(*msg) + 16;
	assert(kdbus_message_new_from_slice(&message, conn,
					    &(struct kdbus_msg_info){ .msg_size = sizeof(*msg) +
										  16 }) == 0);
	assert(kdbus_message_get_n_fds(message) == 0);
}

static void test_receive_nonsense(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	struct kdbus_message *message = NULL;
	int fds[2] = { open_null(), open_null() }, memfd = make_memfd();
	struct kdbus_msg_info info = put_message(conn, 0, fds, memfd);
	struct kdbus_msg *msg = (void *)conn->pool;

	/* data beyond the slice */
	msg->items[0].vec.size = 4096;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == -EBADMSG);
	/* its descriptors were ours nevertheless */
	assert(!is_open(fds[0]) && !is_open(fds[1]) && !is_open(memfd));
	assert(!conn->slices);

	info = put_message(conn, 0, (int[]){ -1, -1 }, -1);
	msg->size = info.msg_size + 8;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == -EBADMSG);
	msg->size = 63;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == -EBADMSG);

	info = put_message(conn, 0, (int[]){ -1, -1 }, -1);
	msg->items[0].size = 8;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == -EBADMSG);

	info.offset = POOL_SIZE - 8;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == -EBADMSG);
	assert(!message);
}

static void test_peek(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	/* numbers of somebody else, which happen to be open here */
	struct kdbus_msg_info info = put_message(conn, 0, (int[]){ 0, 1 }, 2);
	const struct kdbus_item *item;
	const void *data;
	size_t size;
	void *copy;
	int fd;

	copy = malloc(info.msg_size);
	assert(copy);
	memcpy(copy, conn->pool, info.msg_size);
	assert(kdbus_message_new_from_copy(&message, copy, info.msg_size) == 0);
	assert(kdbus_message_is_incomplete(message));
	assert(kdbus_message_get_fd(message, 0, &fd) == -EBADF);
	assert(kdbus_message_get_part(message, 0, &data, &size) == 0 && size == 3);
	assert(kdbus_message_get_part(message, 2, &data, &size) == -EBADF);
	item = kdbus_message_get_item(message, KDBUS_ITEM_FDS);
	assert(item->fds[0] == -1 && item->fds[1] == -1);

	message = kdbus_message_free(message);
	assert(is_open(0) && is_open(1) && is_open(2));
}

static void test_notification(void)
{
	_cleanup_(kdbus_conn_freep) struct kdbus_conn *conn = conn_new_fake(NULL);
	_cleanup_(kdbus_message_freep) struct kdbus_message *message = NULL;
	struct kdbus_msg_info info = { .msg_size = 96 };
	struct kdbus_msg *msg = (void *)conn->pool;

	msg->size = 96;
	msg->items[0].size = 32;
	msg->items[0].type = KDBUS_ITEM_ID_ADD;
	msg->items[0].id_change.id = 3;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	assert(kdbus_item_get_id_change(kdbus_message_get_notification(message))->id == 3);
	message = kdbus_message_free(message);

	/* a connection can't make one */
	msg->src_id = 1;
	assert(kdbus_message_new_from_slice(&message, conn, &info) == 0);
	assert(!kdbus_message_get_notification(message));
}

static void test_bloom(void)
{
	struct kdbus_bloom_parameter parameter = { .size = 64, .n_hash = 8 };
	uint8_t filter[64] = {}, mask[64] = {}, other[64] = {};
	size_t n_bits = 0, n_missing = 0;

	kdbus_bloom_add(&parameter, mask, "a", 1);
	kdbus_bloom_add(&parameter, filter, "b", 1);
	kdbus_bloom_add(&parameter, filter, "a", 1);
	kdbus_bloom_add(&parameter, other, "c", 1);
	for (size_t i = 0; i < 64; ++i) {
		assert((filter[i] & mask[i]) == mask[i]);
		n_bits += __builtin_popcount(mask[i]);
		n_missing += __builtin_popcount(other[i] & ~filter[i]);
	}
	assert(n_bits > 4 && n_bits <= 8);
	assert(n_missing > 0);
}

static void test_deadline(void)
{
	uint64_t now = kdbus_now();

	assert(kdbus_deadline(0) >= now);
	assert(kdbus_deadline(NSEC_PER_SEC) >= now + NSEC_PER_SEC);
	assert(kdbus_deadline(UINT64_MAX) == INT64_MAX);
}

static void test_memfd(void)
{
	_cleanup_(closep) int fd = -1;
	uint8_t *map;

	assert(kdbus_memfd_new(&fd, "test") == 0);
	assert(ftruncate(fd, 4096) == 0);
	map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert(map != MAP_FAILED);
	assert(kdbus_memfd_seal(fd) == -EBUSY);
	munmap(map, 4096);
	assert(kdbus_memfd_seal(fd) == 0);
	assert(kdbus_memfd_seal(fd) == 0);
	assert(ftruncate(fd, 0) < 0 && errno == EPERM);
	assert(kdbus_memfd_seal(0) < 0);
}

int main(void)
{
	test_items();
	test_typed_items();
	test_build();
	test_receive_installed();
	test_pool_is_read_once();
	test_pool_that_changes();
	test_memfd_that_is_too_short();
	test_owner();
	test_fork_while_locked();
	test_receive_by_socket();
	test_receive_by_socket_lost();
	test_receive_withheld();
	test_receive_no_descriptors();
	test_receive_nonsense();
	test_peek();
	test_notification();
	test_bloom();
	test_deadline();
	test_memfd();
	return 0;
}
