/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading /proc and pidfds in one call each: from Python, each of open, read and close costs about as
 * much as the kernel takes for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "proc.h"

#define PIDFD_THREAD_ O_EXCL /* Linux 6.9 */
#define PIDFS_MAGIC 0x50494446

static int64_t read_file(const char *path, void *to, uint64_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, to, size);
	n = n < 0 ? -errno : n;
	close(fd);
	return n;
}

/* As much of /proc/@tid/@name as one read(2) gives. */
int64_t kdbusfs_proc_read(int32_t tid, const char *name, void *to, uint64_t size)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", tid, name);
	return read_file(path, to, size);
}

int64_t kdbusfs_proc_link(int32_t tid, const char *name, void *to, uint64_t size)
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%d/%s", tid, name);
	n = readlink(path, to, size);
	return n < 0 ? -errno : n;
}

/*
 * What tells the root directory of @tid from others: the fdinfo of a descriptor of it, which has its
 * mount and inode, and its path. The directory may be in a file system that a user serves, and
 * nothing of this asks it. The path may be longer than any buffer for one: ENAMETOOLONG.
 */
int64_t kdbusfs_proc_root(int32_t tid, void *to, uint64_t size)
{
	char path[64];
	int64_t n, m;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/root", tid);
	fd = open(path, O_PATH | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	n = read_file(path, to, size);
	if (n >= 0) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		m = readlink(path, (char *)to + n, size - n);
		n = m < 0 ? -errno : n + m;
	}
	close(fd);
	return n;
}

/* struct pidfd_info as it was first (Linux 6.13), of which the kernel fills in what fits. */
struct info {
	uint64_t mask, cgroup;
	uint32_t pid, tgid, ppid;
	uint32_t ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
	int32_t exit_code;
};

#define PIDFD_GET_INFO_ _IOWR(0xFF, 11, struct info)
#define PIDFD_INFO_WANTED 3 /* numbers and credentials */

static int is_pidfs(int pidfd)
{
	static int known;
	struct statfs fs;

	if (!known && fstatfs(pidfd, &fs) == 0)
		known = fs.f_type == PIDFS_MAGIC ? 1 : -1;
	return known > 0;
}

/*
 * Numbers and credentials of @tid, right now, without the text that /proc makes of them, which takes
 * five times as long. @identity is a number that no other thread has or will have. @ids: thread,
 * process, parent, then real, effective, saved and filesystem ids, of user and group by turns.
 * -ENOTTY and others where the kernel does not tell: before Linux 6.13, and of a thread whose
 * parent is outside of our PID namespace.
 */
int kdbusfs_pidfd_info(int32_t tid, uint64_t *identity, uint32_t *ids)
{
	struct info info = { .mask = PIDFD_INFO_WANTED };
	int fd = syscall(SYS_pidfd_open, tid, PIDFD_THREAD_), r = 0;
	struct stat st;

	if (fd < 0)
		return -errno;
	if (!is_pidfs(fd))
		r = -ENOTTY;
	else if (ioctl(fd, PIDFD_GET_INFO_, &info) < 0 || fstat(fd, &st) < 0)
		r = -errno;
	else if ((info.mask & PIDFD_INFO_WANTED) != PIDFD_INFO_WANTED || info.pid != (uint32_t)tid)
		r = -ENOTTY;
	close(fd);
	if (r < 0)
		return r;
	*identity = st.st_ino;
	memcpy(ids, &info.pid, 11 * sizeof(*ids));
	return 0;
}

/* A copy of descriptor @fd of @tid. -EINVAL before Linux 6.9, which has no pidfds of threads. */
int kdbusfs_pidfd_take(int32_t tid, int fd)
{
	int pidfd = syscall(SYS_pidfd_open, tid, PIDFD_THREAD_), copy;

	if (pidfd < 0)
		return -errno;
	copy = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	copy = copy < 0 ? -errno : copy;
	close(pidfd);
	return copy;
}

static int option(int fd, int name)
{
	socklen_t size = sizeof(int);
	int value;

	return getsockopt(fd, SOL_SOCKET, name, &value, &size) < 0 ? -1 : value;
}

/* How many files lie in the queue of an AF_UNIX socket, -ENOTTY where the kernel does not tell. */
static int queued_files(int fd)
{
	static const char field[] = "\nscm_fds:";
	char path[64], text[1024];
	const char *found;
	int64_t n;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	n = read_file(path, text, sizeof(text) - 1);
	if (n < 0)
		return n;
	text[n] = 0;
	found = strstr(text, field);
	return found ? atoi(found + sizeof(field) - 1) : -ENOTTY;
}

/*
 * Lets nothing be sent any more to @fd, which has to be an AF_UNIX socket of type SOCK_SEQPACKET
 * whose other end is user @uid's: else -EINVAL. Returns how many files lie in its queue, to which none
 * can be added; another negative errno if that is not known.
 */
int kdbusfs_make_channel(int fd, uint32_t uid)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);
	int n;

	if (option(fd, SO_DOMAIN) != AF_UNIX || option(fd, SO_TYPE) != SOCK_SEQPACKET ||
	    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != uid ||
	    shutdown(fd, SHUT_RD) < 0)
		return -EINVAL;
	n = queued_files(fd);
	return n == -EINVAL ? -ENOTTY : n;
}
