/* SPDX-License-Identifier: MIT
 *
 * Sums that garbage time stamps cannot overflow.
 */
#ifndef KVMTRACE_SUMS_H
#define KVMTRACE_SUMS_H

#include <stdint.h>

/* Add within [-limit, limit]. */
static inline int64_t added(int64_t sum, int64_t more, int64_t limit)
{
	if (__builtin_add_overflow(sum, more, &sum))
		sum = more < 0 ? -limit : limit;
	return sum > limit ? limit : sum < -limit ? -limit : sum;
}

#endif
