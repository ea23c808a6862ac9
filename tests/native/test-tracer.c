/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Test of the tracer without FUSE
 *
 * A thread held in a FUSE ioctl sleeps so that only SIGKILL wakes it, until it is answered.
 * A parent in vfork(2) does too, until its child ends: here the child ends when it reads a
 * byte from a pipe, so that pipe is the device, and the byte is the reply.
 *
 * Run with the name of a test, or with none to list them. Exit status 77: cannot be tested here.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "tracer.h"

#define MAX_FDS 64
#define N_SIGNALS 20
#define SECOND UINT64_C(1000000000)
#define DEADLINE (20 * SECOND)
#define SKIP 77

#define check(_x) check_at(!!(_x), #_x, __LINE__)

/* a process that is held, and what it shares with the test */
typedef struct Client {
	pid_t pid;
	int device;
	int input;
	struct Shared {
		int32_t numbers[MAX_FDS];
		int n_calls;
		int n_signals;
		int signals[N_SIGNALS];
		long result;
		pid_t child;
		bool go_on;
		int input;
		void *address;
		char byte;
		uint8_t room[KDBUSFS_MAX_ROOM];
	} volatile *shared;
} Client;

static struct Shared volatile *client_shared;

static void check_at(bool good, const char *text, int line)
{
	if (!good) {
		fprintf(stderr, "line %d: %s (%s)\n", line, text, strerror(errno));
		exit(1);
	}
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * SECOND + now.tv_nsec;
}

static void nap(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
}

static char state_of(pid_t pid)
{
	char path[64], buffer[512] = {}, *state;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	check(read(fd, buffer, sizeof(buffer) - 1) > 0);
	close(fd);
	state = strrchr(buffer, ')');
	return state ? state[2] : 0;
}

