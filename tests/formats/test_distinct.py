"""Distinct values and runs of equal rows, against the plain way."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.table.distinct import distinct, run_starts, within


@given(st.lists(st.integers(-3, 3)))
def test_distinct_values(values):
    column = np.array(values, np.int64)
    found = distinct(column)
    assert found.tolist() == np.unique(column).tolist()
    assert found.dtype == column.dtype


@given(st.lists(st.tuples(st.binary(min_size=3, max_size=3), st.integers(0, 1)), max_size=20))
def test_runs_of_equal_rows(rows):
    texts = np.frombuffer(b"".join(text for text, _ in rows), np.uint8).reshape(-1, 3)
    numbers = np.array([number for _, number in rows], np.int64)
    expected = [i for i in range(len(rows)) if not i or rows[i] != rows[i - 1]]
    assert run_starts(texts, numbers).tolist() == expected


def test_masked_arrays_are_not_imported():
    script = (
        "import sys, numpy as np; before = set(sys.modules); "  # NumPy 1 has them in any case
        "from kvmtrace.table.distinct import among, distinct; "
        "distinct(np.array([2, 1, 2])); among(np.array([2, 1]), (1, 3)); "
        "sys.exit('numpy.ma' in set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_within_is_what_isin_does() -> None:
    rng = np.random.default_rng(3)
    for size in (0, 1, 7):
        known = rng.integers(0, 9, size)
        values = rng.integers(0, 9, 30)
        assert within(values, known).tolist() == np.isin(values, known).tolist()
