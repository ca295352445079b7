/* SPDX-License-Identifier: MIT
 *
 * Edges: the VM-entries and VM-exits of lanes, each with the one behind it, and what is summed over them.
 */
#include "loops.h"
#include "sums.h"

int64_t pair_edges(const EdgeSource *from, uint8_t exit, int64_t reason_mask, const EdgeColumns *out)
{
	int64_t n = 0, suspects = 0;

	for (int64_t i = 0; i < from->n_rows; i++) {
		if (from->step[i] <= exit) {
			if (n == out->n_edges)
				return -1;
			out->edge[n] = i;
			out->is_exit[n] = from->step[i] == exit;
			out->reason[n] = from->arg[i] & reason_mask;
			if (n) {
				const int64_t before = out->edge[n - 1];
				const int same = from->thread[i] == from->thread[before];
				const int was_exit = out->is_exit[n - 1];
				const int64_t dur_ns = (int64_t)((uint64_t)from->ts[i] - (uint64_t)from->ts[before]);

				out->dur_ns[n - 1] = dur_ns;
				out->sound[n - 1] = dur_ns >= 0 && !suspects;
				out->handling[n - 1] = same && was_exit && !out->is_exit[n];
				out->guest[n - 1] = same && !was_exit && out->is_exit[n];
			}
			suspects = 0;
			n++;
		}
		suspects += from->suspect[i] != 0;
	}
	return n;
}

int64_t sum_exits(const EdgeView *edges, const ExitSums *sums, int64_t *discarded)
{
	int64_t n = 0;

	for (int64_t i = 0; i < edges->n_edges; i++) {
		const int64_t reason = edges->reason[i];

		if (edges->is_exit[i]) {
			if (reason < 0 || reason >= sums->n_reasons)
				return -1;
			sums->count[reason] = added(sums->count[reason], 1, sums->limit);
		}
		if (i + 1 == edges->n_edges)
			break;
		if (edges->handling[i] && !edges->sound[i])
			++*discarded;
		if (!edges->sound[i])
			continue;
		if (edges->handling[i]) {
			sums->group[n] = reason;
			sums->dur_ns[n++] = edges->dur_ns[i];
		}
		if (edges->guest[i]) {
			const int64_t next = edges->reason[i + 1];

			if (next < 0 || next >= sums->n_reasons)
				return -1;
			sums->guest_ns[next] = added(sums->guest_ns[next], edges->dur_ns[i], sums->limit);
		}
	}
	return n;
}

int64_t slow_exits(const EdgeView *edges, const SweptRows *rows, const int64_t *moved_ns, int64_t least,
		   int64_t *counted, int64_t n_threads, const SlowExits *out)
{
	int64_t n = 0;

	for (int64_t i = 0; i < edges->n_edges; i++) {
		const int64_t begin = edges->edge[i];

		if (begin < 0 || begin >= rows->n_rows || rows->thread[begin] >= n_threads)
			return -1;
		if (edges->is_exit[i])
			counted[rows->thread[begin]]++;
		if (i + 1 == edges->n_edges || !edges->handling[i] || !edges->sound[i])
			continue;
		const int64_t end = edges->edge[i + 1];
		uint64_t work = (uint64_t)edges->dur_ns[i] - (moved_ns ? (uint64_t)moved_ns[i] : 0);

		if (end > rows->n_rows)
			return -1;
		for (int64_t row = begin; row < end; row++)
			if (rows->waiting >> (rows->part[row] & 31) & 1)
				work -= (uint64_t)rows->dur_ns[row];
		if ((int64_t)work < least)
			continue;
		out->edge[n] = i;
		out->work_ns[n] = (int64_t)work;
		out->number[n++] = counted[rows->thread[begin]];
	}
	return n;
}
