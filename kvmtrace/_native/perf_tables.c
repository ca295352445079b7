/* SPDX-License-Identifier: MIT
 *
 * The samples of the tables of `perf kvm stat`: what is pending of each thread, and what an event completes.
 */
#include "loops.h"

/* Take a sample; perf drops those that end before they begin, or begin at time 0. */
static inline void put_sample(const PerfTables *tables, int table, int64_t key, int64_t begin_ns, int64_t end_ns)
{
	const int64_t dur_ns = (int64_t)((uint64_t)end_ns - (uint64_t)begin_ns);

	if (!begin_ns || dur_ns < 0)
		return;
	int64_t at = table * tables->capacity + tables->count[table]++;

	tables->key[at] = key;
	tables->dur_ns[at] = dur_ns;
}

/* The number of the table whose samples end with a VM-entry, by the step that begins them; -1: of none. */
static inline int table_of(const PerfSteps *steps, uint8_t step)
{
	return step == steps->exit ? 0 : step == steps->pio ? 1 : step == steps->msr ? 2 : -1;
}

void take_perf_samples(const uint16_t *thread, const uint8_t *step, const int64_t *ts, const int64_t *arg, int64_t n,
		       const PerfSteps *steps, const PerfThreads *threads, const PerfTables *tables)
{
	int64_t pending[3] = {-1, -1, -1}; /* the row where a sample of each table began */
	int64_t write = -1;		   /* the row of an MMIO write, if it is the latest of what the mmio table looks at */

	for (int64_t i = 0; i < n; i++) {
		const uint16_t t = thread[i];
		const uint8_t s = step[i];

		if (!i || t != thread[i - 1])
			pending[0] = pending[1] = pending[2] = write = -1;
		if (!threads->entered[t] && s != steps->entry)
			continue;
		if (s == steps->entry) {
			threads->entered[t] = 1;
			for (int k = 0; k < 3; k++) {
				if (pending[k] >= 0)
					put_sample(tables, k, k ? arg[pending[k]] : arg[pending[k]] & steps->reason_mask,
						   ts[pending[k]], ts[i]);
				pending[k] = -1;
			}
			if (write >= 0)
				put_sample(tables, 3, arg[write], ts[write], ts[i]);
			write = -1;
			continue;
		}
		const int table = table_of(steps, s);

		if (table >= 0)
			pending[table] = i;
		if (s == steps->mmio_read) {
			if (write >= 0)
				put_sample(tables, 3, arg[write], ts[write], ts[i]);
			else
				put_sample(tables, 3, arg[i], threads->exit_ns[t], ts[i]);
		}
		if (s == steps->exit || s == steps->mmio_read || s == steps->mmio_write) {
			threads->exit_ns[t] = s == steps->exit ? ts[i] : 0;
			write = s == steps->mmio_write ? i : -1;
		}
	}
}
