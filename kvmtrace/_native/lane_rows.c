/* SPDX-License-Identifier: MIT
 *
 * Lanes: the rows of a table that are steps of vCPU threads, and what the thread does from each step to its next. What
 * a step means is handed in (LaneSteps); the tables stand in kvmtrace/spans/.
 */
#include "loops.h"
#include "sums.h"

#define N_STEPS 32 /* steps are below it */

/* The number of a row's thread from 1; 0: it is no vCPU, or there can be no such thread. */
static inline int32_t number_of(const ThreadNumbers *threads, int32_t tid)
{
	return tid > 0 && tid < threads->n_numbers ? threads->number[tid] : 0;
}

int64_t count_lane_rows(const LaneSource *from, const ThreadNumbers *threads, int64_t *n_new)
{
	int64_t n = 0, unknown = 0, switched = 0;

	for (int64_t i = 0; i < from->n_rows; i++) {
		const uint8_t step = from->step[i];

		if (from->switches && from->kind[i] == from->switch_kind && switched < from->n_switches)
			n += number_of(threads, from->switches[switched++]) > 0;
		if (!step)
			continue;
		if (number_of(threads, from->tid[i]) > 0)
			n++;
		else
			unknown += threads->marks >> (step & (N_STEPS - 1)) & 1;
	}
	*n_new = unknown;
	return n;
}

int64_t fill_lane_rows(const LaneSource *from, const ThreadNumbers *threads, int32_t resume, const LaneColumns *out)
{
	int64_t n = 0, switched = 0;

	for (int64_t i = 0; i < from->n_rows; i++) {
		const int32_t own = from->step[i] ? number_of(threads, from->tid[i]) : 0;
		int32_t other = 0;

		if (from->switches && from->kind[i] == from->switch_kind && switched < from->n_switches)
			other = number_of(threads, from->switches[switched++]);
		for (int second = 0; second < 2; second++) { /* a switch from one vCPU to another is two steps */
			if (!(second ? other : own))
				continue;
			if (n == out->n_rows)
				return -1;
			out->thread[n] = (uint16_t)((second ? other : own) - 1);
			out->step[n] = second ? (uint8_t)resume : from->step[i];
			out->ts[n] = from->ts[i];
			out->arg[n] = second ? 0 : from->arg[i];
			out->cpu[n] = from->cpu[i];
			out->loss[n] = from->loss[i];
			if (out->row)
				out->row[n] = from->first_row + i;
			n++;
		}
	}
	return n;
}

void step_durations(const uint16_t *thread, const int64_t *ts, int64_t n, int64_t *latest, int64_t *dur_ns)
{
	int64_t now = 0;

	for (int64_t i = 0; i < n; i++) {
		if (!i || thread[i] != thread[i - 1])
			now = latest[thread[i]];
		if (ts[i] > now)
			now = ts[i];
		latest[thread[i]] = now;
		dur_ns[i] = 0;
		if (i + 1 < n && thread[i + 1] == thread[i] && ts[i + 1] > now)
			dur_ns[i] = (int64_t)((uint64_t)ts[i + 1] - (uint64_t)now);
	}
}

/* Give the deciding rows their part, and each row its thread's latest entry or exit. */
static void decide_parts(const LaneView *lanes, const LaneSteps *steps, uint8_t *part, int32_t *owner)
{
	int64_t before = -1; /* the latest deciding row of the thread */
	int32_t edge = -1;

	for (int64_t i = 0; i < lanes->n_rows; i++) {
		const uint8_t step = lanes->step[i] & (N_STEPS - 1);

		if (!i || lanes->thread[i] != lanes->thread[i - 1]) {
			before = -1;
			edge = -1;
		}
		if (step == steps->entry || step == steps->exit)
			edge = (int32_t)i;
		owner[i] = edge;
		part[i] = steps->after[step];
		if (part[i] == steps->keeps)
			continue;
		if (before >= 0) {
			if (lanes->step[before] == steps->userspace_exit && step == steps->ret)
				part[before] = steps->handler; /* still in the kernel */
			if (lanes->step[before] == steps->exit && step == steps->wrap_out)
				part[before] = steps->entry_exit; /* on its way out of the run function */
		}
		if (edge >= 0 && lanes->step[edge] == steps->entry) {
			if (step == steps->wrap_out)
				part[i] = steps->entry_exit;
			if (step == steps->wrap_in)
				part[i] = steps->guest;
		}
		before = i;
	}
}

void sweep_lanes(const LaneView *lanes, const LaneSteps *steps, uint8_t *part, int32_t *owner)
{
	uint8_t value = steps->unknown;

	decide_parts(lanes, steps, part, owner);
	for (int64_t i = 0; i < lanes->n_rows; i++) {
		const uint8_t step = lanes->step[i] & (N_STEPS - 1);

		if (!i || lanes->thread[i] != lanes->thread[i - 1])
			value = steps->unknown;
		if (part[i] != steps->keeps)
			value = part[i] == steps->guest ? steps->handler : part[i]; /* what follows is host code */
		else
			part[i] = value;
		if (step == steps->block)
			part[i] = steps->blocked;
		if (step == steps->preempt)
			part[i] = steps->preempted;
		if (lanes->suspect[i]) {
			part[i] = steps->unknown;
			value = steps->unknown; /* up to the next row that decides */
		}
	}
}

int64_t sum_by_number(const void *numbers, int32_t wide, const int64_t *weights, int64_t n, int64_t n_sums,
		      int64_t limit, int64_t *sums)
{
	for (int64_t i = 0; i < n; i++) {
		const int64_t at = wide ? ((const int64_t *)numbers)[i] : ((const int32_t *)numbers)[i];

		if (at < 0 || at >= n_sums)
			return -1;
		sums[at] = added(sums[at], weights ? weights[i] : 1, limit);
	}
	return 0;
}

int64_t sum_parts(const uint8_t *part, const int64_t *dur_ns, int64_t n, const int32_t *owner, const int32_t *group,
		  const PartTotals *totals)
{
	for (int64_t i = 0; i < n; i++) {
		const int64_t by = owner ? owner[i] : i;

		if (by >= n || part[i] >= totals->n_parts)
			return -1;
		if (by < 0 || group[by] < 0)
			continue;
		if (group[by] >= totals->n_groups)
			return -1;
		const int64_t cell = group[by] * totals->n_parts + part[i];

		totals->sums[cell] = added(totals->sums[cell], dur_ns[i], totals->limit);
	}
	return 0;
}
