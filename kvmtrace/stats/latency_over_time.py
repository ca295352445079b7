"""How long VM-exits took, over time: median, 99th percentile and maximum of each of some hundred stretches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.stats.exponential_histogram import MAX_BUCKET, PER_OCTAVE, buckets_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.span_builder import Spans

BINS = 512
FIRST_SHIFT = 10
MAX_SHIFT = 61
COARSER = 2  # buckets of the histograms that are one here: within 2.2 %


class LatencyOverTime:
    """Collects exit→entry times over consecutive pieces, in bins that double as time goes on.

    Parameters
    ----------
    origin_ns : time that counts as 0
    """

    def __init__(self, origin_ns: int) -> None:
        self._origin_ns = origin_ns
        self.bin_ns = 1 << FIRST_SHIFT
        self._counts = np.zeros((BINS, MAX_BUCKET // COARSER + 2), np.int32)
        self._max_ns = np.zeros(BINS, np.int64)

    def feed(self, spans: Spans) -> None:
        """Take in the next piece."""
        pairs = spans.pairs
        handled = np.flatnonzero(pairs.handling & pairs.sound)
        dur_ns = pairs.dur_ns[handled]
        since = spans.lanes.ts_ns[pairs.edges[handled]]
        inside = since >= self._origin_ns
        since, dur_ns = since[inside] - self._origin_ns, dur_ns[inside]
        if not len(dur_ns):
            return
        while BINS * self.bin_ns <= int(since.max()) and self.bin_ns < 1 << MAX_SHIFT:
            self._double()
        where = np.clip(since // self.bin_ns, 0, BINS - 1)
        buckets = np.maximum(buckets_of(dur_ns), 0) // COARSER
        width = self._counts.shape[1]
        counts = np.bincount(where * width + buckets, minlength=self._counts.size)
        self._counts += counts.reshape(self._counts.shape).astype(np.int32)
        np.maximum.at(self._max_ns, where, dur_ns)

    def _double(self) -> None:
        half = BINS // 2
        self._counts[:half] = self._counts[0::2] + self._counts[1::2]
        self._max_ns[:half] = np.maximum(self._max_ns[0::2], self._max_ns[1::2])
        self._counts[half:], self._max_ns[half:] = 0, 0
        self.bin_ns *= 2

    def quantiles(self, length_ns: int, *shares: float) -> list[NDArray[np.int64]]:
        """Return of each bin up to `length_ns` these quantiles, ns; 0 in bins without VM-exits."""
        n = min(max(-(-length_ns // self.bin_ns), 1), BINS)
        seen = np.cumsum(self._counts[:n], axis=1)
        total = seen[:, -1]
        found = []
        for share in shares:
            rank = np.maximum(np.ceil(share * total), 1)
            bucket = np.argmax(seen >= rank[:, None], axis=1) * COARSER
            middle = np.rint(2 ** ((bucket + (COARSER - 1) / 2 - 0.5) / PER_OCTAVE)).astype(np.int64)
            found.append(np.where(total > 0, np.minimum(np.maximum(middle, 1), self._max_ns[:n]), 0))
        return found

    def max_ns(self, length_ns: int) -> NDArray[np.int64]:
        """Return the longest of each bin, 0 in bins without VM-exits."""
        return self._max_ns[: min(max(-(-length_ns // self.bin_ns), 1), BINS)]
