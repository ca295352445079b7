"""Events of several CPUs -> one sequence in time order that keeps each CPU's own order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

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
        return Rows(*(getattr(self, f.name)[order] for f in fields(self)))


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


def order_keys(ts_ns: NDArray[np.int64], floor: int) -> NDArray[np.int64]:
    """Return the times by which one CPU's events are merged: the latest time so far, at least `floor`.

    Where the clock steps back an event follows its predecessor at once: that is what merging the
    heads of all CPUs by time gives, without stepping.
    """
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
    order = np.argsort(np.concatenate([keys[i] for i in kept]), kind="stable").astype(np.uint32)
    merged = concat_rows([parts[i] for i in kept])
    for f in fields(Rows):
        setattr(merged, f.name, getattr(merged, f.name)[order])
    return merged
