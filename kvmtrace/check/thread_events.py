"""Thread sequences: the tracked events of vCPU threads, thread by thread, as columns."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import class_positions, thread_rows
from kvmtrace._native.automaton import Knowledge
from kvmtrace._native.thread_rows import TrackedColumns
from kvmtrace.check.alphabet import CLASS, EXIT, classify
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.states import VCPU_EVENTS
from kvmtrace.spans.gaps import doubtful_rows
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.observability import Capability
    from kvmtrace.spans.gaps import Gaps
    from kvmtrace.table.event_table import EventTable


FEW_THREADS = 4  # so many are sooner looked for one by one
_SCHED = CLASS["sched_switch"]


@dataclass(frozen=True, eq=False)
class Sequence:
    """Tracked events of vCPU threads, sorted by thread, recorded order within a thread.

    Parameters
    ----------
    table : EventTable that the events come from
    row : intp, row in `table`
    cls : uint8, class (alphabet.py)
    thread : uint16, number of the thread: index into `tids`
    tids : int32, thread ids
    first : bool, first event of its thread here
    broken : bool, knowledge breaks off before this event
    n_tracked : vCPU-thread events of the table, tracked by the model or not
    n_parked : the table's first rows that waited for this table; each thread's first event among them was seen before
    keys : int64, what names each thread for all of the recording; None: its id. A thread that runs several vCPUs
        counts as several threads (vcpu_lanes.py), with the same id.
    again : bool, see `repeated`, where it is not the rows that tell
    """

    table: EventTable
    row: NDArray[np.intp]
    cls: NDArray[np.uint8]
    thread: NDArray[np.uint16]
    tids: NDArray[np.int32]
    first: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]
    n_tracked: int
    n_parked: int = 0
    keys: NDArray[np.int64] | None = None
    again: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def values(self, kind: str, field: str, positions: NDArray[np.intp]) -> NDArray[Any]:
        """Return field `field` of the events at these positions, which are all of kind `kind`; not to be written to."""
        column, n = self.table.field(kind, field), len(positions)
        if not n:
            return column[:0]
        place = self.position_in_kind
        # one behind the other, as all events of a thread are: nothing is to be picked out
        if place[positions[-1]] - place[positions[0]] == n - 1:
            first = class_positions.consecutive_places(place, positions)
            if first >= 0:
                return column[first : first + n]
        return class_positions.take_values(column, place, positions)

    @cached_property
    def position_in_kind(self) -> NDArray[np.intp]:
        """Return the position of each event among all the table's rows of its kind."""
        return self.table.position_in_kind[self.row]

    @property
    def knowledge(self) -> Knowledge:
        """Return what the compiled loops step through."""
        return Knowledge(self.cls, self.first, self.broken)

    @cached_property
    def repeated(self) -> NDArray[np.bool_]:
        """Say which events ended the part before this one, and were counted there."""
        return self.first & (self.row < self.n_parked) if self.again is None else self.again

    @cached_property
    def begins(self) -> NDArray[np.intp]:
        """Return the positions of events at which a thread begins, or knowledge after it broke off."""
        return np.flatnonzero(self.broken | self.first)

    def at(self, positions: NDArray[np.bool_] | slice) -> Sequence:
        """Return the part at these positions (thread numbers stay)."""
        part = {
            name: getattr(self, name)[positions] for name in ("row", "cls", "thread", "first", "broken", "ts_ns", "cpu")
        }
        part["first"] = first_of(part["thread"])
        return replace(self, **part)

    def key_of(self, thread: int) -> int:
        """Return what names a thread for all of the recording."""
        return int((self.tids if self.keys is None else self.keys)[thread])

    def in_lanes(self, order: NDArray[np.intp], lane: NDArray[np.int64]) -> Sequence:
        """Return the sequence in another order, each event in another thread, all but `broken` reordered."""
        part = {name: getattr(self, name)[order] for name in ("row", "cls", "ts_ns", "cpu")}
        thread = lane.astype(np.uint16)
        first = first_of(thread)
        return replace(self, thread=thread, first=first, broken=self.broken & ~first, **part)


def first_of(thread: NDArray[Any]) -> NDArray[np.bool_]:
    """Say where a new thread begins."""
    first = np.ones(len(thread), bool)
    first[1:] = thread[1:] != thread[:-1]
    return first


def vcpu_tids(table: EventTable, known: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the threads, ascending, that are known or that traced an event only a vCPU thread can trace."""
    telling = np.zeros(max(len(table.kinds), 1), bool)
    telling[[table.kind_index[kind] for kind in VCPU_EVENTS if kind in table.kind_index]] = True
    told = telling.take(table.kind)
    for tid in known[:FEW_THREADS].tolist():
        told &= table.tid != tid
    return distinct(np.append(known, distinct(table.tid[told]))).astype(np.int32)


def build_sequence(
    table: EventTable,
    tids: NDArray[np.int32],
    capability: Capability,
    gaps: Gaps,
    loss: NDArray[np.int32],
    *,
    n_parked: int = 0,
) -> Sequence:
    """Return the sequence of the given threads.

    Parameters
    ----------
    tids : ascending, at most 65,534
    gaps, loss : what was lost, and how often each row's CPU had lost events before it (Gaps.feed)
    n_parked : see Sequence
    """
    classes = classify(table)
    classes[doubtful_rows(table)] = 0
    columns = TrackedColumns(table.tid, classes, table.ts_ns, table.cpu)
    found, n_tracked = thread_rows.tracked(columns, tids)
    row, cls, ts_ns, cpu = found.row, found.cls, found.ts_ns, found.cpu
    first = first_of(found.thread)
    broken = np.zeros(len(row), bool)
    if len(row) > 1:
        # of two events of different CPUs with the same time nobody knows the order
        broken[1:] = (cpu[1:] != cpu[:-1]) & (ts_ns[1:] == ts_ns[:-1]) | (ts_ns[1:] < ts_ns[:-1])
        away = (cls[:-1] == _SCHED) if "sched_switch" in capability.recorded else np.ones(len(row) - 1, bool)
        broken[1:] |= gaps.hide(ts_ns, cpu, loss[row], away)
    if capability.filtered:
        broken |= cls == EXIT  # the recorder dropped whole VM-exits on purpose: nothing is known before any
    broken[first] = False
    return Sequence(table, row, cls, found.thread, tids, first, broken, ts_ns, cpu, n_tracked, n_parked)