#define await(_condition)                                           \
	do {                                                        \
		uint64_t deadline_ = now_ns() + DEADLINE;           \
		while (!(_condition)) {                             \
			check(now_ns() < deadline_ && #_condition); \
			nap();                                      \
		}                                                   \
	} while (0)

static unsigned int count_entries(const char *path)
{
	unsigned int n = 0;
	DIR *dir;

	dir = opendir(path);
	check(dir);
	while (readdir(dir))
		++n;
	closedir(dir);
	return n;
}

/*
 * The client
 */

#ifdef __x86_64__

/*
 * vfork(2) with the stack pointer at @stack, where no memory need be: the child does without. It is
 * also seen here whether the registers that a system call keeps are kept.
 */
static long held_call(int input, void *stack)
{
	static uint64_t sp;
	uint64_t lost;
	long r;

	asm volatile("mov %%rsp, %[sp]\n"
		     "test %[stack], %[stack]\n"
		     "jz 1f\n"
		     "mov %[stack], %%rsp\n"
		     "1: mov $0x1234567890, %%r8\n"
		     "mov %%r8, %%r9\n"
		     "mov %%r8, %%r10\n"
		     "mov %%r8, %%rdx\n"
		     "mov %%r8, %%r14\n"
		     "syscall\n"
		     "test %%rax, %%rax\n"
		     "jnz 2f\n"
		     "mov %[read], %%eax\n"
		     "mov %[input], %%edi\n"
		     "lea %[lost], %%rsi\n"
		     "mov $1, %%edx\n"
		     "syscall\n"
		     "mov %[exit], %%eax\n"
		     "xor %%edi, %%edi\n"
		     "syscall\n"
		     "2: mov %[sp], %%rsp\n"
		     "mov $0x1234567890, %%rcx\n"
		     "xor %%rcx, %%r8\n"
		     "xor %%rcx, %%r9\n"
		     "xor %%rcx, %%r10\n"
		     "xor %%rcx, %%rdx\n"
		     "xor %%rcx, %%r14\n"
		     "or %%r9, %%r8\n"
		     "or %%r10, %%r8\n"
		     "or %%rdx, %%r8\n"
		     "or %%r14, %%r8\n"
		     "mov %%r8, %%rbx\n"
		     : "=a"(r), "=b"(lost), [sp] "+m"(sp)
		     : "a"((long)SYS_vfork), [stack] "r"(stack), [read] "i"(SYS_read),
		       [exit] "i"(SYS_exit), [input] "r"(input), [lost] "m"(client_shared->byte)
		     : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r14", "cc", "memory");
	if (lost)
		_exit(98);
	return r;
}

#else

static long held_call(int input, void *stack)
{
	static char byte;
	pid_t pid;

	if (stack)
		_exit(SKIP);
	pid = vfork();
	if (!pid) {
		read(input, &byte, 1);
		_exit(0);
	}
	return pid;
}

#endif

static void note_signal(int signal)
{
	if (client_shared->n_signals < N_SIGNALS)
		client_shared->signals[client_shared->n_signals] = signal;
	++client_shared->n_signals;
}

/* Check the numbers against the descriptors that were inherited: the same files, close-on-exec. */
static void client_check(const int32_t *fds, size_t n_fds, size_t n_expected)
{
	struct stat there, here;
	size_t n = 0;

	for (size_t i = 0; i < n_fds; ++i) {
		int number = client_shared->numbers[i];

		if (number < 0)
			continue;
		++n;
		check(number != fds[i]);
		check(fcntl(number, F_GETFD) == FD_CLOEXEC);
		check(fstat(number, &here) >= 0 && fstat(fds[i], &there) >= 0);
		check(here.st_dev == there.st_dev && here.st_ino == there.st_ino);
		close(number);
	}
	check(n == n_expected);
}

/*
 * The test's side
 */

static void client_new(Client *client)
{
	int pipe_fds[2];

	check(pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK) >= 0);
	check(fcntl(pipe_fds[0], F_SETFL, 0) >= 0);
	client->input = pipe_fds[0];
	client->device = pipe_fds[1];
	client->shared = mmap(NULL, sizeof(*client->shared), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(client->shared != MAP_FAILED);
	client_shared = client->shared;
}

/*
 * The vfork child outlives a client that is killed, and ends when nobody can write to it any more.
 */
static pid_t client_fork(Client *client)
{
	pid_t pid = fork();

	check(pid >= 0);
	if (!pid)
		close(client->device);
	return pid;
}

/* Wait until it is in its call. */
static void client_await(Client *client)
{
	await(state_of(client->pid) == 'D' || state_of(client->pid) == 'Z');
	check(state_of(client->pid) == 'D');
}

static int client_end(Client *client)
{
	int status, r;

	await((r = waitpid(client->pid, &status, WNOHANG)) != 0);
	check(r == client->pid);
	close(client->device);
	close(client->input);
	munmap((void *)client->shared, sizeof(*client->shared));
	return status;
}

static int32_t begin_for(Client *client, struct kdbusfs_install *install, int device, pid_t pid,
			 const int32_t *fds, size_t n_fds, int32_t *numbers, uint64_t timeout_ns)
{
	return kdbusfs_install_begin(install, device, "", 1, pid, -1,
				     (uintptr_t)client->shared->room,
				     (const void *)client->shared->room, KDBUSFS_MAX_ROOM, fds,
				     n_fds, numbers, timeout_ns);
}

static int32_t client_begin(Client *client, struct kdbusfs_install *install, const int32_t *fds,
			    size_t n_fds)
{
	memset((void *)client->shared->room, 0x5a, KDBUSFS_MAX_ROOM);
	return begin_for(client, install, client->device, client->pid, fds, n_fds,
			 (int32_t *)client->shared->numbers, DEADLINE);
}

/* The room is as it was before. */
static bool client_has_room(void)
{
	for (size_t i = 0; i < KDBUSFS_MAX_ROOM; ++i)
		if (client_shared->room[i] != 0x5a)
			return false;
	return true;
}

static bool client_is_answered(Client *client)
{
	int n = 0;

	check(ioctl(client->input, FIONREAD, &n) >= 0);
	return n > 0;
}

static void make_fds(int32_t *fds, size_t n_fds)
{
	for (size_t i = 0; i < n_fds; ++i) {
		fds[i] = memfd_create("test", MFD_CLOEXEC);
		check(fds[i] >= 0);
	}
}

static int test_install(void)
{
	static const size_t ns[] = { 0, 1, 2, 5, 32, 33, 64 };
	int32_t fds[MAX_FDS];

	make_fds(fds, MAX_FDS);
	for (size_t i = 0; i < sizeof(ns) / sizeof(*ns); ++i) {
		struct kdbusfs_install install;
		Client client;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			unsigned int n = count_entries("/proc/self/fd");

			check(held_call(client.input, NULL) > 0);
			client_check(fds, ns[i], ns[i]);
			check(client_has_room());
			check(count_entries("/proc/self/fd") == n);
			_exit(0);
		}
		client_await(&client);
		check(client_begin(&client, &install, fds, ns[i]) == 0);
		check(install.held && install.n_installed == ns[i]);
		check(state_of(client.pid) == 't');
		kdbusfs_install_end(&install, NULL);
		kdbusfs_install_end(&install, NULL);
		check(client_end(&client) == 0);
	}
	return 0;
}

static int test_lost_ones_are_left_out(void)
{
	struct kdbusfs_install install;
	int32_t fds[5];
	Client client;

	make_fds(fds, 5);
	client_new(&client);
	client.pid = client_fork(&client);
	if (!client.pid) {
		check(held_call(client.input, NULL) > 0);
		check(client_shared->numbers[1] == -1 && client_shared->numbers[4] == -1);
		client_check(fds, 5, 3);
		_exit(0);
	}
	fds[1] = fds[4] = -1;
	client_await(&client);
	check(client_begin(&client, &install, fds, 5) == 0);
	check(install.n_installed == 3);
	kdbusfs_install_end(&install, NULL);
	return client_end(&client);
}

/* AF_UNIX sockets do not take an io_uring: it is lost alone, wherever it is among the others. */
static int test_refused_ones_are_left_out(void)
{
	uint8_t params[120] = {};
	int ring = syscall(SYS_io_uring_setup, 4, params);

	if (ring < 0)
		return SKIP;
	for (int at = 0; at < 16; at += 5) {
		struct kdbusfs_install install;
		int32_t fds[16];
		Client client;

		make_fds(fds, 16);
		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			check(held_call(client.input, NULL) > 0);
			check(client_shared->numbers[at] == -1);
			client_check(fds, 16, 15);
			check(client_has_room());
			_exit(0);
		}
		close(fds[at]);
		fds[at] = ring;
		client_await(&client);
		check(client_begin(&client, &install, fds, 16) == 0);
		check(install.n_installed == 15);
		kdbusfs_install_end(&install, NULL);
		check(client_end(&client) == 0);
		for (int i = 0; i < 16; ++i)
			if (i != at)
				close(fds[i]);
	}
	return 0;
}

