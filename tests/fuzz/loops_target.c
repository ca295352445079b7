/* The compiled loops in one process, for libFuzzer (loops_fuzz.py): what stands in a file is arbitrary, what Python
 * makes of it beforehand (sizes of arrays, numbers of threads) is as it makes it. Every array is as long as it must be
 * and no longer, so that the address sanitizer sees each access astray.
 */
#include <stdlib.h>
#include <string.h>

#include "loops.h"

#define KINDS 65536

typedef struct {
	const uint8_t *at;
	size_t left;
} Input;

static uint64_t take(Input *in, size_t size)
{
	uint64_t value = 0;

	if (size > in->left)
		size = in->left;
	memcpy(&value, in->at, size);
	in->at += size;
	in->left -= size;
	return value;
}

static int64_t below(Input *in, int64_t limit)
{
	return limit > 0 ? (int64_t)(take(in, 4) % (uint64_t)limit) : 0;
}

/* How many elements of a size are looked at: as many as the input has and a few more, which are zeros. */
static int64_t rows_of(Input *in, int64_t size)
{
	return below(in, (int64_t)in->left / size + 4);
}

/* An array of n elements, zeros. */
static void *room(int64_t n, size_t size)
{
	void *made = calloc(n ? (size_t)n : 1, size);

	if (!made)
		abort();
	return n ? made : realloc(made, 1);
}

/* An array of n elements out of the input, which may end before. */
static void *filled(Input *in, int64_t n, size_t size)
{
	uint8_t *made = room(n, size);
	size_t bytes = (size_t)n * size;

	if (bytes > in->left)
		bytes = in->left;
	memcpy(made, in->at, bytes);
	in->at += bytes;
	in->left -= bytes;
	return made;
}

/* n numbers of 0 .. limit - 1 */
static int64_t *numbers(Input *in, int64_t n, int64_t limit)
{
	int64_t *made = room(n, 8);

	for (int64_t i = 0; i < n; i++)
		made[i] = below(in, limit);
	return made;
}

static uint16_t *kinds_of_ids(void)
{
	static uint16_t *table;

	if (!table) {
		table = room(KINDS, 2);
		for (int i = 0; i < KINDS; i++)
			table[i] = (uint16_t)(i % 9);
	}
	return table;
}

static Columns columns(int64_t n, int wide, int common)
{
	return (Columns){n,
			 wide,
			 room(n, wide ? 8 : 4),
			 room(n, 8),
			 common ? room(n, 2) : NULL,
			 room(n, 1),
			 room(n, 1),
			 room(n, 4)};
}

static void free_columns(Columns *c)
{
	free(c->start);
	free(c->ts);
	free(c->kind);
	free(c->flags);
	free(c->preempt);
	free(c->tid);
}

/* Fields of records wherever they are said to begin. */
static void gather(Words buffer, const Columns *c, int64_t n, Input *in)
{
	static const int sizes[] = {1, 2, 4, 8, 15, 16, 3};
	const int64_t size = sizes[take(in, 1) % 7], offset = (int64_t)(int16_t)take(in, 2), whole = 4 * (1 + below(in, 4));
	uint8_t *one = room(n, (size_t)size), *two = room(n, (size_t)whole);
	const FieldPlace places[] = {{offset, size, 0, one}, {offset & ~3, whole, 1, two}};

	if (buffer.n_words) {
		gather_bytes(buffer, c->start, c->wide, n, 4, offset, size, 0, one);
		gather_fields(buffer, c->start, c->wide, n, places, 2);
	}
	free(one);
	free(two);
}

