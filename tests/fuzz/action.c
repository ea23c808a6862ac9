// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * What a thread does: one random thing per step
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "fuzz.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL)
#define PAGE UINT64_C(4096)

typedef struct Action Action;

struct Action {
	const char *name;
	unsigned int weight;
	void (*run)(Thread *thread);
};

static __thread Command command, message;

/* What kdbus may answer; anything else is a fault of the daemon. */
static bool is_known(int error)
{
	static const int known[] = {
		EPERM,         ESRCH,      ENXIO,        E2BIG,     EBADF,      EAGAIN,
		ENOMEM,        EACCES,     EFAULT,       EBUSY,     EEXIST,     EINVAL,
		EMFILE,        ENOTTY,     ETXTBSY,      EMLINK,    EPIPE,      EDOM,
		ENAMETOOLONG,  EXFULL,     EBADSLT,      ECOMM,     EBADMSG,    ENOTUNIQ,
		EBADFD,        EREMCHG,    EDESTADDRREQ, EMSGSIZE,  EOPNOTSUPP, EADDRINUSE,
		EADDRNOTAVAIL, ECONNRESET, ENOBUFS,      ESHUTDOWN, ETIMEDOUT,  EREMOTEIO,
		EMEDIUMTYPE,   ECANCELED,
	};

	for (size_t i = 0; i < N_ELEMENTS(known); i++)
		if (error == known[i])
			return true;
	return false;
}

/* The first is the daemon's answer if something broke in it, the others are the kernel's if the
 * daemon is gone. */
static void check_at(Thread *thread, long r, int line)
{
	__atomic_add_fetch(&shared->n_calls, 1, __ATOMIC_RELAXED);
	if (r < 0 && (errno == EIO || errno == ENOTCONN || errno == ECONNABORTED))
		report(thread, "line %d: %s", line, strerror(errno));
}

#define check(thread, r) check_at(thread, r, __LINE__)

/* What the kernel itself fails with EIO on a file whose mapping was scribbled to, since the daemon
 * refuses to have that written back. */
#define check_data(thread, r) check_at(thread, (r) < 0 && errno != EIO ? -1 : 0, __LINE__)

/* Reads memory that may not be there. */
static bool peek(const void *address, void *to, size_t size)
{
	struct iovec here = { to, size }, there = { (void *)address, size };

	return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)size;
}

static bool poke(void *address, const void *from, size_t size)
{
	struct iovec here = { (void *)from, size }, there = { address, size };

	return process_vm_writev(getpid(), &here, 1, &there, 1, 0) == (ssize_t)size;
}

/**
 * arena_init() - map memory that ends in front of a hole
 * @arena:		arena to initialise
 *
 * Return: 0 on success, negative error code on failure.
 */
int arena_init(Arena *arena)
{
	uint8_t *room;
	int fd, r = 0;

	fd = memfd_create("fuzz-arena", MFD_CLOEXEC);
	if (fd < 0)
		return -errno;

	room = mmap(NULL, ARENA_SIZE + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ftruncate(fd, ARENA_SIZE) < 0 || room == MAP_FAILED) {
		r = -errno;
	} else {
		arena->rw = mmap(room, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
				 fd, 0);
		arena->ro = mmap(NULL, ARENA_SIZE, PROT_READ, MAP_SHARED, fd, 0);
		if (arena->rw == MAP_FAILED || arena->ro == MAP_FAILED)
			r = -errno;
	}

	close(fd);
	return r;
}

/* --- files */

static int any_file(Thread *thread)
{
	int fd;

	/* Mostly one that is open. */
	for (unsigned int i = 0; i < 3; i++) {
		fd = thread->client->files[below(thread, N_FILES)];
		if (fd >= 0)
			return fd;
	}
	return one_in(thread, 8) ? thread->client->others[below(thread, N_OTHERS)] : fd;
}

/* Mostly one that has said hello. */
static int any_connection(Thread *thread)
{
	Client *client = thread->client;

	for (unsigned int i = 0; i < 6; i++) {
		uint64_t slot = below(thread, N_FILES);

		if (client->files[slot] >= 0 && client->ids[slot])
			return client->files[slot];
	}
	return any_file(thread);
}

