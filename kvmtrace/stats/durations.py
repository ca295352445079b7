"""Durations by group, kept exactly and compactly until their quantiles are asked for.

A duration costs 6 bytes (uint32 ns and its group) unless it lasts longer than 4.29 s, so the samples of a
recording of 40 million events fit in some 100 MB.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

_U32_MAX = 2**32 - 1
REL_STDERR_DIGITS = 6  # what summing in another order leaves alone
HISTOGRAM_BUCKETS = 48  # bucket k counts durations of 2**k .. 2**(k+1)-1 ns; bucket 0 also 0 ns
STEPS_PER_OCTAVE = 8  # of the fine histogram: a bar is 9 to 12 % wide


@dataclass(frozen=True)
class Summary:
    """Statistics of one group of durations, ns.

    Quantiles are by nearest rank, so each is a duration that occurred. `rel_stderr` is the relative
    standard error of the mean in percent, as perf prints it: 100 * sqrt(M2 / (n - 1) / n) / mean.
    """

    samples: int = 0
    total_ns: int | None = None
    min_ns: int | None = None
    max_ns: int | None = None
    mean_ns: int | None = None
    rel_stderr: float | None = None
    p50_ns: int | None = None
    p90_ns: int | None = None
    p99_ns: int | None = None
    p999_ns: int | None = None
    histogram: tuple[int, ...] = ()
    fine_histogram: tuple[tuple[int, int], ...] = ()


def nearest_rank(ordered: NDArray[np.int64], percent: float) -> int:
    """Return the smallest value that at least `percent` % of the sorted values do not exceed."""
    return int(ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)])


def relative_stderr(durations: NDArray[np.int64]) -> float:
    """Return the relative standard error of the mean in percent; 0 for fewer than two durations."""
    n = len(durations)
    mean = float(durations.mean()) if n else 0.0
    if n < 2 or mean == 0:
        return 0.0
    m2 = float(np.square(durations - mean).sum())
    return round(100 * math.sqrt(m2 / (n - 1) / n) / mean, REL_STDERR_DIGITS)


def log2_histogram(ordered: NDArray[np.int64]) -> tuple[int, ...]:
    """Count sorted durations by powers of two; trailing empty buckets are left out."""
    edges = np.left_shift(np.int64(1), np.arange(1, HISTOGRAM_BUCKETS, dtype=np.int64))
    below = np.searchsorted(ordered, edges, side="left")
    counts = np.diff(np.concatenate([[0], below, [len(ordered)]]))
    last = int(np.flatnonzero(counts)[-1]) if counts.any() else -1
    return tuple(int(count) for count in counts[: last + 1])


def _fine_edges() -> NDArray[np.int64]:
    """Return the lower bounds of the fine histogram: whole ns, then eight steps per power of two."""
    whole = np.arange(2 * STEPS_PER_OCTAVE, dtype=np.int64)
    octaves = np.arange(4, HISTOGRAM_BUCKETS, dtype=np.int64)
    steps = np.arange(STEPS_PER_OCTAVE, dtype=np.int64)
    return np.concatenate([whole, ((STEPS_PER_OCTAVE + steps) << (octaves[:, None] - 3)).reshape(-1)])


FINE_EDGES = _fine_edges()


def fine_histogram(ordered: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Count sorted durations by eighths of powers of two: (lower bound ns, count) where there is any."""
    below = np.searchsorted(ordered, FINE_EDGES[1:], side="left")
    counts = np.diff(np.concatenate([[0], below, [len(ordered)]]))
    filled = np.flatnonzero(counts)
    return tuple(zip(FINE_EDGES[filled].tolist(), counts[filled].tolist(), strict=True))


def summarise(durations: NDArray[np.int64]) -> Summary:
    """Summarise durations, ns, in any order."""
    n = len(durations)
    if not n:
        return Summary()
    ordered = np.sort(durations).astype(np.int64, copy=False)
    total = int(ordered.sum())
    return Summary(
        n,
        total,
        int(ordered[0]),
        int(ordered[-1]),
        round(total / n),
        relative_stderr(ordered),
        nearest_rank(ordered, 50),
        nearest_rank(ordered, 90),
        nearest_rank(ordered, 99),
        nearest_rank(ordered, 99.9),
        log2_histogram(ordered),
        fine_histogram(ordered),
    )


class Samples:
    """Durations of many groups, fed in pieces.

    Groups are dense numbers below 65,536 (see `KeyIndex`); higher ones share nothing and are kept apart as
    wider integers.
    """

    def __init__(self) -> None:
        self._durations: list[NDArray[Any]] = []
        self._groups: list[NDArray[Any]] = []

    def add(self, groups: NDArray[np.int64], durations: NDArray[np.int64]) -> None:
        """Add durations, ns, none of them negative."""
        if not len(groups):
            return
        short = int(durations.max()) <= _U32_MAX
        few = int(groups.max()) <= 0xFFFF
        self._durations.append(durations.astype(np.uint32 if short else np.int64))
        self._groups.append(groups.astype(np.uint16 if few else np.int32))

    def grouped(self) -> dict[int, NDArray[np.int64]]:
        """Return group -> its durations in the order they were added."""
        if not self._groups:
            return {}
        groups = np.concatenate(self._groups)
        durations = np.concatenate(self._durations)
        order = np.argsort(groups, kind="stable")
        counts = np.bincount(groups)
        present = np.flatnonzero(counts)
        parts = np.split(durations[order], np.cumsum(counts[present])[:-1])
        return {int(group): part for group, part in zip(present, parts, strict=True)}

    def summaries(self) -> dict[int, Summary]:
        """Return group -> its statistics."""
        return {group: summarise(part) for group, part in self.grouped().items()}
