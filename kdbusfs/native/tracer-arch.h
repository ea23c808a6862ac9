/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Registers of a stopped thread, one architecture at a time
 *
 * A call is injected by stepping back onto the system call instruction that the
 * thread has just come from. Syscall user dispatch let that very instruction pass
 * a moment ago, and rseq(2) forbids it in a critical section, so neither is in the
 * way. The kernel keeps all registers across a system call but the few given
 * here, so a call that follows starts from the saved set again.
 *
 *   ARCH_HAS_TRACER   descriptors can be installed
 *   ARCH_HAS_RESTART  the result of a call can be turned into a restart
 *   arch_call()       make @regs those that perform call @nr
 *   arch_result()     of the call, at its exit stop
 *   arch_stack()      lowest address that may be in use on the stack
 *   arch_is_restart() is the result one that makes the kernel restart the call?
 *   arch_instruction(), arch_is_call()
 *                     address of the instruction come from; is it a system call?
 */

#include <elf.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>

#if defined(__x86_64__) && defined(__LP64__)

#define ARCH_HAS_TRACER 1
#define ARCH_HAS_RESTART 1
#define ARCH_INSTRUCTION_SIZE 2

static inline void arch_call(struct user_regs_struct *regs, long nr, const uint64_t *args)
{
	regs->rip -= ARCH_INSTRUCTION_SIZE;
	regs->rax = nr;
	/* not in a system call, or a restart might be read from rax on the way out */
	regs->orig_rax = -1;
	regs->rdi = args[0];
	regs->rsi = args[1];
	regs->rdx = args[2];
	regs->r10 = args[3];
	regs->r8 = args[4];
	regs->r9 = args[5];
}

static inline long arch_result(const struct user_regs_struct *regs)
{
	return regs->rax;
}

static inline uint64_t arch_stack(const struct user_regs_struct *regs)
{
	return regs->rsp - 128; /* the red zone of the psABI */
}

static inline uint64_t arch_instruction(const struct user_regs_struct *regs)
{
	return regs->rip - ARCH_INSTRUCTION_SIZE;
}

/* `syscall`. A 64-bit thread may also have come by `int 0x80`, which has other numbers. */
static inline bool arch_is_call(const struct user_regs_struct *regs, uint32_t instruction)
{
	return (long)regs->orig_rax >= 0 && (instruction & 0xffff) == 0x050f;
}

static inline bool arch_is_restart(const struct user_regs_struct *regs)
{
	/* ERESTARTSYS to ERESTART_RESTARTBLOCK of linux/errno.h */
	return (long)regs->orig_rax >= 0 && (long)regs->rax <= -512 && (long)regs->rax >= -516;
}

/*
 * Turn the result EINTR of the call that a thread is leaving into ERESTARTSYS. Its
 * number is still in orig_rax, and the kernel looks at both once it knows which
 * handler runs. PEEKUSER shows a 32-bit thread in the same layout.
 */
static inline int arch_restart(pid_t tid)
{
	const size_t rax = offsetof(struct user_regs_struct, rax);
	long result;

	errno = 0;
	result = ptrace(PTRACE_PEEKUSER, tid, rax, 0);
	if (errno)
		return -errno;
	if ((int32_t)result != -EINTR)
		return 0;
	if (ptrace(PTRACE_POKEUSER, tid, rax, -512L /* ERESTARTSYS of linux/errno.h */) < 0)
		return -errno;
	return 0;
}

#elif defined(__aarch64__) && defined(__LP64__)

#define ARCH_HAS_TRACER 1
#define ARCH_HAS_RESTART 0
#define ARCH_INSTRUCTION_SIZE 4

/*
 * The kernel shows in x7 whether a thread enters or leaves a call, and puts the value
 * of the entry back after the exit stop. arch_call() does not change x7, so that is
 * also the value to end up with. The thread is out of its call as far as
 * the kernel is concerned (syscallno is reset before the stop), or comes from one of
 * ours, and x0 then holds an argument that is no ERESTART code: NT_ARM_SYSTEM_CALL
 * need not be set.
 */
static inline void arch_call(struct user_regs_struct *regs, long nr, const uint64_t *args)
{
	regs->pc -= ARCH_INSTRUCTION_SIZE;
	regs->regs[8] = nr;
	for (size_t i = 0; i < 6; i++)
		regs->regs[i] = args[i];
}

static inline long arch_result(const struct user_regs_struct *regs)
{
	return regs->regs[0];
}

static inline uint64_t arch_stack(const struct user_regs_struct *regs)
{
	return regs->sp;
}

static inline uint64_t arch_instruction(const struct user_regs_struct *regs)
{
	return regs->pc - ARCH_INSTRUCTION_SIZE;
}

/* `svc #0` */
static inline bool arch_is_call(const struct user_regs_struct *regs, uint32_t instruction)
{
	(void)regs;
	return instruction == 0xd4000001;
}

/* then pc is back on the instruction already, and arch_is_call() fails */
static inline bool arch_is_restart(const struct user_regs_struct *regs)
{
	(void)regs;
	return false;
}

static inline int arch_restart(pid_t tid)
{
	(void)tid;
	return -ENOSYS;
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

#endif
