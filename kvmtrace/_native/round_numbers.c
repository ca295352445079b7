/* SPDX-License-Identifier: MIT
 *
 * Rounds of a vCPU, each from a VM-entry to the next, numbered by all that they hold: equal numbers, equal bytes.
 */
#include <string.h>

#include "loops.h"

#define MOST_PROBES 64 /* of the table, for one round: no file can make a search long */

/* What the events of a class take: bytes, their class among them, and how many places all its columns have. */
typedef struct {
	int64_t size, n_places;
} ClassSize;

static void sum_sizes(const RoundEvents *events, ClassSize *sizes)
{
	for (int cls = 0; cls < 64; cls++) {
		sizes[cls] = (ClassSize){1, INT64_MAX};
		for (int64_t c = events->begin[cls]; c < events->begin[cls + 1]; c++) {
			sizes[cls].size += events->columns[c].size;
			if (events->columns[c].n < sizes[cls].n_places)
				sizes[cls].n_places = events->columns[c].n;
		}
	}
}

/* Copy a value; constant sizes become single moves. */
static inline void copy_value(const uint8_t *value, int64_t size, uint8_t *out)
{
	switch (size) {
	case 1: *out = *value; break;
	case 2: memcpy(out, value, 2); break;
	case 4: memcpy(out, value, 4); break;
	case 8: memcpy(out, value, 8); break;
	default:
		if (size < 8 || size > 16) {
			memcpy(out, value, (size_t)size);
			break;
		}
		memcpy(out, value, 8); /* two moves that overlap */
		memcpy(out + size - 8, value + size - 8, 8);
	}
}

/* Copy the values of an event behind `used` bytes of `out`; returns the bytes used then, -1 if there is no room, or -2
 * if the event's place is none of its columns'.
 */
static inline int64_t put_event(const RoundEvents *events, const ClassSize *sizes, int64_t i, uint8_t *out, int64_t used,
				int64_t room)
{
	const uint8_t cls = events->cls[i] & 63;
	const int64_t place = events->place[i];

	if (sizes[cls].n_places != INT64_MAX && (place < 0 || place >= sizes[cls].n_places))
		return -2;
	if (sizes[cls].size > room - used)
		return -1;
	out[used++] = events->cls[i];
	for (int64_t c = events->begin[cls]; c < events->begin[cls + 1]; c++) {
		const int64_t size = events->columns[c].size;

		copy_value(events->columns[c].values + place * size, size, out + used);
		used += size;
	}
	return used;
}

static inline uint64_t hash_bytes(const uint8_t *bytes, int64_t n, uint64_t seed)
{
	uint64_t hash = seed ^ (uint64_t)n, other = ~seed, word[2];
	int64_t i = 0;

	for (; i + 16 <= n; i += 16) { /* two chains, which the processor works on at once */
		memcpy(word, bytes + i, 16);
		hash = (hash ^ word[0]) * 0x9E3779B97F4A7C15ULL;
		other = (other ^ word[1]) * 0xD6E8FEB86659FD93ULL;
		hash ^= hash >> 32;
		other ^= other >> 29;
	}
	word[0] = word[1] = 0;
	memcpy(word, bytes + i, (size_t)(n - i));
	hash = (hash ^ word[0]) * 0x9E3779B97F4A7C15ULL;
	other = (other ^ word[1]) * 0xD6E8FEB86659FD93ULL;
	hash = (hash ^ hash >> 32 ^ other ^ other >> 29) * 0x9E3779B97F4A7C15ULL;
	return hash ^ hash >> 32;
}

/* Return the number of the content that stands behind the known ones, which it joins if it is new; -1: no room. */
static int32_t number_of(const RoundTable *table, int64_t size)
{
	const uint64_t mask = (uint64_t)table->n_slots - 1;
	const int64_t n = *table->n_known;
	const uint8_t *bytes = table->bytes + table->at[n];
	const uint64_t hash = hash_bytes(bytes, size, table->seed);

	for (uint64_t probe = 0; probe < MOST_PROBES; probe++) {
		const uint64_t slot = (hash + probe) & mask;
		const int64_t known = (int64_t)table->slots[slot] - 1;

		if (known < 0) {
			if (n >= table->most)
				return -1;
			table->hash[n] = hash;
			table->at[n + 1] = table->at[n] + size;
			table->slots[slot] = (int32_t)(n + 1);
			*table->n_known = n + 1;
			return (int32_t)n;
		}
		if (table->hash[known] == hash && table->at[known + 1] - table->at[known] == size &&
		    !memcmp(table->bytes + table->at[known], bytes, (size_t)size))
			return (int32_t)known;
	}
	return -1;
}

int64_t number_rounds(const RoundEvents *events, int32_t entry, int64_t longest, const RoundTable *table, int64_t *start,
		      int64_t *stop, int32_t *number)
{
	const int64_t n = events->n;
	int64_t n_rounds = 0;
	ClassSize sizes[64];

	sum_sizes(events, sizes);
	for (int64_t i = 0; i < n;) {
		const int64_t n_known = *table->n_known, room = table->n_bytes - table->at[n_known];
		int regular = events->cls[i] == entry && !(events->first[i] && !events->repeated[i]);
		int64_t used = 0, j = i;

		do {
			if (regular) {
				used = put_event(events, sizes, j, table->bytes + table->at[n_known], used, room);
				if (used == -2)
					return -1;
				regular = used >= 0 && j - i < longest && (j == i || !events->odd[j]);
			}
			j++;
		} while (j < n && !events->first[j] && events->cls[j] != entry);
		const int closed = j < n && !events->first[j]; /* by the next entry, which begins another round */

		if (j - i == 1 && !closed && events->cls[i] == entry && (!events->first[i] || events->repeated[i])) {
			i = j; /* ended the round before */
			continue;
		}
		if (regular && closed && !events->odd[j]) {
			used = put_event(events, sizes, j, table->bytes + table->at[n_known], used, room);
			if (used == -2)
				return -1;
			regular = used >= 0;
		} else {
			regular = 0;
		}
		start[n_rounds] = i;
		stop[n_rounds] = j + closed;
		number[n_rounds++] = regular ? number_of(table, used) : -1;
		i = j;
	}
	return n_rounds;
}
