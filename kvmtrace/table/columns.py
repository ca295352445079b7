"""Columns of rows that are no events: what frames, Parquet, Arrow and CSV are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RowColumn:
    """One column.

    Parameters
    ----------
    values : (n,), numbers or bools; where `texts` is given, indices into it
    absent : (n,) bool, rows without a value; None: every row of every such column has one
    texts : what the values stand for, None for numbers
    """

    values: NDArray[Any]
    absent: NDArray[np.bool_] | None = None
    texts: tuple[str, ...] | None = None
