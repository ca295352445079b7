"""Count, sum, extremes and variance of durations per group, in constant memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.spans.keys import grown

if TYPE_CHECKING:
    from numpy.typing import NDArray

REL_STDERR_DIGITS = 6  # what summing in another order leaves alone
_NO_MINIMUM = np.iinfo(np.int64).max


class Moments:
    """Durations, ns, by dense group number; fed in pieces.

    The variance is merged from the pieces' own by Chan, Golub and LeVeque's formula for combining samples.
    """

    def __init__(self) -> None:
        self.count: NDArray[np.int64] = np.zeros(16, np.int64)
        self.total_ns: NDArray[np.int64] = np.zeros(16, np.int64)
        self.min_ns: NDArray[np.int64] = np.full(16, _NO_MINIMUM, np.int64)
        self.max_ns: NDArray[np.int64] = np.zeros(16, np.int64)
        self._mean: NDArray[np.float64] = np.zeros(16)
        self._m2: NDArray[np.float64] = np.zeros(16)

    def _grow(self, size: int) -> None:
        self.count = grown(self.count, size)
        self.total_ns = grown(self.total_ns, size)
        self.min_ns = grown(self.min_ns, size, _NO_MINIMUM)
        self.max_ns = grown(self.max_ns, size)
        self._mean = grown(self._mean, size)
        self._m2 = grown(self._m2, size)

    def add(self, groups: NDArray[np.int64], dur_ns: NDArray[np.int64]) -> None:
        """Add durations, none of them negative."""
        if not len(groups):
            return
        self._grow(int(groups.max()) + 1)
        np.minimum.at(self.min_ns, groups, dur_ns)
        np.maximum.at(self.max_ns, groups, dur_ns)
        count = np.bincount(groups, minlength=len(self.count))
        total = np.bincount(groups, dur_ns, minlength=len(self.count))  # float64: exact below 2**53
        mean = total / np.maximum(count, 1)
        m2 = np.bincount(groups, np.square(dur_ns - mean[groups]), minlength=len(self.count))
        merged = np.maximum(self.count + count, 1)
        delta = mean - self._mean
        self._m2 += m2 + np.where(count > 0, np.square(delta) * self.count * count / merged, 0)
        self._mean += delta * count / merged
        self.count += count
        self.total_ns += np.clip(total, 0, 1 << 61).astype(np.int64)  # more only by garbage time stamps

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
