/* SPDX-License-Identifier: MIT
 *
 * Count, sum, extremes and squares of durations by group. Floating point sums go from the first row to the last, so
 * that they are the same on every machine (compiling.py forbids the compiler to contract operations).
 */
#include "loops.h"

void sum_durations(const int64_t *group, const int64_t *dur_ns, int64_t n, int64_t n_groups, const DurationSums *sums)
{
	for (int64_t i = 0; i < n; i++) {
		const int64_t g = group[i];

		sums->count[g]++;
		sums->total[g] += (double)dur_ns[i];
		if (dur_ns[i] < sums->min_ns[g])
			sums->min_ns[g] = dur_ns[i];
		if (dur_ns[i] > sums->max_ns[g])
			sums->max_ns[g] = dur_ns[i];
	}
	for (int64_t g = 0; g < n_groups; g++)
		sums->mean[g] = sums->total[g] / (double)(sums->count[g] ? sums->count[g] : 1);
	for (int64_t i = 0; i < n; i++) {
		const double off = (double)dur_ns[i] - sums->mean[group[i]];

		sums->squares[group[i]] += off * off;
	}
}