static void put_other(int *slot, int fd)
{
	int old = *slot;

	if (fd < 0)
		return;
	*slot = fd;
	if (old >= 0)
		close(old);
}

static void put_file(Thread *thread, int fd, uint64_t id)
{
	uint64_t slot = below(thread, N_FILES);

	thread->client->ids[slot] = id;
	put_other(&thread->client->files[slot], fd);
}

/* --- commands */

/* Puts an argument somewhere, mostly where it can be read and written. */
static uint64_t place(Thread *thread, Arena *arena, const Command *argument)
{
	uint64_t at = 0, size = argument->size;

	switch (below(thread, 48)) {
	case 0:
		at = ARENA_SIZE - ALIGN8(size);
		break;
	case 1:
		at = ARENA_SIZE - size;
		break;
	case 2:
		at = 8 * below(thread, 4096);
		break;
	case 3:
		/* With its end in the hole. */
		at = (ARENA_SIZE - 1 - below(thread, size)) & ~UINT64_C(7);
		break;
	case 4:
		memcpy(arena->rw, argument->data, size);
		return (uintptr_t)arena->ro;
	case 5:
		return strange_address(thread);
	case 6:
		if (size > sizeof(thread->client->page))
			break;
		memcpy(thread->client->page, argument->data, size);
		return (uintptr_t)thread->client->page;
	}
	memcpy(arena->rw + at, argument->data, size > ARENA_SIZE - at ? ARENA_SIZE - at : size);
	return (uintptr_t)arena->rw + at;
}

static unsigned int index_of(unsigned int code)
{
	for (unsigned int i = 0; i < N_CODES; i++)
		if (codes[i] == code)
			return i;
	return 0;
}

static bool waits(unsigned int code)
{
	return code == KDBUS_CMD_SEND || code == KDBUSFS_CMD_SEND;
}

/* Makes the call that @command describes; its results are in @command after that. */
static int issue(Thread *thread, int fd, unsigned int code)
{
	struct kdbus_cmd_send *send = (void *)command.data;
	unsigned int i = index_of(code);
	uint64_t address;
	int r;

	if (waits(code)) {
		build_message(thread, &message, send->flags & KDBUS_SEND_SYNC_REPLY);
		if (one_in(thread, 6))
			damage(thread, &message);
		send->msg_address = place(thread, &thread->message, &message);
	}
	if (one_in(thread, 6))
		damage(thread, &command);
	address = place(thread, &thread->command, &command);

	r = ioctl(fd, code, address) < 0 ? -errno : 0;
	check(thread, r);
	__atomic_add_fetch(&shared->n_results[i][-r % N_ERRORS], 1, __ATOMIC_RELAXED);
	if (r < 0 && !is_known(-r) && !(r == -EINTR && waits(code)))
		report(thread, "%s: %s", code_names[i], strerror(-r));

	if (!peek((void *)(uintptr_t)address, command.data, 96))
		memset(command.data, 0, 96);
	return r;
}

static void remember_offset(Thread *thread, uint64_t offset)
{
	Client *client = thread->client;

	client->offsets[client->n_offsets++ % N_OFFSETS] = offset;
}

/* Returns the id, or 0. */
static uint64_t hello(Thread *thread, int fd)
{
	struct kdbus_cmd_hello *hello_ = (void *)command.data;

	build(thread, &command, KDBUS_CMD_HELLO);
	if (issue(thread, fd, KDBUS_CMD_HELLO) < 0)
		return 0;
	shared->ids[below(thread, N_IDS)] = hello_->id;
	return hello_->id;
}

static void read_mail(Thread *thread, int fd, uint64_t offset)
{
	uint64_t from = offset & ~(PAGE - 1);
	Client *client = thread->client;
	struct kdbus_msg msg;
	uint8_t *p;

	p = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, from);
	if (p == MAP_FAILED)
		return;
	if (peek(p + offset - from, &msg, sizeof(msg)) && msg.src_id)
		client->mail[client->n_mail++ % N_MAIL] = (Mail){ msg.src_id, msg.cookie };
	munmap(p, 2 * PAGE);
}

