// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * D-Bus by sd-bus: from client to daemon to server, and as far back
 *
 * Every message is made anew, as sd-bus has it. Its payload is an array of bytes,
 * which is the cheapest one to marshal.
 */

#include <stdio.h>
#include <systemd/sd-bus.h>
#include "peer.h"

#define PATH "/bench"
#define INTERFACE SERVER_NAME
#define TIMEOUT_US (20 * UINT64_C(1000000))

static sd_bus *client;
static uint8_t *out;

bool peer_can(void)
{
	return true;
}

void peer_prepare(void)
{
	out = buffer_new(job.operation == STREAM ? TO_COUNT : TO_ECHO);
}

static sd_bus *bus_open(void)
{
	sd_bus *bus;
	const char *unique;

	check(sd_bus_new(&bus), "sd_bus_new");
	check(sd_bus_set_address(bus, job.address), "sd_bus_set_address");
	check(sd_bus_set_bus_client(bus, true), "sd_bus_set_bus_client");
	check(sd_bus_negotiate_fds(bus, true), "sd_bus_negotiate_fds");
	check(sd_bus_start(bus), "sd_bus_start");
	check(sd_bus_get_unique_name(bus, &unique), "hello"); /* waits for it */
	return bus;
}

static void match_add(sd_bus *bus, const char *rule)
{
	check(sd_bus_call_method(bus, "org.freedesktop.DBus", "/org/freedesktop/DBus",
				 "org.freedesktop.DBus", "AddMatch", NULL, NULL, "s", rule),
	      "AddMatch");
}

static void message_send(sd_bus *bus, sd_bus_message *m)
{
	check(sd_bus_send(bus, m, NULL), "sd_bus_send");
	sd_bus_message_unref(m);
}

static void descriptor_take(sd_bus_message *m)
{
	int fd;

	check(sd_bus_message_read(m, "h", &fd), "descriptor"); /* closed with the message */
	if (job.operation == MEMFD)
		memfd_check(fd);
}

static void call_serve(sd_bus *bus, sd_bus_message *m, uint64_t *n_countedp)
{
	sd_bus_message *reply;
	const void *data = "x";
	size_t n = 1;

	if (job.operation == DESCRIPTOR || job.operation == MEMFD)
		descriptor_take(m);
	else
		check(sd_bus_message_read_array(m, 'y', &data, &n), "payload");

	if (*(const uint8_t *)data == TO_COUNT) {
		++*n_countedp;
		return;
	}
	check(sd_bus_message_new_method_return(m, &reply), "reply");
	if (*(const uint8_t *)data == TO_TELL) {
		data = n_countedp;
		n = sizeof(*n_countedp);
	}
	check(sd_bus_message_append_array(reply, 'y', data, n), "reply");
	message_send(bus, reply);
	if (data == n_countedp)
		*n_countedp = 0;
}

_Noreturn void peer_serve(size_t index)
{
	sd_bus *bus = bus_open();
	sd_bus_message *m;
	uint64_t n_counted = 0;
	int r;

	(void)index;
	if (job.operation == BROADCAST)
		match_add(bus, "type='signal',interface='" INTERFACE "'");
	else
		check(sd_bus_request_name(bus, SERVER_NAME, 0), "name");
	server_ready();
	for (;;) {
		r = sd_bus_process(bus, &m);
		check(r, "sd_bus_process");
		if (!r) {
			check(sd_bus_wait(bus, UINT64_MAX), "sd_bus_wait");
			continue;
		}
		if (m && sd_bus_message_is_signal(m, INTERFACE, "Signal"))
			broadcast_received();
		else if (m && sd_bus_message_is_method_call(m, INTERFACE, "Call"))
			call_serve(bus, m, &n_counted);
		sd_bus_message_unref(m);
	}
}

void peer_open(void)
{
	client = bus_open();
}

void peer_crowd(size_t n)
{
	sd_bus *holder = bus_open();
	char text[128];

	for (size_t i = 0; i < n; ++i) {
		if (job.operation == CONNECTIONS) {
			bus_open();
		} else if (job.operation == NAMES) {
			snprintf(text, sizeof(text), "%s.n%zu", SERVER_NAME, i);
			check(sd_bus_request_name(holder, text, 0), "name");
		} else {
			snprintf(text, sizeof(text), "type='signal',interface='a.b%zu'", i);
			match_add(holder, text);
		}
	}
}

static sd_bus_message *call_new(sd_bus *bus)
{
	sd_bus_message *m;

	check(sd_bus_message_new_method_call(bus, &m, SERVER_NAME, PATH, INTERFACE, "Call"),
	      "call");
	return m;
}

/* sends it, and waits for the bytes that come back */
static void call(sd_bus *bus, sd_bus_message *m, sd_bus_message **replyp, const void **datap,
		 size_t *np)
{
	check(sd_bus_call(bus, m, TIMEOUT_US, NULL, replyp), "sd_bus_call");
	sd_bus_message_unref(m);
	check(sd_bus_message_read_array(*replyp, 'y', datap, np), "reply");
}

static void echo(sd_bus *bus)
{
	sd_bus_message *m = call_new(bus), *reply;
	const void *data;
	size_t n;

	check(sd_bus_message_append_array(m, 'y', out, job.size), "payload");
	call(bus, m, &reply, &data, &n);
	echo_check(data, n);
	sd_bus_message_unref(reply);
}

static void stream(void)
{
	static const uint8_t tell = TO_TELL;
	sd_bus_message *m, *reply;
	const void *data;
	size_t n;

	for (size_t i = 0; i < job.n_messages; ++i) {
		m = call_new(client);
		check(sd_bus_message_set_expect_reply(m, false), "no reply");
		check(sd_bus_message_append_array(m, 'y', out, job.size), "payload");
		message_send(client, m);
	}
	m = call_new(client);
	check(sd_bus_message_append_array(m, 'y', &tell, 1), "payload");
	call(client, m, &reply, &data, &n);
	if (n != sizeof(uint64_t) || *(const uint64_t *)data != job.n_messages)
		errx(EXIT_FAILURE, "messages were lost");
	sd_bus_message_unref(reply);
}

static void broadcast(void)
{
	sd_bus_message *m;

	broadcast_arm();
	check(sd_bus_message_new_signal(client, &m, PATH, INTERFACE, "Signal"), "signal");
	check(sd_bus_message_append_array(m, 'y', out, job.size), "payload");
	message_send(client, m);
	check(sd_bus_flush(client), "sd_bus_flush");
	broadcast_wait();
}

static void descriptor(int fd)
{
	sd_bus_message *m = call_new(client), *reply;
	const void *data;
	size_t n;

	check(sd_bus_message_append(m, "h", fd), "descriptor");
	call(client, m, &reply, &data, &n);
	sd_bus_message_unref(reply);
}

void peer_once(void)
{
	sd_bus *bus;

	switch (job.operation) {
	case STREAM:
		stream();
		break;
	case BROADCAST:
		broadcast();
		break;
	case DESCRIPTOR:
		descriptor(descriptor_get());
		break;
	case MEMFD:
		descriptor(memfd_get());
		break;
	case CONNECT:
		bus = bus_open();
		sd_bus_flush_close_unref(bus);
		break;
	default:
		echo(client);
	}
}
