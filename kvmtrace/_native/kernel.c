/* SPDX-License-Identifier: MIT
 *
 * The inner loops of decoding and of the model's check, compiled. Each function gives, to the bit, what the NumPy code beside its caller gives
 * (tests/kernel/test_kernel.py holds them against each other); kernel.py loads this file and says what the arguments
 * are. Nothing here trusts its input: every index is held inside the buffer, as NumPy's mode="clip" does.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KERNEL_VERSION 5

/* ring buffer: include/linux/ring_buffer.h, enum ring_buffer_type */
#define TYPE_PADDING 29
#define TYPE_TIME_EXTEND 30
#define TYPE_TIME_STAMP 31
#define SMALLEST_BIG_BYTES 8
#define TS_SHIFT 27
#define TS_MSB (0xF8ULL << 56)

/* perf.data: include/uapi/linux/perf_event.h, enum perf_event_type */
#define RECORD_SAMPLE 9

typedef struct {
	const uint32_t *words;
	int64_t n_words;
} Buffer;

int32_t kernel_version(void)
{
	return KERNEL_VERSION;
}

static inline uint32_t word_at(const Buffer *buffer, int64_t at)
{
	if (at < 0)
		at = 0;
	return buffer->words[at < buffer->n_words ? at : buffer->n_words - 1];
}

/* Words from this record to the next one; those of a page end at `end`. */
static inline int64_t record_step(const Buffer *buffer, int64_t at, int64_t end, uint32_t head)
{
	uint32_t type = head & 31;

	if (type == TYPE_TIME_EXTEND || type == TYPE_TIME_STAMP)
		return 2;
	if (type != 0 && type != TYPE_PADDING)
		return (int64_t)type + 1;
	if (type == TYPE_PADDING && head >> 5 == 0)
		return end - at; /* the rest of the page */
	int64_t length = word_at(buffer, at + 1);

	if (type == 0 && length < SMALLEST_BIG_BYTES)
		return end - at + 1; /* that is no record: it shall not fit */
	return 1 + (length + 3) / 4;
}

/* What each event of ftrace begins with: u16 type, u8 flags, u8 preempt count, s32 pid. */
typedef struct {
	const uint16_t *kind_of_id; /* NULL: the common fields are not wanted */
	uint16_t *kind;
	uint8_t *flags;
	uint8_t *preempt;
	int32_t *tid;
} Common;

static inline void put_common(const Buffer *buffer, const Common *common, int64_t row, int64_t start)
{
	uint32_t first = word_at(buffer, start);

	common->kind[row] = common->kind_of_id[first & 0xFFFF];
	common->flags[row] = (uint8_t)(first >> 16);
	common->preempt[row] = (uint8_t)(first >> 24);
	common->tid[row] = (int32_t)word_at(buffer, start + 1);
}

static inline void put_start(void *starts, int wide, int64_t row, int64_t start)
{
	if (wide)
		((int64_t *)starts)[row] = start;
	else
		((uint32_t *)starts)[row] = (uint32_t)start;
}

/* Count the data records of pages, and find those whose records do not fit: of page `damaged[i]` the record at word
 * `damage_at[i]` would end at word `damage_stop[i]`, behind the page's last. Returns the number of damaged pages.
 */
int64_t count_records(const uint32_t *words, int64_t n_words, const int64_t *first, int64_t *end, int64_t n_pages,
		      int64_t *counts, int64_t *damaged, int64_t *damage_at, int64_t *damage_stop)
{
	const Buffer buffer = {words, n_words};
	int64_t n_damaged = 0;

	for (int64_t page = 0; page < n_pages; page++) {
		int64_t count = 0, at = first[page];

		while (at < end[page]) {
			uint32_t head = word_at(&buffer, at);
			int64_t next = at + record_step(&buffer, at, end[page], head);

			if (next > end[page]) {
				damaged[n_damaged] = page;
				damage_at[n_damaged] = at;
				damage_stop[n_damaged++] = next;
				end[page] = at;
				break;
			}
			count += (head & 31) < TYPE_PADDING;
			at = next;
		}
		counts[page] = count;
	}
	return n_damaged;
}

/* Fill in the data records of pages that count_records has been through (`end` is what it left). Returns how many there
 * are, more than n_rows if more than were counted: the file has been changed meanwhile.
 */
