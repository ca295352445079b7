"""Shares per bin equal those of the slices, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvmtrace.formats import open_recording
from kvmtrace.spans.shares_over_time import shares_over_time
from kvmtrace.spans.slices import collect_segments

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("name", ["vmx-6.1-smp.dat", "svm-6.12-lifecycle.dat"])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.3, 0.4)])
def test_shares_are_those_of_the_slices(name: str, begin: float, end: float) -> None:
    recording = open_recording(FIXTURES / name)
    made = collect_segments(recording.iter_events())
    first, last = int(made.ts_ns.min()), int((made.ts_ns + made.dur_ns).max())
    start, stop = (round(first + (last - first) * where) for where in (begin, end))
    found = shares_over_time(recording.iter_events(), start, stop, n_bins=50)
    expected = np.zeros_like(found.share)
    columns = (made.thread, made.part, made.ts_ns, made.dur_ns)
    for thread, part, ts, dur in zip(*(column.tolist() for column in columns), strict=True):
        low = np.clip(found.edges[:-1], ts, ts + dur)
        expected[thread, part] += np.clip(found.edges[1:], ts, ts + dur) - low
    expected /= np.diff(found.edges)
    assert np.allclose(found.share, expected, atol=1e-6)
    assert found.slices is not None
    inside = (made.ts_ns < stop) & (made.ts_ns + made.dur_ns > start)
    assert len(found.slices) == inside.sum()
    assert shares_over_time(recording.iter_events(), start, stop, max_slices=1).slices is None
