/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Policies
 *
 * A list of names, each followed by who may do what with it.
 */

#include "policy.h"
#include "util.h"

/**
 * kdbus_policy_new() - make an empty policy
 * @policyp:	the new policy
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_policy_new(struct kdbus_policy **policyp)
{
	struct kdbus_policy *policy;

	policy = calloc(1, sizeof(*policy));
	if (!policy)
		return -ENOMEM;

	*policyp = policy;
	return 0;
}

/**
 * kdbus_policy_free() - release a policy
 * @policy:	policy to release, or NULL
 *
 * Connections and endpoints that it was given to are not affected.
 *
 * Return: NULL.
 */
_public_ struct kdbus_policy *kdbus_policy_free(struct kdbus_policy *policy)
{
	if (!policy)
		return NULL;

	kdbus_chain_deinit(&policy->items);
	free(policy);
	return NULL;
}

/**
 * kdbus_policy_add_name() - start the entry of a name
 * @policy:	policy to add to
 * @name:	well-known name; with .* at its end, all names with one element
 *		more
 *
 * A name that nobody is given access to is closed to all but the owner of the
 * bus.
 *
 * Return: 0 on success, -EMSGSIZE, -ENOMEM.
 */
_public_ int kdbus_policy_add_name(struct kdbus_policy *policy, const char *name)
{
	return kdbus_chain_append_string(&policy->items, KDBUS_ITEM_NAME, name);
}

/**
 * kdbus_policy_add_access() - allow something with the name added last
 * @policy:	policy to add to
 * @type:	KDBUS_POLICY_ACCESS_USER, _GROUP or _WORLD
 * @id:		user or group id
 * @access:	KDBUS_POLICY_SEE, _TALK or _OWN
 *
 * Return: 0 on success, -ENOMEM.
 */
_public_ int kdbus_policy_add_access(struct kdbus_policy *policy, uint64_t type, uint64_t id,
				     uint64_t access)
{
	struct kdbus_policy_access line = { .type = type, .access = access, .id = id };

	return kdbus_chain_append(&policy->items, KDBUS_ITEM_POLICY_ACCESS, &line, sizeof(line));
}
