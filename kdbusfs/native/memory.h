/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The memory of a process that is held in its call, and our mappings of pools.
 * All functions return a count or 0, or -errno. Those that may stall are operations, with a
 * number: -ESTALE if somebody has overtaken it (peer/stall.py) when it ends.
 */
int64_t kdbusfs_vm_read(int32_t tid, uint64_t address, void *to, uint64_t size);
int64_t kdbusfs_vm_read_some(int32_t tid, uint64_t address, void *to, uint64_t size);
int64_t kdbusfs_vm_write(int32_t tid, uint64_t address, const void *from, uint64_t size);
int64_t kdbusfs_vm_store(int32_t tid, uint64_t address, const void *from, uint64_t size);
int64_t kdbusfs_vm_fill(int32_t tid, void *to, const uint64_t *segments, uint64_t n_segments);
int64_t kdbusfs_read_cmdline(int32_t tid, void *to, uint64_t size);
int64_t kdbusfs_push(int device, const void *header, uint64_t n_header, const void *data,
		     uint64_t size);

int64_t kdbusfs_push_held(int device, const void *header, uint64_t n_header, const void *data,
			  uint64_t size);

uint64_t kdbusfs_watch(int64_t period_ns);
void kdbusfs_watch_end(void);
int kdbusfs_overtake(uint64_t number);

void *kdbusfs_map(int fd, uint64_t size);
int kdbusfs_unmap(void *address, uint64_t size);

int kdbusfs_is_held(int device, int pidfd);
int kdbusfs_inotify_init(void);
int kdbusfs_inotify_add(int inotify, int fd);

int kdbusfs_pidfd_open(int32_t tid);
int kdbusfs_pidfd_open_process(int32_t pid);
int kdbusfs_pidfd_getfd(int pidfd, int fd);
int kdbusfs_stat(int fd, uint32_t *mode, uint32_t *major, uint32_t *minor);
