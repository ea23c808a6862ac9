// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * PROGRAM PATH: run dbus-broker on a socket at PATH, with everything allowed
 *
 * Its own launcher wants systemd. The broker takes its listening sockets, each with
 * a policy, from a controller, over D-Bus on a socket pair; this is one. Prints
 * "ready", and becomes the one who waits for it: SIGTERM ends both.
 */

#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>
#include "peer.h"

/* who may connect; own: allow, priority, prefix, name; send and receive: allow,
 * priority, four names, type, broadcast, least and most descriptors */
#define RULES "bta(btbs)a(btssssuutt)a(btssssuutt)"
/* by user; by range of users or groups; SELinux; AppArmor, and its name for the bus */
#define POLICY "(a(u(" RULES "))a(buu(" RULES "))a(ss)bs)"

static pid_t broker_start(int controller)
{
	char fd[16];
	pid_t pid = fork();

	check_errno(pid, "fork");
	if (pid)
		return pid;

	prctl(PR_SET_PDEATHSIG, SIGTERM);
	controller = dup(controller); /* without O_CLOEXEC */
	snprintf(fd, sizeof(fd), "%d", controller);
	execlp("dbus-broker", "dbus-broker", "--controller", fd, "--machine-id",
	       "0123456789abcdef0123456789abcdef", "--max-bytes", "1073741824", "--max-fds",
	       "65536", "--max-matches", "1000000", "--max-objects", "1000000", NULL);
	err(EXIT_FAILURE, "dbus-broker");
}

static int listener_new(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	check_errno(fd, "socket");
	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	check_errno(bind(fd, (struct sockaddr *)&address, sizeof(address)), path);
	check_errno(listen(fd, 256), "listen");
	return fd;
}

static void listener_add(sd_bus *bus, int fd)
{
	const uint64_t priority = 1;

	check(sd_bus_call_method(bus, NULL, "/org/bus1/DBus/Broker", "org.bus1.DBus.Broker",
				 "AddListener", NULL, NULL, "ohv", "/org/bus1/DBus/Listener/0", fd,
				 POLICY,
				 /* all users: connect */
				 1, UINT32_MAX, true, priority,
				 /* own */
				 1, true, priority, true, "",
				 /* send */
				 1, true, priority, "", "", "", "", 0, 0, UINT64_C(0), UINT64_MAX,
				 /* receive */
				 1, true, priority, "", "", "", "", 0, 0, UINT64_C(0), UINT64_MAX,
				 /* no ranges, no SELinux, no AppArmor */
				 0, 0, false, "bench"),
	      "AddListener");
}

int main(int argc, char **argv)
{
	int pair[2], status;
	sd_bus *bus;
	pid_t pid;

	if (argc != 2)
		errx(EXIT_FAILURE, "usage: %s PATH", argv[0]);
	check_errno(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair),
		    "socketpair");
	pid = broker_start(pair[1]);
	close(pair[1]);

	check(sd_bus_new(&bus), "sd_bus_new");
	check(sd_bus_set_fd(bus, pair[0], pair[0]), "sd_bus_set_fd");
	check(sd_bus_start(bus), "sd_bus_start");
	listener_add(bus, listener_new(argv[1]));
	puts("ready");
	fflush(stdout);

	check_errno(waitpid(pid, &status, 0), "waitpid");
	return EXIT_FAILURE;
}
