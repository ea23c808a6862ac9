/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * close(2) in a thread of its own, for somebody who waits no longer than so long.
 */
int kdbusfs_close_quickly(int fd, int64_t timeout_ns);
void kdbusfs_close_join(int number);
