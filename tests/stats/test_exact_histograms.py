"""Exponential histograms and exact sums: against plain Python, and the same however the durations are divided."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.stats.exact_sums import ExactSum, ExactSums
from kvmtrace.stats.exponential_histogram import (
    MAX_BUCKET,
    PER_OCTAVE,
    RELATIVE_ERROR,
    ZERO,
    Histograms,
    buckets_of,
    merged,
    middle_ns,
    quantile_ns,
)

DURATIONS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, (1 << 62) - 1)), max_size=60)


def test_powers_of_two_are_upper_bounds() -> None:
    powers = np.array([1 << k for k in range(62)], np.int64)
    assert buckets_of(powers).tolist() == [k * PER_OCTAVE for k in range(62)]
    assert buckets_of(powers[6:] + 1).tolist() == [k * PER_OCTAVE + 1 for k in range(6, 62)]


@given(st.integers(1, (1 << 62) - 1))
def test_a_bucket_holds_what_its_bounds_say(dur_ns: int) -> None:
    bucket = int(buckets_of(np.array([dur_ns]))[0])
    # d <= 2**(i/32)  <=>  d**32 <= 2**i, in integers of any size
    assert dur_ns**PER_OCTAVE <= 1 << bucket
    assert bucket == 0 or dur_ns**PER_OCTAVE > 1 << (bucket - 1)
    assert bucket < MAX_BUCKET
    assert abs(middle_ns(bucket) - dur_ns) / dur_ns <= RELATIVE_ERROR * 1.000001


def test_nothing_is_in_the_bucket_of_zero_but_zero() -> None:
    assert buckets_of(np.array([0, 1])).tolist() == [ZERO, 0]
    assert middle_ns(ZERO) == 0


@given(DURATIONS, st.integers(0, 60))
def test_parts_add_up_to_the_whole(rows: list[tuple[int, int]], cut: int) -> None:
    groups = np.array([group for group, _ in rows], np.int64)
    durations = np.array([dur for _, dur in rows], np.int64)
    whole, parts = Histograms(), [Histograms(), Histograms()]
    sums, part_sums = ExactSums(), [ExactSums(), ExactSums()]
    for histograms, exact, chosen in (
        (whole, sums, slice(None)),
        (parts[0], part_sums[0], slice(0, cut)),
        (parts[1], part_sums[1], slice(cut, None)),
    ):
        histograms.add(groups[chosen], durations[chosen])
        exact.add(groups[chosen], durations[chosen])
    for group in range(4):
        own = [dur for other, dur in rows if other == group]
        assert whole.finish().get(group, {}) == merged(part.finish().get(group, {}) for part in parts)
        assert whole.finish().get(group, {}) == dict(
            sorted(Counter(int(buckets_of(np.array([dur]))[0]) for dur in own).items())
        )
        expected = ExactSum(len(own), sum(own), sum(d * d for d in own), min(own, default=None), max(own, default=None))
        together = ExactSum()
        for part in part_sums:
            together.add(part[group])
        assert sums[group] == together == expected


@pytest.mark.parametrize("q", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_within_the_bound(q: float) -> None:
    durations = np.random.default_rng(3).lognormal(10, 2, 5000).astype(np.int64)
    histograms = Histograms()
    histograms.add(np.zeros(len(durations), np.int64), durations)
    exact = np.sort(durations)[max(math.ceil(q * len(durations)), 1) - 1]
    found = quantile_ns(histograms.finish()[0], q)
    assert found is not None
    assert abs(found - exact) / exact <= RELATIVE_ERROR * 1.000001
    assert quantile_ns({}, q) is None
