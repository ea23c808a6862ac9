// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * PEER OPERATION ADDRESS N MILLISECONDS: fork servers, take samples, print their median
 *
 * Prints the nanoseconds of one operation (of one message of a stream), and how many
 * operations there were in all. Exits with
 * 77 if the peer does not have this operation.
 */

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "peer.h"

#define EXIT_CANNOT 77
#define N_CHILDREN_MAX 128
#define N_SAMPLES_MAX 100000
#define N_SAMPLES_MIN 3

static const char *const operations[] = {
	[ECHO] = "echo",           [CREDENTIALS] = "credentials", [STREAM] = "stream",
	[BROADCAST] = "broadcast", [DESCRIPTOR] = "descriptor",   [MEMFD] = "memfd",
	[CONNECT] = "connect",     [CONNECTIONS] = "connections", [NAMES] = "names",
	[MATCHES] = "matches",
};

#define N_OPERATIONS (sizeof(operations) / sizeof(*operations))

Job job;

static atomic_size_t *n_missing; /* receivers that have not got the broadcast yet */
static int all_received = -1;
static int ready[2];
static pid_t children[N_CHILDREN_MAX];
static size_t n_children;
static uint64_t samples[N_SAMPLES_MAX];

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

void server_ready(void)
{
	check_errno(write(ready[1], "r", 1), "ready");
}

static void broadcast_prepare(void)
{
	n_missing = mmap(NULL, sizeof(*n_missing), PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (n_missing == MAP_FAILED)
		err(EXIT_FAILURE, "mmap");
	all_received = eventfd(0, EFD_CLOEXEC);
	check_errno(all_received, "eventfd");
}

void broadcast_arm(void)
{
	atomic_store(n_missing, job.n_servers);
}

void broadcast_received(void)
{
	uint64_t one = 1;

	if (atomic_fetch_sub(n_missing, 1) == 1)
		check_errno(write(all_received, &one, sizeof(one)), "eventfd");
}

void broadcast_wait(void)
{
	uint64_t one;

	check_errno(read(all_received, &one, sizeof(one)), "eventfd");
}

uint8_t *buffer_new(uint8_t to)
{
	uint8_t *buffer = mmap(NULL, BUFFER_SIZE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (buffer == MAP_FAILED)
		err(EXIT_FAILURE, "mmap");
	memset(buffer, 'x', BUFFER_SIZE);
	buffer[0] = to;
	return buffer;
}

int memfd_get(void)
{
	static int fd = -1;
	uint8_t *data;

	if (fd >= 0)
		return fd;

	fd = memfd_create("bench", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	check_errno(fd, "memfd_create");
	check_errno(ftruncate(fd, MEMFD_SIZE), "ftruncate");
	data = mmap(NULL, MEMFD_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (data == MAP_FAILED)
		err(EXIT_FAILURE, "mmap");
	memset(data, 'm', MEMFD_SIZE);
	munmap(data, MEMFD_SIZE);
	check_errno(fcntl(fd, F_ADD_SEALS,
			  F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL),
		    "F_ADD_SEALS");
	return fd;
}

int descriptor_get(void)
{
	static int fd = -1;

	if (fd < 0) {
		fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
		check_errno(fd, "/dev/null");
	}
	return fd;
}

/* what a receiver does before it believes a memfd, and a look at both its ends */
void memfd_check(int fd)
{
	const volatile uint8_t *data;
	int seals = fcntl(fd, F_GET_SEALS);

	if (seals < 0 || !(seals & F_SEAL_WRITE) || !(seals & F_SEAL_SHRINK))
		errx(EXIT_FAILURE, "the memfd is not sealed");
	data = mmap(NULL, MEMFD_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (data == MAP_FAILED)
		err(EXIT_FAILURE, "mmap");
	if (data[0] != 'm' || data[MEMFD_SIZE - 1] != 'm')
		errx(EXIT_FAILURE, "wrong bytes in the memfd");
	munmap((void *)data, MEMFD_SIZE);
}

void echo_check(const void *data, size_t n)
{
	const uint8_t *bytes = data;

	if (n != job.size || bytes[0] != TO_ECHO || bytes[n - 1] != 'x')
		errx(EXIT_FAILURE, "wrong bytes came back (%zu of them)", n);
}

static int compare(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return a < b ? -1 : a > b;
}

/* operations for so long; returns how many samples there are */
static size_t run(uint64_t ns)
{
	uint64_t start, end, until;
	size_t n = 0;

	end = now_ns();
	until = end + ns;
	while (n < N_SAMPLES_MAX && (n < N_SAMPLES_MIN || end < until)) {
		start = now_ns();
		peer_once();
		end = now_ns();
		samples[n++] = end - start;
	}
	return n;
}

/* returns true in the child, which ends with us */
bool child_new(void)
{
	if (n_children == N_CHILDREN_MAX)
		errx(EXIT_FAILURE, "too many children");
	children[n_children] = fork();
	check_errno(children[n_children], "fork");
	if (children[n_children++])
		return false;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	return true;
}

static void children_end(void)
{
	for (size_t i = 0; i < n_children; ++i)
		kill(children[i], SIGKILL);
	while (wait(NULL) > 0)
		;
}

static void servers_start(void)
{
	char byte;

	check_errno(pipe(ready), "pipe");
	for (size_t i = 0; i < job.n_servers; ++i)
		if (child_new()) {
			close(ready[0]);
			peer_serve(i);
		}
	close(ready[1]);
	for (size_t i = 0; i < job.n_servers; ++i)
		if (read(ready[0], &byte, 1) != 1)
			errx(EXIT_FAILURE, "a server failed");
}

static void job_init(char **argv)
{
	size_t i;

	for (i = 0; i < N_OPERATIONS && strcmp(operations[i], argv[1]); ++i)
		;
	if (i == N_OPERATIONS)
		errx(EXIT_FAILURE, "%s: no such operation", argv[1]);

	job = (Job){ .operation = i, .address = argv[2], .n = strtoul(argv[3], NULL, 10) };
	job.size = i == ECHO || i == STREAM ? job.n : i == BROADCAST ? 64 : 8;
	job.n_messages = i != STREAM ? 1 : job.size > 4096 ? 64 : 1000;
	job.n_servers = i == BROADCAST ? job.n : 1;
	if (job.size > BUFFER_SIZE)
		errx(EXIT_FAILURE, "%zu bytes: too many", job.size);
}

int main(int argc, char **argv)
{
	uint64_t ns;
	size_t n, n_warm;

	if (argc != 5)
		errx(EXIT_FAILURE, "usage: %s OPERATION ADDRESS N MILLISECONDS", argv[0]);
	job_init(argv);
	if (!peer_can())
		return EXIT_CANNOT;

	ns = strtoul(argv[4], NULL, 10) * UINT64_C(1000000);
	signal(SIGPIPE, SIG_IGN);
	broadcast_prepare();
	peer_prepare();
	servers_start();
	if (job.operation != CONNECT)
		peer_open();
	if (job.operation == CONNECTIONS || job.operation == NAMES || job.operation == MATCHES)
		peer_crowd(job.n);

	n_warm = run(ns / 5);
	n = run(ns);
	qsort(samples, n, sizeof(*samples), compare);
	printf("%" PRIu64 " %zu\n", samples[n / 2] / job.n_messages, n_warm + n);

	children_end();
	return EXIT_SUCCESS;
}
