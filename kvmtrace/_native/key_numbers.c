/* SPDX-License-Identifier: MIT
 *
 * Dense numbers for sparse 64-bit keys: an open hash table, probed one slot after the other.
 */
#include "loops.h"

/* Spread a key over the table. The seed differs from run to run, so that no file can choose keys that collide. */
static inline uint64_t hash_of(uint64_t key, uint64_t seed)
{
	key = (key ^ seed) * 0x9E3779B97F4A7C15ULL;
	key = (key ^ key >> 32) * 0xD6E8FEB86659FD93ULL;
	return key ^ key >> 32;
}

int64_t number_keys(const uint64_t *keys, int64_t n, uint64_t seed, const KeyTable *table, int64_t *n_known,
		    int32_t *number)
{
	const uint64_t mask = (uint64_t)table->n_slots - 1;
	int64_t known = *n_known, i;

	for (i = 0; i < n; i++) {
		if (i && keys[i] == keys[i - 1]) {
			number[i] = number[i - 1];
			continue;
		}
		uint64_t slot = hash_of(keys[i], seed) & mask;

		while (table->number[slot] && table->key[slot] != keys[i])
			slot = (slot + 1) & mask;
		if (!table->number[slot]) {
			if (known >= table->n_slots / 2)
				break;
			table->known[known] = table->key[slot] = keys[i];
			table->number[slot] = (int32_t)++known;
		}
		number[i] = table->number[slot] - 1;
	}
	*n_known = known;
	return i;
}
