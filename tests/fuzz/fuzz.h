/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * A fuzzer of kdbus's system calls
 *
 * A handful of workers run one episode after the other. An episode is a process
 * (maybe of another user, in other namespaces, with few descriptors) whose
 * threads share one table of files and do random things with them. Commands are
 * built so that they could succeed, from what earlier ones brought to light, and
 * then many are damaged. Episodes end by themselves or are killed.
 *
 * All decisions of a thread come from a generator seeded with (seed, worker,
 * episode, thread). What they meet depends on the scheduler as well.
 */

#include <kdbus/extension.h>
#include <linux/kdbus.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Arena Arena;
typedef struct Client Client;
typedef struct Command Command;
typedef struct Mail Mail;
typedef struct Map Map;
typedef struct Rng Rng;
typedef struct Shared Shared;
typedef struct Thread Thread;

#define ALIGN8(x) (((x) + 7) & ~UINT64_C(7))
#define N_ELEMENTS(x) (sizeof(x) / sizeof(*(x)))

#define ARENA_SIZE (UINT64_C(1) << 17)
#define COMMAND_MAX (UINT64_C(1) << 16)
#define PAYLOAD_SIZE (UINT64_C(4) << 20)
#define N_FILES 24
#define N_OTHERS 12
#define N_MAPS 8
#define N_IDS 64
#define N_MAIL 16
#define N_OFFSETS 16
#define N_THREADS 4
#define N_CODES 19
#define N_ERRORS 256
#define REPORT_SIZE 4096

/* splitmix64 */
struct Rng {
	uint64_t state;
};

/* What all processes see. */
struct Shared {
	uint64_t ids[N_IDS]; /* of connections, on whatever bus */
	uint64_t n_calls;
	uint64_t n_episodes;
	uint64_t n_killed;
	uint64_t n_results[N_CODES][N_ERRORS]; /* by index into codes[], and by errno */
	uint64_t n_reports;
	char report[REPORT_SIZE]; /* of the first thing that must never happen */
};

/* A message that was received, for a reply to refer to. */
struct Mail {
	uint64_t src_id;
	uint64_t cookie;
};

/* A mapping of a file. */
struct Map {
	uint8_t *address;
	uint64_t size;
	bool writable;
};

/* A process's things; its threads use them at the same time, without locks. */
struct Client {
	int files[N_FILES];    /* kdbus nodes, or -1 */
	uint64_t ids[N_FILES]; /* of the connections among them, or 0 */
	int others[N_OTHERS];  /* what else can be sent or polled */
	Map maps[N_MAPS];
	Mail mail[N_MAIL];
	uint64_t offsets[N_OFFSETS]; /* of slices, in whatever pool */
	uint64_t n_mail;
	uint64_t n_offsets;
	uint64_t page[4096]; /* commands that several threads write to */
	pthread_t threads[N_THREADS];
	int tids[N_THREADS];
	const char *mount;
	const char *bus; /* directory of a bus that outlives all episodes */
	unsigned int uid;
};

/* Memory to put arguments in: @rw is followed by nothing; @ro is the same
 * memory, which can't be written to. */
struct Arena {
	uint8_t *rw;
	uint8_t *ro;
};

struct Thread {
	Rng rng;
	Client *client;
	Arena command;
	Arena message;
	uint64_t seed;
	unsigned int worker;
	unsigned int episode;
	unsigned int number;
	unsigned int step;
	const char *action;
};

/* A command or a message under construction. */
struct Command {
	uint64_t size; /* what is there, padding of the last item too */
	uint64_t data[COMMAND_MAX / 8 + 16];
};

extern Shared *shared;
extern uint8_t *payload; /* PAYLOAD_SIZE bytes to send from */
extern const unsigned int codes[N_CODES];
extern const char *const code_names[N_CODES];

/* fuzz.c */
void report(Thread *thread, const char *format, ...) __attribute__((__format__(printf, 2, 3)));

/* build.c */
void build(Thread *thread, Command *command, unsigned int code);
void build_message(Thread *thread, Command *command, bool sync);
void damage(Thread *thread, Command *command);
uint64_t strange_number(Thread *thread);
uint64_t strange_address(Thread *thread);

/* action.c */
int arena_init(Arena *arena);
void client_init(Client *client, Thread *thread);
void act(Thread *thread);

static inline uint64_t rng_next(Rng *rng)
{
	uint64_t z = (rng->state += UINT64_C(0x9e3779b97f4a7c15));

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static inline uint64_t below(Thread *thread, uint64_t n)
{
	return rng_next(&thread->rng) % n;
}

static inline bool one_in(Thread *thread, uint64_t n)
{
	return !below(thread, n);
}
