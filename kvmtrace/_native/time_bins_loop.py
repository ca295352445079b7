"""Stretches of time cut at the edges of bins of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Stretches:
    """What threads did from `begin_ns` on for `dur_ns`.

    Parameters
    ----------
    part : below the bins' parts
    code, cpu, level : what gives a bin its name, not negative, of as many bits as the bins have for it
    """

    thread: NDArray[np.int64]
    begin_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]
    part: NDArray[np.uint8]
    code: NDArray[np.int64]
    cpu: NDArray[np.int64]
    level: NDArray[np.int64] | None


@dataclass(frozen=True)
class BinArrays:
    """The bins of threads, from time 0 on.

    Parameters
    ----------
    part_ns : int64, shape (threads, bins, parts)
    longest, cpu, level : int64, shape (threads, bins), of the longest piece of a stretch in each its length, and its
        value in the lowest bits; -1 for none
    """

    bin_ns: int
    part_ns: NDArray[np.int64]
    longest: NDArray[np.int64]
    cpu: NDArray[np.int64]
    level: NDArray[np.int64]


def add_stretches(stretches: Stretches, bins: BinArrays, value_bits: int) -> None:
    """Add the pieces of stretches to the bins that they lie in; what lies in none is left out.

    Raises
    ------
    ValueError
        A thread or part is none of the bins'.
    """
    source, out = ffi.new("Stretches *"), ffi.new("TimeBins *")
    parts = (stretches.thread, stretches.begin_ns, stretches.dur_ns, stretches.code, stretches.cpu)
    kept = [np.ascontiguousarray(part, np.int64) for part in parts]
    part = np.ascontiguousarray(stretches.part)
    level = None if stretches.level is None else np.ascontiguousarray(stretches.level, np.int64)
    source.n, source.part, source.level = len(part), given(part), ffi.NULL if level is None else given(level)
    source.thread, source.begin_ns, source.dur_ns, source.code, source.cpu = (given(one) for one in kept)
    out.n_threads, out.n_bins, out.n_parts = bins.part_ns.shape
    out.bin_ns, out.value_bits, out.longest_ns = bins.bin_ns, value_bits, (1 << (62 - value_bits)) - 1
    out.part_ns, out.longest = filled(bins.part_ns), filled(bins.longest)
    out.cpu, out.level = filled(bins.cpu), filled(bins.level)
    if lib.add_stretches(source, out):
        raise ValueError("a thread or part that is none of the bins'")
