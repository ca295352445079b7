"""Count, sum, extremes and variance of durations per group, in constant memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.duration_sums import NO_MINIMUM, sum_durations
from kvmtrace.spans.keys import grown

if TYPE_CHECKING:
    from numpy.typing import NDArray

REL_STDERR_DIGITS = 6  # what summing in another order leaves alone


class Moments:
    """Durations, ns, by dense group number; fed in pieces.

    The variance is merged from the pieces' own by Chan, Golub and LeVeque's formula for combining samples.
    """

    def __init__(self) -> None:
        self.count: NDArray[np.int64] = np.zeros(16, np.int64)
        self.total_ns: NDArray[np.int64] = np.zeros(16, np.int64)
        self.min_ns: NDArray[np.int64] = np.full(16, NO_MINIMUM, np.int64)
        self.max_ns: NDArray[np.int64] = np.zeros(16, np.int64)
        self._mean: NDArray[np.float64] = np.zeros(16)
        self._m2: NDArray[np.float64] = np.zeros(16)

    def _grow(self, size: int) -> None:
        self.count = grown(self.count, size)
        self.total_ns = grown(self.total_ns, size)
        self.min_ns = grown(self.min_ns, size, NO_MINIMUM)
        self.max_ns = grown(self.max_ns, size)
        self._mean = grown(self._mean, size)
        self._m2 = grown(self._m2, size)

    def add(self, groups: NDArray[np.int64], dur_ns: NDArray[np.int64]) -> None:
        """Add durations, none of them negative."""
        if not len(groups):
            return
        self._grow(int(groups.max()) + 1)
        found = sum_durations(groups, dur_ns, len(self.count))
        count, mean = found.count, found.mean
        np.minimum(self.min_ns, found.min_ns, out=self.min_ns)
        np.maximum(self.max_ns, found.max_ns, out=self.max_ns)
        merged = np.maximum(self.count + count, 1)
        delta = mean - self._mean
        self._m2 += found.squares + np.where(count > 0, np.square(delta) * self.count * count / merged, 0)
        self._mean += delta * count / merged
        self.count += count
        self.total_ns += np.clip(found.total, 0, 1 << 61).astype(np.int64)  # more only by garbage time stamps

    def rel_stderr(self, group: int) -> float:
        """Return the relative standard error of the mean in percent; 0 for fewer than two durations."""
        n, mean = int(self.count[group]), float(self._mean[group])
        if n < 2 or mean == 0:
            return 0.0
        return round(100 * math.sqrt(float(self._m2[group]) / (n - 1) / n) / mean, REL_STDERR_DIGITS)

    def summary(self, group: int) -> dict[str, Any]:
        """Return the fields of a PerfRow for a group with at least one duration."""
        n, total_ns = int(self.count[group]), int(self.total_ns[group])
        return {
            "samples": n,
            "total_ns": total_ns,
            "min_ns": int(self.min_ns[group]),
            "max_ns": int(self.max_ns[group]),
            "mean_ns": round(total_ns / n),
            "rel_stderr": self.rel_stderr(group),
        }
