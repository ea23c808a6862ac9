/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Tracer: stop a thread on its way out of a call that we answer
 *
 * PTRACE_SEIZE and PTRACE_INTERRUPT find the thread asleep in its call, where nothing
 * is seen of them but a FUSE_INTERRUPT. The reply then lets it go, and before it is
 * back in user mode, and before any signal is taken from its queue, it stops
 * (PTRACE_EVENT_STOP). There:
 *
 *  - kdbusfs_interrupt() changes the result of the call, no more.
 *
 *  - kdbusfs_install_begin() makes it run socket, recvmsg and close. The socket is
 *    duplicated into this process (pidfd_getfd), which binds it to a name that the
 *    kernel picks, connects it to itself and sends the descriptors through it. So it
 *    lives in the thread's network namespace, nobody else can send to it, and
 *    wherever the number may point that the thread's siblings can change under us,
 *    we send to nothing but that same socket.
 *    A socketpair would take two slots of the table, and its numbers would have to be
 *    read from memory that the siblings can write.
 *
 * Signals are blocked while the thread runs our calls, so they stay queued, in order,
 * and are delivered afterwards. SIGSTOP cannot be blocked: it is passed on, stops the
 * other threads of the process, and this one too once it is detached. A thread that
 * dies reports PTRACE_EVENT_EXIT, mostly even if killed, and is left to it.
 *
 * All that could block is kept off the caller: each call has a thread of its own.
 * PTRACE_SEIZE waits for an execve() of a sibling, which waits for the thread to die,
 * which waits for our reply; the stop may be late or never come. When time is up, the
 * caller goes on and the tracing thread is ended by a signal, which detaches the traced
 * one in whatever state it is. Only while that one has our registers must it be seen
 * through to the end.
 *
 * If this process is killed in just that moment, the thread goes on with the registers
 * of our call: PTRACE_O_EXITKILL would be the alternative.
 */

#ifndef _GNU_SOURCE
#  define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "tracer-arch.h"
#include "tracer.h"

#if ARCH_HAS_TRACER

#ifndef PTRACE_GETSIGMASK
#  define PTRACE_GETSIGMASK 0x420a
#  define PTRACE_SETSIGMASK 0x420b
#endif
#ifndef PTRACE_O_SUSPEND_SECCOMP
#  define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif
#ifndef PTRACE_EVENT_STOP
#  define PTRACE_EVENT_STOP 128
#endif
#ifndef SYS_pidfd_open
#  define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#  define SYS_pidfd_getfd 438
#endif

#define TRACER_PIDFD_THREAD O_EXCL /* Linux 6.9 */
#define TRACER_OPTIONS (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXIT)
#define TRACER_KERNEL_SIGSET_SIZE 8
#define TRACER_MAX_THREADS 64
#define TRACER_MAX_FDS 512
#define TRACER_STACK_SIZE (128 * 1024)
#define TRACER_CHUNK 32	       /* descriptors per datagram, bounds the room on the thread's stack */
#define TRACER_SPARE_SLOTS 32 /* above RLIMIT_NOFILE, to find a free one for our socket */
#define TRACER_SCRATCH_MAP 4096
#define TRACER_WANTED INT32_MAX
#define TRACER_STATUS_SIZE 8192
#define TRACER_SECOND UINT64_C(1000000000)
#define TRACER_LOOK_NS UINT64_C(1000000) /* first look at a thread that is late, then twice as long */
#define TRACER_LOOK_MAX_NS UINT64_C(64000000)

#define _cleanup_(_x) __attribute__((__cleanup__(_x)))

typedef struct Tracer Tracer;
typedef struct TracerCarrier TracerCarrier;
typedef struct TracerScratch TracerScratch;
typedef struct TracerTarget TracerTarget;

enum {
	TRACER_STAGE_SEIZE, /* the reply is not written */
	TRACER_STAGE_STOP,  /* it is, and the thread is to stop */
	TRACER_STAGE_RUN,   /* the thread runs calls of ours, see it through */
	TRACER_STAGE_HELD,  /* stopped, and as it was before */
	TRACER_STAGE_GONE,  /* the thread is dead, detached, or about to be */
};

/**
 * struct Tracer - one thread being traced, and the thread that traces it
 * @lock:		guards all below
 * @moved:		@stage, @abandoned or @released changed
 * @n_refs:		the caller and the tracing thread
 * @stage:		TRACER_STAGE_*
 * @error:		if the reply was not written, why
 * @abandoned:		the caller has gone, @reply, @fds and @numbers with it
 * @released:		the thread may be detached
 * @dead:		the thread is dead, even if wait(2) does not say so
 * @restart:		kdbusfs_interrupt() rather than kdbusfs_install_begin()
 * @received:		numbers in the thread's table, -1, or TRACER_WANTED
 */
struct Tracer {
	pthread_mutex_t lock;
	pthread_cond_t moved;
	unsigned int n_refs;
	int stage;
	int error;
	bool abandoned;
	bool released;
	bool restart;
	_Atomic bool dead;

