/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mounts, by descriptor: open_tree(2), fsopen(2), fsmount(2), move_mount(2), umount2(2).
 * All functions return a descriptor or 0, or -errno.
 */
int kdbusfs_mount_id(int fd, uint64_t *id, uint64_t *unique_id);
int kdbusfs_mount_new(const char *type, const char *const *options, int noexec);
int kdbusfs_mount_clone(const char *path);
int kdbusfs_mount_attach(int mount, int directory);
int kdbusfs_mount_detach(const char *path);
int kdbusfs_mount_namespace(void);
