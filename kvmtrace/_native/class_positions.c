/* SPDX-License-Identifier: MIT
 *
 * Where the events of each class stand in a sequence, which of them is the first of its segment, and what they hold.
 */
#include <string.h>

#include "loops.h"

#define N_CLASSES 64

void positions_by_class(const uint8_t *cls, int64_t n, int64_t *begin, int64_t *order)
{
	int64_t next[N_CLASSES] = {0};

	for (int64_t i = 0; i < n; i++)
		next[cls[i] & (N_CLASSES - 1)]++;
	begin[0] = 0;
	for (int c = 0; c < N_CLASSES; c++) {
		begin[c + 1] = begin[c] + next[c];
		next[c] = begin[c];
	}
	for (int64_t i = 0; i < n; i++)
		order[next[cls[i] & (N_CLASSES - 1)]++] = i;
}

int64_t first_in_segments(const int64_t *of, int64_t n_events, const int64_t *positions, int64_t n, int64_t n_segments,
			  int64_t *first, int64_t *count)
{
	memset(first, 0xFF, (size_t)n_segments * sizeof(*first)); /* -1 */
	memset(count, 0, (size_t)n_segments * sizeof(*count));
	for (int64_t i = 0; i < n; i++) {
		const int64_t at = positions[i];

		if (at < 0 || at >= n_events || of[at] < 0 || of[at] >= n_segments)
			return -1;
		if (!count[of[at]]++)
			first[of[at]] = at;
	}
	return 0;
}

int64_t take_values(const uint8_t *column, int64_t n_column, int64_t size, const int64_t *place, int64_t n_places,
		    const int64_t *positions, int64_t n, uint8_t *out)
{
	for (int64_t i = 0; i < n; i++, out += size) {
		const int64_t at = positions[i];

		if (at < 0 || at >= n_places || place[at] < 0 || place[at] >= n_column)
			return -1;
		const uint8_t *value = column + place[at] * size;

		switch (size) { /* constant sizes become single moves */
		case 1: *out = *value; break;
		case 2: memcpy(out, value, 2); break;
		case 4: memcpy(out, value, 4); break;
		case 8: memcpy(out, value, 8); break;
		default: memcpy(out, value, (size_t)size);
		}
	}
	return 0;
}

int64_t consecutive_places(const int64_t *place, int64_t n_places, const int64_t *positions, int64_t n)
{
	int64_t first = -1;

	for (int64_t i = 0; i < n; i++) {
		const int64_t at = positions[i];

		if (at < 0 || at >= n_places)
			return -1;
		if (!i)
			first = place[at];
		else if (place[at] != first + i)
			return -1;
	}
	return first;
}

int64_t steps_and_breaks(const uint8_t *cls, const uint8_t *broken, const int64_t *order, int64_t n, int64_t n_steps,
			 int64_t *latest, int64_t *breaks)
{
	int64_t step = -1, broke = 0;

	for (int64_t i = 0; i < n; i++) {
		const int64_t at = order[i];

		if (at < 0 || at >= n)
			return -1;
		if (cls[at] <= n_steps)
			step = i;
		broke += broken[at] != 0;
		latest[i] = step;
		breaks[i] = broke;
	}
	return 0;
}

void next_entries(const uint8_t *kind, const uint8_t *linked, int64_t n, int32_t entry, int32_t exit, int64_t *next)
{
	int64_t nearest = -1; /* the first segment behind that is an entry, where nothing else decides before it */

	for (int64_t i = n - 1; i >= 0; i--) {
		next[i] = linked[i] ? nearest : -1;
		if (kind[i] == entry)
			nearest = i;
		else if (kind[i] == exit || !kind[i] || !linked[i])
			nearest = -1;
	}
}
