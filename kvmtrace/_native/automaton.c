/* SPDX-License-Identifier: MIT
 *
 * The model's states over sequences of events. The tables are handed in: what is allowed stands in kvmtrace/model/.
 */
#include <string.h>

#include "loops.h"

int64_t take_steps(const uint8_t *cls, const uint8_t *first, const uint8_t *broken, int64_t n,
		   const uint8_t *next_state, const uint8_t *verdicts, int64_t n_steps, int32_t unknown,
		   uint8_t *state_out, int64_t *position, uint8_t *before, uint8_t *verdict)
{
	int64_t n_taken = 0;
	uint8_t state = (uint8_t)unknown;

	for (int64_t i = 0; i < n; i++) {
		if (first[i] || broken[i])
			state = (uint8_t)unknown;
		state_out[i] = state;
		if (!cls[i] || cls[i] > n_steps)
			continue;
		position[n_taken] = i;
		before[n_taken] = state;
		verdict[n_taken++] = verdicts[state * (n_steps + 1) + cls[i]];
		state = next_state[cls[i]];
	}
	return n_taken;
}

int64_t cut_segments(const uint8_t *cls, const uint8_t *first, const uint8_t *broken, int64_t n,
		     const uint8_t *boundaries, int64_t *of, int64_t *start, uint8_t *kind, uint64_t *mask,
		     uint8_t *linked)
{
	int64_t segment = -1;

	for (int64_t i = 0; i < n; i++) {
		int boundary = cls[i] == boundaries[0] || cls[i] == boundaries[1] || cls[i] == boundaries[2];
		int begins = first[i] || broken[i];

		if (boundary || begins) {
			if (segment >= 0)
				linked[segment] = !begins;
			segment++;
			start[segment] = i;
			kind[segment] = boundary ? cls[i] : 0;
			mask[segment] = 0;
			linked[segment] = 0;
		}
		of[i] = segment;
		if (!boundary)
			mask[segment] |= 1ULL << (cls[i] & 63);
	}
	return segment + 1;
}

void count_edges(const uint8_t *before, const uint8_t *cls, const uint8_t *wrong, const int64_t *ts, int64_t n,
		 int64_t n_classes, int32_t unknown, int32_t sub_bits, int64_t n_buckets, int64_t *counts)
{
	for (int64_t i = 0; i < n; i++) {
		if (before[i] == unknown || wrong[i])
			continue;
		int64_t dur = i ? (int64_t)((uint64_t)ts[i] - (uint64_t)ts[i - 1]) : 0;
		int64_t shift = 0, bucket;

		if (dur < 0)
			dur = 0;
		if (dur) {
			double value = (double)dur; /* as NumPy does: rounded above 2^53 */
			uint64_t bits;

			memcpy(&bits, &value, sizeof(bits));
			shift = (int64_t)(bits >> 52) - 1023 - sub_bits;
			if (shift < 0)
				shift = 0;
		}
		bucket = (shift << sub_bits) + (dur >> shift);
		if (bucket >= n_buckets)
			bucket = n_buckets - 1;
		counts[(before[i] * n_classes + cls[i]) * n_buckets + bucket]++;
	}
}
