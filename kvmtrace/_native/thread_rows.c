/* SPDX-License-Identifier: MIT
 *
 * Which rows of a table belong together: to a thread, to a kind.
 */
#include <string.h>

#include "loops.h"

int64_t count_tracked(const int32_t *tid, const uint8_t *cls, int64_t n, const int32_t *tids, int64_t n_tids,
		      uint16_t *number, int64_t *counts)
{
	int64_t total = 0, known = 0;
	int32_t last = -1;

	for (int64_t i = 0; i < n_tids; i++)
		counts[i] = 0;
	for (int64_t row = 0; row < n; row++) {
		if (!row || tid[row] != last) { /* a thread's events mostly follow each other */
			int64_t low = 0, high = n_tids;

			last = tid[row];
			while (low < high) {
				int64_t middle = (low + high) / 2;

				if (tids[middle] < last)
					low = middle + 1;
				else
					high = middle;
			}
			known = low < n_tids && tids[low] == last ? low + 1 : 0;
		}
		number[row] = (uint16_t)known;
		if (known) {
			total++;
			counts[known - 1] += cls[row] > 0;
		}
	}
	return total;
}

void fill_tracked(const uint16_t *number, const uint8_t *cls, const int64_t *ts, const int16_t *cpu, int64_t n,
		  int64_t *next, int64_t *row_out, uint8_t *cls_out, uint16_t *thread_out, int64_t *ts_out,
		  int16_t *cpu_out)
{
	for (int64_t row = 0; row < n; row++) {
		if (!number[row] || !cls[row])
			continue;
		int64_t at = next[number[row] - 1]++;

		row_out[at] = row;
		cls_out[at] = cls[row];
		thread_out[at] = (uint16_t)(number[row] - 1);
		ts_out[at] = ts[row];
		cpu_out[at] = cpu[row];
	}
}

int64_t rows_by_kind(const uint16_t *kind, int64_t n, int64_t n_kinds, int64_t *begin, int64_t *order, int64_t *position)
{
	memset(begin, 0, (size_t)(n_kinds + 1) * sizeof(*begin));
	for (int64_t i = 0; i < n; i++) {
		if (kind[i] >= n_kinds)
			return -1;
		position[i] = begin[kind[i] + 1]++;
	}
	for (int64_t k = 0; k < n_kinds; k++)
		begin[k + 1] += begin[k];
	for (int64_t i = 0; i < n; i++)
		order[begin[kind[i]] + position[i]] = i;
	return 0;
}

void latest_wanted(const uint8_t *wanted, const uint16_t *thread, int64_t n, int32_t *latest)
{
	int32_t last = -1;

	for (int64_t i = 0; i < n; i++) {
		if (i && thread[i] != thread[i - 1])
			last = -1;
		if (wanted[i])
			last = (int32_t)i;
		latest[i] = last;
	}
}

void mark_changes(const uint8_t *values, int64_t n, int64_t size, uint8_t *changed)
{
	for (int64_t i = 1; i < n; i++) {
		const uint8_t *value = values + i * size;
		int same;

		switch (size) { /* constant sizes become single comparisons */
		case 1: same = *value == value[-1]; break;
		case 4: same = !memcmp(value, value - 4, 4); break;
		case 8: same = !memcmp(value, value - 8, 8); break;
		case 15: same = !memcmp(value, value - 15, 15); break; /* of an instruction */
		default: same = !memcmp(value, value - size, (size_t)size);
		}
		changed[i] |= !same;
	}
}
