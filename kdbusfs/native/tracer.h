/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Threads held in a call of ours, and what only ptrace(2) can do to them
 *
 * A thread waits in a system call that this process will answer by writing
 * @reply to @device: an ioctl(2) on a FUSE mount, whose answer is a struct
 * fuse_out_header and what follows it. The functions below stop the thread on
 * its way out of that call, so that something can be done to it which no FUSE
 * reply can say.
 *
 * Who writes the reply: a negative return means that it was not written and
 * that the thread still waits, so the caller must answer it. With 0 it was.
 * Written exactly once, in both cases.
 *
 * Any thread may call. ptrace(2) ties a traced thread to one tracing thread, so
 * every call runs in a short-lived thread of its own, and the caller waits for
 * it, @timeout_ns (of CLOCK_MONOTONIC) and 3 seconds at most. A thread that does not come out
 * in time (its cgroup is frozen, its memory does not fault in) is let go. No more than 64 are so
 * under way at a time. Neither reads or writes the memory of the thread.
 *
 * Files on the mount must be opened with FOPEN_NOFLUSH: execve(2) closes files under the
 * lock that process_vm_readv(2) and pidfd_getfd(2) take, and would wait for FUSE_FLUSH.
 *
 * The process must not wait for just any child (waitpid(-1, ...)), since that
 * takes the stops of traced threads away; its SIGCHLD disposition does not
 * matter. The signal SIGRTMAX is used between threads of this process.
 *
 * Errors of all functions, none of them with the reply written:
 *   -EPERM      ptrace is refused: the thread is traced already (strace, gdb), is
 *               a thread of this process, or we lack CAP_SYS_PTRACE
 *   -ESRCH      no such thread, or it is being killed
 *   -ETIMEDOUT  could not be attached to in time (another thread of it execs)
 *   -EAGAIN     too many under way, or no thread to be had
 *   -EINVAL, -ENOMEM
 *   -ENOSYS     not on this architecture
 *   any error of write(2) to @device, -EIO for a short one
 */

/*
 * The sizes of the structs of KDBUS_CMD_SEND and KDBUS_CMD_RECV. The first is that of a struct
 * msghdr, too.
 */
#define KDBUSFS_MIN_ROOM 56
#define KDBUSFS_MAX_ROOM 64
#define KDBUSFS_MAX_STRAYS 8

/*
 * struct kdbusfs_install - a thread that is being given descriptors
 * @tracer:       private
 * @n_installed:  how many of the numbers are not -1
 * @held:         1: the thread is stopped, until kdbusfs_install_end();
 *                0: it died, or did not stop in time and runs on
 * @n_strays, @strays: descriptors of ours that the caller has to close, where it
 *                does not matter how long that takes: a stranger's, which only
 *                somebody who plays tricks sees to it that there are
 */
struct kdbusfs_install {
	void *tracer;
	uint32_t n_installed;
	int32_t held;
	uint32_t n_strays;
	int32_t strays[KDBUSFS_MAX_STRAYS];
};

/*
 * kdbusfs_install_begin() - put descriptors into the table of a waiting thread
 * @install:     filled in, even on errors
 * @device:      where to write @reply
 * @tid:         thread, as seen from our PID namespace
 * @pidfd:       of the thread, -1: none. It makes sure that @tid is still that thread
 * @room:        address of memory of the thread that may be used meanwhile
 * @content:     what is in there when the reply has been written
 * @room_size:   56 to 64 bytes
 * @fds:         descriptors of ours, which stay ours; -1 stands for one that is lost
 * @n_fds:       up to 512
 * @numbers:     n_fds numbers: the same file in the thread's table, close-on-exec,
 *               or -1 where that was impossible
 *
 * Writes the reply, stops the thread on its way back to user mode, and makes it
 * receive the descriptors. It does so in whichever namespaces it lives. A thread under a
 * seccomp filter that does not allow socket, fcntl, recvfrom, recvmsg, sendto and close gets
 * none. Its registers, memory, signal mask and pending signals are as before. Descriptors are
 * installed in order until RLIMIT_NOFILE is reached, just as if the kernel did it; but if that
 * is also the hard limit and we lack CAP_SYS_RESOURCE, the last slot stays free. One that can't
 * be sent over an AF_UNIX socket (an io_uring, or what a security module denies) is left out. A
 * thread that came by a 32-bit system call gets none.
 *
 * The thread is then still stopped, so that its numbers can be told to it. Call
 * kdbusfs_install_end() soon: after 2 seconds it loses the descriptors and runs on.
 *
 * Return: 0 with the reply written and the numbers filled in, else negative with
 *         the reply not written and all numbers -1
 */
int32_t kdbusfs_install_begin(struct kdbusfs_install *install, int32_t device, const void *reply,
			      uint64_t reply_size, int32_t tid, int32_t pidfd, uint64_t room,
			      const void *content, uint64_t room_size, const int32_t *fds,
			      uint32_t n_fds, int32_t *numbers, uint64_t timeout_ns);

/*
 * kdbusfs_install_end() - let the thread go, and wait until it has gone
 * @install:     from kdbusfs_install_begin(), whatever that returned; may be
 *               ended more than once
 * @content:     what the thread finds in its room, room_size bytes; NULL: what was there
 *
 * Return: 0, or -ETIMEDOUT if it took too long: then the thread has no descriptors
 */
int32_t kdbusfs_install_end(struct kdbusfs_install *install, const void *content);

/*
 * kdbusfs_tracer_hurry() - say how many others wait for a thread of the caller's
 *
 * While there are any, a thread that is late is given up after 100 ms. What the tracer needs for
 * as long as the process lives (a descriptor) is there after the first call.
 */
void kdbusfs_tracer_hurry(uint32_t n_waiting);
