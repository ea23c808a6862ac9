/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Policies
 */

#include "item.h"

struct kdbus_policy {
	KdbusChain items;
};
