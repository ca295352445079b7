"""What each vCPU thread did in each of many short stretches, in bounded memory: bins double as time goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.time_bins_loop import BinArrays, Stretches, add_stretches
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.time_parts import N_PARTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.doings import Doings

ALL_BINS = 1 << 18  # of all threads together
THREAD_BINS = 1 << 17  # of one thread
FEWEST_BINS = 64
FIRST_SHIFT = 6  # bins of 64 ns
MAX_SHIFT = 61
_CODE_BITS = 20
NO_CODE = (1 << _CODE_BITS) - 1
# of each array: how two neighbours become one, and what nothing is
_ARRAYS: dict[str, tuple[np.ufunc, int]] = {
    "_part_ns": (np.add, 0),
    "_longest": (np.maximum, -1),
    "_cpu": (np.maximum, -1),
    "_level": (np.maximum, -1),
    "_exits": (np.add, 0),
    "_events": (np.add, 0),
}


def code_of(segments: NDArray[Any]) -> NDArray[np.int64]:
    """Return what each segment is: Part + N_PARTS * (number of the handled exit reason + 1)."""
    reason = segments["reason"].astype(np.int64)
    reason[reason >= NO_CODE // N_PARTS - 1] = -1  # so many reasons are a damaged file
    codes: NDArray[np.int64] = segments["part"].astype(np.int64) + N_PARTS * (reason + 1)
    return codes


@dataclass(frozen=True)
class ThreadBins:
    """One thread's bins.

    Parameters
    ----------
    part_ns : (n, N_PARTS) int64, time of each Part
    code, cpu, level : (n,) int64, of the longest segment in each bin; -1 where there is none
    exits, events : (n,) int64, VM-exits and follow-up events that begin in it
    """

    part_ns: NDArray[np.int64]
    code: NDArray[np.int64]
    cpu: NDArray[np.int64]
    level: NDArray[np.int64]
    exits: NDArray[np.int64]
    events: NDArray[np.int64]


class TimeBins:
    """Adds up doings in bins of equal length since the origin.

    Parameters
    ----------
    begin_ns, end_ns, n_bins : bins that stay as they are, for a stretch that is known; by default they begin at 0 and
        double whenever time goes on, or threads come
    """

    def __init__(self, begin_ns: int = 0, end_ns: int | None = None, n_bins: int | None = None) -> None:
        self._fixed = end_ns is not None
        self.begin_ns = begin_ns
        self.n_bins = n_bins or THREAD_BINS
        self.bin_ns = 1 << FIRST_SHIFT if end_ns is None else max(-(-(end_ns - begin_ns) // self.n_bins), 1)
        self._n_threads = 1
        self._new(1)

    def _new(self, n_threads: int) -> None:
        n = self.n_bins
        self._part_ns = np.zeros((n_threads, n, N_PARTS), np.int64)
        self._longest, self._cpu, self._level = (np.full((n_threads, n), -1, np.int64) for _ in range(3))
        self._exits, self._events = (np.zeros((n_threads, n), np.int64) for _ in range(2))

    def feed(self, doings: Doings) -> None:
        """Take in segments and follow-up events."""
        segments = doings.segments
        if not len(segments):
            return
        if not self._fixed:
            self._cover(int(doings.thread.max()) + 1, int((segments["ts_ns"] + segments["dur_ns"]).max()))
        self._grow(max(int(doings.thread.max()), int(doings.event_thread.max(initial=0))) + 1)
        self._add_segments(doings.thread.astype(np.int64), segments)
        exits = segments["rip"] >= 0
        self._count(self._exits, doings.thread[exits], segments["ts_ns"][exits])
        self._count(self._events, doings.event_thread, doings.events["ts_ns"])

    def _add_segments(self, thread: NDArray[np.int64], segments: NDArray[Any]) -> None:
        """Cut segments at the bins' edges and add the pieces."""
        level = segments["level"]
        stretches = Stretches(
            thread,
            segments["ts_ns"] - self.begin_ns,
            segments["dur_ns"],
            segments["part"],
            code_of(segments),
            segments["cpu"].astype(np.int64) & 0xFFFF,
            level if level.any() else None,
        )
        bins = BinArrays(self.bin_ns, self._part_ns, self._longest, self._cpu, self._level)
        add_stretches(stretches, bins, _CODE_BITS)

    def _count(self, counts: NDArray[np.int64], thread: NDArray[Any], ts_ns: NDArray[np.int64]) -> None:
        where = (ts_ns - self.begin_ns) // self.bin_ns
        inside = (where >= 0) & (where < self.n_bins)
        cells = thread[inside].astype(np.int64) * self.n_bins + where[inside]
        counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)

    def _cover(self, n_threads: int, end_ns: int) -> None:
        """Halve the bins until so many threads have room, and double their length until the time has a bin."""
        wanted = max(min(THREAD_BINS, 1 << max((ALL_BINS // n_threads).bit_length() - 1, 0)), FEWEST_BINS)
        while self.n_bins > wanted:
            self._double()
            self.n_bins //= 2
            for name in _ARRAYS:
                setattr(self, name, np.ascontiguousarray(getattr(self, name)[:, : self.n_bins]))
        while self.n_bins * self.bin_ns <= end_ns and self.bin_ns < 1 << MAX_SHIFT:
            self._double()

    def _double(self) -> None:
        """Let each bin take in its neighbour; the second half becomes free."""
        half = self.n_bins // 2
        for name, (join, empty) in _ARRAYS.items():
            array = getattr(self, name)
            array[:, :half] = join(array[:, 0::2], array[:, 1::2])
            array[:, half:] = empty
        self.bin_ns *= 2

    def _grow(self, n_threads: int) -> None:
        have = len(self._part_ns)
        self._n_threads = max(self._n_threads, n_threads)
        if have >= n_threads:
            return
        before = [getattr(self, name) for name in _ARRAYS]
        self._new(max(n_threads, have * 3 // 2))
        for name, array in zip(_ARRAYS, before, strict=True):
            getattr(self, name)[:have] = array

    def of(self, thread: int, end_ns: int) -> ThreadBins | None:
        """Return a thread's bins up to a time; None of a thread without any."""
        if thread >= len(self._part_ns):
            return None
        n = min(max(-(-(end_ns - self.begin_ns) // self.bin_ns), 1), self.n_bins)
        longest, cpu, level = self._longest[thread, :n], self._cpu[thread, :n], self._level[thread, :n]
        return ThreadBins(
            self._part_ns[thread, :n],
            np.where(longest < 0, -1, longest & NO_CODE),
            np.where(cpu < 0, -1, cpu & 0xFFFF),
            np.where(level < 0, -1, level & 0xFF),
            self._exits[thread, :n],
            self._events[thread, :n],
        )
