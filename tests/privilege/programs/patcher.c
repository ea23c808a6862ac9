/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A receiver that changes its own code while it is made to receive descriptors.
 *
 * usage: patcher ENDPOINT exec PROGRAM   executes PROGRAM in that moment
 *        patcher ENDPOINT mkdir PATH     makes a directory, which a seccomp filter kills it for
 *
 * It sends itself descriptors, and receives each by a system call instruction of its own. A second
 * thread waits until a number is taken that was free, and makes a jump of that instruction, to
 * code that does what was asked for. Exit status 3: that was never reached.
 */
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kdbus.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)

#define TARGET 64

static volatile uint8_t *code;
static volatile int lowest, armed;

static void *patch(void *unused)
{
	(void)unused;
	for (;;) {
		while (!armed)
			;
		while (armed) {
			if (fcntl(lowest, F_GETFD) >= 0) {
				*(volatile uint16_t *)code = 0xeb | (TARGET - 2) << 8;
				armed = 0;
			}
		}
	}
	return NULL;
}

/* mov $nr, %eax; mov $a, %rdi; mov $b, %rsi; xor %edx, %edx; syscall; jmp . */
static void write_call(uint8_t *to, uint32_t nr, uint64_t a, uint64_t b)
{
	*to++ = 0xb8;
	memcpy(to, &nr, 4);
	memcpy(to + 4, "\x48\xbf", 2);
	memcpy(to + 6, &a, 8);
	memcpy(to + 14, "\x48\xbe", 2);
	memcpy(to + 16, &b, 8);
	memcpy(to + 24, "\x31\xd2\x0f\x05\xeb\xfe", 6);
}

static int forbid_mkdir(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdir, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(filter) / sizeof(*filter), filter };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -1;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static int send_descriptor(int bus, uint64_t to)
{
	struct {
		struct kdbus_msg msg;
		uint64_t size, type;
		int fd, pad;
	} message = {
		.msg = { .size = sizeof(struct kdbus_msg) + 20,
			 .dst_id = to,
			 .cookie = 1,
			 .payload_type = KDBUS_PAYLOAD_DBUS },
		.size = 20,
		.type = KDBUS_ITEM_FDS,
		.fd = 0,
	};
	struct kdbus_cmd_send cmd = { .size = sizeof(cmd), .msg_address = (uintptr_t)&message };

	return ioctl(bus, KDBUS_CMD_SEND, &cmd);
}

static void receive(int bus)
{
	struct kdbus_cmd_recv cmd = { .size = sizeof(cmd) };
	struct kdbus_cmd_free cmd_free = { .size = sizeof(cmd_free) };
	long r;

	lowest = dup(0);
	close(lowest);
	armed = 1;
	__asm__ volatile("call *%[code]"
			 : "=a"(r)
			 : "0"((long)SYS_ioctl), "D"((long)bus), "S"((long)KDBUS_CMD_RECV),
			   "d"(&cmd), [code] "r"(code)
			 : "rcx", "r11", "memory");
	armed = 0;
	*(volatile uint16_t *)code = 0x050f;
	cmd_free.offset = cmd.msg.offset;
	ioctl(bus, KDBUS_CMD_FREE, &cmd_free);
	for (int fd = lowest; fd < lowest + 40; fd++)
		close(fd);
}

int main(int argc, char **argv)
{
	struct kdbus_cmd_hello hello = { .size = sizeof(hello),
					 .flags = KDBUS_HELLO_ACCEPT_FD,
					 .pool_size = 1 << 20 };
	char *arguments[] = { argv[argc - 1], NULL };
	uint64_t second = (uintptr_t)arguments;
	struct timespec start, now;
	pthread_t thread;
	sigset_t all;
	int bus, nr = SYS_execve;

	if (argc != 4)
		return 2;
	bus = open(argv[1], O_RDWR | O_CLOEXEC);
	if (bus < 0 || ioctl(bus, KDBUS_CMD_HELLO, &hello) < 0)
		return 1;
	code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		    0);
	if (code == MAP_FAILED)
		return 1;
	memcpy((void *)code, "\x0f\x05\xc3", 3);
	if (!strcmp(argv[2], "mkdir")) {
		nr = SYS_mkdir;
		second = 0755;
		if (forbid_mkdir() < 0)
			return 1;
	}
	write_call((uint8_t *)code + TARGET, nr, (uintptr_t)argv[3], second);
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	if (pthread_create(&thread, NULL, patch, NULL))
		return 1;
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		if (send_descriptor(bus, hello.id) < 0)
			return 1;
		receive(bus);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec - start.tv_sec < 15);
	return 3;
}

#else

int main(void)
{
	return 77;
}

#endif
