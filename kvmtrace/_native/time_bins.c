/* SPDX-License-Identifier: MIT
 *
 * Stretches of time cut at the edges of bins of equal length.
 */
#include "loops.h"

static inline void keep_longest(int64_t *longest, int64_t value)
{
	if (value > *longest)
		*longest = value;
}

/* Multiply; what is more than there are numbers for is the largest one. */
static inline int64_t product(int64_t one, int64_t other)
{
	int64_t found;

	return __builtin_mul_overflow(one, other, &found) ? INT64_MAX : found;
}

int64_t add_stretches(const Stretches *from, const TimeBins *bins)
{
	const int64_t all_ns = product(bins->n_bins, bins->bin_ns);

	for (int64_t i = 0; i < from->n; i++) {
		int64_t begin = from->begin_ns[i], end = (int64_t)((uint64_t)begin + (uint64_t)from->dur_ns[i]);

		if (from->thread[i] < 0 || from->thread[i] >= bins->n_threads || from->part[i] >= bins->n_parts)
			return -1;
		begin = begin < 0 ? 0 : begin;
		end = end > all_ns ? all_ns : end;
		for (int64_t bin = begin / bins->bin_ns; begin < end; bin++) {
			const int64_t edge = product(bin + 1, bins->bin_ns), stop = end < edge ? end : edge, dur_ns = stop - begin;
			const int64_t at = from->thread[i] * bins->n_bins + bin;
			const int64_t length = (dur_ns < bins->longest_ns ? dur_ns : bins->longest_ns) << bins->value_bits;

			int64_t *sum = bins->part_ns + at * bins->n_parts + from->part[i];

			*sum = (int64_t)((uint64_t)*sum + (uint64_t)dur_ns);
			keep_longest(bins->longest + at, length | from->code[i]);
			keep_longest(bins->cpu + at, length | from->cpu[i]);
			if (from->level)
				keep_longest(bins->level + at, length | from->level[i]);
			begin = stop;
		}
	}
	return 0;
}
