/* SPDX-License-Identifier: MIT
 *
 * The tables of `perf kvm stat`, event by event: what is pending of each thread, and the sums of what an event completes.
 */
#include "key_table.h"

#define MOST_NS ((int64_t)1 << 61)

enum { VMEXIT, IOPORT, MSR, MMIO, N_TABLES };

/* Welford's sums go from the first sample to the last, so that they are the same however the events are cut. */
static inline void put_sample(PerfTable *table, int32_t number, int64_t begin_ns, int64_t end_ns)
{
	const int64_t dur_ns = (int64_t)((uint64_t)end_ns - (uint64_t)begin_ns);

	if (!begin_ns || dur_ns < 0) /* perf drops those that end before they begin, or begin at time 0 */
		return;
	PerfSums *sums = table->sums + number;
	const double off = (double)dur_ns - sums->mean;

	sums->count++;
	if (__builtin_add_overflow(sums->total, dur_ns, &sums->total) || sums->total > MOST_NS)
		sums->total = MOST_NS; /* only by garbage time stamps */
	if (dur_ns < sums->min_ns || sums->count == 1)
		sums->min_ns = dur_ns;
	if (dur_ns > sums->max_ns)
		sums->max_ns = dur_ns;
	sums->mean += off / (double)sums->count;
	sums->squares += off * ((double)dur_ns - sums->mean);
}

static inline void complete(PerfThread *thread, PerfTable *tables, int64_t now)
{
	for (int i = 0; i < N_TABLES; i++)
		if (thread->pending >> i & 1)
			put_sample(tables + i, thread->number[i], thread->begin_ns[i], now);
	thread->pending = 0;
}

static inline void begin(PerfThread *thread, int table, int32_t number, int64_t now)
{
	thread->pending |= 1 << table;
	thread->number[table] = number;
	thread->begin_ns[table] = now;
}

/* Take an event with a key; a read that ends while a write is pending counts for the write's key. */
static inline void take_keyed(PerfThread *thread, PerfTable *tables, uint8_t what, int32_t number, int64_t now)
{
	switch (what) {
	case PERF_EXIT:
		begin(thread, VMEXIT, number, now);
		thread->exit_ns = now;
		thread->pending &= ~(1 << MMIO);
		break;
	case PERF_LEAVES:
		put_sample(tables + VMEXIT, number, thread->begin_ns[VMEXIT], now);
		thread->begin_ns[VMEXIT] = 0;
		break;
	case PERF_PIO: begin(thread, IOPORT, number, now); break;
	case PERF_MSR: begin(thread, MSR, number, now); break;
	case PERF_MMIO_READ:
		if (thread->pending >> MMIO & 1)
			put_sample(tables + MMIO, thread->number[MMIO], thread->begin_ns[MMIO], now);
		else
			put_sample(tables + MMIO, number, thread->exit_ns, now);
		thread->pending &= ~(1 << MMIO);
		thread->exit_ns = 0;
		break;
	case PERF_MMIO_WRITE:
		begin(thread, MMIO, number, now);
		thread->exit_ns = 0;
		break;
	default: break;
	}
}

/* What an event is, for those with a key also the table of its key. */
static inline uint8_t what_of(const PerfKind *kind, int64_t position)
{
	return kind->whats ? kind->whats[position] : kind->what;
}

/* The thread of a row; NULL for one that has not had a VM-entry, unless this is one and there is room for it. */
static inline PerfThread *thread_of(const PerfThreads *threads, int32_t tid, int is_entry)
{
	if (tid <= 0 || tid >= threads->n_tids)
		return NULL;
	if (!threads->number[tid]) {
		if (!is_entry || *threads->n_known >= threads->n_threads)
			return NULL;
		threads->number[tid] = (int32_t)++*threads->n_known;
	}
	return threads->state + threads->number[tid] - 1;
}

int64_t take_perf_events(const PerfRows *rows, int64_t from, const PerfKind *kinds, int64_t *position,
			 const PerfThreads *threads, PerfTable *tables, uint64_t seed)
{
	PerfThread *thread = NULL;
	int32_t latest_tid = 0;

	for (int64_t i = from; i < rows->n_rows; i++) {
		if (rows->kind[i] >= rows->n_kinds)
			return -1;
		const PerfKind *kind = kinds + rows->kind[i];
		int64_t *at = position + rows->kind[i];
		int32_t number = -1;
		uint8_t what = kind->what;

		if (what == PERF_NOTHING)
			continue;
		if (what >= PERF_EXIT) {
			PerfTable *of = tables + kind->table;

			if (*at >= kind->n)
				return -1;
			what = what_of(kind, *at);
			if (of->latest < 0 || of->latest_key != kind->keys[*at]) {
				number = number_of_key(&of->keys, kind->keys[*at], seed, &of->n_known);
				if (number < 0)
					return i;
				of->latest_key = kind->keys[*at];
				of->latest = number;
			}
			number = of->latest;
			++*at;
		}
		if (rows->tid[i] != latest_tid || !thread) {
			latest_tid = rows->tid[i];
			thread = thread_of(threads, latest_tid, what < PERF_EXIT);
		}
		if (!thread)
			continue;
		if (what == PERF_ENTRY)
			complete(thread, tables, rows->ts[i]);
		else if (what == PERF_ENTERS)
			thread->begin_ns[VMEXIT] = rows->ts[i];
		else
			take_keyed(thread, tables, what, number, rows->ts[i]);
	}
	return rows->n_rows;
}
