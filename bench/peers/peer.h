// SPDX-License-Identifier: LGPL-2.1-or-later
#pragma once

/*
 * What every peer has to offer, and what main() in peer.c does for all of them
 *
 * A peer is a program that carries messages in its way: client, servers and what
 * lies between. main() forks the servers, takes the samples and ends all; a peer
 * supplies the five functions below. Whatever fails ends the program, loudly.
 */

#include <err.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SERVER_NAME "org.example.Bench"
#define MEMFD_SIZE (64UL << 20)
#define BUFFER_SIZE (1UL << 20)

typedef enum Operation {
	ECHO,        /* n bytes there and back */
	CREDENTIALS, /* 8 bytes there and back, both told who sent them where the peer can */
	STREAM,      /* n bytes there, many times, and one question how often */
	BROADCAST,   /* 64 bytes to n receivers */
	DESCRIPTOR,  /* one descriptor there, a byte back */
	MEMFD,       /* a sealed memfd there, where it is mapped; a byte back */
	CONNECT,     /* connect, say hello, disconnect */
	CONNECTIONS, /* 8 bytes there and back beside n other connections, */
	NAMES,       /* names, */
	MATCHES,     /* or matches */
} Operation;

/* the first byte of each message tells the server what to do */
#define TO_ECHO 'e'  /* send all of it back */
#define TO_COUNT 'c' /* count it */
#define TO_TELL 't'  /* send a uint64_t back: how many were counted since the last time */

typedef struct Job {
	Operation operation;
	const char *address; /* of the bus, or a directory to make sockets in */
	size_t n;
	size_t size;       /* bytes of a message */
	size_t n_messages; /* in a stream */
	size_t n_servers;
} Job;

extern Job job;

/* whether this peer has this operation */
bool peer_can(void);
/* before any server is there */
void peer_prepare(void);
/* in a process of its own: set up, say server_ready(), serve for ever */
_Noreturn void peer_serve(size_t index);
/* in the client: connect; add connections, names, or matches to the bus */
void peer_open(void);
void peer_crowd(size_t n);
/* one operation, also CONNECT; all of it is timed */
void peer_once(void);

bool child_new(void);
void server_ready(void);
void broadcast_arm(void);
void broadcast_received(void);
void broadcast_wait(void);
void memfd_check(int fd);
void echo_check(const void *data, size_t n);

/* sealed, and made once; /dev/null */
int memfd_get(void);
int descriptor_get(void);
/* page-aligned, of BUFFER_SIZE; the first byte is a TO_* */
uint8_t *buffer_new(uint8_t to);

static inline void check(int r, const char *what)
{
	if (r < 0) {
		errno = -r;
		err(EXIT_FAILURE, "%s", what);
	}
}

static inline void check_errno(long r, const char *what)
{
	if (r < 0)
		err(EXIT_FAILURE, "%s", what);
}

/* whether an operation is made of calls of 8 bytes */
static inline bool operation_is_call(void)
{
	return job.operation != STREAM && job.operation != BROADCAST &&
	       job.operation != DESCRIPTOR && job.operation != MEMFD;
}