/* Slots are filled to the last one, in order. */
static int test_nofile_limit(void)
{
	for (int n_free = 0; n_free < 6; ++n_free) {
		struct kdbusfs_install install;
		int32_t fds[4];
		int n_expected = n_free < 4 ? n_free : 4;
		Client client;

		make_fds(fds, 4);
		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			struct rlimit limit = { 60, 200 };

			check(setrlimit(RLIMIT_NOFILE, &limit) >= 0);
			while (dup(client.input) >= 0)
				;
			for (int i = 0; i < n_free; ++i)
				close(59 - 2 * i);
			check(held_call(client.input, NULL) > 0);
			check(getrlimit(RLIMIT_NOFILE, &limit) >= 0);
			check(limit.rlim_cur == 60 && limit.rlim_max == 200);
			for (int i = 0; i < 4; ++i)
				check((client_shared->numbers[i] >= 0) == (i < n_expected));
			client_check(fds, 4, n_expected);
			_exit(0);
		}
		client_await(&client);
		check(client_begin(&client, &install, fds, 4) == 0);
		check(install.held && (int)install.n_installed == n_expected);
		kdbusfs_install_end(&install, NULL);
		check(client_end(&client) == 0);
		for (int i = 0; i < 4; ++i)
			close(fds[i]);
	}
	return 0;
}

#define DENY(_nr)                                         \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (_nr), 0, 1), \
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)

/*
 * Each call that is needed is one that the filter may deny. Then none is made, or the thread would
 * be killed.
 */
