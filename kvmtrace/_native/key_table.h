/* SPDX-License-Identifier: MIT
 *
 * The open hash table behind KeyTable, probed one slot after the other.
 */
#ifndef KVMTRACE_KEY_TABLE_H
#define KVMTRACE_KEY_TABLE_H

#include "loops.h"

/* Spread a key over the table. The seed differs from run to run, so that no file can choose keys that collide. */
static inline uint64_t hash_of(uint64_t key, uint64_t seed)
{
	key = (key ^ seed) * 0x9E3779B97F4A7C15ULL;
	key = (key ^ key >> 32) * 0xD6E8FEB86659FD93ULL;
	return key ^ key >> 32;
}

/* Return a key's number from 0, a new key's being the next one; -1 where it is new and the table half full. */
static inline int32_t number_of_key(const KeyTable *table, uint64_t key, uint64_t seed, int64_t *known)
{
	const uint64_t mask = (uint64_t)table->n_slots - 1;
	uint64_t slot = hash_of(key, seed) & mask;

	while (table->number[slot] && table->key[slot] != key)
		slot = (slot + 1) & mask;
	if (!table->number[slot]) {
		if (*known >= table->n_slots / 2)
			return -1;
		table->known[*known] = table->key[slot] = key;
		table->number[slot] = (int32_t)++*known;
	}
	return table->number[slot] - 1;
}

#endif
