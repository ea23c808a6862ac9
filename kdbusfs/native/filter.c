/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Seccomp filters: classic BPF as seccomp(2) takes it
 *
 * The kernel has checked the program, but the one who installed it is a stranger: nothing here
 * depends on that check. Jumps only lead forward, so a program ends.
 */

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include "filter.h"

typedef struct Machine {
	uint32_t a, x;
	uint32_t memory[BPF_MEMWORDS];
	const struct seccomp_data *data;
} Machine;

static bool load(Machine *m, const struct sock_filter *f, uint32_t *to)
{
	switch (BPF_MODE(f->code)) {
	case BPF_IMM:
		*to = f->k;
		return true;
	case BPF_ABS: /* whole words of struct seccomp_data only */
		if (f->k % 4 || f->k > sizeof(*m->data) - 4)
			return false;
		memcpy(to, (const char *)m->data + f->k, 4);
		return true;
	case BPF_LEN:
		*to = sizeof(*m->data);
		return true;
	case BPF_MEM:
		if (f->k >= BPF_MEMWORDS)
			return false;
		*to = m->memory[f->k];
		return true;
	default:
		return false;
	}
}

static bool calculate(Machine *m, const struct sock_filter *f)
{
	uint32_t by = BPF_SRC(f->code) == BPF_X ? m->x : f->k;

	switch (BPF_OP(f->code)) {
	case BPF_ADD:
		m->a += by;
		return true;
	case BPF_SUB:
		m->a -= by;
		return true;
	case BPF_MUL:
		m->a *= by;
		return true;
	case BPF_DIV: /* by X that is 0: the kernel returns 0 from the program */
		if (!by)
			return false;
		m->a /= by;
		return true;
	case BPF_AND:
		m->a &= by;
		return true;
	case BPF_OR:
		m->a |= by;
		return true;
	case BPF_XOR:
		m->a ^= by;
		return true;
	case BPF_LSH:
		m->a <<= by & 31;
		return true;
	case BPF_RSH:
		m->a >>= by & 31;
		return true;
	case BPF_NEG:
		m->a = -m->a;
		return true;
	default:
		return false;
	}
}

/* How many instructions are left out; negative: no such jump. */
static int64_t jump(const Machine *m, const struct sock_filter *f)
{
	uint32_t with = BPF_SRC(f->code) == BPF_X ? m->x : f->k;
	bool taken;

	switch (BPF_OP(f->code)) {
	case BPF_JA:
		return f->k;
	case BPF_JEQ:
		taken = m->a == with;
		break;
	case BPF_JGT:
		taken = m->a > with;
		break;
	case BPF_JGE:
		taken = m->a >= with;
		break;
	case BPF_JSET:
		taken = m->a & with;
		break;
	default:
		return -1;
	}
	return taken ? f->jt : f->jf;
}

static bool store(Machine *m, const struct sock_filter *f, uint32_t value)
{
	if (f->k >= BPF_MEMWORDS)
		return false;
	m->memory[f->k] = value;
	return true;
}

/* Anything but a jump or the end of the program. */
static bool step(Machine *m, const struct sock_filter *f)
{
	switch (BPF_CLASS(f->code)) {
	case BPF_LD:
		return load(m, f, &m->a);
	case BPF_LDX:
		return load(m, f, &m->x);
	case BPF_ST:
		return store(m, f, m->a);
	case BPF_STX:
		return store(m, f, m->x);
	case BPF_ALU:
		return calculate(m, f);
	case BPF_MISC:
		if (BPF_MISCOP(f->code) == BPF_TAX)
			m->x = m->a;
		else
			m->a = m->x;
		return true;
	default:
		return false;
	}
}

uint32_t kdbusfs_filter_run(const uint64_t *program, uint32_t n, int32_t nr, uint32_t arch,
			    uint64_t instruction_pointer, const uint64_t *args)
{
	struct seccomp_data data = {
		.nr = nr,
		.arch = arch,
		.instruction_pointer = instruction_pointer,
	};
	Machine machine = { .data = &data };
	struct sock_filter f;
	int64_t skip;

	_Static_assert(sizeof(f) == sizeof(*program), "an instruction is a word");
	memcpy(data.args, args, sizeof(data.args));
	for (uint64_t at = 0; at < n; ++at) {
		memcpy(&f, program + at, sizeof(f));
		if (BPF_CLASS(f.code) == BPF_RET)
			return BPF_RVAL(f.code) == BPF_A ? machine.a : f.k;
		if (BPF_CLASS(f.code) == BPF_JMP) {
			skip = jump(&machine, &f);
			if (skip < 0)
				break;
			at += skip;
		} else if (!step(&machine, &f)) {
			break;
		}
	}
	return SECCOMP_RET_KILL_THREAD;
}