static int test_seccomp(void)
{
	static const int denied[] = { SYS_mkdirat, SYS_socket, SYS_recvmsg, SYS_recvfrom,
				      SYS_sendto };
	int32_t fds[3];

	make_fds(fds, 3);
	for (size_t i = 0; i < sizeof(denied) / sizeof(*denied); ++i) {
		struct sock_filter filter[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			DENY(denied[i]),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog program = { sizeof(filter) / sizeof(*filter), filter };
		struct kdbusfs_install install;
		Client client;
		int r, status;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) >= 0);
			check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) >= 0);
			check(held_call(client.input, NULL) > 0);
			check(client_has_room());
			client_check(fds, 3, i ? 0 : 3);
			syscall(denied[i], -1, -1, -1, -1, -1, -1); /* the filter is in force */
			_exit(0);
		}
		client_await(&client);
		r = client_begin(&client, &install, fds, 3);
		check(r == 0);
		kdbusfs_install_end(&install, NULL);
		if (geteuid() != 0)
			check(install.n_installed == 0);
		else
			check(install.n_installed == (i ? 0 : 3));
		status = client_end(&client);
		check(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
	}
	return 0;
}

/*
 * No room below the stack pointer, none that is writable, no stack at all; and what is there stays
 * as it is.
 */
static int test_stack(void)
{
	int32_t fds[40];

	make_fds(fds, 40);
	for (int i = 0; i < 6; ++i) {
		struct kdbusfs_install install;
		Client client;
		int status;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			char *map = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE,
					 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			char *stacks[] = { map + 4096,      map + 4096 + 160, map + 8192,
					   map + 8192 + 64, map + 12288,      (char *)16 };

			check(map != MAP_FAILED);
			memset(map, 0xa5, 3 * 4096);
			check(mprotect(map, 4096, PROT_NONE) >= 0);
			check(mprotect(map + 8192, 4096, PROT_READ) >= 0);
			check(held_call(client.input, stacks[i]) > 0);
			for (int k = 4096; k < 12288; ++k)
				check((uint8_t)map[k] == 0xa5);
			client_check(fds, 40, 40);
			_exit(0);
		}
		await(state_of(client.pid) == 'D' || state_of(client.pid) == 'Z');
		if (state_of(client.pid) == 'Z') {
			status = client_end(&client);
			return WIFEXITED(status) && WEXITSTATUS(status) == SKIP ? SKIP : 1;
		}
		check(client_begin(&client, &install, fds, 40) == 0);
		check(install.n_installed == 40);
		kdbusfs_install_end(&install, NULL);
		check(client_end(&client) == 0);
	}
	return 0;
}

/*
 * Those sent before, while it is held and stopped, and a mask that is not empty: none is lost, each
 * comes once, in order.
 */
static int test_signals(void)
{
	struct kdbusfs_install install;
	int32_t fds[2];
	Client client;

	make_fds(fds, 2);
	client_new(&client);
	client.pid = client_fork(&client);
	if (!client.pid) {
		struct sigaction action = { .sa_handler = note_signal };
		sigset_t blocked, mask;

		sigemptyset(&blocked);
		sigaddset(&blocked, SIGUSR1);
		sigaddset(&blocked, SIGUSR2);
		check(sigprocmask(SIG_BLOCK, &blocked, NULL) >= 0);
		sigfillset(&action.sa_mask);
		check(sigaction(SIGUSR1, &action, NULL) >= 0);
		check(sigaction(SIGUSR2, &action, NULL) >= 0);
		check(sigaction(SIGRTMIN, &action, NULL) >= 0);
		check(sigaction(SIGRTMIN + 1, &action, NULL) >= 0);

		check(held_call(client.input, NULL) > 0);
		check(client_shared->n_signals == 2 * 6);
		for (int i = 0; i < 2 * 6; ++i)
			check(client_shared->signals[i] == SIGRTMIN + i / 6);
		check(sigprocmask(SIG_BLOCK, NULL, &mask) >= 0);
		for (int i = 1; i < 32; ++i)
			check(sigismember(&mask, i) == (i == SIGUSR1 || i == SIGUSR2));
		check(sigprocmask(SIG_UNBLOCK, &mask, NULL) >= 0);
		check(client_shared->n_signals == 2 * 6 + 2);
		client_check(fds, 2, 2);
		_exit(0);
	}
	client_await(&client);
	for (int i = 0; i < 6; ++i)
		check(sigqueue(client.pid, SIGRTMIN + i % 2, (union sigval){}) >= 0);
	check(kill(client.pid, SIGUSR1) >= 0);
	check(client_begin(&client, &install, fds, 2) == 0);
	check(install.n_installed == 2);
	for (int i = 0; i < 6; ++i)
		check(sigqueue(client.pid, SIGRTMIN + i % 2, (union sigval){}) >= 0);
	check(kill(client.pid, SIGUSR2) >= 0);
	check(client.shared->n_signals == 0);
	kdbusfs_install_end(&install, NULL);
	return client_end(&client);
}

