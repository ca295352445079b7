"""Dense numbers for sparse keys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = int.from_bytes(os.urandom(8), "little")
_FIRST_SLOTS = 64


class KeyNumbers:
    """Numbers distinct 64-bit keys 0, 1, 2 ... in the order of their appearance, in time linear in their number."""

    def __init__(self) -> None:
        self._n = 0
        self._resize(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._n

    def _resize(self, n_slots: int) -> None:
        known = np.empty(0, np.uint64) if self._n == 0 else self.known()
        self._slot_key, self._slot_number = np.zeros(n_slots, np.uint64), np.zeros(n_slots, np.int32)
        self._known = np.empty(n_slots // 2, np.uint64)
        self._n = 0
        if len(known):
            self._number(known, np.empty(len(known), np.int32))

    def as_c(self) -> Any:
        """Return C's `KeyTable`; this must outlive it, and not grow meanwhile."""
        table = ffi.new("KeyTable *")
        table.key, table.number = filled(self._slot_key), filled(self._slot_number)
        table.n_slots, table.known = len(self._slot_key), filled(self._known)
        return table

    def grow(self, n: int) -> None:
        """Make room for twice as many keys, of which `n` are known by now."""
        self._n = n
        self._resize(2 * len(self._slot_key))

    @property
    def room(self) -> int:
        """How many keys there may be before it has to grow."""
        return len(self._known)

    def _number(self, keys: NDArray[np.uint64], out: NDArray[np.int32]) -> int:
        """Count keys in until the table is half full; return how many."""
        table = self.as_c()
        n_known = np.array([self._n], np.int64)
        done: int = lib.number_keys(given(keys), len(keys), SEED, table, filled(n_known), filled(out))
        self._n = int(n_known[0])
        return done

    def known(self) -> NDArray[np.uint64]:
        """Return the keys in the order of their numbers."""
        return self.first(self._n)

    def first(self, n: int) -> NDArray[np.uint64]:
        """Return the keys with the first n numbers."""
        return self._known[:n]

    def number(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Return the number of each key; unknown ones get the next numbers.

        Parameters
        ----------
        values : integers, shape (n,); taken modulo 2**64
        """
        keys = np.ascontiguousarray(values).astype(np.uint64, copy=False)
        out = np.empty(len(keys), np.int32)
        done = self._number(keys, out)
        while done < len(keys):
            self.grow(self._n)
            done += self._number(keys[done:], out[done:])
        return out
