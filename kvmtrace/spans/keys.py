"""Dense numbers for sparse keys: ports, MSRs, guest addresses, exit reasons; and sums by such numbers.

Statistics count with `bincount`, which wants small integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.key_numbers import KeyNumbers
from kvmtrace._native.lane_rows import sum_by_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUM_LIMIT = 1 << 61


class KeyIndex:
    """Numbers distinct 64-bit keys 0, 1, 2 ... and keeps the numbers from one table to the next."""

    def __init__(self) -> None:
        self._numbers = KeyNumbers()

    def __len__(self) -> int:
        return len(self._numbers)

    def keys(self) -> list[int]:
        """Return the keys in the order of their numbers."""
        found: list[int] = self._numbers.known().tolist()
        return found

    def encode(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Return the number of each key; unknown keys get new numbers, in the order of their appearance.

        Parameters
        ----------
        values : integers, shape (n,); taken modulo 2**64
        """
        return self._numbers.number(values)


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
        """Add `weights` (1 each by default) to the sums of `ids`.

        Garbage time stamps may sum to more than int64 holds: such sums stay at a bound.
        """
        if not len(ids):
            return
        sum_by_number(ids, weights, self.room(int(ids.max()) + 1), SUM_LIMIT)

    def room(self, size: int) -> NDArray[np.int64]:
        """Return the sums, of `size` numbers at least, for others to add to."""
        self.values = grown(self.values, size)
        return self.values

    def __getitem__(self, number: int) -> int:
        return int(self.values[number]) if number < len(self.values) else 0