/* SIGSTOP, whenever it comes, stops it once it is let go, and is reported to its parent. */
static int test_stop(void)
{
	int32_t fds[2];
	int r, status;

	make_fds(fds, 2);
	for (int i = 0; i < 3; ++i) {
		struct kdbusfs_install install;
		Client client;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			check(held_call(client.input, NULL) > 0);
			client_shared->n_calls = 1;
			client_check(fds, 2, 2);
			_exit(0);
		}
		client_await(&client);
		if (i == 0)
			check(kill(client.pid, SIGSTOP) >= 0);
		check(client_begin(&client, &install, fds, 2) == 0);
		check(install.n_installed == 2);
		if (i == 1)
			check(kill(client.pid, SIGSTOP) >= 0);
		kdbusfs_install_end(&install, NULL);
		if (i < 2) {
			/* we are its parent as well as its tracer, so nobody wakes us: poll */
			await((r = waitpid(client.pid, &status, WUNTRACED | WNOHANG)) != 0);
			check(r == client.pid && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
			await(state_of(client.pid) == 'T');
			check(client.shared->n_calls == 0);
			check(kill(client.pid, SIGCONT) >= 0);
		}
		check(client_end(&client) == 0);
	}
	return 0;
}

static int test_traced_already(void)
{
	struct kdbusfs_install install;
	int32_t fds[1];
	Client client;
	pid_t tracer;
	int r, status;

	make_fds(fds, 1);
	client_new(&client);
	client.pid = client_fork(&client);
	if (!client.pid) {
		check(held_call(client.input, NULL) > 0);
		check(client_shared->numbers[0] == -1);
		_exit(0);
	}
	client_await(&client);
	tracer = fork();
	if (!tracer) {
		check(ptrace(PTRACE_SEIZE, client.pid, 0, 0) >= 0);
		client_shared->go_on = true;
		for (;;)
			pause();
	}
	await(client.shared->go_on || state_of(tracer) == 'Z');
	r = client_begin(&client, &install, fds, 1);
	kdbusfs_install_end(&install, NULL);
	check(r == -EPERM && !install.held);
	check(!client_is_answered(&client));
	check(kill(tracer, SIGKILL) >= 0 && waitpid(tracer, &status, 0) == tracer);
	check(write(client.device, "", 1) == 1);
	return client_end(&client);
}

static int test_errors(void)
{
	struct kdbusfs_install install;
	int32_t fds[1], numbers[600];
	Client client;
	pid_t pid;

	make_fds(fds, 1);
	client_new(&client);
	client.pid = client_fork(&client);
	if (!client.pid)
		_exit(held_call(client.input, NULL) <= 0);
	client_await(&client);

	/* none of these writes the reply */
	check(begin_for(&client, &install, client.device, 0, fds, 1, numbers, DEADLINE) == -ESRCH);
	check(begin_for(&client, &install, client.device, getpid(), fds, 1, numbers, DEADLINE) ==
	      -EPERM);
	check(begin_for(&client, &install, client.device, client.pid, numbers, 600, numbers,
			DEADLINE) == -EINVAL);
	check(begin_for(&client, &install, -1, client.pid, fds, 1, numbers, DEADLINE) == -EBADF);
	check(numbers[0] == -1);
	check(!client_is_answered(&client));
	check(state_of(client.pid) == 'D');

	/* and it is not traced any more: this one does */
	await(begin_for(&client, &install, client.device, client.pid, fds, 1, numbers, DEADLINE) ==
	      0);
	check(install.n_installed == 1);
	kdbusfs_install_end(&install, NULL);
	check(client_end(&client) == 0);

	pid = fork();
	if (!pid)
		_exit(0);
	check(waitpid(pid, NULL, 0) == pid);
	client_new(&client);
	check(begin_for(&client, &install, -1, pid, fds, 1, numbers, DEADLINE) == -ESRCH);
	return 0;
}

