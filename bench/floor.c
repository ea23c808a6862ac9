// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The floor: a FUSE server that does nothing
 *
 * Mounts at the directory given and offers one file, `bus`, which answers each
 * ioctl with success and each poll with POLLOUT. It reads one request and
 * writes one reply, in one thread, with no state. What one ioctl costs here is
 * what one FUSE round trip costs on this machine, so that what kdbusfs costs
 * can be told as a multiple of it.
 *
 * Prints `ready` once mounted. SIGTERM and SIGINT unmount and exit.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILE_NODEID 2
#define REQUEST_MAX (128 * 1024)

static const char *mountpoint;

/*
 * Everything happens in the handler: leaving it to the read loop would lose a
 * signal that comes between a check and the read.
 */
static void on_signal(int signal)
{
	(void)signal;
	umount2(mountpoint, MNT_DETACH);
	_exit(0);
}

static int reply(int device, uint64_t unique, int error, const void *body, size_t n_body)
{
	struct fuse_out_header header = {
		.len = sizeof(header) + n_body,
		.error = -error,
		.unique = unique,
	};
	struct iovec parts[] = {
		{ &header, sizeof(header) },
		{ (void *)body, n_body },
	};

	/* ENOENT: the caller was killed while it waited */
	if (writev(device, parts, n_body ? 2 : 1) < 0 && errno != ENOENT)
		return -errno;

	return 0;
}

static struct fuse_attr node_attr(uint64_t nodeid)
{
	if (nodeid == FUSE_ROOT_ID)
		return (struct fuse_attr){ .ino = nodeid, .mode = S_IFDIR | 0755, .nlink = 2 };

	return (struct fuse_attr){ .ino = nodeid, .mode = S_IFREG | 0666, .nlink = 1 };
}

static int handle(int device, const struct fuse_in_header *request)
{
	const void *body = request + 1;

	switch (request->opcode) {
	case FUSE_INIT: {
		struct fuse_init_out out = {
			.major = FUSE_KERNEL_VERSION,
			.minor = 31,
			.max_write = 4096,
			.max_background = 64,
			.congestion_threshold = 48,
		};

		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_LOOKUP: {
		struct fuse_entry_out out = {
			.nodeid = FILE_NODEID,
			.attr = node_attr(FILE_NODEID),
		};

		if (request->nodeid != FUSE_ROOT_ID || strcmp(body, "bus"))
			return reply(device, request->unique, ENOENT, NULL, 0);
		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_GETATTR: {
		struct fuse_attr_out out = { .attr = node_attr(request->nodeid) };

		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_OPEN: {
		struct fuse_open_out out = { .open_flags = FOPEN_DIRECT_IO };

		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_IOCTL: {
		struct fuse_ioctl_out out = {};

		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_POLL: {
		struct fuse_poll_out out = { .revents = POLLOUT };

		return reply(device, request->unique, 0, &out, sizeof(out));
	}
	case FUSE_FLUSH:
	case FUSE_RELEASE:
		return reply(device, request->unique, 0, NULL, 0);
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return 0; /* these want no reply */
	default:
		return reply(device, request->unique, ENOSYS, NULL, 0);
	}
}

static int serve(int device)
{
	void *request;
	ssize_t l;
	int r;

	request = malloc(REQUEST_MAX);
	if (!request)
		return -ENOMEM;

	for (;;) {
		l = read(device, request, REQUEST_MAX);
		if (l < 0) {
			if (errno == EINTR || errno == EAGAIN || errno == ENOENT)
				continue;
			r = errno == ENODEV ? 0 : -errno; /* ENODEV: unmounted */
			break;
		}

		r = handle(device, request);
		if (r < 0)
			break;
	}

	free(request);
	return r;
}

int main(int argc, char **argv)
{
	char options[128];
	int device, r;

	if (argc != 2) {
		fprintf(stderr, "usage: %s MOUNTPOINT\n", argv[0]);
		return 2;
	}

	mountpoint = argv[1];
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (device < 0) {
		fprintf(stderr, "/dev/fuse: %s\n", strerror(errno));
		return 1;
	}

	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other",
		 device);
	if (mount("kdbusfs-floor", mountpoint, "fuse.kdbusfs-floor",
		  MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0) {
		fprintf(stderr, "mount %s: %s\n", mountpoint, strerror(errno));
		return 1;
	}

	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	puts("ready");
	fflush(stdout);

	r = serve(device);
	if (r < 0) {
		fprintf(stderr, "floor: %s\n", strerror(-r));
		umount2(mountpoint, MNT_DETACH);
		return 1;
	}

	return 0;
}
