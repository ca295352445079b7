"""VM-exits per second of each reason, in bins that widen as the recording turns out to be longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAX_BINS = 1000
_FIRST_SHIFT = 20  # bins of 2**20 ns, about 1 ms
_MAX_SHIFT = 61


class ExitRates:
    """Counts VM-exits per reason's number and bin of 2**k ns."""

    def __init__(self) -> None:
        self._shift = _FIRST_SHIFT
        self._first: int | None = None  # number of the first bin
        self._counts = np.zeros((0, 0), np.int64)  # reason x bin

    def feed(self, reasons: NDArray[np.int64], ts_ns: NDArray[np.int64]) -> None:
        """Count VM-exits."""
        if not len(reasons):
            return
        self._cover(int(ts_ns.min()), int(ts_ns.max()), int(reasons.max()) + 1)
        assert self._first is not None
        bins = np.clip((ts_ns >> self._shift) - self._first, 0, self._counts.shape[1] - 1)
        n_bins = self._counts.shape[1]
        self._counts += np.bincount(reasons * n_bins + bins, minlength=self._counts.size).reshape(self._counts.shape)

    def _cover(self, low: int, high: int, n_reasons: int) -> None:
        """Make bins for both times, and rows for the reasons."""
        first, n_bins = self._first, self._counts.shape[1]
        while True:
            start = low >> self._shift if first is None else min(first, low >> self._shift)
            stop = max((high >> self._shift) + 1, 0 if first is None else first + n_bins)
            if stop - start <= MAX_BINS or self._shift >= _MAX_SHIFT:
                break
            if first is not None:
                odd = first & 1
                padded = np.pad(self._counts, ((0, 0), (odd, (odd + n_bins) & 1)))
                self._counts = padded.reshape(len(padded), -1, 2).sum(axis=2)
                first, n_bins = first >> 1, self._counts.shape[1]
            self._shift += 1
        before = 0 if first is None else first - start
        more = max(n_reasons - len(self._counts), 0)
        self._counts = np.pad(self._counts, ((0, more), (before, stop - start - before - n_bins)))
        self._first = start

    def finish(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (reason's number, ns, VM-exits per second from then on), where the rate changes."""
        if self._first is None:
            return
        per_second = self._counts * 1_000_000_000 >> self._shift
        starts = (np.arange(self._counts.shape[1] + 1, dtype=np.int64) + self._first) << self._shift
        for number, rates in enumerate(per_second):
            ended = np.append(rates, 0)
            changes = np.flatnonzero(np.diff(ended, prepend=0))
            if len(changes):
                yield number, starts[changes], ended[changes]
