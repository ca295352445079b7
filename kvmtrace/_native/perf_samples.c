/* SPDX-License-Identifier: MIT
 *
 * Records of a perf.data: a u64 head (u32 type, u16 misc, u16 size) and what its event's sample_type says.
 *
 * Source: include/uapi/linux/perf_event.h, enum perf_event_type, PERF_RECORD_SAMPLE
 */
#include "records.h"

#define RECORD_SAMPLE 9
#define MAX_CHAIN (1 << 16) /* of a sample's call chain; more is damage */
#define MAX_CPU 32767

static inline uint64_t double_at(const uint64_t *words, int64_t n_words, int64_t at)
{
	return words[at < n_words ? at : n_words - 1];
}

/* Words of the record with this head, 0 where it cannot be one of those that end at `end`. */
static inline int64_t record_words(uint64_t head, int64_t at, int64_t end)
{
	const int64_t size = (int64_t)(head >> 48);

	return size < 8 || size & 7 || at + size / 8 > end ? 0 : size / 8;
}

int64_t end_of_perf_records(const uint64_t *words, int64_t n_words)
{
	int64_t at = 0;

	while (at < n_words) {
		const int64_t size = record_words(words[at], at, n_words);

		if (!size)
			break;
		at += size;
	}
	return at;
}

/* Return the number of the layout, from 1, of samples with this identifier; 0: they do not count. */
static inline int64_t layout_number(const Samples *samples, uint64_t id)
{
	int64_t low = 0, high = samples->n_ids;

	if (samples->table_size) {
		id -= samples->ids[0];
		return id < (uint64_t)samples->table_size ? samples->table[id] : 0;
	}
	while (low < high) {
		int64_t middle = (low + high) / 2;

		if (samples->ids[middle] < id)
			low = middle + 1;
		else
			high = middle;
	}
	return low < samples->n_ids && samples->ids[low] == id ? samples->layout_of_id[low] + 1 : 0;
}

/* Return the layout of the sample at word `at`, NULL if it does not count. */
static inline const Layout *layout_of(const uint64_t *words, int64_t n_words, int64_t at, const Samples *samples)
{
	int64_t number = samples->n_ids ? layout_number(samples, double_at(words, n_words, at + 1)) : 1;

	return number > 0 && number <= samples->n_layouts ? samples->layouts + number - 1 : NULL;
}

int64_t read_perf_records(const uint64_t *words, int64_t n_words, PerfSpan *span, const Samples *samples,
			  const uint16_t *kind_of_id, const Columns *out, int16_t *cpu, int64_t *others)
{
	const Words buffer = {(const uint32_t *)words, n_words * 2};
	const int64_t n_others = span->n_others;
	int64_t row = 0, size;

	span->n_others = 0;
	for (; span->at < span->last; span->at += size) {
		const int64_t at = span->at;
		const uint64_t head = words[at];

		size = record_words(head, at, span->end);
		if (!size)
			break;
		if ((uint32_t)head != RECORD_SAMPLE) {
			if (span->n_others == n_others)
				return -1;
			others[span->n_others++] = at;
			continue;
		}
		const Layout *where = layout_of(words, n_words, at, samples);

		if (!where)
			continue;
		int64_t raw = at + where->raw;

		if (where->chain >= 0) {
			uint64_t chain = double_at(words, n_words, at + where->chain);

			raw += (int64_t)(chain < MAX_CHAIN ? chain : MAX_CHAIN);
		}
		if (raw >= at + size)
			continue;
		if (row == out->n_rows)
			return -1;
		uint32_t number = where->cpu < 0 ? UINT32_MAX : (uint32_t)double_at(words, n_words, at + where->cpu);

		out->ts[row] = double_at(words, n_words, at + where->time);
		cpu[row] = number <= MAX_CPU ? (int16_t)number : -1;
		put_start(out, row, raw * 2 + 1);
		if (out->kind)
			put_common(&buffer, kind_of_id, out, row, raw * 2 + 1);
		row++;
	}
	return row;
}