/*
 * The reply is written, but the call does not end until later: it is let go, and nothing is
 * installed.
 */
static int test_timeout(void)
{
	struct kdbusfs_install install;
	int32_t fds[1], number;
	uint64_t start;
	Client client;
	int null;

	make_fds(fds, 1);
	null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	client_new(&client);
	client.pid = client_fork(&client);
	if (!client.pid) {
		unsigned int n = count_entries("/proc/self/fd");

		check(held_call(client.input, NULL) > 0);
		check(count_entries("/proc/self/fd") == n);
		_exit(0);
	}
	client_await(&client);
	start = now_ns();
	check(begin_for(&client, &install, null, client.pid, fds, 1, &number, SECOND / 20) == 0);
	check(now_ns() - start >= SECOND / 20);
	check(number == -1 && !install.held && !install.n_installed);
	kdbusfs_install_end(&install, NULL);
	check(write(client.device, "", 1) == 1);
	check(client_end(&client) == 0);
	close(null);
	return 0;
}

/*
 * Killed at some moment around begin: it ends as it should, and begin returns, says right whether
 * it replied and leaves no thread behind. It traces from a process that is not the parent of
 * the client, for otherwise its waits and ours would take each other's events.
 */
static int test_kill(void)
{
	unsigned int seed = 1;
	int32_t fds[40];

	make_fds(fds, 40);
	for (int i = 0; i < 300; ++i) {
		struct kdbusfs_install install;
		uint64_t until, delay = rand_r(&seed) % 600000;
		Client client;
		pid_t daemon;
		int r, status;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid)
			_exit(held_call(client.input, NULL) <= 0);
		client_await(&client);
		daemon = fork();
		if (!daemon) {
			client.shared->go_on = true;
			r = client_begin(&client, &install, fds, 1 + i % 40);
			check(r >= 0 ||
			      ((r == -ESRCH || r == -EPERM) && !client_is_answered(&client)));
			kdbusfs_install_end(&install, NULL);
			await(count_entries("/proc/self/task") == 3);
			_exit(0);
		}
		await(client.shared->go_on);
		until = now_ns() + delay;
		while (now_ns() < until)
			;
		check(kill(client.pid, SIGKILL) >= 0);
		check(waitpid(daemon, &status, 0) == daemon && status == 0);
		status = client_end(&client);
		check(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
	}
	return 0;
}

#ifdef __x86_64__

/*
 * The client makes its call by an instruction in memory that the test can write, too, as its
 * siblings could. At 64 there is what it does if the instruction becomes a jump to there.
 */
static uint8_t *make_code(void)
{
	uint8_t *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
			     MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	check(code != MAP_FAILED);
	memcpy(code, "\x0f\x05\xc3", 3); /* syscall; ret */
	memcpy(code + 64, "\xb8\x27\0\0\0\x0f\x05\xeb\xfe",
	       9); /* mov $SYS_getpid, %eax; syscall; jmp . */
	return code;
}

/*
 * held_call() by the instruction at @code. The child must not write to the stack, which is the
 * parent's.
 */
static long held_call_by(const uint8_t *code, int input)
{
	long r;

	asm volatile("call *%[code]\n"
		     "test %%rax, %%rax\n"
		     "jnz 1f\n"
		     "mov %[read], %%eax\n"
		     "mov %[input], %%edi\n"
		     "lea %[lost], %%rsi\n"
		     "mov $1, %%edx\n"
		     "syscall\n"
		     "mov %[exit], %%eax\n"
		     "xor %%edi, %%edi\n"
		     "syscall\n"
		     "1:\n"
		     : "=a"(r)
		     : "a"((long)SYS_vfork), [code] "r"(code), [read] "i"(SYS_read),
		       [exit] "i"(SYS_exit), [input] "r"(input), [lost] "m"(client_shared->byte)
		     : "rcx", "rdx", "rsi", "rdi", "r11", "cc", "memory");
	return r;
}

