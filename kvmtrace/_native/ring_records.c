/* SPDX-License-Identifier: MIT
 *
 * Pages of ftrace's ring buffer: records one after the other, each led by a word with a 5-bit type and a 27-bit time
 * delta.
 *
 * Source: include/linux/ring_buffer.h, enum ring_buffer_type
 */
#include "records.h"

#define TYPE_PADDING 29
#define TYPE_TIME_EXTEND 30
#define TYPE_TIME_STAMP 31
#define SMALLEST_BIG_BYTES 8
#define TS_SHIFT 27
#define TS_MSB (0xF8ULL << 56)

/* Words from this record to the next one; those of a page end at `end`. */
static inline int64_t record_step(const Words *buffer, int64_t at, int64_t end, uint32_t head)
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

int64_t count_records(Words buffer, const int64_t *first, int64_t *end, int64_t n_pages, int64_t *counts,
		      int64_t *damaged, int64_t *damage_at, int64_t *damage_stop)
{
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

int64_t fill_records(Words buffer, const int64_t *first, const int64_t *end, const uint64_t *page_ts, int64_t n_pages,
		     const uint16_t *kind_of_id, const Columns *out)
{
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

				if (row == out->n_rows)
					return row + 1;
				out->ts[row] = now;
				put_start(out, row, data);
				if (out->kind)
					put_common(&buffer, kind_of_id, out, row, data);
				row++;
			}
			at += record_step(&buffer, at, end[page], head);
		}
	}
	return row;
}
