/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mounts, by descriptor. glibc has functions for the newer of these calls from 2.36 on, and musl
 * has none, so they are called by number, whose names come from the system's headers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef FSOPEN_CLOEXEC
#include <linux/mount.h>
#endif

#include "mount.h"

#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x4000U /* Linux 6.8 */
#endif

/*
 * The mount that @fd was opened on: @id as in proc_pid_mountinfo(5), which the kernel gives to
 * another mount as soon as this one is gone, and @unique_id, which it never gives again; 0 on
 * kernels that have none. Nobody who serves a file system is asked.
 */
int kdbusfs_mount_id(int fd, uint64_t *id, uint64_t *unique_id)
{
	int flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
	struct statx st;

	if (statx(fd, "", flags, STATX_MNT_ID, &st) < 0)
		return -errno;
	if (!(st.stx_mask & STATX_MNT_ID))
		return -ENOSYS;
	*id = st.stx_mnt_id;
	if (statx(fd, "", flags, STATX_MNT_ID_UNIQUE, &st) < 0)
		return -errno;
	*unique_id = st.stx_mask & STATX_MNT_ID_UNIQUE ? st.stx_mnt_id : 0;
	return 0;
}

static int configure(int context, const char *const *options)
{
	for (; *options; options += 2) {
		int command = options[1] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;

		if (syscall(SYS_fsconfig, context, command, options[0], options[1], 0) < 0)
			return -errno;
	}
	if (syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		return -errno;
	return 0;
}

/*
 * A new file system, mounted nowhere; it is gone with the last descriptor unless it is attached.
 * @options are pairs of a name and a value, NULL for one without, and end with NULL.
 */
int kdbusfs_mount_new(const char *type, const char *const *options, int noexec)
{
	int attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (noexec ? MOUNT_ATTR_NOEXEC : 0);
	int context, fd, r;

	context = syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
	if (context < 0)
		return -errno;
	r = configure(context, options);
	if (r >= 0) {
		fd = syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes);
		r = fd < 0 ? -errno : fd;
	}
	close(context);
	return r;
}

/* A copy of all mounts at and below @path, mounted nowhere. */
int kdbusfs_mount_clone(const char *path)
{
	int fd = syscall(SYS_open_tree, AT_FDCWD, path,
			 OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);

	return fd < 0 ? -errno : fd;
}

/* Mounts what is mounted nowhere on @directory, on top of what is mounted there. */
int kdbusfs_mount_attach(int mount, int directory)
{
	if (syscall(SYS_move_mount, mount, "", directory, "",
		    MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0)
		return -errno;
	return 0;
}

/* Unmounts what is on top at @path and all below it, even if it is busy. Links are followed. */
int kdbusfs_mount_detach(const char *path)
{
	return umount2(path, MNT_DETACH) < 0 ? -errno : 0;
}

/* Gives the calling thread a mount namespace of its own: what is mounted and unmounted in it
 * reaches no other, while what others do reaches it. */
int kdbusfs_mount_namespace(void)
{
	if (unshare(CLONE_NEWNS) < 0)
		return -errno;
	return mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 ? -errno : 0;
}
