// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Workers and episodes
 *
 * fuzz MOUNT BUS SECONDS SEED [WORKER EPISODE]
 *
 * BUS is the directory of a bus that anybody may open and that lives longer than
 * this. With WORKER and EPISODE only that episode is run, over and over again.
 * Says on stdout, in JSON, what was done; exits with 1 if something happened
 * that must never happen.
 */

#include <errno.h>
#include <grp.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "fuzz.h"

#define N_WORKERS 4
#define EPISODE_MS 1500
/* How long a process may take to vanish after SIGKILL. */
#define DEATH_MS 20000

Shared *shared;
uint8_t *payload;

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void die(const char *what)
{
	perror(what);
	exit(2);
}

/**
 * report() - something happened that must never happen
 * @thread:		who saw it
 * @format:		what it was
 *
 * Only the first one is kept: the others tend to follow from it.
 */
void report(Thread *thread, const char *format, ...)
{
	va_list arguments;
	int n;

	if (__atomic_fetch_add(&shared->n_reports, 1, __ATOMIC_SEQ_CST))
		return;
	n = snprintf(shared->report, REPORT_SIZE,
		     "seed %" PRIu64 " worker %u episode %u thread %u step %u, %s: ", thread->seed,
		     thread->worker, thread->episode, thread->number, thread->step, thread->action);
	va_start(arguments, format);
	vsnprintf(shared->report + n, REPORT_SIZE - n, format, arguments);
	va_end(arguments);
}

/* --- an episode */

static void ignore_signal(int number)
{
	(void)number;
}

static void handle(int number, int flags)
{
	struct sigaction action = { .sa_handler = ignore_signal, .sa_flags = flags };

	sigaction(number, &action, NULL);
}

static void thread_seed(Thread *thread, unsigned int number)
{
	thread->number = number;
	thread->action = "start";
	thread->rng.state = thread->seed;
	thread->rng.state = rng_next(&thread->rng) + thread->worker;
	thread->rng.state = rng_next(&thread->rng) + thread->episode;
	thread->rng.state = rng_next(&thread->rng) + number;
}

/* Becomes somebody: often root, or else a user without rights, maybe elsewhere. */
static void become(Thread *thread)
{
	static const unsigned int uids[] = { 0, 0, 0, 65534, 60001, 60002 };
	unsigned int uid = uids[below(thread, N_ELEMENTS(uids))];
	struct rlimit files = { 256, 256 };

	if (one_in(thread, 8))
		files.rlim_cur = files.rlim_max = 24 + below(thread, 24);
	setrlimit(RLIMIT_NOFILE, &files);

	if (one_in(thread, 8) && unshare(CLONE_NEWPID) < 0)
		die("unshare");
	if (uid) {
		if (setgroups(0, NULL) < 0 || setresgid(uid, uid, uid) < 0 ||
		    setresuid(uid, uid, uid) < 0)
			die("setresuid");
	}
	/* May be forbidden to those without rights. */
	if (one_in(thread, 12))
		unshare(CLONE_NEWUSER);
	thread->client->uid = uid;
	prctl(PR_SET_DUMPABLE, 1);
}

static void *run_thread(void *data)
{
	Thread *thread = data;
	uint64_t n_steps = UINT64_C(20) << below(thread, 8);

	thread->client->tids[thread->number] = gettid();
	for (uint64_t n = below(thread, n_steps); n > 0; n--)
		act(thread);
	return NULL;
}

static _Noreturn void run_episode(Thread *first)
{
	static Client client;
	static Thread threads[N_THREADS];
	int restart = one_in(first, 2) ? SA_RESTART : 0;
	unsigned int n_threads = one_in(first, 2) ? 1 : 1 + below(first, N_THREADS);
	bool join = one_in(first, 2);

	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	client.mount = first->client->mount;
	client.bus = first->client->bus;
	first->client = &client;
	become(first);

	handle(SIGUSR1, 0);
	handle(SIGUSR2, SA_RESTART);
	handle(SIGALRM, restart);
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);

	client_init(&client, first);
	for (unsigned int i = 0; i < n_threads; i++) {
		threads[i] = *first;
		thread_seed(&threads[i], i + 1);
		if (arena_init(&threads[i].command) < 0 || arena_init(&threads[i].message) < 0)
			die("arena");
	}
	for (unsigned int i = 1; i < n_threads; i++)
		if (pthread_create(&client.threads[i], NULL, run_thread, &threads[i]))
			_exit(0);
	run_thread(&threads[0]);
	if (join)
		for (unsigned int i = 1; i < n_threads; i++)
			pthread_join(client.threads[i], NULL);
	_exit(0);
}

