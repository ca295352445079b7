"""Events of several CPUs -> one sequence in time order that keeps each CPU's own order."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass
class Rows:
    """Columns of n events, table.py's six and where each record is.

    Parameters
    ----------
    start : word index of the record's data; of lost events their number
    """

    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]
    tid: NDArray[np.int32]
    kind: NDArray[np.uint16]
    irq_flags: NDArray[np.uint8]
    preempt_count: NDArray[np.uint8]
    start: NDArray[Any]

    def __len__(self) -> int:
        return len(self.ts_ns)

    def slice(self, first: int, last: int) -> Rows:
        """Return rows first..last as views."""
        return Rows(*(getattr(self, f.name)[first:last] for f in fields(self)))

    def take(self, order: NDArray[Any]) -> Rows:
        """Return the rows at these positions."""
        return Rows(*(getattr(self, f.name).take(order) for f in fields(self)))

    def sort_by(self, order: NDArray[np.intp]) -> None:
        """Put the rows in this order, in place; those at either end that stand in it already are not touched."""
        moved = np.flatnonzero(order != np.arange(len(order)))
        if not len(moved):
            return
        first, last = int(moved[0]), int(moved[-1]) + 1
        for f in fields(self):
            column = getattr(self, f.name)
            column[first:last] = column[order[first:last]]


def concat_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts; the parts' columns are let go one by one, so that memory peaks low."""
    if len(parts) == 1:
        return parts[0]
    columns = {}
    for f in fields(Rows):
        columns[f.name] = np.concatenate([getattr(part, f.name) for part in parts])
        for part in parts:
            setattr(part, f.name, np.empty(0, columns[f.name].dtype))
    return Rows(**columns)


def no_rows(start_dtype: np.dtype[Any]) -> Rows:
    """Return no rows."""
    return Rows(
        np.empty(0, np.int64),
        np.empty(0, np.int16),
        np.empty(0, np.int32),
        np.empty(0, np.uint16),
        np.empty(0, np.uint8),
        np.empty(0, np.uint8),
        np.empty(0, start_dtype),
    )


def occurring(kind: NDArray[np.uint16], n_kinds: int) -> list[int]:
    """Return the kinds that occur, ascending; in parts, as bincount makes eight bytes of each."""
    counts = np.zeros(n_kinds, np.int64)
    for first in range(0, len(kind), 1 << 18):
        counts += np.bincount(kind[first : first + (1 << 18)], minlength=n_kinds)
    found: list[int] = np.flatnonzero(counts).tolist()
    return found


class RowsBuilder:
    """Rows put one behind the other in columns that are there from the start: nothing is held twice.

    Parameters
    ----------
    capacity : int, how many rows there may be; memory is taken as rows come, so it may be far too large
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: Rows | None = None
        self._n = 0

    def __bool__(self) -> bool:
        """Say whether anything was added."""
        return self._rows is not None

    def __len__(self) -> int:
        return self._n

    def add(self, rows: Rows) -> None:
        """Put rows behind those that are there."""
        room = self.room(len(rows), rows)
        for f in fields(Rows):
            getattr(room, f.name)[:] = getattr(rows, f.name)
        self.take_in(len(rows))

    def room(self, n: int, like: Rows) -> Rows:
        """Return n rows behind those that are there, to be filled in; `like`: of these types."""
        end = self._n + n
        if self._rows is None or end > len(self._rows):
            self._grow(max(end, self._capacity), like)
        assert self._rows is not None
        return self._rows.slice(self._n, end)

    def take_in(self, n: int) -> None:
        """Count n rows, which were filled in, to those that are there."""
        self._n += n

    def _grow(self, size: int, like: Rows) -> None:
        old, self._rows = self._rows, Rows(*(np.empty(size, getattr(like, f.name).dtype) for f in fields(Rows)))
        self._capacity = size + size // 2
        for f in fields(Rows) if old is not None else ():
            getattr(self._rows, f.name)[: self._n] = getattr(old, f.name)[: self._n]

    def finish(self) -> Rows:
        """Return all rows."""
        assert self._rows is not None
        return self._rows.slice(0, self._n)


def order_keys(ts_ns: NDArray[np.int64], floor: int) -> NDArray[np.int64]:
    """Return the times by which one CPU's events are merged: the latest time so far, at least `floor`.

    Where the clock steps back an event follows its predecessor at once: that is what merging the
    heads of all CPUs by time gives, without stepping.
    """
    if len(ts_ns) and ts_ns[0] >= floor and bool((ts_ns[1:] >= ts_ns[:-1]).all()):
        return ts_ns  # mostly
    return np.maximum(np.maximum.accumulate(ts_ns), floor)


def merge_rows(parts: list[Rows], keys: list[NDArray[np.int64]]) -> Rows:
    """Merge CPUs by their keys; at equal times the earlier part comes first.

    Parameters
    ----------
    parts : Rows per CPU, in buffer order
    keys : per CPU, ascending (see order_keys)
    """
    kept = [i for i, part in enumerate(parts) if len(part)]
    if len(kept) <= 1:
        return parts[kept[0]] if kept else parts[0]
    # a stable sort of some ascending runs is a merge (timsort finds the runs)
    order = np.argsort(np.concatenate([keys[i] for i in kept]), kind="stable")
    merged = concat_rows([parts[i] for i in kept])
    for f in fields(Rows):
        setattr(merged, f.name, getattr(merged, f.name).take(order))
    return merged
