/* SPDX-License-Identifier: MIT
 *
 * One field of many records.
 */
#include <string.h>

#include "records.h"

#define AHEAD 16 /* records */

static inline int64_t start_at(const void *starts, int wide, int64_t row)
{
	return wide ? ((const int64_t *)starts)[row] : (int64_t)((const uint32_t *)starts)[row];
}

void gather_bytes(Words buffer, const void *starts, int32_t wide, int64_t n, int64_t unit, int64_t offset, int64_t size,
		  int32_t by_word, uint8_t *out)
{
	const uint8_t *bytes = (const uint8_t *)buffer.words;
	const int64_t n_bytes = buffer.n_words * 4;

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