	int device;
	const void *reply;
	size_t reply_size;
	pid_t tid;
	pid_t tracing_tid;
	const int32_t *fds;
	int32_t *numbers;
	size_t n_fds;
	int32_t received[];
};

/* what the thread gets as the argument of recvmsg(2), @control last since it may be short */
struct TracerScratch {
	struct msghdr header;
	union {
		struct cmsghdr align;
		uint8_t control[CMSG_SPACE(TRACER_CHUNK * sizeof(int32_t))];
	};
};

/**
 * struct TracerTarget - the traced thread, stopped
 * @regs:		its own registers
 * @scratch:		address of its struct TracerScratch
 * @scratch_size:	how much of that is used
 * @scratch_mapped:	not on its stack
 * @lost:		cannot run any more calls
 * @signal:		to pass on when detaching, or 0
 */
struct TracerTarget {
	Tracer *tracer;
	pid_t tid;
	struct user_regs_struct regs;
	uint64_t scratch;
	size_t scratch_size;
	bool scratch_mapped : 1;
	bool lost : 1;
	TracerScratch saved;
	int signal;
};

/* a socket that sends to itself: @number there, @fd here */
struct TracerCarrier {
	int number;
	int fd;
	struct sockaddr_un name;
	socklen_t n_name;
};

static pthread_mutex_t tracer_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int tracer_n_threads;
static pthread_once_t tracer_once = PTHREAD_ONCE_INIT;
static int tracer_once_error;
static _Thread_local sigjmp_buf tracer_escape;
static _Thread_local volatile sig_atomic_t tracer_escapable;

static void closep(int *fdp)
{
	if (*fdp >= 0)
		close(*fdp);
}

static int tracer_signal(void)
{
	return SIGRTMAX;
}

/*
 * The tracing thread blocks with the signal unblocked, and is never in the way of it
 * otherwise: one that comes too soon is pending until then. As long as the traced thread may
 * be let go at any time, the handler jumps to the end. PTRACE_SEIZE cannot be ended
 * otherwise, since it is restarted after any handler.
 */
static void tracer_handler(int signal)
{
	(void)signal;
	if (tracer_escapable)
		siglongjmp(tracer_escape, 1);
}

static void tracer_set_signal(bool on)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, tracer_signal());
	pthread_sigmask(on ? SIG_UNBLOCK : SIG_BLOCK, &set, NULL);
}

/* Fetch /proc/TID/status. The lock that execve() holds while it closes files is not needed for it. */
static int status_read(pid_t tid, char *buffer, size_t size)
{
	_cleanup_(closep) int fd = -1;
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	n = read(fd, buffer, size - 1);
	if (n < 0)
		return -errno;
	buffer[n] = 0;
	return 0;
}

/* The value of a line such as "\nTgid:\t12", or "" */
static const char *status_find(const char *buffer, const char *key)
{
	const char *line = strstr(buffer, key);

	if (!line)
		return "";
	line += strlen(key);
	return line + strspn(line, " \t");
}

/*
 * The traced thread
 */

/*
 * Wait for the next stop. An end of the thread, or the stop before its end, is
 * -ESRCH: nothing is left to be done but to detach, which the end of the
 * tracing thread does. The end of a thread that leads its group is reported after that
 * of its last sibling only, which may itself wait for a reply of ours, and SIGKILL
 * may suppress the stop: then the caller sees the end, and interrupts the wait.
 */
static int target_wait(Tracer *tracer, int *statusp)
{
	int r, status;

	tracer_set_signal(true);
	do {
		r = tracer->dead ? (errno = ESRCH, -1) : waitpid(tracer->tid, &status, __WALL | __WNOTHREAD);
	} while (r < 0 && errno == EINTR);
	tracer_set_signal(false);
	if (r < 0)
		return -errno;
	if (!WIFSTOPPED(status) || status >> 16 == PTRACE_EVENT_EXIT)
		return -ESRCH;

	*statusp = status;
	return 0;
}

/*
 * Make the thread run one system call; whatever that returned is in @resultp. -errno if
 * it could not, and then it can't run another: it died, or has to be let go.
 *
 * Between two calls the thread passes the place where signals are taken, and where
 * group stops begin (SIGSTOP and others) and are reported to have ended (SIGCONT).
 */
static int target_call(TracerTarget *t, long *resultp, long nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	const uint64_t args[] = { a, b, c, d, e, f };
	struct user_regs_struct regs = t->regs;
	unsigned int n_stops = 0;
	int r, status, signal = 0;

	if (t->lost)
		return -ESRCH;

	t->lost = true;
	arch_call(&regs, nr, args);
	r = arch_set_regs(t->tid, &regs);
	if (r < 0)
		return r;

	while (n_stops < 2) {
		if (ptrace(PTRACE_SYSCALL, t->tid, 0, (long)signal) < 0)
			return -errno;
		r = target_wait(t->tracer, &status);
		if (r < 0)
			return r;

		signal = 0;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
			++n_stops;
		} else if (status >> 16 == 0 && WSTOPSIG(status) == SIGSTOP) {
			signal = SIGSTOP;
		} else if (status >> 16 != PTRACE_EVENT_STOP) {
			/* a fault: someone took away the code */
			t->signal = WSTOPSIG(status);
			return -EINTR;
		}
	}

	r = arch_get_regs(t->tid, &regs);
	if (r < 0)
		return r;

	t->lost = false;
	*resultp = arch_result(&regs);
	return 0;
}