int64_t fill_records(const uint32_t *words, int64_t n_words, const int64_t *first, const int64_t *end,
		     const uint64_t *page_ts, int64_t n_pages, const uint16_t *kind_of_id, int32_t wide,
		     int64_t n_rows, uint64_t *ts, void *start, uint16_t *kind, uint8_t *flags, uint8_t *preempt,
		     int32_t *tid)
{
	const Buffer buffer = {words, n_words};
	const Common common = {kind_of_id, kind, flags, preempt, tid};
	int64_t row = 0;

	for (int64_t page = 0; page < n_pages; page++) {
		uint64_t now = page_ts[page];

		for (int64_t at = first[page]; at < end[page];) {
			uint32_t head = word_at(&buffer, at), type = head & 31;
			uint64_t delta = head >> 5;

			if (type >= TYPE_TIME_EXTEND)
				delta += (uint64_t)word_at(&buffer, at + 1) << TS_SHIFT;
			now = type == TYPE_TIME_STAMP ? delta | (page_ts[page] & TS_MSB) : now + delta;
			if (type < TYPE_PADDING) {
				int64_t data = at + 1 + (type == 0);

				if (row == n_rows)
					return row + 1;
				ts[row] = now;
				put_start(start, wide, row, data);
				if (kind_of_id)
					put_common(&buffer, &common, row, data);
				row++;
			}
			at += record_step(&buffer, at, end[page], head);
		}
	}
	return row;
}

#define AHEAD 16 /* records */

static inline int64_t start_at(const void *starts, int wide, int64_t row)
{
	return wide ? ((const int64_t *)starts)[row] : (int64_t)((const uint32_t *)starts)[row];
}

/* Copy `size` bytes at byte `start * unit + offset` of each record. Beyond the buffer's end its last word repeats
 * (`by_word`: fields of whole words at a multiple of 4) or its last byte.
 */
void gather_bytes(const uint32_t *words, int64_t n_words, const void *starts, int32_t wide, int64_t n, int64_t unit,
		  int64_t offset, int64_t size, int32_t by_word, uint8_t *out)
{
	const Buffer buffer = {words, n_words};
	const uint8_t *bytes = (const uint8_t *)words;
	const int64_t n_bytes = n_words * 4;

	for (int64_t row = 0; row < n; row++, out += size) {
		int64_t at = start_at(starts, wide, row) * unit + offset;

		if (row + AHEAD < n) /* records lie too far apart for the processor to guess the next one */
			__builtin_prefetch(bytes + start_at(starts, wide, row + AHEAD) * unit + offset);
		if (at >= 0 && at + size <= n_bytes) {
			switch (size) { /* constant sizes become single moves */
			case 1: *out = bytes[at]; break;
			case 2: memcpy(out, bytes + at, 2); break;
			case 4: memcpy(out, bytes + at, 4); break;
			case 8: memcpy(out, bytes + at, 8); break;
			default: memcpy(out, bytes + at, (size_t)size);
			}
			continue;
		}
		for (int64_t i = 0; by_word && i < size; i += 4) {
			uint32_t word = word_at(&buffer, at / 4 + i / 4);

			memcpy(out + i, &word, 4);
		}
		for (int64_t i = 0; !by_word && i < size; i++) {
			int64_t where = at + i < 0 ? 0 : at + i;

			out[i] = bytes[where < n_bytes ? where : n_bytes - 1];
		}
	}
}

static inline uint64_t double_at(const uint64_t *words, int64_t n_words, int64_t at)
{
	return words[at < n_words ? at : n_words - 1];
}

/* Find the records that begin in words first..last (the last of them ends at `end` at the latest), and count the
 * samples. Records: their number, or -1 - their number where an impossible one ended the walk; *stop: where it ended.
 */
int64_t count_perf_records(const uint64_t *words, int64_t first, int64_t last, int64_t end, int64_t *n_samples,
			   int64_t *stop)
{
	int64_t at = first, n = 0, samples = 0;

	while (at < last) {
		int64_t size = (int64_t)(words[at] >> 48);

		if (size < 8 || size & 7 || at + size / 8 > end)
			break;
		samples += (uint32_t)words[at] == RECORD_SAMPLE;
		n++;
		at += size / 8;
	}
	*n_samples = samples;
	*stop = at;
	return at < last ? -1 - n : n;
}