static void ring(Input *in)
{
	const int64_t n_pages = 1 + below(in, 6), wide = below(in, 2), common = below(in, 2), changed = below(in, 8);
	const int64_t n_words = rows_of(in, 4);
	int64_t *first = numbers(in, n_pages, n_words + 1), *end = numbers(in, n_pages, n_words + 1);
	int64_t *counts = room(n_pages, 8), *damaged = room(n_pages, 8), *at = room(n_pages, 8), *stop = room(n_pages, 8);
	uint64_t *ts = filled(in, n_pages, 8);
	uint32_t *words = filled(in, n_words, 4);
	const Words buffer = {words, n_words};
	int64_t n = 0;

	count_records(buffer, first, end, n_pages, counts, damaged, at, stop);
	for (int64_t i = 0; i < n_pages; i++)
		n += counts[i];
	Columns out = columns(n, (int)wide, (int)common);

	if (changed == 1 && n_words) /* the file is written to meanwhile */
		words[below(in, n_words)] = (uint32_t)take(in, 4);
	const int64_t found = fill_records(buffer, first, end, ts, n_pages, kinds_of_ids(), &out);

	if (found == n)
		gather(buffer, &out, n, in);
	free_columns(&out);
	free(first), free(end), free(counts), free(damaged), free(at), free(stop), free(ts), free(words);
}

/* Ascending identifiers, each with the number of its layout. */
static void identifiers(Input *in, Samples *samples)
{
	uint64_t *ids = room(samples->n_ids, 8);
	int32_t *of = room(samples->n_ids, 4);

	for (int64_t i = 0; i < samples->n_ids; i++) {
		ids[i] = (i ? ids[i - 1] + 1 : 0) + take(in, 1);
		of[i] = (int32_t)below(in, samples->n_layouts + 1);
	}
	samples->ids = ids;
	samples->layout_of_id = of;
	if (samples->n_ids && below(in, 2)) {
		samples->table_size = (int64_t)(ids[samples->n_ids - 1] - ids[0] + 1);
		uint16_t *table = room(samples->table_size, 2);

		for (int64_t i = 0; i < samples->n_ids; i++)
			table[ids[i] - ids[0]] = (uint16_t)(of[i] + 1);
		samples->table = table;
	}
}

static void copies(Words buffer, const Columns *c, int64_t n, int16_t *cpu, Input *in)
{
	int64_t *order = room(n, 8), n_slots = 4, same = 0;
	uint8_t *copy = room(n, 1);

	while (n_slots < 4 * n + 1)
		n_slots *= 2;
	for (int64_t i = 0; i < n; i++)
		order[i] = i;
	if (n && below(in, 4) == 1)
		order[below(in, n)] = (int64_t)take(in, 8);
	int64_t *slots = room(n_slots, 8), *moments = room(n_slots, 8);
	const TimedRows rows = {n, order, c->wide, c->start, (const int64_t *)c->ts, cpu, c->tid, c->kind};

	mark_copies(buffer, &rows, 3, take(in, 8), slots, moments, n_slots, copy, &same);
	free(order), free(copy), free(slots), free(moments);
}

static void perf(Input *in)
{
	const int64_t n_words = 1 + rows_of(in, 8), wide = below(in, 2), first = below(in, n_words);
	const int64_t last = first + below(in, n_words - first + 1), n = below(in, n_words + 1), n_others = below(in, n_words + 1);
	Layout *layouts = room(3, sizeof(Layout));
	Samples samples = {layouts, below(in, 4), NULL, NULL, below(in, 6), NULL, 0};
	PerfSpan span = {first, last, n_words, n_others};

	for (int i = 0; i < 3; i++)
		layouts[i] = (Layout){1 + below(in, 4), below(in, 5) - 1, 1 + below(in, 7), below(in, 8) - 1};
	identifiers(in, &samples);
	uint64_t *words = filled(in, n_words, 8);
	Columns out = columns(n, (int)wide, 1);
	int16_t *cpu = room(n, 2);
	int64_t *others = room(n_others, 8);
	const Words buffer = {(const uint32_t *)words, n_words * 2};

	end_of_perf_records(words, n_words);
	const int64_t found = read_perf_records(words, n_words, &span, &samples, kinds_of_ids(), &out, cpu, others);

	if (found >= 0) {
		gather(buffer, &out, found, in);
		copies(buffer, &out, found, cpu, in);
	}
	free_columns(&out);
	free(cpu), free(others), free(words), free(layouts);
	free((void *)samples.ids), free((void *)samples.layout_of_id), free((void *)samples.table);
}

