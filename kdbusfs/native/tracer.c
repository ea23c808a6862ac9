/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Tracer: stop a thread on its way out of a call that we answer
 *
 * PTRACE_SEIZE and PTRACE_INTERRUPT find the thread asleep in its call, where nothing
 * is seen of them but a FUSE_INTERRUPT. The reply then lets it go, and before it is
 * back in user mode, and before any signal is taken from its queue, it stops
 * (PTRACE_EVENT_STOP). There kdbusfs_install_begin() makes it run socket, recvfrom, recvmsg,
 * sendto and close. The socket is duplicated into this process (pidfd_getfd), which connects it
 * with one of its own, by names in a file system that nobody else sees. So the thread's
 * namespaces do not matter, nobody else can send to it, and what its siblings do to the number
 * of the socket costs nobody but them.
 *
 * How a call is run. The thread is sent back onto its own system call instruction, with its
 * own arguments, as if it made the same call again. Its siblings may put other code there, so
 * nothing is decided by what is in its memory: it stops at the entry of the call, where the
 * kernel has number and arguments, and there they are compared with those that they have to
 * be. Only then they are replaced by ours, and the call runs. At its exit the thread gets the
 * registers back with which its own call ended, so it is as it was whenever it is not inside of
 * a call of ours. A stop that is not the expected one ends the work: the thread is let go, and
 * no register of it is set. There is no other way for it to come by another program or other
 * credentials than a call, whose entry would be such a stop.
 *
 * Memory of the thread may be of a kind that never faults in, so we touch none of it: what it
 * is to have there, it receives, and what it has there, it sends. The room for that is the
 * struct that its own call has just filled (struct room), which gets its content back.
 *
 * A seccomp filter is not suspended. It is asked (filter.c), and unless it allows all calls, none
 * is made: with it suspended, others that share the table of descriptors could help themselves to
 * the socket, or put another one under its number.
 *
 * Signals stay in their queues while none is pending. The first that comes between two calls
 * is put back by the kernel, as one that is blocked, and blocked they all are from then on.
 * SIGSTOP cannot be blocked: it is passed on, stops the other threads of the process, and this
 * one too once it is detached. A thread that dies reports PTRACE_EVENT_EXIT, mostly even if
 * killed, and is left to it.
 *
 * All that could block is kept off the caller: each call has a thread of its own.
 * PTRACE_SEIZE waits for an execve() of a sibling, which waits for the thread to die,
 * which waits for our reply; the stop may be late or never come. When time is up, the
 * caller goes on and the tracing thread is ended by a signal, which detaches the traced
 * one as it is. While that one runs calls, each wait has a time limit of its own; then it is
 * interrupted, and gets its registers back where it stops. One that does not even stop (it
 * waits for its memory) is let go: it makes its own call again, or, if it waits inside of
 * a call of ours, goes on behind that.
 *
 * If this process is killed meanwhile, a thread that is between two calls makes its own call
 * again, and fails as all calls on a dead mount do. One that is inside of a call of ours goes on
 * behind that: PTRACE_O_EXITKILL would be the alternative.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
#include "filter.h"
#include "tracer-arch.h"
#include "tracer.h"

#if ARCH_HAS_TRACER

#ifndef PTRACE_GETSIGMASK
#define PTRACE_GETSIGMASK 0x420a
#define PTRACE_SETSIGMASK 0x420b
#endif
#ifndef PTRACE_SECCOMP_GET_FILTER
#define PTRACE_SECCOMP_GET_FILTER 0x420c
#endif
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

#define TRACER_PIDFD_THREAD O_EXCL /* Linux 6.9 */
#define TRACER_OPTIONS (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXIT | PTRACE_O_TRACEEXEC)
#define TRACER_KERNEL_SIGSET_SIZE 8
#define TRACER_MAX_THREADS 64
#define TRACER_MAX_FDS 512
#define TRACER_STACK_SIZE (128 * 1024)
#define TRACER_SPARE_SLOTS 32 /* above RLIMIT_NOFILE, to find a free one for our socket */
#define TRACER_WANTED INT32_MAX
#define TRACER_STATUS_SIZE 8192
#define TRACER_SECOND UINT64_C(1000000000)
/* the first look at a thread that is late; each next one after twice as long */
#define TRACER_LOOK_NS UINT64_C(1000000)
#define TRACER_LOOK_MAX_NS UINT64_C(64000000)
#define TRACER_MAX_FILTERS 64
#define TRACER_MAX_INSTRUCTIONS 32768 /* as the kernel has it, for all filters of a thread */
/* how often a tracing thread that waits looks at the clock */
#define TRACER_TICK_NS UINT64_C(50000000)
#define TRACER_RUN_NS (2 * TRACER_SECOND)   /* for all calls that the traced thread makes */
#define TRACER_HURRY_NS UINT64_C(100000000) /* for anything, while others wait for their turn */
#define TRACER_GRACE_NS UINT64_C(200000000) /* for it to stop, and for the last calls */
#define TRACER_HELD_NS (2 * TRACER_SECOND)

#define _cleanup_(_x) __attribute__((__cleanup__(_x)))

typedef struct Tracer Tracer;
typedef struct TracerCarrier TracerCarrier;
typedef struct TracerTarget TracerTarget;

enum {
	TRACER_STAGE_SEIZE, /* the reply is not written */
	TRACER_STAGE_STOP,  /* it is, and the thread is to stop */
	TRACER_STAGE_RUN,   /* the thread runs calls of ours */
	TRACER_STAGE_HELD,  /* stopped, and as it was before */
	TRACER_STAGE_LEAVE, /* the thread runs the last calls of ours */
	TRACER_STAGE_GONE,  /* the thread is dead, detached, or about to be */
};

