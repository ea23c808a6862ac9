/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A raw receiver of descriptors, with many threads or under a strict seccomp filter.
 *
 * usage: receiver ENDPOINT N_MESSAGES N_THREADS
 *        receiver ENDPOINT N_MESSAGES seccomp      with calls that receiving takes
 *        receiver ENDPOINT N_MESSAGES strict       without them
 *
 * Each message has one descriptor in FDS and one in PAYLOAD_MEMFD, each of a file that holds the
 * message's cookie. Prints its id, and at the end four numbers: messages that were right, that were
 * wrong, that came incomplete, and descriptors left open that were not open before.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kdbus.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define POOL_SIZE (1 << 20)
#define MAX_THREADS 64

static atomic_uint n_left, n_right, n_wrong, n_incomplete;
static const char *pool;
static int bus;

static int count_fds(void)
{
	int n = 0;

	for (int fd = 0; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

/* Whether @fd is a file that holds @cookie, and is not inherited by exec; closes it. */
static int check_fd(int fd, uint64_t cookie)
{
	uint64_t content = 0;
	int right;

	right = fd >= 0 && pread(fd, &content, sizeof(content), 0) == sizeof(content) &&
		content == cookie && fcntl(fd, F_GETFD) == FD_CLOEXEC;
	if (fd >= 0)
		close(fd);
	return right;
}

static void check(const struct kdbus_msg *msg, uint64_t return_flags)
{
	uint64_t at = sizeof(*msg);
	int n = 0, right = 0;

	while (at < msg->size) {
		const struct kdbus_item *item = (const void *)((const char *)msg + at);

		if (item->type == KDBUS_ITEM_FDS) {
			n++;
			right += check_fd(item->fds[0], msg->cookie);
		} else if (item->type == KDBUS_ITEM_PAYLOAD_MEMFD) {
			n++;
			right += check_fd(item->memfd.fd, msg->cookie);
		}
		at += (item->size + 7) & ~7ULL;
	}
	if (return_flags & KDBUS_RECV_RETURN_INCOMPLETE_FDS)
		n_incomplete++;
	if (n == 2 && right == 2)
		n_right++;
	else
		n_wrong++;
}

static void *receive(void *unused)
{
	struct pollfd poller = { .fd = bus, .events = POLLIN };

	(void)unused;
	while (atomic_load(&n_left) > 0) {
		struct kdbus_cmd_recv recv = { .size = sizeof(recv) };
		struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free) };

		if (ioctl(bus, KDBUS_CMD_RECV, &recv) < 0) {
			if (errno != EAGAIN)
				abort();
			poll(&poller, 1, 50);
			continue;
		}
		check((const void *)(pool + recv.msg.offset), recv.msg.return_flags);
		cmd_free.offset = recv.msg.offset;
		if (ioctl(bus, KDBUS_CMD_FREE, &cmd_free) < 0)
			abort();
		n_left--;
	}
	return NULL;
}

/*
 * Only what `receive` needs itself, and the first calls if @strict is 0; anything else kills the
 * process.
 */
static int lock_up(int strict)
{
	static const int allowed[] = {
		SYS_socket, SYS_recvfrom, SYS_recvmsg, SYS_sendto,     SYS_ioctl, SYS_pread64,
		SYS_close,  SYS_fcntl,    SYS_write,   SYS_exit_group, SYS_ppoll,
#ifdef SYS_poll
		SYS_poll,
#endif
	};
	struct sock_filter filter[2 * sizeof(allowed) / sizeof(*allowed) + 2];
	struct sock_fprog program = { .filter = filter };
	unsigned int n = 0;

	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
						   offsetof(struct seccomp_data, nr));
	for (unsigned int i = strict ? 4 : 0; i < sizeof(allowed) / sizeof(*allowed); i++) {
		filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0,
							   1);
		filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	program.len = n;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -errno;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0 ? -errno : 0;
}

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		abort();
}

int main(int argc, char **argv)
{
	struct kdbus_cmd_hello hello = { .size = sizeof(hello),
					 .flags = KDBUS_HELLO_ACCEPT_FD,
					 .pool_size = POOL_SIZE };
	pthread_t threads[MAX_THREADS];
	int n_threads, before;
	char line[128];

	if (argc != 4)
		return 2;
	bus = open(argv[1], O_RDWR | O_CLOEXEC);
	if (bus < 0 || ioctl(bus, KDBUS_CMD_HELLO, &hello) < 0)
		return 1;
	pool = mmap(NULL, POOL_SIZE, PROT_READ, MAP_SHARED, bus, 0);
	if (pool == MAP_FAILED)
		return 1;
	n_left = atoi(argv[2]);
	n_threads = atoi(argv[3]);
	before = count_fds();
	if (!n_threads && strcmp(argv[3], "0") && lock_up(!strcmp(argv[3], "strict")) < 0)
		return 1;
	snprintf(line, sizeof(line), "%llu\n", (unsigned long long)hello.id);
	say(line);
	for (int i = 0; i < n_threads && i < MAX_THREADS; i++)
		if (pthread_create(&threads[i], NULL, receive, NULL))
			return 1;
	if (!n_threads)
		receive(NULL);
	for (int i = 0; i < n_threads && i < MAX_THREADS; i++)
		pthread_join(threads[i], NULL);
	snprintf(line, sizeof(line), "%u %u %u %d\n", n_right, n_wrong, n_incomplete,
		 count_fds() - before);
	say(line);
	/* exit() would make calls that the filter does not allow. */
	_exit(0);
}