/* An empty table of keys. */
static KeyTable key_table(int64_t n_slots)
{
	return (KeyTable){room(n_slots, 8), room(n_slots, 4), n_slots, room(n_slots / 2, 8)};
}

static void free_key_table(KeyTable *table)
{
	free(table->key), free(table->number), free(table->known);
}

/* The events of perf's tables: keys and what the events are come from the file, and so do the threads. */
static void perf_events(Input *in)
{
	const int64_t n = rows_of(in, 14), n_kinds = 1 + below(in, 6), n_tids = below(in, 40), n_threads = 1 + below(in, 8);
	int64_t *ts = filled(in, n, 8), position[6] = {0}, n_known = 0, done = 0;
	/* the table of each kind is that of what its events are: Python says both */
	static const uint8_t tables_of[PERF_LEAVES + 1] = {[PERF_PIO] = 1, [PERF_MSR] = 2, [PERF_MMIO_READ] = 3, [PERF_MMIO_WRITE] = 3};
	static const uint8_t mmio[] = {PERF_MMIO_READ, PERF_MMIO_WRITE, PERF_KEY_ONLY};
	int32_t *tid = filled(in, n, 4), *number = room(n_tids, 4);
	uint16_t *kind = room(n, 2);
	PerfKind kinds[6];
	PerfTable tables[4];

	for (int64_t i = 0; i < n; i++) {
		kind[i] = (uint16_t)below(in, n_kinds + (i % 97 == 96)); /* now and then one that there is not */
		tid[i] = tid[i] % 50;
	}
	for (int i = 0; i < 6; i++) {
		const int64_t n_keys = below(in, n + 2);
		uint8_t *whats = below(in, 2) ? filled(in, n_keys, 1) : NULL;

		for (int64_t k = 0; whats && k < n_keys; k++)
			whats[k] = mmio[whats[k] % 3];
		const uint8_t what = whats ? PERF_MMIO_READ : (uint8_t)below(in, PERF_LEAVES + 1);

		kinds[i] = (PerfKind){what, whats ? 3 : tables_of[what], n_keys, whats, filled(in, n_keys, 8)};
	}
	for (int i = 0; i < 4; i++) {
		const int64_t n_slots = 2LL << below(in, 6);

		tables[i] = (PerfTable){key_table(n_slots), 0, -1, 0, room(n_slots / 2, sizeof(PerfSums))};
	}
	const PerfRows rows = {n, n_kinds, ts, tid, kind};
	const PerfThreads threads = {n_tids, n_threads, number, room(n_threads, sizeof(PerfThread)), &n_known};

	done = take_perf_events(&rows, 0, kinds, position, &threads, tables, take(in, 8));
	if (done > n)
		abort();
	for (int i = 0; i < 6; i++)
		free((void *)kinds[i].whats), free((void *)kinds[i].keys);
	for (int i = 0; i < 4; i++)
		free_key_table(&tables[i].keys), free(tables[i].sums);
	free(ts), free(tid), free(number), free(kind), free(threads.state);
}

/* Rounds of any classes, with columns that may be shorter than the places say. */
static void rounds(Input *in)
{
	const int64_t n = rows_of(in, 12), n_columns = below(in, 6), most = below(in, 12), n_bytes = below(in, 600);
	static const int64_t sizes[] = {1, 4, 8, 9, 12, 15, 16, 17, 2};
	uint8_t *cls = filled(in, n, 1), *first = filled(in, n, 1), *repeated = filled(in, n, 1), *odd = filled(in, n, 1);
	int64_t *place = numbers(in, n, n + 1), begin[65], n_known = 0;
	ClassColumn *own = room(n_columns, sizeof(ClassColumn));

	for (int64_t i = 0; i < n; i++)
		cls[i] &= 63;
	for (int64_t i = 0; i < n_columns; i++) {
		own[i].n = below(in, n + 3);
		own[i].size = sizes[below(in, 9)];
		own[i].values = filled(in, own[i].n * own[i].size, 1);
	}
	for (int64_t c = 0; c <= 64; c++)
		begin[c] = c * n_columns / 64;
	const RoundEvents events = {n, cls, first, repeated, odd, place, own, begin};
	const int64_t n_slots = 1LL << below(in, 7);
	const RoundTable table = {n_slots, most, n_bytes, take(in, 8), &n_known, room(most + 1, 8), room(n_slots, 4), room(most, 8), room(n_bytes, 1)};
	int64_t *start = room(n, 8), *stop = room(n, 8);
	int32_t *number = room(n, 4);

	for (int again = 0; again < 2; again++) /* what is known of the first is found in the second */
		number_rounds(&events, (int32_t)below(in, 64), 1 + below(in, 40), &table, start, stop, number);
	for (int64_t i = 0; i < n_columns; i++)
		free((void *)own[i].values);
	free(cls), free(first), free(repeated), free(odd), free(place), free(own), free(start), free(stop), free(number);
	free(table.at), free(table.slots), free(table.hash), free(table.bytes);
}