/* what the traced thread lends: a struct msghdr while it receives, and descriptors in its place */
typedef union TracerRoom {
	struct msghdr header;
	struct {
		union {
			struct cmsghdr align;
			uint8_t control[offsetof(struct msghdr, msg_controllen)];
		};
	};
} TracerRoom;

_Static_assert(sizeof(TracerRoom) == KDBUSFS_MIN_ROOM, "the room takes a header");

/*
 * Descriptors per datagram. What the kernel writes to a header it has read is behind the control
 * message.
 */
#define TRACER_CHUNK ((offsetof(struct msghdr, msg_controllen) - CMSG_LEN(0)) / sizeof(int32_t))

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
 * @start_ns:		when it began
 * @content:		of the room, as the thread is to find it
 * @strays:		descriptors whose close may wait
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
	_Atomic bool dead;

	int device;
	const void *reply;
	size_t reply_size;
	pid_t tid;
	int pidfd;
	pid_t tracing_tid;
	uint64_t start_ns;
	uint64_t room;
	size_t room_size;
	uint8_t content[KDBUSFS_MAX_ROOM];
	int32_t strays[KDBUSFS_MAX_STRAYS];
	size_t n_strays;
	const int32_t *fds;
	int32_t *numbers;
	size_t n_fds;
	int32_t received[];
};

/**
 * struct TracerTarget - the traced thread, stopped
 * @regs:		those with which its own call ended
 * @again:		those that make the same call again
 * @mask:		its own signal mask, if @masked
 * @filters:		how many seccomp filters it has; @programs are theirs
 * @deadline_ns:	for its next stop
 * @expired:		that has passed, and it was interrupted
 * @room_used:		the room has not its own content
 * @lost:		cannot run any more calls, and is not to be touched
 * @signal:		to pass on when detaching, or 0
 */
struct TracerTarget {
	Tracer *tracer;
	pid_t tid;
	struct user_regs_struct regs;
	struct user_regs_struct again;
	uint64_t mask;
	uint64_t *programs[TRACER_MAX_FILTERS];
	uint32_t n_programs[TRACER_MAX_FILTERS];
	size_t n_filters;
	uint64_t deadline_ns;
	bool masked : 1;
	bool expired : 1;
	bool room_used : 1;
	bool lost : 1;
	int signal;
};

/* @number is the thread's socket, connected with @fd, which is ours alone */
struct TracerCarrier {
	int number;
	int fd;
};

static _Atomic uint32_t tracer_n_waiting;
static pthread_mutex_t tracer_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int tracer_n_threads;
static pthread_once_t tracer_once = PTHREAD_ONCE_INIT;
static int tracer_once_error;
static int tracer_names = -1; /* where sockets have their names for a moment */
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

/*
 * Fetch /proc/TID/status. The lock that execve() holds while it closes files is not needed for it.
 */
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

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * TRACER_SECOND + now.tv_nsec;
}

static bool tracer_is_late(Tracer *tracer, uint64_t now)
{
	return tracer_n_waiting && now - tracer->start_ns >= TRACER_HURRY_NS;
}

/* Set how much longer it may take from here on. */
static void target_give(TracerTarget *t, uint64_t ns)
{
	t->deadline_ns = now_ns() + ns;
	t->expired = false;
}

static bool target_is_late(TracerTarget *t)
{
	uint64_t now = now_ns();

	return now >= t->deadline_ns || (!t->expired && tracer_is_late(t->tracer, now));
}

/*
 * Wait for the next stop. An end of the thread, or the stop before its end, is
 * -ESRCH: nothing is left to be done but to detach, which the end of the
 * tracing thread does. The end of a thread that leads its group is reported after that
 * of its last sibling only, which may itself wait for a reply of ours, and SIGKILL
 * may suppress the stop: then the caller sees the end, and interrupts the wait.
 *
 * Once the thread runs calls, a timer interrupts the wait, too. When time is up the thread is
 * interrupted, and if even that does not stop it, the wait ends with -ETIMEDOUT.
 */
static int target_wait(TracerTarget *t, int *statusp)
{
	int r, status;

	for (;;) {
		tracer_set_signal(true);
		r = t->tracer->dead ? (errno = ESRCH, -1)
				    : waitpid(t->tid, &status, __WALL | __WNOTHREAD);
		tracer_set_signal(false);
		if (r >= 0)
			break;
		if (errno != EINTR)
			return -errno;
		if (!t->deadline_ns || !target_is_late(t))
			continue;
		if (t->expired || ptrace(PTRACE_INTERRUPT, t->tid, 0, 0) < 0)
			return -ETIMEDOUT;
		target_give(t, TRACER_GRACE_NS);
		t->expired = true;
	}
	if (!WIFSTOPPED(status) || status >> 16 == PTRACE_EVENT_EXIT)
		return -ESRCH;

	*statusp = status;
	return 0;
}

static int target_get_info(TracerTarget *t, struct __ptrace_syscall_info *info)
{
	return ptrace(PTRACE_GET_SYSCALL_INFO, t->tid, sizeof(*info), info) < 0 ? -errno : 0;
}

/* Does the thread stand at the entry of the very call that it was sent to make? */
static bool target_is_at_entry(TracerTarget *t)
{
	struct __ptrace_syscall_info info;
	uint64_t args[6];

	if (target_get_info(t, &info) < 0)
		return false;
	arch_args(&t->again, args);
	return info.op == PTRACE_SYSCALL_INFO_ENTRY && info.arch == ARCH_AUDIT &&
	       info.instruction_pointer == arch_ip_at_entry(&t->again) &&
	       info.stack_pointer == arch_sp(&t->again) &&
	       (long)info.entry.nr == arch_nr(&t->again) &&
	       !memcmp(info.entry.args, args, sizeof(args));
}

