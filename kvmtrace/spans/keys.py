"""Dense numbers for sparse keys: ports, MSRs, guest addresses, exit reasons.

Statistics count with `bincount`, which wants small integers. Sorting millions of keys to find the few
distinct ones would cost more than everything else, so keys are hashed into a table, vectorised; only those
that collide with another key are sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUM_LIMIT = 1 << 61
_TABLE_BITS = 14
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads consecutive keys
_PREFIX = 8192
_SHIFT = np.uint64(64 - _TABLE_BITS)


class KeyIndex:
    """Numbers distinct 64-bit keys 0, 1, 2 ... and keeps the numbers from one table to the next."""

    def __init__(self) -> None:
        self._slot_key = np.zeros(1 << _TABLE_BITS, np.uint64)
        self._slot_id = np.full(1 << _TABLE_BITS, -1, np.int32)
        self._ids: dict[int, int] = {}
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[int]:
        """Return the keys in the order of their numbers."""
        return self._keys

    def encode(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Return the number of each key; unknown keys get new numbers, in the order of their appearance.

        Parameters
        ----------
        values : integers, shape (n,); taken modulo 2**64
        """
        keys = np.ascontiguousarray(values).astype(np.uint64, copy=False)
        slots = ((keys * _MULTIPLIER) >> _SHIFT).astype(np.intp)
        n_known = len(self._keys)
        self._fill_slots(keys[:_PREFIX], slots[:_PREFIX])  # nearly all keys, so that little is left to do
        self._fill_slots(keys, slots)
        ids: NDArray[np.int32] = self._slot_id[slots]
        collided = np.flatnonzero(self._slot_key[slots] != keys)
        if len(collided):
            distinct, inverse = np.unique(keys[collided], return_inverse=True)
            numbers = np.array([self._number(int(key)) for key in distinct], np.int32)
            ids[collided] = numbers[inverse.reshape(-1)]
        return self._by_appearance(ids, n_known)

    def _fill_slots(self, keys: NDArray[np.uint64], slots: NDArray[np.intp]) -> None:
        """Give every empty slot that is needed one of its keys; the others collide."""
        needed = np.flatnonzero(self._slot_id[slots] < 0)
        if not len(needed):
            return
        used = np.zeros(len(self._slot_id), bool)
        used[slots[needed]] = True
        self._slot_key[slots[needed]] = keys[needed]
        for slot in np.flatnonzero(used):
            self._slot_id[slot] = self._number(int(self._slot_key[slot]))

    def _by_appearance(self, ids: NDArray[np.int32], n_known: int) -> NDArray[np.int32]:
        """Renumber the keys that are new in this call so that the first seen has the lowest number."""
        n_keys = len(self._keys)
        if n_keys == n_known:
            return ids
        first = np.full(n_keys, len(ids), np.intp)
        for part in (ids[:_PREFIX], ids):
            first[part[::-1]] = np.arange(len(part) - 1, -1, -1)
            if first[n_known:].max() < len(ids):
                break
        order = np.argsort(first[n_known:], kind="stable")
        new = np.arange(n_keys, dtype=np.int32)
        new[n_known + order] = np.arange(n_known, n_keys, dtype=np.int32)
        self._keys[n_known:] = [self._keys[n_known + old] for old in order.tolist()]
        self._ids.update(zip(self._keys[n_known:], range(n_known, n_keys), strict=True))
        filled = self._slot_id >= n_known
        self._slot_id[filled] = new[self._slot_id[filled]]
        return new[ids]

    def _number(self, key: int) -> int:
        number = self._ids.setdefault(key, len(self._keys))
        if number == len(self._keys):
            self._keys.append(key)
        return number


def grown(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """Return `array` with at least `size` elements, new ones being `fill`."""
    if len(array) >= size:
        return array
    larger = np.full(max(size, 2 * len(array)), fill, array.dtype)
    larger[: len(array)] = array
    return larger


class Counter:
    """Exact integer sums per dense number."""

    def __init__(self) -> None:
        self.values: NDArray[np.int64] = np.zeros(16, np.int64)

    def add(self, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        """Add `weights` (1 each by default) to the sums of `ids`; each call's sums must stay below 2**53."""
        if not len(ids):
            return
        sums = np.bincount(ids, weights)
        self.values = grown(self.values, len(sums))
        # bincount adds in float64, which is exact for integers up to 2**53 (104 days in ns)
        # garbage time stamps may sum to more than int64 holds: such sums stay at a bound
        sums = np.clip(sums, -SUM_LIMIT, SUM_LIMIT).astype(np.int64)
        self.values[: len(sums)] = np.clip(self.values[: len(sums)] + sums, -SUM_LIMIT, SUM_LIMIT)

    def __getitem__(self, number: int) -> int:
        return int(self.values[number]) if number < len(self.values) else 0