/* Columns of events as the model sees them: classes and states of its tables, anything else. */
static void automaton(Input *in)
{
	const int64_t n = rows_of(in, 11), n_steps = 1 + below(in, 30), n_states = 2 + below(in, 4), n_buckets = 1 + below(in, 40);
	uint8_t *cls = filled(in, n, 1), *first = filled(in, n, 1), *broken = filled(in, n, 1), boundaries[3] = {1, 2, 3};
	uint8_t *next = room(n_steps + 1, 1), *verdicts = room(n_states * (n_steps + 1), 1), *state = room(n, 1);
	uint8_t *before = room(n, 1), *verdict = room(n, 1), *kind = room(n, 1), *linked = room(n, 1);
	int64_t *position = room(n, 8), *of = room(n, 8), *start = room(n, 8), *found = room(n, 8), *count = room(n, 8);
	int64_t *ts = filled(in, n, 8), *counts = room(n_states * (n_steps + 1) * n_buckets, 8);
	uint64_t *mask = room(n, 8);

	for (int64_t i = 0; i <= n_steps; i++)
		next[i] = (uint8_t)below(in, n_states);
	if (n)
		first[0] = 1;
	const int64_t taken = take_steps(cls, first, broken, n, next, verdicts, n_steps, 0, state, position, before, verdict);

	for (int64_t i = 0; i < taken; i++)
		state[i] = cls[position[i]];
	count_edges(before, state, verdict, ts, taken, n_steps + 1, 0, 3, n_buckets, counts);
	const int64_t segments = cut_segments(cls, first, broken, n, boundaries, of, start, kind, mask, linked);

	first_in_segments(of, n, ts, n, segments, found, count); /* positions that are none are told */
	first_in_segments(of, n, position, taken, segments, found, count);
	next_entries(kind, linked, segments, 1, 2, found);
	free(cls), free(first), free(broken), free(next), free(verdicts), free(state), free(before), free(verdict), free(kind);
	free(linked), free(position), free(of), free(start), free(found), free(count), free(ts), free(counts), free(mask);
}

