/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Deadlines: absolute times on CLOCK_MONOTONIC, in nanoseconds
 */

#include <kdbus/kdbus.h>
#include <stdint.h>
#include <time.h>

#define NSEC_PER_SEC UINT64_C(1000000000)

uint64_t kdbus_now(void);
