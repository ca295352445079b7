"""Count, sum, extremes and squares of durations by group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_MINIMUM = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DurationSums:
    """Of each group: how many durations, their sum and mean (exact below 2**53), extremes, squares about the mean."""

    count: NDArray[np.int64]
    total: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    min_ns: NDArray[np.int64]
    max_ns: NDArray[np.int64]


def sum_durations(group: NDArray[np.int64], dur_ns: NDArray[np.int64], n_groups: int) -> DurationSums:
    """Sum durations by group.

    Parameters
    ----------
    group : int64, shape (n,), below n_groups
    dur_ns : int64, shape (n,), none of them negative
    """
    found = DurationSums(
        np.zeros(n_groups, np.int64),
        np.zeros(n_groups),
        np.empty(n_groups),
        np.zeros(n_groups),
        np.full(n_groups, NO_MINIMUM, np.int64),
        np.zeros(n_groups, np.int64),
    )
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < n_groups:
        raise ValueError(f"a group that is none of {n_groups}")
    sums = ffi.new("DurationSums *")
    sums.count, sums.total, sums.mean = filled(found.count), filled(found.total), filled(found.mean)
    sums.squares, sums.min_ns, sums.max_ns = filled(found.squares), filled(found.min_ns), filled(found.max_ns)
    lib.sum_durations(given(group), given(dur_ns), len(group), n_groups, sums)
    return found