static void lanes(Input *in)
{
	const int64_t n = rows_of(in, 34), n_numbers = below(in, 300), n_threads = 1 + below(in, 20);
	int32_t *tid = filled(in, n, 4), *loss = filled(in, n, 4), *number = room(n_numbers, 4), *switches = filled(in, n, 4);
	uint16_t *kind = filled(in, n, 2);
	uint8_t *step = filled(in, n, 1), *suspect = filled(in, n, 1);
	int64_t *ts = filled(in, n, 8), *arg = filled(in, n, 8), n_new;
	int16_t *cpu = filled(in, n, 2);
	const ThreadNumbers threads = {number, n_numbers, (uint32_t)take(in, 4)};
	LaneSource from = {n, tid, kind, step, ts, arg, cpu, loss, NULL, 0, 0, 5};

	if (below(in, 2)) {
		from.switches = switches;
		from.n_switches = n / 2;
	}
	for (int64_t i = 0; i < n; i++) {
		step[i] &= 31;
		if (below(in, 2))
			tid[i] = (int32_t)below(in, n_numbers + 1);
		if (tid[i] > 0 && tid[i] < n_numbers)
			number[tid[i]] = 1 + tid[i] % (int32_t)n_threads;
	}
	int64_t rows = count_lane_rows(&from, &threads, &n_new);
	LaneColumns out = {rows, room(rows, 2), room(rows, 1), room(rows, 8), room(rows, 8), room(rows, 2), room(rows, 4), room(rows, 8)};
	int64_t *latest = room(n_threads, 8), *dur = room(rows, 8), *totals = room(8 * n_threads, 8);
	uint8_t *part = room(rows, 1), *dubious = room(rows, 1);
	int32_t *owner = room(rows, 4), *group = room(rows, 4);
	LaneSteps steps = {.entry = 1, .exit = 2, .userspace_exit = 3, .ret = 4, .wrap_in = 5, .wrap_out = 6, .block = 7,
			   .preempt = 8, .keeps = 7, .guest = 0, .entry_exit = 1, .handler = 2, .blocked = 3, .preempted = 4,
			   .unknown = 5};

	for (int i = 0; i < 32; i++)
		steps.after[i] = (uint8_t)(i % 8);
	rows = fill_lane_rows(&from, &threads, 9, &out);
	if (rows > 0) {
		for (int64_t i = 0; i < rows; i++) {
			dubious[i] = suspect[i % n] & 1;
			group[i] = (int32_t)below(in, n_threads + 1) - 1;
		}
		const LaneView view = {rows, out.thread, out.step, dubious};
		const PartTotals sums = {8, n_threads, 1LL << 61, totals};

		step_durations(out.thread, out.ts, rows, latest, dur);
		sweep_lanes(&view, &steps, part, owner);
		sum_parts(part, dur, rows, owner, group, &sums);
		sum_by_number(out.arg, 1, out.ts, rows, n_threads, 1LL << 61, totals);
	}
	free(out.thread), free(out.step), free(out.ts), free(out.arg), free(out.cpu), free(out.loss), free(out.row);
	free(latest), free(dur), free(totals), free(part), free(dubious), free(owner), free(group);
	free(tid), free(loss), free(number), free(switches), free(kind), free(step), free(suspect), free(ts), free(arg), free(cpu);
}

static void keys(Input *in)
{
	const int64_t size = 1 + below(in, 16), n = rows_of(in, 10 + size), n_kinds = 1 + below(in, 20);
	const int64_t n_slots = 1LL << (1 + below(in, 7));
	uint64_t *key = filled(in, n, 8);
	int32_t *number = room(n, 4);
	KeyTable table = key_table(n_slots);
	uint16_t *kind = filled(in, n, 2);
	int64_t *begin = room(n_kinds + 1, 8), *order = room(n, 8), *position = room(n, 8), known = 0;
	uint8_t *values = filled(in, n * size, 1), *changed = room(n, 1), *taken = room(n * size, 1);

	if (below(in, 2))
		for (int64_t i = 0; i < n; i++)
			kind[i] = (uint16_t)(kind[i] % n_kinds);
	number_keys(key, n, take(in, 8), &table, &known, number);
	if (rows_by_kind(kind, n, n_kinds, begin, order, position) == 0)
		take_values(values, n, size, position, n, order, n, taken);
	take_values(values, n, size, (const int64_t *)key, n, order, n, taken); /* places that are none are told */
	consecutive_places(position, n, order, n);
	mark_changes(values, n, size, changed);
	free_key_table(&table);
	free(key), free(number), free(kind), free(begin), free(order);
	free(position), free(values), free(changed), free(taken);
}

static void footer(Input *in)
{
	const int64_t n_groups = below(in, 4), n_columns = 1 + below(in, 4), n = rows_of(in, 1);
	uint8_t *bytes = filled(in, n, 1);
	int64_t *chunks = room(4 * n_groups * n_columns, 8);

	read_column_chunks(bytes, n, n_groups, n_columns, chunks);
	free(bytes), free(chunks);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static void (*const targets[])(Input *) = {ring, perf, perf_events, automaton, rounds, lanes, keys, footer};
	Input in = {data, size};

	targets[take(&in, 1) % 8](&in);
	return 0;
}