/* Other code where the thread is sent: it makes none of our calls, and what it does is its own. */
static int test_code(void)
{
	static const struct {
		const char *code;
		int state;  /* in which it then is */
		int signal; /* that ends it, if it ends */
	} patches[] = {
		{ "\xeb\x3e", 'R', 0 }, /* jmp to 64: another call, and then a loop */
		{ "\xeb\xfe", 'Z',
		  0 }, /* jmp .: no call ever; it gets its registers back, and goes on */
		{ "\xcd\x80", 'Z', 0 },      /* int $0x80: the same number, which is another call */
		{ "\x0f\x0b", 'Z', SIGILL }, /* ud2: a fault */
	};
	int32_t fds[2];

	make_fds(fds, 2);
	for (size_t i = 0; i < sizeof(patches) / sizeof(*patches); ++i) {
		struct kdbusfs_install install;
		uint8_t *code = make_code();
		uint64_t start;
		Client client;
		int status;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			held_call_by(code, client.input);
			check(client_has_room());
			_exit(0);
		}
		client_await(&client);
		memcpy(code, patches[i].code, 2);
		start = now_ns();
		check(client_begin(&client, &install, fds, 2) == 0);
		check(!install.n_installed);
		kdbusfs_install_end(&install, NULL);
		check(now_ns() - start < 4 * SECOND);
		await(state_of(client.pid) == patches[i].state);
		if (patches[i].state == 'R')
			check(kill(client.pid, SIGKILL) >= 0);
		status = client_end(&client);
		if (patches[i].state == 'Z')
			check(patches[i].signal
				      ? WIFSIGNALED(status) && WTERMSIG(status) == patches[i].signal
				      : status == 0);
		munmap(code, 4096);
	}
	return 0;
}

#else

static int test_code(void)
{
	return SKIP;
}

#endif

/* The room is where no page ever comes: the thread may wait for it, we don't. */
static int test_memory(void)
{
	struct kdbusfs_install install;
	uint64_t start;
	int32_t fds[2];
	Client client;

	make_fds(fds, 2);
	client_new(&client);
	client_shared->address = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	client.pid = client_fork(&client);
	if (!client.pid) {
		struct uffdio_api api = { .api = UFFD_API };
		struct uffdio_register range = {
			.range = { (uintptr_t)client_shared->address, 4096 },
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};
		int fd = syscall(SYS_userfaultfd, O_CLOEXEC);

		if (fd < 0 || ioctl(fd, UFFDIO_API, &api) < 0 ||
		    ioctl(fd, UFFDIO_REGISTER, &range) < 0)
			_exit(SKIP);
		check(held_call(client.input, NULL) > 0);
		_exit(0);
	}
	await(state_of(client.pid) == 'D' || state_of(client.pid) == 'Z');
	if (state_of(client.pid) == 'Z') {
		client_end(&client);
		return SKIP;
	}
	start = now_ns();
	check(kdbusfs_install_begin(&install, client.device, "", 1, client.pid, -1,
				    (uintptr_t)client_shared->address,
				    (const void *)client.shared->room, KDBUSFS_MAX_ROOM, fds, 2,
				    (int32_t *)client.shared->numbers, DEADLINE) == 0);
	check(!install.n_installed);
	kdbusfs_install_end(&install, NULL);
	check(now_ns() - start < 5 * SECOND);
	check(kill(client.pid, SIGKILL) >= 0);
	client_end(&client);
	return 0;
}

/*
 * A sibling puts another socket under each number that was free: a TCP socket that lingers, whose
 * last close waits for a peer that does not read.
 */
static void *replace(void *userdata)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0), number;
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	struct linger linger = { 1, 30 };
	socklen_t n = sizeof(name);

	(void)userdata;
	check(bind(listener, (void *)&name, n) >= 0 && listen(listener, 64) >= 0);
	check(getsockname(listener, (void *)&name, &n) >= 0);
	for (;;) {
		static char data[1 << 22];
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

		check(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)) >= 0);
		connect(fd, (void *)&name, n);
		write(fd, data, sizeof(data));
		fcntl(fd, F_DUPFD, 300);
		close(fd);
		client_shared->n_calls++;
		for (number = 3; number < 200; ++number)
			if (fcntl(number, F_GETFD) == FD_CLOEXEC && number != client_shared->input)
				break;
		if (number < 200 && fcntl(300, F_GETFD) >= 0) {
			dup2(300, number);
			close(300);
		}
	}
	return NULL;
}

