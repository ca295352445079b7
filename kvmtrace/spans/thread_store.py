"""Rows of every thread in time order, in a temporary file: any stretch of any recording can be read again."""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.scratch import scratch_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one thread in the file.

    Parameters
    ----------
    offset, n : first row in the file, and how many
    begin_ns, last_ns : times of the first and the last
    before : rows that were counted in the thread's earlier runs (ThreadStore.add)
    """

    offset: int
    n: int
    begin_ns: int
    last_ns: int
    before: int


class ThreadStore:
    """Takes rows in pieces, and gives back those of a thread between two times.

    Parameters
    ----------
    dtype : of the rows; its field `ts_ns` ascends within each thread
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        with scratch_file() as file:
            self._fd = os.dup(file.fileno())  # lives as long as the store
        weakref.finalize(self, os.close, self._fd)
        self._runs: dict[int, list[Run]] = {}
        self._counted: dict[int, int] = {}
        self._rows: NDArray[Any] | None = None
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, thread: NDArray[Any], rows: NDArray[Any], counted: NDArray[np.bool_]) -> None:
        """Take in rows, thread after thread; `counted` says which of them Run.before counts."""
        if not len(rows):
            return
        left = memoryview(rows.tobytes())
        while left:
            left = left[os.write(self._fd, left) :]
        self._rows = None
        bounds = [0, *(np.flatnonzero(thread[1:] != thread[:-1]) + 1).tolist(), len(rows)]
        sums = np.concatenate([[0], np.cumsum(counted)])
        for first, stop in itertools.pairwise(bounds):
            number = int(thread[first])
            before = self._counted.get(number, 0)
            run = Run(self._n + first, stop - first, int(rows["ts_ns"][first]), int(rows["ts_ns"][stop - 1]), before)
            self._runs.setdefault(number, []).append(run)
            self._counted[number] = before + int(sums[stop] - sums[first])
        self._n += len(rows)

    def threads(self) -> list[int]:
        """Return the numbers of the threads that have rows, ascending."""
        return sorted(self._runs)

    def counted(self, thread: int) -> int:
        """Return how many rows of a thread were counted."""
        return self._counted.get(thread, 0)

    def all_runs(self, thread: int) -> list[Run]:
        """Return all runs of a thread, in time order."""
        return self._runs.get(thread, [])

    def last(self, thread: int) -> Any:
        """Return the last row of a thread."""
        run = self._runs[thread][-1]
        return self._mapped()[run.offset + run.n - 1]

    def runs(self, thread: int, begin_ns: int = 0, end_ns: int = 1 << 62) -> Iterator[tuple[Run, int, int]]:
        """Yield the runs of a thread that begin before `end_ns`, with which of their rows (first, stop) are wanted.

        The last row before `begin_ns` is among them: it reaches into the stretch.
        """
        runs = self._runs.get(thread, [])
        first = max(bisect.bisect_left(runs, begin_ns, key=lambda run: run.begin_ns) - 1, 0)
        for run in runs[first:]:
            if run.begin_ns > end_ns:
                return
            low, high = 0, run.n
            if begin_ns > run.begin_ns:
                low = max(int(np.searchsorted(self.rows(run, 0, run.n)["ts_ns"], begin_ns)) - 1, 0)
            if end_ns < run.last_ns:
                high = int(np.searchsorted(self.rows(run, 0, run.n)["ts_ns"], end_ns, "right"))
            if high > low:
                yield run, low, high

    def rows(self, run: Run, first: int, stop: int) -> NDArray[Any]:
        """Return rows of a run."""
        return self._mapped()[run.offset + first : run.offset + stop]

    def between(self, thread: int, begin_ns: int, end_ns: int) -> NDArray[Any]:
        """Return a thread's rows between two times, with the one before."""
        found = [self.rows(run, first, stop) for run, first, stop in self.runs(thread, begin_ns, end_ns)]
        return np.concatenate(found) if found else np.empty(0, self._dtype)

    def count_between(self, thread: int, begin_ns: int, end_ns: int) -> int:
        """Return how many rows `between` would give."""
        return sum(stop - first for _, first, stop in self.runs(thread, begin_ns, end_ns))

    def _mapped(self) -> NDArray[Any]:
        if self._rows is None:
            size = self._n * self._dtype.itemsize
            self._rows = np.frombuffer(mmap.mmap(self._fd, size, prot=mmap.PROT_READ), self._dtype)
        return self._rows
