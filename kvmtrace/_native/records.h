/* SPDX-License-Identifier: MIT
 *
 * What the decoders share: words of a buffer, and the columns of records.
 */
#ifndef KVMTRACE_RECORDS_H
#define KVMTRACE_RECORDS_H

#include "loops.h"

/* Return a word of the buffer; before its begin the first one, beyond its end the last one. */
static inline uint32_t word_at(const Words *buffer, int64_t at)
{
	if (at < 0)
		at = 0;
	if (at >= buffer->n_words) {
		if (!buffer->n_words)
			return 0;
		at = buffer->n_words - 1;
	}
	return buffer->words[at];
}

/* Keep what each event of ftrace begins with: u16 type, u8 flags, u8 preempt count, s32 pid. */
static inline void put_common(const Words *buffer, const uint16_t *kind_of_id, const Columns *out, int64_t row,
			      int64_t start)
{
	uint32_t first = word_at(buffer, start);

	out->kind[row] = kind_of_id[first & 0xFFFF];
	out->flags[row] = (uint8_t)(first >> 16);
	out->preempt[row] = (uint8_t)(first >> 24);
	out->tid[row] = (int32_t)word_at(buffer, start + 1);
}

static inline void put_start(const Columns *out, int64_t row, int64_t start)
{
	if (out->wide)
		((int64_t *)out->start)[row] = start;
	else
		((uint32_t *)out->start)[row] = (uint32_t)start;
}

#endif
