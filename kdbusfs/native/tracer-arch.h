/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Registers of a stopped thread, one architecture at a time
 *
 * A thread that comes from a system call is sent back onto the instruction that it came by, to
 * make the same call again; at the entry of that, the call is replaced by another one. The
 * kernel keeps all registers across a system call but the few given here.
 *
 *   ARCH_HAS_TRACER   descriptors can be installed
 *   ARCH_AUDIT        what PTRACE_GET_SYSCALL_INFO calls the architecture
 *   arch_again()      make @regs those that make the same call again
 *   arch_nr(), arch_args(), arch_ip(), arch_sp()
 *                     of such @regs, as the entry of that call has to show them
 *   arch_replace()    make the call at whose entry the thread stands another one
 *   arch_is_restart() is the result one that makes the kernel restart the call?
 */

#include <elf.h>
#include <errno.h>
#include <linux/audit.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>

#if defined(__x86_64__) && defined(__LP64__)

#define ARCH_HAS_TRACER 1
#define ARCH_AUDIT AUDIT_ARCH_X86_64

static inline void arch_again(struct user_regs_struct *regs)
{
	regs->rip -= 2; /* the length of `syscall`; what else it may have been shows at the entry */
	regs->rax = regs->orig_rax;
	/* not in a system call, or a restart might be read from rax on the way out */
	regs->orig_rax = -1;
}

static inline long arch_nr(const struct user_regs_struct *again)
{
	return again->rax;
}

static inline void arch_args(const struct user_regs_struct *again, uint64_t *args)
{
	args[0] = again->rdi;
	args[1] = again->rsi;
	args[2] = again->rdx;
	args[3] = again->r10;
	args[4] = again->r8;
	args[5] = again->r9;
}

static inline uint64_t arch_ip(const struct user_regs_struct *again)
{
	return again->rip;
}

static inline uint64_t arch_ip_at_entry(const struct user_regs_struct *again)
{
	return again->rip + 2;
}

static inline uint64_t arch_sp(const struct user_regs_struct *again)
{
	return again->rsp;
}

static inline void arch_replace_args(struct user_regs_struct *regs, long nr, const uint64_t *args)
{
	regs->orig_rax = nr;
	regs->rdi = args[0];
	regs->rsi = args[1];
	regs->rdx = args[2];
	regs->r10 = args[3];
	regs->r8 = args[4];
	regs->r9 = args[5];
}

static inline int arch_replace_nr(pid_t tid, long nr)
{
	(void)tid, (void)nr;
	return 0;
}

static inline bool arch_is_restart(const struct user_regs_struct *regs)
{
	/* ERESTARTSYS to ERESTART_RESTARTBLOCK of linux/errno.h */
	return (long)regs->orig_rax >= 0 && (long)regs->rax <= -512 && (long)regs->rax >= -516;
}

#elif defined(__aarch64__) && defined(__LP64__)

#define ARCH_HAS_TRACER 1
#define ARCH_AUDIT AUDIT_ARCH_AARCH64

/*
 * The kernel shows in x7 whether a thread enters or leaves a call, and puts the value of before
 * back after either stop, so x7 need not be right there. The first argument is not shown once
 * the call has a result: made again, the call has a bad one, and fails with EBADF.
 */
static inline void arch_again(struct user_regs_struct *regs)
{
	regs->pc -= 4;
	regs->regs[0] = -1;
}

static inline long arch_nr(const struct user_regs_struct *again)
{
	return again->regs[8];
}

static inline void arch_args(const struct user_regs_struct *again, uint64_t *args)
{
	for (size_t i = 0; i < 6; i++)
		args[i] = again->regs[i];
}

static inline uint64_t arch_ip(const struct user_regs_struct *again)
{
	return again->pc;
}

static inline uint64_t arch_ip_at_entry(const struct user_regs_struct *again)
{
	return again->pc + 4;
}

static inline uint64_t arch_sp(const struct user_regs_struct *again)
{
	return again->sp;
}

static inline void arch_replace_args(struct user_regs_struct *regs, long nr, const uint64_t *args)
{
	(void)nr;
	for (size_t i = 0; i < 6; i++)
		regs->regs[i] = args[i];
}

static inline int arch_replace_nr(pid_t tid, long nr)
{
	int number = nr;
	struct iovec v = { &number, sizeof(number) };

	return ptrace(PTRACE_SETREGSET, tid, NT_ARM_SYSTEM_CALL, &v) < 0 ? -errno : 0;
}

/* then the registers are those before the call already, and the call made again is another one */
static inline bool arch_is_restart(const struct user_regs_struct *regs)
{
	(void)regs;
	return false;
}

#else

#define ARCH_HAS_TRACER 0

#endif

#if ARCH_HAS_TRACER

/* Fails with -ENOEXEC for a 32-bit thread, whose register set has another size. */
static inline int arch_get_regs(pid_t tid, struct user_regs_struct *regs)
{
	struct iovec v = { regs, sizeof(*regs) };

	if (ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &v) < 0)
		return -errno;
	return v.iov_len == sizeof(*regs) ? 0 : -ENOEXEC;
}

static inline int arch_set_regs(pid_t tid, const struct user_regs_struct *regs)
{
	struct iovec v = { (void *)regs, sizeof(*regs) };

	return ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &v) < 0 ? -errno : 0;
}

/* The thread stands at the entry of a call. */
static inline int arch_replace(pid_t tid, struct user_regs_struct *regs, long nr,
			       const uint64_t *args)
{
	int r;

	arch_replace_args(regs, nr, args);
	r = arch_set_regs(tid, regs);
	return r < 0 ? r : arch_replace_nr(tid, nr);
}

#endif
