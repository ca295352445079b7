"""The distinct values of a column, which are among a few, and where rows differ from the one before.

NumPy's own functions for sets import masked arrays, which takes longer than a piece of a recording.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.thread_rows import mark_changes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return what np.unique does, soon where equal values stand together."""
    values = np.sort(values[_new(values)])
    return values[_new(values)]


def among(values: NDArray[Any], wanted: Iterable[int]) -> NDArray[np.bool_]:
    """Say which values are one of these few numbers, as np.isin does."""
    found = np.zeros(values.shape, bool)
    for one in wanted:
        found |= values == one
    return found


def within(values: NDArray[Any], known: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which values are one of many others."""
    if not len(known):
        return np.zeros(len(values), bool)
    known = np.sort(known)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found


def run_starts(*columns: NDArray[Any]) -> NDArray[np.intp]:
    """Return the rows that differ from the one before in one of the columns, the first row among them.

    Parameters
    ----------
    columns : of as many rows each; bytes of shape (n, size) or values of shape (n,)
    """
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for values in columns:
        mark_changes(values, new)
    return np.flatnonzero(new)


def _new(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which values differ from the one before."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return new
