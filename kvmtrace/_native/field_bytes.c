/* SPDX-License-Identifier: MIT
 *
 * Fields of many records.
 */
#include <string.h>

#include "records.h"

#define AHEAD 16 /* records */

static inline int64_t start_at(const void *starts, int wide, int64_t row)
{
	return wide ? ((const int64_t *)starts)[row] : (int64_t)((const uint32_t *)starts)[row];
}

/* Copy a field that begins at byte `at` of the buffer, all of it or what there is. */
static inline void copy_field(const Words *buffer, int64_t at, int64_t size, int by_word, uint8_t *out)
{
	const uint8_t *bytes = (const uint8_t *)buffer->words;
	const int64_t n_bytes = buffer->n_words * 4;

	if (at >= 0 && at + size <= n_bytes) {
		memcpy(out, bytes + at, (size_t)size);
		return;
	}
	for (int64_t i = 0; by_word && i < size; i += 4) {
		uint32_t word = word_at(buffer, at / 4 + i / 4);

		memcpy(out + i, &word, 4);
	}
	for (int64_t i = 0; !by_word && i < size; i++) {
		int64_t where = at + i < 0 ? 0 : at + i;

		out[i] = bytes[where < n_bytes ? where : n_bytes - 1];
	}
}

/* Copy a field of rows first..last; the compiler makes a loop of its own for each usual size. */
static inline void copy_rows(const Words *buffer, const void *starts, int wide, int64_t first, int64_t last,
			     int64_t unit, int64_t offset, int64_t size, int by_word, uint8_t *out)
{
	const uint8_t *bytes = (const uint8_t *)buffer->words;

	for (int64_t row = first; row < last; row++) {
		if (row + AHEAD < last) /* records lie too far apart for the processor to guess the next one */
			__builtin_prefetch(bytes + start_at(starts, wide, row + AHEAD) * unit + offset);
		copy_field(buffer, start_at(starts, wide, row) * unit + offset, size, by_word, out + row * size);
	}
}

static void copy_sized(const Words *buffer, const void *starts, int wide, int64_t first, int64_t last, int64_t unit,
		       int64_t offset, int64_t size, int by_word, uint8_t *out)
{
	switch (size) {
	case 1: copy_rows(buffer, starts, wide, first, last, unit, offset, 1, by_word, out); break;
	case 2: copy_rows(buffer, starts, wide, first, last, unit, offset, 2, by_word, out); break;
	case 4: copy_rows(buffer, starts, wide, first, last, unit, offset, 4, by_word, out); break;
	case 8: copy_rows(buffer, starts, wide, first, last, unit, offset, 8, by_word, out); break;
	default: copy_rows(buffer, starts, wide, first, last, unit, offset, size, by_word, out);
	}
}

void gather_bytes(Words buffer, const void *starts, int32_t wide, int64_t n, int64_t unit, int64_t offset, int64_t size,
		  int32_t by_word, uint8_t *out)
{
	copy_sized(&buffer, starts, wide, 0, n, unit, offset, size, by_word, out);
}

void gather_fields(Words buffer, const void *starts, int32_t wide, int64_t n, const FieldPlace *fields, int64_t n_fields)
{
	const uint8_t *bytes = (const uint8_t *)buffer.words;

	for (int64_t row = 0; row < n; row++) {
		const int64_t at = start_at(starts, wide, row) * 4;

		if (row + AHEAD < n)
			__builtin_prefetch(bytes + start_at(starts, wide, row + AHEAD) * 4);
		for (int64_t i = 0; i < n_fields; i++) {
			const FieldPlace *f = fields + i;
			uint8_t *out = f->out + row * f->size;

			switch (f->size) { /* constant sizes become single moves */
			case 1: copy_field(&buffer, at + f->offset, 1, f->by_word, out); break;
			case 4: copy_field(&buffer, at + f->offset, 4, f->by_word, out); break;
			case 8: copy_field(&buffer, at + f->offset, 8, f->by_word, out); break;
			default: copy_field(&buffer, at + f->offset, f->size, f->by_word, out);
			}
		}
	}
}
