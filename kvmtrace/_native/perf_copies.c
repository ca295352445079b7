/* SPDX-License-Identifier: MIT
 *
 * Samples that perf wrote twice: of one CPU, time, thread, kind and content. An open hash table of those that share
 * their time with a neighbour, probed one slot after the other.
 */
#include <string.h>

#include "records.h"

#define MAX_RECORD (1 << 16) /* bytes of raw data that are compared */

static inline uint64_t mix(uint64_t hash, uint64_t value)
{
	hash = (hash ^ value) * 0x9E3779B97F4A7C15ULL;
	return hash ^ hash >> 32;
}

/* Where the raw data of a row are, its length in front: [*first, *end) in words of the buffer. */
static inline void content_of(const Words *buffer, const TimedRows *rows, int64_t row, int64_t *first, int64_t *end)
{
	int64_t start = rows->wide ? ((const int64_t *)rows->start)[row] : (int64_t)((const uint32_t *)rows->start)[row];
	uint32_t bytes = word_at(buffer, start - 1);

	*first = start < 1 ? 0 : start - 1 < buffer->n_words ? start - 1 : buffer->n_words;
	*end = start + (bytes < MAX_RECORD ? bytes : MAX_RECORD) / 4;
	if (*end > buffer->n_words)
		*end = buffer->n_words;
	if (*end < *first)
		*end = *first;
}

static int same_content(const Words *buffer, const TimedRows *rows, int64_t one, int64_t other)
{
	int64_t at, end, first, stop;

	if (rows->ts[one] != rows->ts[other] || rows->cpu[one] != rows->cpu[other] || rows->tid[one] != rows->tid[other] ||
	    rows->kind[one] != rows->kind[other])
		return 0;
	content_of(buffer, rows, one, &at, &end);
	content_of(buffer, rows, other, &first, &stop);
	return end - at == stop - first && !memcmp(buffer->words + at, buffer->words + first, (size_t)(end - at) * 4);
}

/* Look for a row's equal, put it in where there is none; return whether there was one. */
static int is_known(const Words *buffer, const TimedRows *rows, int64_t row, uint64_t seed, int64_t *slots,
		    uint64_t mask)
{
	uint64_t hash = mix(mix(seed, (uint64_t)rows->ts[row]), (uint16_t)rows->cpu[row]);
	int64_t at, end;

	content_of(buffer, rows, row, &at, &end);
	hash = mix(hash, (uint64_t)(uint32_t)rows->tid[row] << 16 | rows->kind[row]);
	for (; at < end; at++)
		hash = mix(hash, buffer->words[at]);
	uint64_t slot = hash & mask;

	for (; slots[slot]; slot = (slot + 1) & mask)
		if (same_content(buffer, rows, slots[slot] - 1, row))
			return 1;
	slots[slot] = row + 1;
	return 0;
}

/* Do the same with nothing but time and CPU. */
static int is_known_moment(const TimedRows *rows, int64_t row, uint64_t seed, int64_t *slots, uint64_t mask)
{
	uint64_t slot = mix(mix(seed, (uint64_t)rows->ts[row]), (uint16_t)rows->cpu[row]) & mask;

	for (; slots[slot]; slot = (slot + 1) & mask) {
		int64_t other = slots[slot] - 1;

		if (rows->ts[other] == rows->ts[row] && rows->cpu[other] == rows->cpu[row])
			return 1;
	}
	slots[slot] = row + 1;
	return 0;
}

int64_t mark_copies(Words buffer, const TimedRows *rows, int32_t lost, uint64_t seed, int64_t *slots, int64_t *moments,
		    int64_t n_slots, uint8_t *copy, int64_t *n_same)
{
	const uint64_t mask = (uint64_t)n_slots - 1;
	int64_t copies = 0, same = 0, put = 0;

	for (int64_t i = 0; i < rows->n_rows; i++)
		if (rows->order[i] < 0 || rows->order[i] >= rows->n_rows)
			return -1;
	for (int64_t i = 0; i < rows->n_rows; i++) {
		const int64_t row = rows->order[i];

		copy[i] = 0;
		if (!((i && rows->ts[row] == rows->ts[rows->order[i - 1]]) ||
		      (i + 1 < rows->n_rows && rows->ts[row] == rows->ts[rows->order[i + 1]])))
			continue;
		if (++put >= n_slots)
			return -1;
		same += is_known_moment(rows, row, seed, moments, mask);
		if (rows->kind[row] != lost && is_known(&buffer, rows, row, seed, slots, mask)) {
			copy[i] = 1;
			copies++;
		}
	}
	*n_same = same;
	return copies;
}