static int test_replaced(void)
{
	int32_t fds[2];

	for (int i = 0; i < 2; ++i)
		fds[i] = dup(0); /* not close-on-exec, unlike all that is installed */
	for (int i = 0; i < 10; ++i) {
		struct kdbusfs_install install;
		uint64_t start;
		Client client;

		client_new(&client);
		client_shared->input = client.input;
		client.pid = client_fork(&client);
		if (!client.pid) {
			pthread_t thread;

			check(pthread_create(&thread, NULL, replace, NULL) == 0);
			await(client_shared->n_calls > 0);
			held_call(client.input, NULL);
			_exit(0);
		}
		client_await(&client);
		start = now_ns();
		check(client_begin(&client, &install, fds, 2) == 0);
		kdbusfs_install_end(&install, NULL);
		check(now_ns() - start < 6 * SECOND);
		for (uint32_t k = 0; k < install.n_strays; ++k)
			close(install.strays[k]);
		kill(client.pid, SIGKILL);
		client_end(&client);
	}
	return 0;
}

/*
 * The tracer is killed at some moment: its client goes on as if nothing had been, or makes its call
 * once more. Only inside of a call of ours it has not its own registers: a few in a hundred.
 */
static int test_tracer_killed(void)
{
	unsigned int seed = 7, n_wrong = 0, n = 200;
	int32_t fds[8];

	make_fds(fds, 8);
	for (unsigned int i = 0; i < n; ++i) {
		uint64_t until, delay = rand_r(&seed) % 500000;
		Client client;
		pid_t daemon;
		int status;

		client_new(&client);
		client.pid = client_fork(&client);
		if (!client.pid) {
			sigset_t mask;

			/* that of its vfork child would be a reason to block all */
			sigemptyset(&mask);
			sigaddset(&mask, SIGCHLD);
			check(sigprocmask(SIG_BLOCK, &mask, NULL) >= 0);
			if (held_call(client.input, NULL) <= 0)
				_exit(1);
			check(sigprocmask(SIG_BLOCK, NULL, &mask) >= 0);
			_exit(sigismember(&mask, SIGTERM) ? 2 : 0);
		}
		client_await(&client);
		daemon = fork();
		if (!daemon) {
			struct kdbusfs_install install;

			client.shared->go_on = true;
			client_begin(&client, &install, fds, 8);
			kdbusfs_install_end(&install, NULL);
			_exit(0);
		}
		await(client.shared->go_on);
		until = now_ns() + delay;
		while (now_ns() < until)
			;
		kill(daemon, SIGKILL);
		check(waitpid(daemon, &status, 0) == daemon);
		write(client.device, "", 1);
		write(client.device, "", 1);
		status = client_end(&client);
		n_wrong += status != 0;
	}
	return n_wrong > n / 4;
}

static const struct {
	const char *name;
	int (*run)(void);
} tests[] = {
	{ "install", test_install },
	{ "lost-ones-are-left-out", test_lost_ones_are_left_out },
	{ "refused-ones-are-left-out", test_refused_ones_are_left_out },
	{ "nofile-limit", test_nofile_limit },
	{ "seccomp", test_seccomp },
	{ "stack", test_stack },
	{ "signals", test_signals },
	{ "stop", test_stop },
	{ "traced-already", test_traced_already },
	{ "errors", test_errors },
	{ "timeout", test_timeout },
	{ "kill", test_kill },
	{ "code", test_code },
	{ "memory", test_memory },
	{ "replaced", test_replaced },
	{ "tracer-killed", test_tracer_killed },
};

int main(int argc, char **argv)
{
	int r;

	for (size_t i = 0; i < sizeof(tests) / sizeof(*tests); ++i) {
		if (argc < 2) {
			puts(tests[i].name);
		} else if (!strcmp(argv[1], tests[i].name)) {
			alarm(120);
			r = tests[i].run();
			/* no tracing thread is left behind; "." and ".." count */
			await(count_entries("/proc/self/task") == 3);
			return r;
		}
	}
	return argc < 2 ? 0 : 2;
}