static void run_command(Thread *thread)
{
	static const unsigned int often[] = {
		KDBUS_CMD_SEND, KDBUS_CMD_SEND, KDBUS_CMD_SEND,         KDBUSFS_CMD_SEND,
		KDBUS_CMD_RECV, KDBUS_CMD_FREE, KDBUS_CMD_NAME_ACQUIRE, KDBUS_CMD_MATCH_ADD,
	};
	unsigned int code;
	int fd;

	code = one_in(thread, 2) ? codes[below(thread, N_CODES)]
				 : often[below(thread, N_ELEMENTS(often))];
	if (code == KDBUS_CMD_BYEBYE && !one_in(thread, 4))
		return;
	if (code == KDBUS_CMD_HELLO) {
		hello(thread, any_file(thread));
		return;
	}
	fd = code == KDBUS_CMD_BUS_MAKE || one_in(thread, 16) ? any_file(thread)
							      : any_connection(thread);
	build(thread, &command, code);
	if (issue(thread, fd, code) < 0)
		return;
	if (code == KDBUS_CMD_CONN_INFO || code == KDBUS_CMD_BUS_CREATOR_INFO)
		remember_offset(thread, command.data[5]);
	else if (code == KDBUS_CMD_LIST)
		remember_offset(thread, command.data[3]);
	else if (waits(code))
		remember_offset(thread, command.data[4]);
}

/* Takes messages, reads their heads, frees most of them. */
static void run_receive(Thread *thread)
{
	unsigned int code = one_in(thread, 3) ? KDBUSFS_CMD_RECV : KDBUS_CMD_RECV;
	int fd = any_connection(thread);
	uint64_t offset;

	for (uint64_t n = 1 + below(thread, 8); n > 0; n--) {
		build(thread, &command, code);
		if (issue(thread, fd, code) < 0)
			return;
		offset = command.data[5];
		remember_offset(thread, offset);
		if (one_in(thread, 2))
			read_mail(thread, fd, offset);
		if (one_in(thread, 4))
			continue;
		build(thread, &command, KDBUS_CMD_FREE);
		command.data[3] = offset;
		issue(thread, fd, KDBUS_CMD_FREE);
	}
}

static void run_raw_ioctl(Thread *thread)
{
	unsigned long code = codes[below(thread, N_CODES)];

	if (one_in(thread, 3))
		code = rng_next(&thread->rng);
	else
		code ^= 1UL << below(thread, 32);
	check(thread, ioctl(any_file(thread), code, strange_address(thread)));
}

/* --- open and close */

static void open_file(Thread *thread, const char *path, bool connect)
{
	int fd = open(path, (one_in(thread, 8) ? O_RDONLY : O_RDWR) | O_CLOEXEC);

	check(thread, fd);
	if (fd < 0)
		return;
	put_file(thread, fd, connect ? hello(thread, fd) : 0);
}

static void run_connect(Thread *thread)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/bus", thread->client->bus);
	open_file(thread, path, !one_in(thread, 8));
}

static void run_open_control(Thread *thread)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/control", thread->client->mount);
	open_file(thread, path, false);
}

/* Opens what somebody made: a bus, or a custom endpoint of it or of the common bus. */
static void run_open_made(Thread *thread)
{
	const char *mount = thread->client->mount;
	unsigned int uid = one_in(thread, 2) ? 0 : thread->client->uid;
	unsigned int n = below(thread, 24), m = below(thread, 24);
	char path[256];

	switch (below(thread, 3)) {
	case 0:
		snprintf(path, sizeof(path), "%s/%u-fuzz-%u/bus", mount, uid, n);
		break;
	case 1:
		snprintf(path, sizeof(path), "%s/%u-fuzz-%u/%u-fuzz-%u", mount, uid, n, uid, m);
		break;
	default:
		snprintf(path, sizeof(path), "%s/%u-fuzz-%u", thread->client->bus, uid, m);
		break;
	}
	open_file(thread, path, one_in(thread, 2));
}