/* Where the parts of a sample are, in u64 words from its header; chain and cpu -1 if absent. */
typedef struct {
	int64_t time, cpu, raw, chain;
} Layout;

#define MAX_CHAIN (1 << 16) /* of a sample's call chain; more is damage */
#define MAX_CPU 32767

/* Return the layout of the sample at word `at`, NULL if it does not count. */
static inline const Layout *layout_of(const uint64_t *words, int64_t n_words, int64_t at, const Layout *layouts,
				      const uint8_t *number_of_id, int64_t n_ids)
{
	if (!number_of_id)
		return layouts;
	uint64_t id = double_at(words, n_words, at + 1);

	return id < (uint64_t)n_ids && number_of_id[id] ? layouts + number_of_id[id] - 1 : NULL;
}

/* Fill in the samples among the records of words first..stop, and the positions of all other records. `number_of_id`
 * gives the number of a sample's layout, from 1, by the identifier that it begins with (0: it does not count); NULL:
 * all samples have the first one. Returns how many count and hold raw data, -1 if there is not what was counted.
 */
int64_t fill_perf_records(const uint64_t *words, int64_t n_words, int64_t first, int64_t stop, const Layout *layouts,
			  const uint8_t *number_of_id, int64_t n_ids, const uint16_t *kind_of_id, int32_t wide,
			  int64_t n_rows, int64_t n_others, int64_t *ts, int16_t *cpu, void *start, uint16_t *kind, uint8_t *flags, uint8_t *preempt,
			  int32_t *tid, int64_t *others)
{
	const Buffer buffer = {(const uint32_t *)words, n_words * 2};
	const Common common = {kind_of_id, kind, flags, preempt, tid};
	int64_t row = 0;

	for (int64_t at = first, size; at < stop; at += size) {
		uint64_t head = words[at];

		size = (int64_t)(head >> 51);
		if (size < 1)
			return -1;
		if ((uint32_t)head != RECORD_SAMPLE) {
			if (n_others-- == 0)
				return -1;
			*others++ = at;
			continue;
		}
		const Layout *where = layout_of(words, n_words, at, layouts, number_of_id, n_ids);

		if (!where)
			continue;
		int64_t raw = at + where->raw;

		if (where->chain >= 0) {
			uint64_t chain = double_at(words, n_words, at + where->chain);

			raw += (int64_t)(chain < MAX_CHAIN ? chain : MAX_CHAIN);
		}
		if (raw >= at + size)
			continue;
		if (row == n_rows)
			return -1;
		uint32_t number = where->cpu < 0 ? UINT32_MAX : (uint32_t)double_at(words, n_words, at + where->cpu);

		ts[row] = (int64_t)double_at(words, n_words, at + where->time);
		cpu[row] = number <= MAX_CPU ? (int16_t)number : -1;
		put_start(start, wide, row, raw * 2 + 1);
		put_common(&buffer, &common, row, raw * 2 + 1);
		row++;
	}
	return row;
}

/* Count the events of threads `tids` (ascending) that the model tracks (class > 0): per thread in `counts`. Returns
 * how many events of these threads there are, tracked or not. `number` keeps each row's thread, from 1; 0: none.
 */
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

/* Put the tracked events in order of thread, recorded order within a thread. `next` holds where each thread begins
 * and is used up.
 */
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

/* Step the transition table through a sequence: the state in which each event finds its thread, and for each step
 * (class 1..n_steps) its position, the state before and the table's verdict. Returns how many steps there are.
 */
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

/* Cut a sequence into segments, at events of the three boundary classes and where knowledge begins. Returns how many
 * there are; `of` gives each event's.
 */
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

/* Count the steps by edge (state before, class) and by the log-linear bucket of the time since the step before:
 * 2^sub_bits buckets for each power of two. Steps from the unknown state and wrong ones do not count.
 */
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

/* Sort rows by their kind: `order` has the rows of kind 0, of kind 1 ..., each ascending, from `begin[kind]` on (n_kinds + 1
 * numbers), `position` the place of each row within its kind. Returns -1 if a kind is none of n_kinds.
 */
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

/* For each row, the latest row of its thread up to itself that is wanted, or -1; threads stand one behind the other. */
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
