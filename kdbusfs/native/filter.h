/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * kdbusfs_filter_run() - what a seccomp filter says to a system call
 * @program:      n struct sock_filter, as PTRACE_SECCOMP_GET_FILTER gives them
 * @n:            how many
 * @nr, @arch, @instruction_pointer, @args: the fields of struct seccomp_data
 *
 * Return: its SECCOMP_RET_*, or 0 (SECCOMP_RET_KILL_THREAD) if it makes no sense
 */
uint32_t kdbusfs_filter_run(const uint64_t *program, uint32_t n, int32_t nr, uint32_t arch,
			    uint64_t instruction_pointer, const uint64_t *args);