/* Is it still where it was sent from, so that it has run nothing of its own? */
static bool target_is_at_start(TracerTarget *t)
{
	struct user_regs_struct regs;
	uint64_t args[6], expected[6];

	if (arch_get_regs(t->tid, &regs) < 0)
		return false;
	arch_args(&regs, args);
	arch_args(&t->again, expected);
	return arch_ip(&regs) == arch_ip(&t->again) && arch_sp(&regs) == arch_sp(&t->again) &&
	       arch_nr(&regs) == arch_nr(&t->again) && !memcmp(args, expected, sizeof(args));
}

static int target_block_signals(TracerTarget *t)
{
	uint64_t all = UINT64_MAX;

	if (t->masked)
		return 0;
	if (ptrace(PTRACE_GETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &t->mask) < 0 ||
	    ptrace(PTRACE_SETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &all) < 0)
		return -errno;
	t->masked = true;
	return 0;
}

/* Was the signal brought about by an instruction of the thread? Then it can't be put off. */
static bool target_has_fault(TracerTarget *t)
{
	siginfo_t info;

	return ptrace(PTRACE_GETSIGINFO, t->tid, 0, &info) < 0 ||
	       (info.si_code > 0 && info.si_code != SI_KERNEL && info.si_signo != SIGCHLD &&
		info.si_signo != SIGIO) ||
	       (info.si_code == SI_KERNEL &&
		(info.si_signo == SIGSEGV || info.si_signo == SIGBUS || info.si_signo == SIGTRAP));
}

/*
 * On its way to the entry the thread passes the place where signals are taken, and where group
 * stops begin (SIGSTOP and others) and are reported to have ended (SIGCONT). Put what to go on
 * with in @signalp, or fail: then it has its registers back if they were still ours.
 */
static int target_pass(TracerTarget *t, int status, int *signalp)
{
	int r = 0, signal = WSTOPSIG(status), event = status >> 16;

	*signalp = 0;
	if (signal == (SIGTRAP | 0x80) || (event && event != PTRACE_EVENT_STOP)) {
		return -EINTR; /* an entry that is not the expected one, or another program */
	} else if (!target_is_at_start(t)) {
		t->signal = event ? 0 : signal;
		return -EINTR;
	} else if (event == PTRACE_EVENT_STOP) {
		r = t->expired || target_is_late(t) ? -ETIMEDOUT : 0;
	} else if (target_has_fault(t)) {
		t->signal = signal; /* someone took away the code */
		r = -EINTR;
	} else {
		*signalp = signal;
		r = signal == SIGSTOP ? 0 : target_block_signals(t);
	}
	if (r < 0 && arch_set_regs(t->tid, &t->regs) >= 0)
		t->lost = t->signal != 0;
	return r;
}

/* Send the thread back to make its own call again, and wait until it is at the entry of that. */
static int target_go_to_entry(TracerTarget *t)
{
	int r, status, signal = 0;

	r = arch_set_regs(t->tid, &t->again);
	if (r < 0)
		return r;
	for (;;) {
		if (ptrace(PTRACE_SYSCALL, t->tid, 0, (long)signal) < 0)
			return -errno;
		r = target_wait(t, &status);
		if (r < 0)
			return r;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80) && target_is_at_entry(t))
			return 0;
		r = target_pass(t, status, &signal);
		if (r < 0)
			return r;
	}
}

/*
 * Make the call at whose entry the thread stands another one, which ends with the registers of its
 * own.
 */
static int target_run(TracerTarget *t, long *resultp, long nr, const uint64_t *args)
{
	struct __ptrace_syscall_info info;
	struct user_regs_struct regs;
	int r, status;

	r = arch_get_regs(t->tid, &regs);
	if (r >= 0)
		r = arch_replace(t->tid, &regs, nr, args);
	if (r < 0)
		return r;
	if (ptrace(PTRACE_SYSCALL, t->tid, 0, 0) < 0)
		return -errno;
	r = target_wait(t, &status);
	if (r < 0)
		return r;
	if (WSTOPSIG(status) != (SIGTRAP | 0x80))
		return -EINTR;
	r = target_get_info(t, &info);
	if (r < 0)
		return r;
	if (info.op != PTRACE_SYSCALL_INFO_EXIT)
		return -EINTR;

	*resultp = info.exit.rval;
	return arch_set_regs(t->tid, &t->regs);
}

static bool target_may_call(TracerTarget *t, long nr, const uint64_t *args)
{
	uint32_t action;

	for (size_t i = 0; i < t->n_filters; ++i) {
		action = kdbusfs_filter_run(t->programs[i], t->n_programs[i], nr, ARCH_AUDIT,
					    arch_ip_at_entry(&t->again), args) &
			 SECCOMP_RET_ACTION_FULL;
		if (action != SECCOMP_RET_ALLOW && action != SECCOMP_RET_LOG)
			return false;
	}
	return true;
}

/*
 * Make the thread run one system call; whatever that returned is in @resultp. -errno if it
 * could not. Then it can't run another if it is lost: it died, or has to be let go as it is.
 */
static int target_call(TracerTarget *t, long *resultp, long nr, uint64_t a, uint64_t b, uint64_t c,
		       uint64_t d, uint64_t e, uint64_t f)
{
	const uint64_t args[] = { a, b, c, d, e, f };
	int r;

	if (t->lost)
		return -ESRCH;
	if (t->expired)
		return -ETIMEDOUT;
	if (!target_may_call(t, nr, args))
		return -EPERM;

	t->lost = true;
	r = target_go_to_entry(t);
	if (r < 0)
		return r;
	r = target_run(t, resultp, nr, args);
	if (r < 0)
		return r;
	t->lost = false;
	return 0;
}