/* Becomes the owner of a bus, or of an endpoint of the common one. */
static void run_make(Thread *thread)
{
	bool is_bus = one_in(thread, 2);
	char path[256];
	int fd;

	if (is_bus)
		snprintf(path, sizeof(path), "%s/control", thread->client->mount);
	else
		snprintf(path, sizeof(path), "%s/bus", thread->client->bus);
	fd = open(path, O_RDWR | O_CLOEXEC);
	check(thread, fd);
	if (fd < 0)
		return;
	build(thread, &command, is_bus ? KDBUS_CMD_BUS_MAKE : KDBUS_CMD_ENDPOINT_MAKE);
	issue(thread, fd, is_bus ? KDBUS_CMD_BUS_MAKE : KDBUS_CMD_ENDPOINT_MAKE);
	for (uint64_t n = below(thread, 4); n > 0; n--) {
		build(thread, &command, KDBUS_CMD_ENDPOINT_UPDATE);
		issue(thread, fd, KDBUS_CMD_ENDPOINT_UPDATE);
	}
	put_file(thread, fd, 0);
}

static void run_close(Thread *thread)
{
	uint64_t slot = below(thread, N_FILES);
	int fd = thread->client->files[slot];

	thread->client->files[slot] = -1;
	thread->client->ids[slot] = 0;
	if (fd >= 0)
		check(thread, close(fd));
}

static void run_dup(Thread *thread)
{
	put_file(thread, fcntl(any_file(thread), F_DUPFD_CLOEXEC, 3), 0);
}

static bool is_ours(const Client *client, int fd)
{
	for (unsigned int i = 0; i < N_FILES; i++)
		if (client->files[i] == fd)
			return true;
	for (unsigned int i = 0; i < N_OTHERS; i++)
		if (client->others[i] == fd)
			return true;
	return fd <= STDERR_FILENO;
}

/* Closes descriptors that came with messages. */
static void run_tidy(Thread *thread)
{
	for (int fd = 0; fd < 256; fd++)
		if (!is_ours(thread->client, fd))
			close(fd);
}

/* --- pools */

static void run_map(Thread *thread)
{
	Map *map = &thread->client->maps[below(thread, N_MAPS)];
	uint64_t offset = one_in(thread, 8) ? PAGE * below(thread, 1 << 20) : 0;
	uint64_t size = PAGE << below(thread, 11);
	int protection = PROT_READ, flags = MAP_SHARED;
	uint8_t *p;

	if (one_in(thread, 8))
		protection |= PROT_WRITE;
	if (one_in(thread, 8))
		flags = MAP_PRIVATE;
	p = mmap(NULL, size, protection, flags, any_connection(thread), offset);
	check(thread, p == MAP_FAILED ? -1 : 0);
	if (p == MAP_FAILED)
		return;
	if (map->address)
		munmap(map->address, map->size);
	*map = (Map){ p, size, protection & PROT_WRITE };
}

static void run_touch(Thread *thread)
{
	Map map = thread->client->maps[below(thread, N_MAPS)];
	uint64_t noise[8];

	if (!map.address)
		return;
	for (uint64_t n = below(thread, 16); n > 0; n--) {
		uint8_t *at = map.address + 64 * below(thread, map.size / 64);

		for (unsigned int i = 0; i < N_ELEMENTS(noise); i++)
			noise[i] = strange_number(thread);
		if (map.writable && one_in(thread, 2))
			poke(at, noise, sizeof(noise));
		else
			peek(at, noise, sizeof(noise));
	}
	if (one_in(thread, 4))
		madvise(map.address, map.size, MADV_DONTNEED);
	if (one_in(thread, 8))
		mprotect(map.address, map.size, PROT_READ | PROT_WRITE);
	if (one_in(thread, 8))
		msync(map.address, map.size, MS_SYNC);
}

/* --- polling, and system calls that kdbus refuses */

static void run_poll(Thread *thread)
{
	struct pollfd fds[8];
	unsigned int n = 1 + below(thread, N_ELEMENTS(fds));

	for (unsigned int i = 0; i < n; i++)
		fds[i] = (struct pollfd){ any_file(thread), below(thread, 64), 0 };
	check(thread, poll(fds, n, (int)below(thread, 3)));
}

