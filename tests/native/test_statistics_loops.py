"""The compiled loops of the statistics give what their twins give, to the last bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import oracle_statistics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace._native.duration_sums import DurationSums, sum_durations
from kvmtrace._native.perf_tables import PerfThreads
from kvmtrace.spans.lanes import Step
from kvmtrace.stats.perf_kvm_stat import _STEPS


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1 << 62) | st.integers(0, 10**6)), min_size=1, max_size=200)
)
@settings(max_examples=300, deadline=None)
def test_sums_of_durations(rows):
    group, dur_ns = (np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ([], [])))
    compiled, plain = (of(group, dur_ns, 7) for of in (sum_durations, oracle_statistics.sum_durations))
    for field in fields(DurationSums):
        one, other = getattr(compiled, field.name), getattr(plain, field.name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, field.name)


@pytest.mark.parametrize("group", [-1, 7])
def test_a_group_that_is_none_is_refused(group):
    with pytest.raises(ValueError, match="none of 7"):
        sum_durations(np.array([group]), np.array([1]), 7)


STEPS = [Step.ENTRY, Step.EXIT, Step.PIO, Step.MSR, Step.MMIO_READ, Step.MMIO_WRITE, Step.RUN]
ROWS = st.tuples(st.sampled_from(STEPS), st.integers(-2, 4), st.integers(0, 1 << 40))


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.lists(ROWS, max_size=30)), max_size=4), max_size=4))
@settings(max_examples=300, deadline=None)
def test_samples_of_perfs_tables(pieces):
    compiled, plain = PerfThreads(_STEPS), oracle_statistics.PerfThreads(_STEPS)
    clock = 0
    for piece in pieces:
        rows = [(thread, *row) for thread, part in sorted(dict(piece).items()) for row in part]
        thread, step, later, arg = (np.array(c, np.int64) for c in (zip(*rows, strict=True) if rows else ([],) * 4))
        ts_ns = clock + np.cumsum(later)
        clock = int(ts_ns[-1]) if len(ts_ns) else clock
        columns = thread.astype(np.uint16), step.astype(np.uint8), ts_ns, arg
        ours, theirs = compiled.take_samples(*columns), plain.take_samples(*columns)
        for name, samples in theirs.items():
            assert [column.tolist() for column in ours[name]] == ([c.tolist() for c in samples] or [[], []])