#define TARGET_CALL_6(_t, _resultp, _nr, _a, _b, _c, _d, _e, _f, ...) \
	target_call(_t, _resultp, _nr, _a, _b, _c, _d, _e, _f)
#define TARGET_CALL(_t, _resultp, ...) TARGET_CALL_6(_t, _resultp, __VA_ARGS__, 0, 0, 0, 0, 0, 0)

/*
 * Fetch the seccomp filters. That takes CAP_SYS_ADMIN and a kernel with CONFIG_CHECKPOINT_RESTORE.
 */
static int target_get_filters(TracerTarget *t)
{
	size_t n_instructions = 0;
	uint64_t *program;
	long n;

	for (;;) {
		n = ptrace(PTRACE_SECCOMP_GET_FILTER, t->tid, (long)t->n_filters, NULL);
		if (n < 0)
			return errno == ENOENT ? 0 : -errno;
		n_instructions += n;
		if (t->n_filters == TRACER_MAX_FILTERS || n_instructions > TRACER_MAX_INSTRUCTIONS)
			return -E2BIG;
		program = malloc(n * sizeof(*program));
		if (!program)
			return -ENOMEM;
		t->programs[t->n_filters] = program;
		t->n_programs[t->n_filters] = n;
		if (ptrace(PTRACE_SECCOMP_GET_FILTER, t->tid, (long)t->n_filters++, program) != n)
			return -EIO;
	}
}

/*
 * Would all calls that are needed be allowed? Which numbers descriptors have, filters do not care
 * about.
 */
static bool target_may_install(TracerTarget *t)
{
	const uint64_t any[6] = {}, socket[6] = { AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC };
	const uint64_t dup[6] = { 0, F_DUPFD_CLOEXEC },
		       receive[6] = { 0, t->tracer->room, sizeof(TracerRoom), MSG_DONTWAIT };
	const uint64_t receive_fds[6] = { 0, t->tracer->room, MSG_CMSG_CLOEXEC | MSG_DONTWAIT };

	return target_may_call(t, SYS_socket, socket) && target_may_call(t, SYS_fcntl, dup) &&
	       target_may_call(t, SYS_close, any) && target_may_call(t, SYS_recvfrom, receive) &&
	       target_may_call(t, SYS_recvmsg, receive_fds) &&
	       target_may_call(t, SYS_sendto, receive);
}

/* The thread is at its first stop. Learn all that has to be known, or leave it alone. */
static int target_look(TracerTarget *t)
{
	struct __ptrace_syscall_info info;
	char status[TRACER_STATUS_SIZE];
	uint64_t pending, blocked;
	int r;

	r = arch_get_regs(t->tid, &t->regs);
	if (r >= 0)
		r = target_get_info(t, &info);
	if (r >= 0)
		r = status_read(t->tid, status, sizeof(status));
	if (r < 0)
		return r;
	/*
	 * Another architecture is a 32-bit call of a 64-bit thread. A reply that brings descriptors
	 * asks for no restart, but other calls than ioctl(2) do so on being interrupted.
	 */
	if (info.arch != ARCH_AUDIT || arch_is_restart(&t->regs))
		return -ENOEXEC;
	t->again = t->regs;
	arch_again(&t->again);

	switch (atoi(status_find(status, "\nSeccomp:"))) {
	case SECCOMP_MODE_DISABLED:
		break;
	case SECCOMP_MODE_FILTER:
		r = target_get_filters(t);
		if (r < 0)
			return r;
		if (target_may_install(t))
			break;
		/* fall through */
	default:
		return -EPERM;
	}

	/* in the order in which they are queued they come afterwards, if none is taken now */
	pending = strtoull(status_find(status, "\nSigPnd:"), NULL, 16) |
		  strtoull(status_find(status, "\nShdPnd:"), NULL, 16);
	blocked = strtoull(status_find(status, "\nSigBlk:"), NULL, 16);
	return pending & ~blocked ? target_block_signals(t) : 0;
}

static void target_deinit(TracerTarget *t)
{
	for (size_t i = 0; i < t->n_filters; ++i)
		free(t->programs[i]);
}

/*
 * The carrier
 */

#define TRACER_CARRIER_NULL { .number = -1, .fd = -1 }

/*
 * Leave the close of a descriptor that may wait to those who may. One too many is kept open: there
 * are none.
 */
static void tracer_stray(Tracer *tracer, int fd)
{
	if (tracer->n_strays < KDBUSFS_MAX_STRAYS)
		tracer->strays[tracer->n_strays++] = fd;
}

/* Is @fd what @number is in the thread's table? */
static bool target_has(TracerTarget *t, int number, int fd)
{
	return syscall(SYS_kcmp, (long)getpid(), (long)t->tid, 0L /* KCMP_FILE */, (long)fd,
		       (long)number) == 0;
}

/*
 * Before Linux 6.9 there are pidfds of whole processes only, and the thread may have
 * left the table that the others share: compare what we got with what it has.
 */
