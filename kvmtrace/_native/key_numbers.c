/* SPDX-License-Identifier: MIT
 *
 * Dense numbers for sparse 64-bit keys.
 */
#include "key_table.h"

int64_t number_keys(const uint64_t *keys, int64_t n, uint64_t seed, const KeyTable *table, int64_t *n_known,
		    int32_t *number)
{
	int64_t known = *n_known, i;

	for (i = 0; i < n; i++) {
		if (i && keys[i] == keys[i - 1]) {
			number[i] = number[i - 1];
			continue;
		}
		number[i] = number_of_key(table, keys[i], seed, &known);
		if (number[i] < 0)
			break;
	}
	*n_known = known;
	return i;
}