/* Bring the thread from the exit of a call to the place where signals are taken. */
static void target_stop(TracerTarget *t)
{
	int r, status = 0;

	if (t->lost)
		return;

	t->lost = true;
	if (ptrace(PTRACE_INTERRUPT, t->tid, 0, 0) < 0)
		return;
	do {
		if (ptrace(PTRACE_CONT, t->tid, 0, status ? (long)WSTOPSIG(status) : 0L) < 0)
			return;
		r = target_wait(t->tracer, &status);
		if (r < 0)
			return;
	} while (status >> 16 != PTRACE_EVENT_STOP);
	t->lost = false;
}

#define TARGET_CALL_6(_t, _resultp, _nr, _a, _b, _c, _d, _e, _f, ...) \
	target_call(_t, _resultp, _nr, _a, _b, _c, _d, _e, _f)
#define TARGET_CALL(_t, _resultp, ...) TARGET_CALL_6(_t, _resultp, __VA_ARGS__, 0, 0, 0, 0, 0, 0)

static int target_read(TracerTarget *t, void *data, uint64_t address, size_t size)
{
	struct iovec ours = { data, size }, theirs = { (void *)(uintptr_t)address, size };

	return process_vm_readv(t->tid, &ours, 1, &theirs, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static int target_write(TracerTarget *t, const void *data, uint64_t address, size_t size)
{
	struct iovec ours = { (void *)data, size }, theirs = { (void *)(uintptr_t)address, size };

	return process_vm_writev(t->tid, &ours, 1, &theirs, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

/* Did the thread come here by an instruction that we can use again? */
static bool target_is_usable(TracerTarget *t)
{
	uint64_t address = arch_instruction(&t->regs), word_address = address;
	long word;

	/* a word is read whole, so it must not leave the page; PEEKTEXT may read what is executable only */
	if (address % 4096 > 4096 - sizeof(word))
		word_address = address + ARCH_INSTRUCTION_SIZE - sizeof(word);
	errno = 0;
	word = ptrace(PTRACE_PEEKTEXT, t->tid, word_address, 0);
	if (errno)
		return false;

	return arch_is_call(&t->regs, (uint64_t)word >> (8 * (address - word_address)));
}

/*
 * Some memory for recvmsg(2): what is below the stack, if it is there to be read and
 * written, and else a mapping. Below the stack is where a signal frame could appear at
 * any time, but some runtimes see to it that none does and keep their stacks short, so
 * be frugal: 80 bytes for one or two descriptors. (A main thread's stack grows on
 * its own faults only, so the page below need not be there.)
 */
static int target_map_scratch(TracerTarget *t, size_t n_fds)
{
	long address;
	int r;

	t->scratch_size = offsetof(TracerScratch, control) + CMSG_SPACE(n_fds * sizeof(int32_t));
	t->scratch = (arch_stack(&t->regs) - t->scratch_size) & ~UINT64_C(15);
	if (target_read(t, &t->saved, t->scratch, t->scratch_size) >= 0 &&
	    target_write(t, &t->saved, t->scratch, t->scratch_size) >= 0)
		return 0;

	t->scratch = 0;
	r = TARGET_CALL(t, &address, SYS_mmap, 0, TRACER_SCRATCH_MAP, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0);
	if (r < 0)
		return r;
	if ((unsigned long)address > -4096UL)
		return address;

	t->scratch = address;
	t->scratch_mapped = true;
	return 0;
}

static int target_unmap_scratch(TracerTarget *t)
{
	long result;

	if (!t->scratch)
		return 0;
	if (t->scratch_mapped)
		return TARGET_CALL(t, &result, SYS_munmap, t->scratch, TRACER_SCRATCH_MAP);

	return target_write(t, &t->saved, t->scratch, t->scratch_size);
}

/*
 * Before Linux 6.9 there are pidfds of whole processes only, and the thread may have
 * left the table that the others share: compare what we got with what it has.
 */
static int target_getfd_old(TracerTarget *t, int number)
{
	_cleanup_(closep) int pidfd = -1, fd = -1;
	char path[64], status[TRACER_STATUS_SIZE];
	struct stat here, there;
	int r;

	r = status_read(t->tid, status, sizeof(status));
	if (r < 0)
		return r;
	pidfd = syscall(SYS_pidfd_open, atoi(status_find(status, "\nTgid:")), 0);
	if (pidfd < 0)
		return -errno;
	fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
	if (fd < 0)
		return -errno;

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)t->tid, number);
	if (fstat(fd, &here) < 0 || stat(path, &there) < 0)
		return -errno;
	if (here.st_dev != there.st_dev || here.st_ino != there.st_ino)
		return -EBADF;

	r = fd;
	fd = -1;
	return r;
}

static int target_getfd(TracerTarget *t, int number)
{
	_cleanup_(closep) int pidfd = -1;
	int fd;

	pidfd = syscall(SYS_pidfd_open, t->tid, TRACER_PIDFD_THREAD);
	if (pidfd < 0)
		return target_getfd_old(t, number);
	fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
	return fd < 0 ? -errno : fd;
}

/*
 * The carrier
 */

#define TRACER_CARRIER_NULL { .number = -1, .fd = -1 }

static void carrier_deinit(TracerCarrier *carrier)
{
	closep(&carrier->fd);
	carrier->fd = -1;
}

static int carrier_close(TracerCarrier *carrier, TracerTarget *t)
{
	long result;
	int r = 0;

	if (carrier->number >= 0)
		r = TARGET_CALL(t, &result, SYS_close, carrier->number);
	carrier->number = -1;
	return r;
}

static int carrier_socket(TracerCarrier *carrier, TracerTarget *t)
{
	long number;
	int r;

	r = TARGET_CALL(t, &number, SYS_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (r < 0)
		return r;
	if (number < 0)
		return number;

	carrier->number = number;
	return 0;
}

/*
 * The same without taking one of the slots below RLIMIT_NOFILE, in which the
 * descriptors have to go. The limit is raised for the moment, for the whole process,
 * and down again before anything is received. Above the hard limit, which takes
 * CAP_SYS_RESOURCE, only if that is as low.
 */
static int carrier_socket_above(TracerCarrier *carrier, TracerTarget *t)
{
	struct rlimit own, raised, seen;
	long number;
	int r;

	if (prlimit(t->tid, RLIMIT_NOFILE, NULL, &own) < 0)
		return -errno;
	raised.rlim_cur = own.rlim_cur + TRACER_SPARE_SLOTS;
	raised.rlim_max = own.rlim_max;
	if (raised.rlim_max == own.rlim_cur)
		raised.rlim_max = raised.rlim_cur;
	else if (raised.rlim_cur > raised.rlim_max)
		raised.rlim_cur = raised.rlim_max;
	if (prlimit(t->tid, RLIMIT_NOFILE, &raised, NULL) < 0)
		return -errno;

	r = carrier_socket(carrier, t);
	if (r >= 0 && (rlim_t)carrier->number < own.rlim_cur) {
		r = TARGET_CALL(t, &number, SYS_fcntl, carrier->number, F_DUPFD_CLOEXEC, own.rlim_cur);
		if (r >= 0) {
			r = carrier_close(carrier, t);
			if (number >= 0)
				carrier->number = number;
			else if (r >= 0)
				r = number;
		}
	}

	/* if it was set by the process in between, it is to be that */
	if (prlimit(t->tid, RLIMIT_NOFILE, &own, &seen) >= 0 &&
	    (seen.rlim_cur != raised.rlim_cur || seen.rlim_max != raised.rlim_max))
		prlimit(t->tid, RLIMIT_NOFILE, &seen, NULL);
	return r;
}

/*
 * Let go of the lowest free number, which the socket has got: programs expect the first
 * descriptor of a message there. Without room further up it stays where it is.
 */
static int carrier_step_aside(TracerCarrier *carrier, TracerTarget *t, size_t n_fds)
{
	long number;
	int r;

	r = TARGET_CALL(t, &number, SYS_fcntl, carrier->number, F_DUPFD_CLOEXEC,
			carrier->number + n_fds + TRACER_SPARE_SLOTS);
	if (r < 0 || number < 0)
		return r;
	r = carrier_close(carrier, t);
	carrier->number = number;
	return r;
}

/*
 * Take hold of the socket and make it its own and only peer. What others sent to
 * its name before it was connected goes away.
 */
static int carrier_connect(TracerCarrier *carrier, TracerTarget *t)
{
	const struct sockaddr_un any = { .sun_family = AF_UNIX };
	char byte;
	int r;

	r = target_getfd(t, carrier->number);
	if (r < 0)
		return r;
	carrier->fd = r;
	carrier->n_name = sizeof(carrier->name);
	if (bind(carrier->fd, (const void *)&any, sizeof(any.sun_family)) < 0 ||
	    getsockname(carrier->fd, (void *)&carrier->name, &carrier->n_name) < 0 ||
	    connect(carrier->fd, (const void *)&carrier->name, carrier->n_name) < 0)
		return -errno;
	while (recv(carrier->fd, &byte, sizeof(byte), MSG_DONTWAIT) >= 0)
		;

	return errno == EAGAIN ? 0 : -errno;
}

/*
 * Send the descriptors @first to @last, at most a chunk, to the name of the socket itself:
 * wherever else it may be connected by now. Return how many.
 */
static int carrier_send(TracerCarrier *carrier, Tracer *tracer, size_t first)
{
	TracerScratch scratch = {};
	struct cmsghdr *control = (void *)scratch.control;
	int32_t *fds = (void *)CMSG_DATA(control);
	int r, n = 0;

	/* the caller's descriptors may be closed and their numbers reused once it has gone */
	pthread_mutex_lock(&tracer->lock);
	if (tracer->abandoned) {
		r = -ECANCELED;
	} else {
		for (size_t i = first; i < tracer->n_fds && n < TRACER_CHUNK; ++i)
			if (tracer->fds[i] >= 0)
				fds[n++] = tracer->fds[i];
		control->cmsg_len = CMSG_LEN(n * sizeof(int32_t));
		control->cmsg_level = SOL_SOCKET;
		control->cmsg_type = SCM_RIGHTS;
		scratch.header.msg_name = &carrier->name;
		scratch.header.msg_namelen = carrier->n_name;
		scratch.header.msg_control = control;
		scratch.header.msg_controllen = CMSG_SPACE(n * sizeof(int32_t));
		r = sendmsg(carrier->fd, &scratch.header, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : n;
	}
	pthread_mutex_unlock(&tracer->lock);
	return r;
}

/* Make the thread receive a datagram of up to @n descriptors. Return how many it has got, in order. */
static int carrier_recv(TracerCarrier *carrier, TracerTarget *t, size_t n, int32_t *numbers)
{
	TracerScratch scratch = {};
	struct cmsghdr *control = (void *)scratch.control;
	size_t n_received;
	long result;
	int r;

	scratch.header.msg_control = (void *)(uintptr_t)(t->scratch + offsetof(TracerScratch, control));
	scratch.header.msg_controllen = CMSG_SPACE(n * sizeof(int32_t));
	r = target_write(t, &scratch, t->scratch, t->scratch_size);
	if (r < 0)
		return r;
	r = TARGET_CALL(t, &result, SYS_recvmsg, carrier->number, t->scratch, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (r < 0)
		return r;
	if (result < 0)
		return result;
	r = target_read(t, &scratch, t->scratch, t->scratch_size);
	if (r < 0)
		return r;

	/* no control message at all if none could be installed; its siblings may have written here, so trust no size */
	if (control->cmsg_len < CMSG_LEN(0) || control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
		return 0;
	n_received = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int32_t);
	if (n_received > n)
		n_received = n;
	memcpy(numbers, CMSG_DATA(control), n_received * sizeof(int32_t));
	return n_received;
}

/* Move all descriptors that fit, from @*firstp on; -EMFILE if the next one there did not. */
static int carrier_move(TracerCarrier *carrier, Tracer *tracer, TracerTarget *t, size_t *firstp)
{
	int32_t numbers[TRACER_CHUNK];
	int n, n_received, r;

	for (;;) {
		while (*firstp < tracer->n_fds && tracer->received[*firstp] != TRACER_WANTED)
			++*firstp;
		if (*firstp == tracer->n_fds)
			return 0;

		n = carrier_send(carrier, tracer, *firstp);
		if (n < 0)
			return n;
		r = carrier_recv(carrier, t, n, numbers);
		if (r < 0)
			return r;
		n_received = r;
		for (int i = 0; i < n_received; ++*firstp)
			if (tracer->received[*firstp] == TRACER_WANTED)
				tracer->received[*firstp] = numbers[i++];
		if (n_received < n)
			return -EMFILE;
	}
}

/*
 * The installation. RLIMIT_NOFILE may leave no slot for the socket, or only slots
 * that the descriptors need: what is then missing gets a second try.
 */
static void target_install(TracerTarget *t, Tracer *tracer)
{
	bool above = false;
	size_t first = 0;
	int r;

	if (target_map_scratch(t, tracer->n_fds < TRACER_CHUNK ? tracer->n_fds : TRACER_CHUNK) < 0)
		return;

	for (;;) {
		_cleanup_(carrier_deinit) TracerCarrier carrier = TRACER_CARRIER_NULL;

		r = above ? carrier_socket_above(&carrier, t) : carrier_socket(&carrier, t);
		if (r >= 0 && !above)
			r = carrier_step_aside(&carrier, t, tracer->n_fds);
		if (r >= 0)
			r = carrier_connect(&carrier, t);
		if (r >= 0)
			r = carrier_move(&carrier, tracer, t, &first);
		carrier_close(&carrier, t);
		if (r != -EMFILE || above)
			break;
		above = true;
	}

	target_unmap_scratch(t);
}

/* Nobody will tell the thread of the descriptors, so take them away again. */
static void target_uninstall(TracerTarget *t, Tracer *tracer)
{
	long result;

	for (size_t i = 0; i < tracer->n_fds; ++i)
		if (tracer->received[i] >= 0 && tracer->received[i] != TRACER_WANTED)
			TARGET_CALL(t, &result, SYS_close, tracer->received[i]);
}

static bool tracer_is_abandoned(Tracer *tracer)
{
	bool abandoned;

	pthread_mutex_lock(&tracer->lock);
	abandoned = tracer->abandoned;
	pthread_mutex_unlock(&tracer->lock);
	return abandoned;
}

static void tracer_install(Tracer *tracer, TracerTarget *t)
{
	uint64_t all = UINT64_MAX, mask;

	if (t->lost || arch_get_regs(t->tid, &t->regs) < 0 || !target_is_usable(t))
		return;
	if (ptrace(PTRACE_GETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &mask) < 0 ||
	    ptrace(PTRACE_SETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &all) < 0)
		return;

	target_install(t, tracer);
	if (tracer_is_abandoned(tracer))
		target_uninstall(t, tracer);

	/*
	 * A result that asks for a restart is looked at only where signals are taken. No FUSE
	 * reply can ask for one, but other calls than ioctl(2) end on being interrupted.
	 */
	if (arch_is_restart(&t->regs))
		target_stop(t);

	/* these fail only if it was killed */
	arch_set_regs(t->tid, &t->regs);
	ptrace(PTRACE_SETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &mask);
}

/*
 * The tracing thread
 */

static int tracer_seize(Tracer *tracer, long options)
{
	int r;

	tracer_set_signal(true);
	r = ptrace(PTRACE_SEIZE, tracer->tid, 0, options) < 0 ? -errno : 0;
	tracer_set_signal(false);
	return r;
}

/*
 * Suspending seccomp takes CAP_SYS_ADMIN in the initial user namespace and a kernel with
 * CONFIG_CHECKPOINT_RESTORE. Without, a thread under a filter is left alone: the filter
 * might kill it for our calls.
 */
static int tracer_attach(Tracer *tracer)
{
	char status[TRACER_STATUS_SIZE];
	int r;

	r = tracer_seize(tracer, TRACER_OPTIONS | PTRACE_O_SUSPEND_SECCOMP);
	if (r != -EPERM && r != -EINVAL)
		return r;
	r = tracer_seize(tracer, TRACER_OPTIONS);
	if (r < 0 || tracer->restart)
		return r;
	r = status_read(tracer->tid, status, sizeof(status));
	if (r < 0)
		return r;

	return atoi(status_find(status, "\nSeccomp:")) ? -EPERM : 0;
}

static int tracer_reply(Tracer *tracer)
{
	ssize_t n;
	int r;

	pthread_mutex_lock(&tracer->lock);
	if (tracer->abandoned) {
		r = -ECANCELED;
	} else {
		n = write(tracer->device, tracer->reply, tracer->reply_size);
		r = n == (ssize_t)tracer->reply_size ? 0 : n < 0 ? -errno : -EIO;
		if (r >= 0)
			tracer->stage = TRACER_STAGE_STOP;
	}
	pthread_mutex_unlock(&tracer->lock);
	return r;
}

/* The thread is at its stop: from here on it is seen through, unless the caller has gone. */
static int tracer_enter(Tracer *tracer)
{
	int r = 0;

	pthread_mutex_lock(&tracer->lock);
	if (tracer->abandoned) {
		r = -ECANCELED;
	} else {
		tracer->stage = TRACER_STAGE_RUN;
		tracer_escapable = false;
	}
	pthread_mutex_unlock(&tracer->lock);
	return r;
}

/* Show the caller what came of it, and hold the thread until it is told to let go. */
static void tracer_hold(Tracer *tracer)
{
	pthread_mutex_lock(&tracer->lock);
	if (!tracer->abandoned) {
		for (size_t i = 0; i < tracer->n_fds; ++i)
			if (tracer->received[i] != TRACER_WANTED)
				tracer->numbers[i] = tracer->received[i];
		tracer->stage = TRACER_STAGE_HELD;
		pthread_cond_broadcast(&tracer->moved);
		while (!tracer->released)
			pthread_cond_wait(&tracer->moved, &tracer->lock);
	}
	pthread_mutex_unlock(&tracer->lock);
}

static int tracer_run(Tracer *tracer)
{
	TracerTarget target = { .tracer = tracer, .tid = tracer->tid };
	int r, status;

	r = tracer_attach(tracer);
	if (r < 0)
		return r;
	if (ptrace(PTRACE_INTERRUPT, tracer->tid, 0, 0) < 0)
		return -errno;
	r = tracer_reply(tracer);
	if (r < 0)
		return r;

	/* the reply is written, errors do not count any more */

	r = target_wait(tracer, &status);
	if (r < 0)
		return 0;
	r = tracer_enter(tracer);
	if (r < 0)
		return 0;

	/*
	 * The stop comes before any signal. If there is one nevertheless, the thread was not
	 * asleep when it was interrupted: it is handed its signal, and nothing else.
	 */
	if (status >> 16 != PTRACE_EVENT_STOP) {
		target.signal = WSTOPSIG(status);
		target.lost = true;
	}

	if (tracer->restart) {
		arch_restart(tracer->tid);
	} else {
		tracer_install(tracer, &target);
		if (target.lost && !target.signal)
			return 0;
		tracer_hold(tracer);
	}

	ptrace(PTRACE_DETACH, tracer->tid, 0, (long)target.signal);
	return 0;
}

static Tracer *tracer_unref(Tracer *tracer)
{
	unsigned int n_refs;

	if (!tracer)
		return NULL;

	pthread_mutex_lock(&tracer->lock);
	n_refs = --tracer->n_refs;
	pthread_mutex_unlock(&tracer->lock);
	if (!n_refs) {
		pthread_cond_destroy(&tracer->moved);
		pthread_mutex_destroy(&tracer->lock);
		free(tracer);
	}
	return NULL;
}

static void tracer_unrefp(Tracer **tracerp)
{
	tracer_unref(*tracerp);
}

static int tracer_take_slot(void)
{
	int r = 0;

	pthread_mutex_lock(&tracer_lock);
	if (tracer_n_threads < TRACER_MAX_THREADS)
		++tracer_n_threads;
	else
		r = -EAGAIN;
	pthread_mutex_unlock(&tracer_lock);
	return r;
}

static void tracer_drop_slot(void)
{
	pthread_mutex_lock(&tracer_lock);
	--tracer_n_threads;
	pthread_mutex_unlock(&tracer_lock);
}

static void *tracer_main(void *userdata)
{
	Tracer *tracer = userdata;
	volatile int r = -ESRCH;

	if (!sigsetjmp(tracer_escape, 0)) {
		tracer_escapable = true;
		tracer->tracing_tid = syscall(SYS_gettid);
		r = tracer_run(tracer);
	}

	pthread_mutex_lock(&tracer->lock);
	if (tracer->stage == TRACER_STAGE_SEIZE)
		tracer->error = r;
	tracer->stage = TRACER_STAGE_GONE;
	pthread_mutex_unlock(&tracer->lock);
	pthread_cond_broadcast(&tracer->moved);

	/* the end of this thread detaches what is still attached, running or not, without losing a signal */
	tracer_unref(tracer);
	tracer_drop_slot();
	return NULL;
}

/*
 * The caller
 */

static void tracer_init_process(void)
{
	struct sigaction action = { .sa_handler = tracer_handler };

	sigfillset(&action.sa_mask);
	tracer_once_error = sigaction(tracer_signal(), &action, NULL) < 0 ? -errno : 0;
}

static int tracer_new(Tracer **tracerp, size_t n_fds)
{
	pthread_condattr_t attributes;
	Tracer *tracer;

	pthread_once(&tracer_once, tracer_init_process);
	if (tracer_once_error < 0)
		return tracer_once_error;

	tracer = calloc(1, sizeof(*tracer) + n_fds * sizeof(*tracer->received));
	if (!tracer)
		return -ENOMEM;
	tracer->n_refs = 1;
	tracer->n_fds = n_fds;
	pthread_mutex_init(&tracer->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&tracer->moved, &attributes);
	pthread_condattr_destroy(&attributes);

	*tracerp = tracer;
	return 0;
}

/* Start the tracing thread, with all signals blocked. On success it has a reference of its own. */
static int tracer_start(Tracer *tracer, pthread_t *threadp)
{
	pthread_attr_t attributes;
	sigset_t all, own;
	int r;

	r = tracer_take_slot();
	if (r < 0)
		return r;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, TRACER_STACK_SIZE);
	sigfillset(&all);
	tracer->n_refs = 2;
	pthread_sigmask(SIG_SETMASK, &all, &own);
	r = -pthread_create(threadp, &attributes, tracer_main, tracer);
	pthread_sigmask(SIG_SETMASK, &own, NULL);
	pthread_attr_destroy(&attributes);
	if (r < 0) {
		tracer->n_refs = 1;
		tracer_drop_slot();
	}
	return r;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * TRACER_SECOND + now.tv_nsec;
}

/* End the tracing thread, which is not to be waited for. The lock is held. */
static void tracer_abandon(Tracer *tracer, pthread_t thread)
{
	tracer->abandoned = true;
	if (tracer->stage != TRACER_STAGE_RUN)
		pthread_kill(thread, tracer_signal());
}

/*
 * Look after a thread that is late: no use to attach to one that is about to be killed,
 * nor to wait for one that is dead. If it led its group and a sibling has executed a program,
 * its number is now that of the sibling, which we do not trace; the kernel does not wake up those
 * who wait for the former. The lock is held, so no reply is written meanwhile.
 */
static void tracer_look(Tracer *tracer, pthread_t thread)
{
	char status[TRACER_STATUS_SIZE] = "";
	bool dead;
	int r;

	/* if there is none any more, it is empty, and the thread dead */
	r = status_read(tracer->tid, status, sizeof(status));
	if (r < 0 && r != -ESRCH)
		return;
	if (tracer->stage == TRACER_STAGE_SEIZE)
		dead = strtoull(status_find(status, "\nSigPnd:"), NULL, 16) & (UINT64_C(1) << (SIGKILL - 1));
	else
		dead = strchr("ZX", *status_find(status, "\nState:")) ||
		       atoi(status_find(status, "\nTracerPid:")) != tracer->tracing_tid;
	if (dead) {
		tracer->dead = true;
		pthread_kill(thread, tracer_signal());
	}
}

/*
 * Wait until the thread is held, gone, or time is up. Return 1 if it is held, 0 if it is not,
 * and negative if the reply was not written and will not be.
 */
static int tracer_wait(Tracer *tracer, pthread_t thread, uint64_t timeout_ns)
{
	uint64_t now = now_ns(), end, look, interval = TRACER_LOOK_NS;
	struct timespec until;
	int r;

	end = timeout_ns < UINT64_MAX / 2 ? now + timeout_ns : UINT64_MAX / 2;
	look = now + interval;
	pthread_mutex_lock(&tracer->lock);
	while (tracer->stage < TRACER_STAGE_HELD) {
		if (now >= end) {
			tracer_abandon(tracer, thread);
			break;
		}
		if (now >= look) {
			tracer_look(tracer, thread);
			if (interval < TRACER_LOOK_MAX_NS)
				interval *= 2;
			look = now + interval;
		}
		until.tv_sec = (look < end ? look : end) / TRACER_SECOND;
		until.tv_nsec = (look < end ? look : end) % TRACER_SECOND;
		if (pthread_cond_timedwait(&tracer->moved, &tracer->lock, &until) == ETIMEDOUT)
			now = now_ns();
	}
	if (tracer->stage == TRACER_STAGE_GONE)
		r = tracer->error;
	else if (tracer->stage == TRACER_STAGE_HELD)
		r = 1;
	else
		r = tracer->stage == TRACER_STAGE_SEIZE ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&tracer->lock);
	return r;
}

int32_t kdbusfs_install_begin(struct kdbusfs_install *install,
			      int32_t device,
			      const void *reply,
			      uint64_t reply_size,
			      int32_t tid,
			      const int32_t *fds,
			      uint32_t n_fds,
			      int32_t *numbers,
			      uint64_t timeout_ns)
{
	_cleanup_(tracer_unrefp) Tracer *tracer = NULL;
	pthread_t thread;
	int r;

	*install = (struct kdbusfs_install){};
	for (size_t i = 0; i < n_fds; ++i)
		numbers[i] = -1;
	if (n_fds > TRACER_MAX_FDS)
		return -EINVAL;
	if (tid <= 0)
		return -ESRCH;

	r = tracer_new(&tracer, n_fds);
	if (r < 0)
		return r;
	tracer->device = device;
	tracer->reply = reply;
	tracer->reply_size = reply_size;
	tracer->tid = tid;
	tracer->fds = fds;
	tracer->numbers = numbers;
	for (size_t i = 0; i < n_fds; ++i)
		tracer->received[i] = fds[i] < 0 ? -1 : TRACER_WANTED;

	r = tracer_start(tracer, &thread);
	if (r < 0)
		return r;
	r = tracer_wait(tracer, thread, timeout_ns);
	if (r <= 0)
		return r;

	for (size_t i = 0; i < n_fds; ++i)
		install->n_installed += numbers[i] >= 0;
	install->held = 1;
	install->tracer = tracer;
	tracer = NULL;
	return 0;
}

void kdbusfs_install_end(struct kdbusfs_install *install)
{
	_cleanup_(tracer_unrefp) Tracer *tracer = install->tracer;

	if (!tracer)
		return;

	pthread_mutex_lock(&tracer->lock);
	tracer->released = true;
	pthread_mutex_unlock(&tracer->lock);
	pthread_cond_broadcast(&tracer->moved);
	*install = (struct kdbusfs_install){};
}

int32_t kdbusfs_interrupt(int32_t device,
			  const void *reply,
			  uint64_t reply_size,
			  int32_t tid,
			  uint64_t timeout_ns)
{
	_cleanup_(tracer_unrefp) Tracer *tracer = NULL;
	pthread_t thread;
	int r;

	if (!ARCH_HAS_RESTART)
		return -ENOSYS;
	if (tid <= 0)
		return -ESRCH;

	r = tracer_new(&tracer, 0);
	if (r < 0)
		return r;
	tracer->restart = true;
	tracer->device = device;
	tracer->reply = reply;
	tracer->reply_size = reply_size;
	tracer->tid = tid;

	r = tracer_start(tracer, &thread);
	if (r < 0)
		return r;
	return tracer_wait(tracer, thread, timeout_ns);
}

#else /* ARCH_HAS_TRACER */

int32_t kdbusfs_install_begin(struct kdbusfs_install *install,
			      int32_t device,
			      const void *reply,
			      uint64_t reply_size,
			      int32_t tid,
			      const int32_t *fds,
			      uint32_t n_fds,
			      int32_t *numbers,
			      uint64_t timeout_ns)
{
	(void)device, (void)reply, (void)reply_size, (void)tid, (void)fds, (void)timeout_ns;
	*install = (struct kdbusfs_install){};
	for (size_t i = 0; i < n_fds; ++i)
		numbers[i] = -1;
	return -ENOSYS;
}

void kdbusfs_install_end(struct kdbusfs_install *install)
{
	*install = (struct kdbusfs_install){};
}

int32_t kdbusfs_interrupt(int32_t device,
			  const void *reply,
			  uint64_t reply_size,
			  int32_t tid,
			  uint64_t timeout_ns)
{
	(void)device, (void)reply, (void)reply_size, (void)tid, (void)timeout_ns;
	return -ENOSYS;
}

#endif