static int target_getfd_old(TracerTarget *t, int number)
{
	_cleanup_(closep) int pidfd = -1;
	char status[TRACER_STATUS_SIZE];
	int r, fd;

	r = status_read(t->tid, status, sizeof(status));
	if (r < 0)
		return r;
	pidfd = syscall(SYS_pidfd_open, atoi(status_find(status, "\nTgid:")), 0);
	if (pidfd < 0)
		return -errno;
	fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
	if (fd < 0)
		return -errno;
	if (target_has(t, number, fd))
		return fd;

	tracer_stray(t->tracer, fd);
	return -EBADF;
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
 * Our end, to which nobody sends but who has the thread's socket. If there is anything left in
 * it, descriptors may be in there that others want to see closed by us.
 */
static void carrier_end(TracerCarrier *carrier, Tracer *tracer)
{
	char byte;

	if (carrier->fd < 0)
		return;
	shutdown(carrier->fd, SHUT_RD);
	if (recv(carrier->fd, &byte, sizeof(byte), MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN)
		close(carrier->fd);
	else
		tracer_stray(tracer, carrier->fd);
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

/* Has the thread no siblings? Then it gets none as long as it is stopped. */
static bool target_is_alone(TracerTarget *t)
{
	char status[TRACER_STATUS_SIZE];

	return status_read(t->tid, status, sizeof(status)) >= 0 &&
	       atoi(status_find(status, "\nThreads:")) == 1;
}

/*
 * The same without taking one of the slots below RLIMIT_NOFILE, in which the
 * descriptors have to go. The limit is raised for the moment, for the whole process,
 * and down again before anything is received. Above the hard limit, which takes
 * CAP_SYS_RESOURCE, only if that is as low, and the thread is alone: a sibling could fork, and the
 * child would keep it.
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
	if (raised.rlim_max == own.rlim_cur) {
		if (!target_is_alone(t))
			return -EMFILE;
		raised.rlim_max = raised.rlim_cur;
	} else if (raised.rlim_cur > raised.rlim_max) {
		raised.rlim_cur = raised.rlim_max;
	}
	if (prlimit(t->tid, RLIMIT_NOFILE, &raised, NULL) < 0)
		return -errno;

	r = carrier_socket(carrier, t);
	if (r >= 0 && (rlim_t)carrier->number < own.rlim_cur) {
		r = TARGET_CALL(t, &number, SYS_fcntl, carrier->number, F_DUPFD_CLOEXEC,
				own.rlim_cur);
		if (r >= 0) {
			r = carrier_close(carrier, t);
			if (number >= 0)
				carrier->number = number;
			else if (r >= 0)
				r = number;
		}
	}

	/* if it was set by somebody in between, it is to be that, but never more than it may be */
	if (prlimit(t->tid, RLIMIT_NOFILE, &own, &seen) >= 0 &&
	    (seen.rlim_cur != raised.rlim_cur || seen.rlim_max != raised.rlim_max)) {
		if (seen.rlim_cur > own.rlim_max)
			seen.rlim_cur = own.rlim_max;
		if (seen.rlim_max > own.rlim_max)
			seen.rlim_max = own.rlim_max;
		prlimit(t->tid, RLIMIT_NOFILE, &seen, NULL);
	}
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
 * Is @fd a socket as the thread has made it? Its siblings may have put another one, or any file,
 * under the number. A file would be asked by fstat(2), who is no socket answers by itself here.
 * One without a name and without a peer has never received anything.
 */
static bool is_new_socket(int fd)
{
	int domain = -1, type = -1;
	socklen_t n = sizeof(int);
	struct sockaddr_un name;

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) < 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n) < 0 || domain != AF_UNIX ||
	    type != SOCK_DGRAM)
		return false;
	n = sizeof(name);
	return getpeername(fd, (void *)&name, &n) < 0 && errno == ENOTCONN;
}

/* The directory of a tmpfs that is mounted nowhere. */
static int make_names(void)
{
	_cleanup_(closep) int context = -1;
	int fd;

	context = syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
	if (context < 0 || syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		return -errno;
	fd = syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0);
	return fd < 0 ? -errno : fd;
}

static socklen_t name_init(struct sockaddr_un *name, char what)
{
	*name = (struct sockaddr_un){ .sun_family = AF_UNIX };
	snprintf(name->sun_path, sizeof(name->sun_path), "/proc/self/fd/%d/%c%ld", tracer_names,
		 what, syscall(SYS_gettid));
	return sizeof(*name);
}

/* Connect both with each other, by names that are gone afterwards. */
static int connect_pair(int here, int there)
{
	struct sockaddr_un a, b;
	socklen_t n = name_init(&a, 'a');
	int r = 0;

	name_init(&b, 'b');
	if (bind(here, (void *)&a, n) < 0 || bind(there, (void *)&b, n) < 0 ||
	    connect(here, (void *)&b, n) < 0 || connect(there, (void *)&a, n) < 0)
		r = -errno;
	unlink(a.sun_path);
	unlink(b.sun_path);
	return r;
}

static int carrier_connect(TracerCarrier *carrier, TracerTarget *t)
{
	struct __ptrace_syscall_info info;
	int there, r;

	there = target_getfd(t, carrier->number);
	if (there < 0)
		return there;
	/* if it is still stopped, it is what the number of the thread stood for, and nobody who took its place */
	r = target_get_info(t, &info);
	if (r >= 0 && !is_new_socket(there))
		r = -ENOTSOCK;
	if (r >= 0) {
		carrier->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		r = carrier->fd < 0 ? -errno : connect_pair(carrier->fd, there);
	}
	if (r < 0)
		tracer_stray(t->tracer, there);
	else
		close(there);
	return r;
}