static void run_epoll(Thread *thread)
{
	struct epoll_event events[4],
		event = { .events = EPOLLIN | (one_in(thread, 2) ? EPOLLET : 0) };
	int epoll = thread->client->others[N_OTHERS - 1];

	epoll_ctl(epoll, one_in(thread, 3) ? EPOLL_CTL_DEL : EPOLL_CTL_ADD, any_file(thread),
		  &event);
	check(thread, epoll_wait(epoll, events, N_ELEMENTS(events), (int)below(thread, 2)));
}

static void run_file(Thread *thread)
{
	int fd = any_file(thread);
	uint8_t buffer[512] = {};
	struct stat st;

	switch (below(thread, 12)) {
	case 0:
		check_data(thread, read(fd, buffer, below(thread, sizeof(buffer))));
		break;
	case 1:
		check_data(thread, write(fd, buffer, below(thread, sizeof(buffer))));
		break;
	case 2:
		check_data(thread,
			   pread(fd, buffer, sizeof(buffer), strange_number(thread) & INT64_MAX));
		break;
	case 3:
		check_data(thread, lseek(fd, strange_number(thread) & INT64_MAX, below(thread, 5)));
		break;
	case 4:
		check_data(thread, ftruncate(fd, strange_number(thread) & INT64_MAX));
		break;
	case 5:
		check_data(thread, fallocate(fd, below(thread, 64), below(thread, 1 << 20),
					     1 + below(thread, 1 << 20)));
		break;
	case 6:
		check(thread, fstat(fd, &st));
		break;
	case 7:
		check_data(thread, fsync(fd));
		break;
	case 8:
		check(thread, fcntl(fd, F_SETFL, one_in(thread, 2) ? O_NONBLOCK : O_DIRECT));
		break;
	case 9:
		check_data(thread, copy_file_range(fd, NULL, any_file(thread), NULL, PAGE, 0));
		break;
	case 10:
		check_data(thread, splice(thread->client->others[2], NULL, fd, NULL, PAGE,
					  SPLICE_F_NONBLOCK));
		break;
	default:
		check(thread, fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE));
		break;
	}
}

static void list_directory(const char *path)
{
	DIR *directory = opendir(path);

	if (!directory)
		return;
	while (readdir(directory))
		;
	closedir(directory);
}

static void run_tree(Thread *thread)
{
	static const char *const entries[] = { "",    "control",  "0-fuzz-0", "0-fuzz-1/bus",
					       "new", "control/x" };
	const char *entry = entries[below(thread, N_ELEMENTS(entries))];
	struct statfs sf;
	char path[256];
	struct stat st;

	snprintf(path, sizeof(path), "%s/%s", thread->client->mount, entry);
	switch (below(thread, 10)) {
	case 0:
		list_directory(thread->client->mount);
		break;
	case 1:
		list_directory(thread->client->bus);
		break;
	case 2:
		check(thread, stat(path, &st));
		break;
	case 3:
		check(thread, statfs(path, &sf));
		break;
	case 4:
		check(thread, mkdir(path, 0700));
		break;
	case 5:
		check(thread, unlink(path));
		break;
	case 6:
		check(thread, rename(path, thread->client->bus));
		break;
	case 7:
		check(thread, access(path, R_OK | W_OK));
		break;
	case 8:
		check(thread, symlink("x", path));
		break;
	default:
		check(thread,
		      open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) < 0 ? -1 : 0);
		break;
	}
}

/* --- the rest of the process */

static void make_others(Thread *thread)
{
	Client *client = thread->client;
	int pair[2];

	for (unsigned int i = 0; i < 2; i++) {
		int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

		if (fd >= 0 && ftruncate(fd, PAYLOAD_SIZE / 64) == 0)
			fcntl(fd, F_ADD_SEALS, i || !one_in(thread, 4) ? SEALS : F_SEAL_WRITE);
		put_other(&client->others[i], fd);
	}
	if (pipe2(pair, O_CLOEXEC | O_NONBLOCK) == 0) {
		put_other(&client->others[2], pair[0]);
		put_other(&client->others[3], pair[1]);
	}
	put_other(&client->others[4], eventfd(below(thread, 2), EFD_CLOEXEC | EFD_NONBLOCK));
	put_other(&client->others[5], open("/dev/null", O_RDWR | O_CLOEXEC));
	put_other(&client->others[6], open(client->mount, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	put_other(&client->others[7], open("/proc/self/status", O_RDONLY | O_CLOEXEC));
	put_other(&client->others[8], open(client->bus, O_PATH | O_CLOEXEC));
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0) {
		put_other(&client->others[9], pair[0]);
		put_other(&client->others[10], pair[1]);
	}
	put_other(&client->others[N_OTHERS - 1], epoll_create1(EPOLL_CLOEXEC));
}

/* Empties the socket, or somebody else's end of a pipe. */
static void run_drain(Thread *thread)
{
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(64 * sizeof(int))];
	} control;
	uint8_t data[64];
	struct iovec iov = { data, sizeof(data) };
	struct msghdr packet = { .msg_iov = &iov,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control) };

	recvmsg(thread->client->others[9 + below(thread, 2)], &packet,
		MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
}

