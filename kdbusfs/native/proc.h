/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the system tells of a thread that is held in its call: /proc/TID (proc(5)) and pidfds.
 * All functions return a count or 0, or -errno.
 */
int64_t kdbusfs_proc_read(int32_t tid, const char *name, void *to, uint64_t size);
int64_t kdbusfs_proc_link(int32_t tid, const char *name, void *to, uint64_t size);
int64_t kdbusfs_proc_root(int32_t tid, void *to, uint64_t size);
int kdbusfs_pidfd_info(int32_t tid, uint64_t *identity, uint32_t *ids);
int kdbusfs_pidfd_take(int32_t tid, int fd);
int kdbusfs_make_channel(int fd, uint32_t uid);