/* Have the thread fill its room. */
static int carrier_fill(TracerCarrier *carrier, TracerTarget *t, const void *content, size_t size)
{
	long result;
	int r;

	if (send(carrier->fd, content, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return -errno;
	t->room_used = true;
	r = TARGET_CALL(t, &result, SYS_recvfrom, carrier->number, t->tracer->room, size,
			MSG_DONTWAIT);
	if (r < 0)
		return r;
	return result < 0 ? result : result != (long)size ? -EIO : 0;
}

/* Give the room its own content back. */
static void carrier_clear(TracerCarrier *carrier, TracerTarget *t)
{
	if (t->room_used && carrier_fill(carrier, t, t->tracer->content, t->tracer->room_size) >= 0)
		t->room_used = false;
}

/*
 * Send the @n descriptors of @fds. Return 0, or why they could not be sent; the network layer
 * and security modules refuse a datagram as a whole.
 */
static int carrier_send(TracerCarrier *carrier, const int32_t *fds, size_t n)
{
	TracerRoom room = {};
	struct cmsghdr *control = (void *)room.control;
	struct msghdr header = { .msg_control = control,
				 .msg_controllen = CMSG_SPACE(n * sizeof(int32_t)) };

	control->cmsg_len = CMSG_LEN(n * sizeof(int32_t));
	control->cmsg_level = SOL_SOCKET;
	control->cmsg_type = SCM_RIGHTS;
	memcpy(CMSG_DATA(control), fds, n * sizeof(int32_t));
	return sendmsg(carrier->fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/*
 * What the thread has sent, which its siblings can do as well: trust nothing of it. If there are
 * descriptors with it, it stays where it is.
 */
static int carrier_read(TracerCarrier *carrier, TracerRoom *room)
{
	struct iovec v = { room, sizeof(*room) };
	struct msghdr header = { .msg_iov = &v, .msg_iovlen = 1 };
	ssize_t n;

	n = recvmsg(carrier->fd, &header, MSG_PEEK | MSG_DONTWAIT);
	if (n < 0)
		return -errno;
	if (n != offsetof(struct msghdr, msg_controllen) || header.msg_flags)
		return -EBADMSG;
	return recv(carrier->fd, room, sizeof(*room), MSG_DONTWAIT) < 0 ? -errno : 0;
}

/* Make the thread receive a datagram of @n descriptors. Return how many it has got, in order. */
static int carrier_recv(TracerCarrier *carrier, TracerTarget *t, size_t n, int32_t *numbers)
{
	struct cmsghdr *control;
	TracerRoom room;
	size_t n_received;
	long result;
	int r;

	r = TARGET_CALL(t, &result, SYS_recvmsg, carrier->number, t->tracer->room,
			MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (r < 0)
		return r;
	if (result < 0)
		return result;
	r = TARGET_CALL(t, &result, SYS_sendto, carrier->number, t->tracer->room,
			offsetof(struct msghdr, msg_controllen), MSG_DONTWAIT | MSG_NOSIGNAL);
	if (r < 0)
		return r;
	if (result < 0)
		return result;
	r = carrier_read(carrier, &room);
	if (r < 0)
		return r;

	/* no control message at all if none could be installed */
	control = (void *)room.control;
	if (control->cmsg_len < CMSG_LEN(0) || control->cmsg_level != SOL_SOCKET ||
	    control->cmsg_type != SCM_RIGHTS)
		return 0;
	n_received = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int32_t);
	if (n_received > n)
		n_received = n;
	memcpy(numbers, CMSG_DATA(control), n_received * sizeof(int32_t));
	return n_received;
}

/*
 * The next descriptors that are wanted, from @first on, at most @most; @indices says which. The
 * caller's may be closed and their numbers used again once it has gone.
 */
static int carrier_pick(TracerCarrier *carrier, Tracer *tracer, size_t first, size_t most,
			size_t *indices)
{
	int32_t fds[TRACER_CHUNK];
	size_t n = 0;
	int r = 0;

	pthread_mutex_lock(&tracer->lock);
	for (size_t i = first; i < tracer->n_fds && n < most; ++i) {
		if (tracer->received[i] != TRACER_WANTED)
			continue;
		indices[n] = i;
		fds[n++] = tracer->fds[i];
	}
	if (n)
		r = tracer->abandoned ? -ECANCELED : carrier_send(carrier, fds, n);
	pthread_mutex_unlock(&tracer->lock);
	return r < 0 ? r : (int)n;
}

/* Move all descriptors that fit; -EMFILE if the next one did not. */
static int carrier_move(TracerCarrier *carrier, Tracer *tracer, TracerTarget *t)
{
	const TracerRoom receive = { .header = {
					     .msg_control = (void *)(uintptr_t)tracer->room,
					     .msg_controllen = CMSG_SPACE(TRACER_CHUNK *
									  sizeof(int32_t)),
				     } };
	int32_t numbers[TRACER_CHUNK];
	size_t indices[TRACER_CHUNK], first = 0, most = TRACER_CHUNK, n_alone = 0;
	int n, n_received, r;

	for (;;) {
		while (first < tracer->n_fds && tracer->received[first] != TRACER_WANTED)
			++first;
		if (first == tracer->n_fds)
			return 0;

		r = carrier_fill(carrier, t, &receive, sizeof(receive));
		if (r < 0)
			return r;
		n = carrier_pick(carrier, tracer, first, most, indices);
		if (n < 0 && n != -ECANCELED && n != -EAGAIN) {
			/* one of them is refused: find out which */
			if (most > 1)
				n_alone = TRACER_CHUNK;
			else
				tracer->received[first] = -1;
			most = 1;
			continue;
		}
		if (n < 0)
			return n;
		n_received = carrier_recv(carrier, t, n, numbers);
		if (n_received < 0)
			return n_received;
		for (int i = 0; i < n_received; ++i)
			tracer->received[indices[i]] = numbers[i];
		if (n_received < n)
			return -EMFILE;
		if (n_alone && !--n_alone)
			most = TRACER_CHUNK;
	}
}

/*
 * The installation. RLIMIT_NOFILE may leave no slot for the socket, or only slots
 * that the descriptors need: what is then missing gets a second try.
 */
static void target_install(TracerTarget *t, Tracer *tracer, TracerCarrier *carrier)
{
	bool above = false;
	int r;

	for (;;) {
		r = above ? carrier_socket_above(carrier, t) : carrier_socket(carrier, t);
		if (r >= 0 && !above)
			r = carrier_step_aside(carrier, t, tracer->n_fds);
		if (r >= 0)
			r = carrier_connect(carrier, t);
		if (r >= 0)
			r = carrier_move(carrier, tracer, t);
		if (r != -EMFILE || above)
			break;
		above = true;
		carrier_clear(carrier, t);
		carrier_close(carrier, t);
		carrier_end(carrier, tracer);
	}
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

static void tracer_install(Tracer *tracer, TracerTarget *t, TracerCarrier *carrier)
{
	target_give(t, TRACER_RUN_NS);
	if (target_look(t) >= 0)
		target_install(t, tracer, carrier);
}

/* Take out of the thread all that is not to stay in it; it is as it was before then. */
static void tracer_leave(Tracer *tracer, TracerTarget *t, TracerCarrier *carrier)
{
	target_give(t, TRACER_GRACE_NS);
	if (tracer_is_abandoned(tracer))
		target_uninstall(t, tracer);
	if (carrier->fd >= 0)
		carrier_clear(carrier, t);
	carrier_close(carrier, t);
	if (t->masked && !t->lost)
		ptrace(PTRACE_SETSIGMASK, t->tid, (long)TRACER_KERNEL_SIGSET_SIZE, &t->mask);
}

/*
 * The tracing thread
 */

static int tracer_seize(Tracer *tracer)
{
	int r;

	tracer_set_signal(true);
	r = ptrace(PTRACE_SEIZE, tracer->tid, 0, (long)TRACER_OPTIONS) < 0 ? -errno : 0;
	tracer_set_signal(false);
	return r;
}

/*
 * Attach to the thread that waits for our reply. What is attached keeps its number: if the
 * thread of the pidfd is still there afterwards, this is it.
 */
static int tracer_attach(Tracer *tracer)
{
	int r;

	r = tracer_seize(tracer);
	if (r < 0)
		return r;
	if (tracer->pidfd >= 0 && syscall(SYS_pidfd_send_signal, tracer->pidfd, 0, NULL, 0) < 0)
		return -errno;
	return ptrace(PTRACE_INTERRUPT, tracer->tid, 0, 0) < 0 ? -errno : 0;
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

/*
 * Show the caller what came of it, and hold the thread until it is told to let go, or too much
 * time has passed: then nobody will tell the thread of its descriptors.
 */
static void tracer_hold(Tracer *tracer)
{
	uint64_t end = now_ns() + TRACER_HELD_NS, tick;
	struct timespec until;

	pthread_mutex_lock(&tracer->lock);
	if (!tracer->abandoned) {
		for (size_t i = 0; i < tracer->n_fds; ++i)
			if (tracer->received[i] != TRACER_WANTED)
				tracer->numbers[i] = tracer->received[i];
		tracer->stage = TRACER_STAGE_HELD;
		pthread_cond_broadcast(&tracer->moved);
	}
	while (!tracer->abandoned && !tracer->released) {
		tick = now_ns();
		if (tick >= end || tracer_is_late(tracer, tick)) {
			tracer->abandoned = true;
			break;
		}
		tick += TRACER_TICK_NS;
		until.tv_sec = tick / TRACER_SECOND;
		until.tv_nsec = tick % TRACER_SECOND;
		pthread_cond_timedwait(&tracer->moved, &tracer->lock, &until);
	}
	tracer->stage = TRACER_STAGE_LEAVE;
	pthread_mutex_unlock(&tracer->lock);
}

/* Have waits of this thread interrupted from now on. */
static int tracer_start_timer(Tracer *tracer, timer_t *timerp)
{
	const struct timespec tick = { .tv_nsec = TRACER_TICK_NS };
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = tracer_signal() };

	event._sigev_un._tid = tracer->tracing_tid;
	if (timer_create(CLOCK_MONOTONIC, &event, timerp) < 0)
		return -errno;
	timer_settime(*timerp, 0, &(struct itimerspec){ tick, tick }, NULL);
	return 0;
}

static void tracer_run_calls(Tracer *tracer, TracerTarget *t)
{
	TracerCarrier carrier = TRACER_CARRIER_NULL;
	timer_t timer;

	if (tracer_start_timer(tracer, &timer) < 0)
		return;
	tracer_install(tracer, t, &carrier);
	if (!t->lost)
		tracer_hold(tracer);
	tracer_leave(tracer, t, &carrier);
	carrier_end(&carrier, tracer);
	target_deinit(t);
	timer_delete(timer);
}

static int tracer_run(Tracer *tracer)
{
	TracerTarget target = { .tracer = tracer, .tid = tracer->tid };
	int r, status;

	r = tracer_attach(tracer);
	if (r < 0)
		return r;
	r = tracer_reply(tracer);
	if (r < 0)
		return r;

	/* the reply is written, errors do not count any more */

	r = target_wait(&target, &status);
	if (r < 0)
		return 0;
	r = tracer_enter(tracer);
	if (r < 0)
		return 0;

	/*
	 * The stop comes before any signal. If there is one nevertheless, the thread was not
	 * asleep when it was interrupted: it is handed its signal, and nothing else.
	 */
	if (status >> 16 != PTRACE_EVENT_STOP)
		target.signal = status >> 16 ? 0 : WSTOPSIG(status);
	else
		tracer_run_calls(tracer, &target);

	/* one that is running is detached by the end of this thread */
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

	/*
	 * the end of this thread detaches what is still attached, running or not, without losing a
	 * signal
	 */
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
	tracer_names = make_names(); /* without, nothing can be installed */
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
	tracer->start_ns = now_ns();
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
		dead = strtoull(status_find(status, "\nSigPnd:"), NULL, 16) &
		       (UINT64_C(1) << (SIGKILL - 1));
	else
		dead = strchr("ZX", *status_find(status, "\nState:")) ||
		       atoi(status_find(status, "\nTracerPid:")) != tracer->tracing_tid;
	if (dead) {
		tracer->dead = true;
		pthread_kill(thread, tracer_signal());
	}
}

/*
 * Wait until something has moved, or the tracing thread, which has limits of its own, is long
 * overdue.
 */
static void tracer_wait_for_move(Tracer *tracer, uint64_t until_ns)
{
	const struct timespec until = { until_ns / TRACER_SECOND, until_ns % TRACER_SECOND };

	pthread_cond_timedwait(&tracer->moved, &tracer->lock, &until);
}

/*
 * Wait until the thread is held, gone, or time is up. Return 1 if it is held, 0 if it is not,
 * and negative if the reply was not written and will not be. Time is up at once if the thread
 * is late and others wait. Once it runs calls, it is the tracing thread that sees to the end.
 */
static int tracer_wait(Tracer *tracer, pthread_t thread, uint64_t timeout_ns)
{
	uint64_t now = tracer->start_ns, end, look, interval = TRACER_LOOK_NS;
	int r;

	end = timeout_ns < UINT64_MAX / 2 ? now + timeout_ns : UINT64_MAX / 2;
	look = now + interval;
	pthread_mutex_lock(&tracer->lock);
	while (tracer->stage < TRACER_STAGE_HELD) {
		if (tracer->stage < TRACER_STAGE_RUN &&
		    (now >= end || tracer_is_late(tracer, now))) {
			tracer_abandon(tracer, thread);
			break;
		}
		if (now >= look) {
			tracer_look(tracer, thread);
			if (interval < TRACER_LOOK_MAX_NS)
				interval *= 2;
			look = now + interval;
		}
		tracer_wait_for_move(tracer,
				     tracer->stage < TRACER_STAGE_RUN && end < look ? end : look);
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

/* Hand over to the caller what it has to close. */
static void install_take_strays(struct kdbusfs_install *install, Tracer *tracer)
{
	pthread_mutex_lock(&tracer->lock);
	for (size_t i = 0; i < tracer->n_strays; ++i)
		install->strays[install->n_strays++] = tracer->strays[i];
	tracer->n_strays = 0;
	pthread_mutex_unlock(&tracer->lock);
}

void kdbusfs_tracer_hurry(uint32_t n_waiting)
{
	pthread_once(&tracer_once, tracer_init_process);
	tracer_n_waiting = n_waiting;
}

int32_t kdbusfs_install_begin(struct kdbusfs_install *install, int32_t device, const void *reply,
			      uint64_t reply_size, int32_t tid, int32_t pidfd, uint64_t room,
			      const void *content, uint64_t room_size, const int32_t *fds,
			      uint32_t n_fds, int32_t *numbers, uint64_t timeout_ns)
{
	_cleanup_(tracer_unrefp) Tracer *tracer = NULL;
	pthread_t thread;
	int r;

	*install = (struct kdbusfs_install){};
	for (size_t i = 0; i < n_fds; ++i)
		numbers[i] = -1;
	if (n_fds > TRACER_MAX_FDS || room_size < KDBUSFS_MIN_ROOM || room_size > KDBUSFS_MAX_ROOM)
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
	tracer->pidfd = pidfd;
	tracer->room = room;
	tracer->room_size = room_size;
	memcpy(tracer->content, content, room_size);
	tracer->fds = fds;
	tracer->numbers = numbers;
	for (size_t i = 0; i < n_fds; ++i)
		tracer->received[i] = fds[i] < 0 ? -1 : TRACER_WANTED;

	r = tracer_start(tracer, &thread);
	if (r < 0)
		return r;
	r = tracer_wait(tracer, thread, timeout_ns);
	if (r <= 0) {
		install_take_strays(install, tracer);
		return r;
	}

	for (size_t i = 0; i < n_fds; ++i)
		install->n_installed += numbers[i] >= 0;
	install->held = 1;
	install->tracer = tracer;
	tracer = NULL;
	return 0;
}

int32_t kdbusfs_install_end(struct kdbusfs_install *install, const void *content)
{
	_cleanup_(tracer_unrefp) Tracer *tracer = install->tracer;
	int32_t r;

	install->tracer = NULL;
	install->held = 0;
	if (!tracer)
		return 0;

	pthread_mutex_lock(&tracer->lock);
	r = tracer->abandoned ? -ETIMEDOUT : 0;
	if (!tracer->abandoned && content)
		memcpy(tracer->content, content, tracer->room_size);
	tracer->released = true;
	pthread_cond_broadcast(&tracer->moved);
	while (tracer->stage != TRACER_STAGE_GONE)
		tracer_wait_for_move(tracer, now_ns() + TRACER_SECOND);
	pthread_mutex_unlock(&tracer->lock);
	install_take_strays(install, tracer);
	return r;
}

#else /* ARCH_HAS_TRACER */

int32_t kdbusfs_install_begin(struct kdbusfs_install *install, int32_t device, const void *reply,
			      uint64_t reply_size, int32_t tid, int32_t pidfd, uint64_t room,
			      const void *content, uint64_t room_size, const int32_t *fds,
			      uint32_t n_fds, int32_t *numbers, uint64_t timeout_ns)
{
	(void)device, (void)reply, (void)reply_size, (void)tid, (void)pidfd, (void)room;
	(void)content, (void)room_size, (void)fds, (void)timeout_ns;
	*install = (struct kdbusfs_install){};
	for (size_t i = 0; i < n_fds; ++i)
		numbers[i] = -1;
	return -ENOSYS;
}

int32_t kdbusfs_install_end(struct kdbusfs_install *install, const void *content)
{
	(void)install, (void)content;
	return 0;
}

void kdbusfs_tracer_hurry(uint32_t n_waiting)
{
	(void)n_waiting;
}

#endif
