"""The distinct values of a column, and where rows differ from the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return what np.unique does, soon where equal values stand together, and without importing masked arrays."""
    values = np.sort(values[_new(values)])
    return values[_new(values)]


def run_starts(*columns: NDArray[Any]) -> NDArray[np.intp]:
    """Return the rows that differ from the one before in one of the columns, the first row among them.

    Parameters
    ----------
    columns : of as many rows each; bytes of shape (n, size) or values of shape (n,)
    """
    new = np.ones(len(columns[0]), bool)
    new[1:] = False
    for values in columns:
        flat, width = values.reshape(-1), values.shape[1] if values.ndim > 1 else 1
        new[np.flatnonzero(flat[width:] != flat[:-width]) // width + 1] = True
    return np.flatnonzero(new)


def _new(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which values differ from the one before."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return new
