/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Bloom filters
 *
 * kdbus compares bits and leaves it to programs how they come about: a signal
 * passes if all bits of the mask are in its filter. This is one way, good for
 * all programs that use this library. Two 64-bit hashes a and b of an element
 * give as many bit numbers as wanted, a + i * b (Kirsch and Mitzenmacher, "Less
 * Hashing, Same Performance"); both come from FNV-1a, finished by the mixer of
 * MurmurHash3, since FNV alone is weak in its upper bits. Bit n is bit n % 8 of
 * byte n / 8.
 */

#include <kdbus/kdbus.h>
#include "util.h"

static uint64_t mix(uint64_t h)
{
	h = (h ^ (h >> 33)) * UINT64_C(0xff51afd7ed558ccd);
	h = (h ^ (h >> 33)) * UINT64_C(0xc4ceb9fe1a85ec53);
	return h ^ (h >> 33);
}

/**
 * kdbus_bloom_add() - add an element to a filter or mask
 * @parameter:	parameters of the bus, see kdbus_conn_get_bloom()
 * @bits:	filter, or mask, or one generation of a mask: @parameter->size
 *		bytes, zero at first
 * @element:	what the signal is about, or what is wanted
 * @size:	its size
 *
 * A mask of no elements lets everything pass.
 */
_public_ void kdbus_bloom_add(const struct kdbus_bloom_parameter *parameter, void *bits,
			      const void *element, size_t size)
{
	uint64_t n_bits = parameter->size * 8, hash = UINT64_C(0xcbf29ce484222325), a, b, n;
	const uint8_t *p = element;
	uint8_t *bytes = bits;

	if (!n_bits)
		return;

	for (size_t i = 0; i < size; ++i)
		hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);

	a = mix(hash);
	b = mix(a + UINT64_C(0x9e3779b97f4a7c15)) | 1;
	for (uint64_t i = 0; i < parameter->n_hash; ++i) {
		n = (a + i * b) % n_bits;
		bytes[n / 8] |= 1 << (n % 8);
	}
}