/* Waits for a child until @deadline; -ETIMEDOUT if it is there still. */
static int wait_for(pid_t child, int64_t deadline)
{
	struct pollfd pollfd = { .events = POLLIN };
	int64_t left;
	int r = 0;

	pollfd.fd = syscall(SYS_pidfd_open, child, 0);
	if (pollfd.fd < 0)
		die("pidfd_open");
	while (!(pollfd.revents & POLLIN)) {
		left = deadline - now_ms();
		if (left < 0) {
			r = -ETIMEDOUT;
			break;
		}
		poll(&pollfd, 1, (int)left);
	}
	close(pollfd.fd);
	if (!r)
		waitpid(child, NULL, 0);
	return r;
}

/* Kills all that is left of an episode. */
static void reap(Thread *thread, pid_t group)
{
	int64_t deadline = now_ms() + DEATH_MS;

	kill(-group, SIGKILL);
	while (waitpid(-1, NULL, WNOHANG) >= 0) {
		if (now_ms() > deadline) {
			thread->action = "end";
			report(thread, "a process does not die");
			return;
		}
		poll(NULL, 0, 1);
	}
}

static void run_worker(Thread *thread, int64_t end, bool once)
{
	pid_t child;

	prctl(PR_SET_CHILD_SUBREAPER, 1);
	while (now_ms() < end && !shared->n_reports) {
		int64_t patience = EPISODE_MS;

		thread_seed(thread, 0);
		if (one_in(thread, 3))
			patience = 1 + below(thread, 200);
		child = fork();
		if (child < 0)
			die("fork");
		if (child == 0)
			run_episode(thread);
		if (wait_for(child, now_ms() + patience) < 0) {
			__atomic_add_fetch(&shared->n_killed, 1, __ATOMIC_RELAXED);
			kill(child, SIGKILL);
			if (wait_for(child, now_ms() + DEATH_MS) < 0)
				report(thread, "process %d does not die", child);
		}
		reap(thread, child);
		__atomic_add_fetch(&shared->n_episodes, 1, __ATOMIC_RELAXED);
		thread->episode += !once;
	}
}

static void print_results(uint64_t seed)
{
	const char *name;
	uint64_t n;

	printf("{\"seed\": %" PRIu64 ", \"calls\": %" PRIu64 ", \"episodes\": %" PRIu64
	       ", \"killed\": %" PRIu64 ", \"report\": \"%s\", \"results\": {",
	       seed, shared->n_calls, shared->n_episodes, shared->n_killed, shared->report);
	for (unsigned int i = 0; i < N_CODES; i++) {
		printf("%s\"%s\": {\"0\": %" PRIu64, i ? ", " : "", code_names[i],
		       shared->n_results[i][0]);
		for (int error = 1; error < N_ERRORS; error++) {
			n = shared->n_results[i][error];
			name = strerrorname_np(error);
			if (n)
				printf(", \"%s\": %" PRIu64, name ? name : "?", n);
		}
		printf("}");
	}
	printf("}}\n");
}

int main(int argc, char **argv)
{
	static Client client;
	Thread thread = { .client = &client };
	struct rlimit no_core = {};
	pid_t workers[N_WORKERS];
	int64_t end;

	if (argc != 5 && argc != 7) {
		fprintf(stderr, "usage: fuzz MOUNT BUS SECONDS SEED [WORKER EPISODE]\n");
		return 2;
	}
	client.mount = argv[1];
	client.bus = argv[2];
	end = now_ms() + atoi(argv[3]) * INT64_C(1000);
	thread.seed = strtoull(argv[4], NULL, 0);

	setrlimit(RLIMIT_CORE, &no_core);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	payload = mmap(NULL, PAYLOAD_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		       0);
	if (shared == MAP_FAILED || payload == MAP_FAILED)
		die("mmap");

	if (argc == 7) {
		thread.worker = (unsigned int)atoi(argv[5]);
		thread.episode = (unsigned int)atoi(argv[6]);
		run_worker(&thread, end, true);
	} else {
		for (thread.worker = 0; thread.worker < N_WORKERS; ++thread.worker) {
			workers[thread.worker] = fork();
			if (workers[thread.worker] == 0) {
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				run_worker(&thread, end, false);
				_exit(0);
			}
		}
		for (unsigned int i = 0; i < N_WORKERS; i++)
			waitpid(workers[i], NULL, 0);
	}

	print_results(thread.seed);
	return shared->n_reports ? 1 : 0;
}
