"""Histograms with exponential buckets of base 2**(1/32): integer arrays that add exactly.

Bucket i holds the durations d with 2**((i-1)/32) < d <= 2**(i/32) ns, as Prometheus' native histograms of schema 5
count (OpenTelemetry's scale 5 has the same bounds, one index lower). Bucket 0 holds 1 ns; 0 ns is counted in ZERO.
A bucket's middle is at most 1.09 % away from any duration in it. Two histograms are merged by adding counts, and the
result does not depend on how the durations were divided among them.

Source: prometheus/client_model metrics.proto (Histogram.schema), opentelemetry-proto metrics.proto
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.spans.keys import Counter, KeyIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

SCHEMA = 5
PER_OCTAVE = 1 << SCHEMA
ZERO = -1  # the bucket of durations of 0 ns
MAX_BUCKET = 63 * PER_OCTAVE
RELATIVE_ERROR = 2 ** (1 / (2 * PER_OCTAVE)) - 1  # of a bucket's middle: 1.09 %
_OFFSET = 1  # buckets are stored from ZERO on
_BITS = 12  # a stored bucket number fits


@cache
def _bounds() -> NDArray[np.int64]:
    """Return the largest duration of each bucket, exactly: floor(2**(i/32)), 32 being 2**SCHEMA."""
    found = []
    for i in range(MAX_BUCKET):
        value = 1 << i
        for _ in range(SCHEMA):
            value = math.isqrt(value)  # the root of a root rounded down, rounded down, is the whole root rounded down
        found.append(value)
    return np.array(found, np.int64)


def buckets_of(dur_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each duration; ZERO for 0 ns.

    Parameters
    ----------
    dur_ns : int64, shape (n,), none negative
    """
    found: NDArray[np.int64] = np.searchsorted(_bounds(), dur_ns, side="left").astype(np.int64)
    found[dur_ns == 0] = ZERO
    return found


def middle_ns(bucket: int) -> float:
    """Return the duration that stands for a bucket: the geometric middle of its bounds."""
    return 0.0 if bucket == ZERO else 2 ** ((bucket - 0.5) / PER_OCTAVE)


def quantile_ns(counts: Mapping[int, int], q: float) -> float | None:
    """Return the q-quantile of a histogram, within RELATIVE_ERROR; None of an empty one.

    Parameters
    ----------
    counts : bucket -> number of durations
    q : 0..1; the value at rank ceil(q * n), as a sorted list has it
    """
    total = sum(counts.values())
    if not total:
        return None
    rank = max(1, math.ceil(q * total))
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return middle_ns(bucket)
    raise AssertionError("the counts do not add up")


def merged(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Return the sum of several histograms, ascending by bucket."""
    total: dict[int, int] = {}
    for counts in histograms:
        for bucket, count in counts.items():
            total[bucket] = total.get(bucket, 0) + count
    return dict(sorted(total.items()))


class Histograms:
    """One histogram per dense group number, fed in pieces."""

    def __init__(self) -> None:
        self._index = KeyIndex()
        self._counts = Counter()

    def add(self, groups: NDArray[Any], dur_ns: NDArray[np.int64]) -> None:
        """Count durations, none of them negative."""
        if len(groups):
            keys = groups.astype(np.int64) << _BITS | (buckets_of(dur_ns) + _OFFSET)
            self._counts.add(self._index.encode(keys))

    def finish(self) -> dict[int, dict[int, int]]:
        """Return group -> bucket -> count, buckets ascending."""
        found: dict[int, dict[int, int]] = {}
        for number, key in enumerate(self._index.keys()):
            found.setdefault(key >> _BITS, {})[(key & (1 << _BITS) - 1) - _OFFSET] = self._counts[number]
        return {group: dict(sorted(counts.items())) for group, counts in found.items()}