static void run_signal(Thread *thread)
{
	int number = one_in(thread, 2) ? SIGUSR1 : SIGUSR2;

	syscall(SYS_tgkill, getpid(), thread->client->tids[below(thread, N_THREADS)], number);
}

static void run_timer(Thread *thread)
{
	unsigned int us = 100 + below(thread, UINT64_C(200) << below(thread, 8));
	struct itimerval timer = { { 0, us }, { 0, us } };

	setitimer(ITIMER_REAL, &timer, NULL);
}

static void run_sockets(Thread *thread)
{
	make_others(thread);
}

/* A child with copies of all descriptors, which ends soon, or is killed. */
static void run_fork(Thread *thread)
{
	pid_t child;

	if (!one_in(thread, 4))
		return;
	child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		thread->rng.state ^= 1;
		memset(thread->client->tids, 0, sizeof(thread->client->tids));
		thread->client->tids[0] = gettid();
		run_timer(thread);
		for (uint64_t n = below(thread, 40); n > 0; n--)
			act(thread);
		_exit(0);
	}
	if (child > 0 && one_in(thread, 2))
		kill(child, SIGKILL);
}

static void run_dumpable(Thread *thread)
{
	prctl(PR_SET_DUMPABLE, below(thread, 2));
}

/* Ends all threads, wherever they are. */
static void run_exec(Thread *thread)
{
	if (one_in(thread, 64))
		execl("/bin/true", "true", NULL);
}

static const Action actions[] = {
	{ "connect", 8, run_connect },
	{ "command", 64, run_command },
	{ "receive", 20, run_receive },
	{ "open control", 2, run_open_control },
	{ "open made", 4, run_open_made },
	{ "make", 2, run_make },
	{ "close", 3, run_close },
	{ "dup", 1, run_dup },
	{ "tidy", 1, run_tidy },
	{ "raw ioctl", 3, run_raw_ioctl },
	{ "map", 3, run_map },
	{ "touch", 4, run_touch },
	{ "poll", 4, run_poll },
	{ "epoll", 2, run_epoll },
	{ "file", 4, run_file },
	{ "tree", 2, run_tree },
	{ "drain", 2, run_drain },
	{ "signal", 2, run_signal },
	{ "timer", 1, run_timer },
	{ "sockets", 1, run_sockets },
	{ "fork", 1, run_fork },
	{ "dumpable", 1, run_dumpable },
	{ "exec", 1, run_exec },
};

/**
 * client_init() - begin with nothing but what else can be sent
 * @client:		client to initialise; mount, bus and uid have been set
 * @thread:		its first thread
 */
void client_init(Client *client, Thread *thread)
{
	for (unsigned int i = 0; i < N_FILES; i++)
		client->files[i] = -1;
	for (unsigned int i = 0; i < N_OTHERS; i++)
		client->others[i] = -1;
	make_others(thread);
}

/**
 * act() - do one thing
 * @thread:		who
 */
void act(Thread *thread)
{
	uint64_t sum = 0, pick;

	for (size_t i = 0; i < N_ELEMENTS(actions); i++)
		sum += actions[i].weight;
	pick = below(thread, sum);
	for (size_t i = 0; i < N_ELEMENTS(actions); i++) {
		if (pick < actions[i].weight) {
			thread->action = actions[i].name;
			actions[i].run(thread);
			break;
		}
		pick -= actions[i].weight;
	}
	++thread->step;
}
