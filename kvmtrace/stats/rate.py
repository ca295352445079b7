"""VM-exits over time, in bins that widen as the recording turns out to be longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.stats.rows import Rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

MAX_BINS = 1024
_FIRST_SHIFT = 10  # bins of 1,024 ns


class RateAccumulator:
    """Counts events per bin of 2**k ns; k is the smallest that needs at most MAX_BINS bins."""

    def __init__(self) -> None:
        self._shift = _FIRST_SHIFT
        self._first: int | None = None  # number of the first bin: ts_ns >> shift
        self._counts = {"kvm_exit": np.zeros(0, np.int64), "kvm_userspace_exit": np.zeros(0, np.int64)}

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        if not len(table):
            return
        self._cover(int(table.ts_ns.min()), int(table.ts_ns.max()))
        assert self._first is not None
        for event, counts in self._counts.items():
            bins = (table.ts_ns[table.rows(event)] >> self._shift) - self._first
            np.add(counts, np.bincount(bins, minlength=len(counts)), out=counts)

    def _cover(self, low: int, high: int) -> None:
        """Widen and extend the bins until both times have one."""
        first = low >> self._shift if self._first is None else min(self._first, low >> self._shift)
        n_bins = len(self._counts["kvm_exit"])
        last = max(high >> self._shift, (self._first or first) + n_bins - 1)
        while last - first >= MAX_BINS:
            self._halve()
            first, last = first >> 1, last >> 1
        before = 0 if self._first is None else self._first - first
        for event, counts in self._counts.items():
            wider = np.zeros(last - first + 1, np.int64)
            wider[before : before + len(counts)] = counts
            self._counts[event] = wider
        self._first = first

    def _halve(self) -> None:
        """Make each bin twice as wide."""
        self._shift += 1
        if self._first is None:
            return
        odd = self._first & 1
        self._first >>= 1
        self._counts = {event: _paired(counts, odd) for event, counts in self._counts.items()}

    def finish(self) -> Rate | None:
        """Return the rates, None for no events."""
        if self._first is None:
            return None
        exits, userspace = (tuple(counts.tolist()) for counts in self._counts.values())
        return Rate(1 << self._shift, self._first << self._shift, exits, userspace)


def _paired(counts: NDArray[np.int64], odd: int) -> NDArray[np.int64]:
    """Add neighbours; with `odd`, the first stands alone."""
    padded = np.concatenate([np.zeros(odd, np.int64), counts])
    padded = np.append(padded, np.zeros(len(padded) & 1, np.int64))
    sums: NDArray[np.int64] = padded.reshape(-1, 2).sum(axis=1)
    return sums
