"""Which part of a recording a report is about: threads, vCPUs, a stretch of time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.vcpu_ids import listed, vcpus_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording


@dataclass(frozen=True)
class Selection:
    """A part of a recording; by default all of it.

    Parameters
    ----------
    tid : thread, or None
    vcpu_id : vCPU id (of every VM that has it), or None
    begin, end : ns, or None
    relative : the times count from the recording's first event, not from the clock's zero
    level : of guest, whose VM-exits and what belongs to them alone are counted, or None
    """

    tid: int | None = None
    vcpu_id: int | None = None
    begin: int | None = None
    end: int | None = None
    relative: bool = True
    level: int | None = None

    @property
    def everything(self) -> bool:
        """Say whether no event is left out; a level leaves out none, as the others tell when it changes."""
        return (self.tid, self.vcpu_id, self.begin, self.end) == (None, None, None, None)

    def describe(self) -> str | None:
        """Return the selection in words, None for everything."""
        since = " after the start" if self.relative else ""
        words = [
            f"thread {self.tid}" if self.tid is not None else "",
            f"vCPU {self.vcpu_id}" if self.vcpu_id is not None else "",
            f"from {self.begin / 1e9:.9g} s{since}" if self.begin is not None else "",
            f"to {self.end / 1e9:.9g} s{since}" if self.end is not None else "",
            f"VM-exits of L{self.level}" if self.level is not None else "",
        ]
        return ", ".join(word for word in words if word) or None

    def resolved(self, recording: Recording) -> ResolvedSelection:
        """Return the selection with the threads and time stamps it means in this recording."""
        tids = {self.tid} if self.tid is not None else None
        if self.vcpu_id is not None:
            tids = _threads_of(recording.iter_events(), self.vcpu_id, tids)
        origin = 0
        if self.relative and (self.begin is not None or self.end is not None):
            origin = next((int(t.ts_ns[0]) for t in recording.iter_events(100_000) if len(t)), 0)
        begin = None if self.begin is None else self.begin + origin
        end = None if self.end is None else self.end + origin
        return ResolvedSelection(replace(self, begin=begin, end=end), tids)


@dataclass(frozen=True)
class ResolvedSelection:
    """A selection with absolute times; `tids` are the threads wanted, None for all."""

    selection: Selection
    tids: set[int] | None

    def of(self, table: EventTable) -> EventTable:
        """Return the selected rows of a table; lost events always stay."""
        wanted = self.selection
        if wanted.everything:
            return table
        keep = np.ones(len(table), bool)
        if self.tids is not None:
            tids = np.array(sorted(self.tids), np.int64)
            keep = np.isin(table.tid, tids)
            if table.has("sched_switch", "next_pid"):
                switched_in = np.isin(table.field("sched_switch", "next_pid"), tids)
                keep[table.rows("sched_switch")[switched_in]] = True
        if wanted.begin is not None:
            keep &= table.ts_ns >= wanted.begin
        if wanted.end is not None:
            keep &= table.ts_ns <= wanted.end
        keep[table.rows("lost_events")] = True
        return table.take(np.flatnonzero(keep))


def _threads_of(tables: Iterator[EventTable], vcpu_id: int, among: set[int] | None) -> set[int]:
    """Return the threads that ran a vCPU of this id."""
    found = {tid for table in tables for one, tid in vcpus_of(table) if one == vcpu_id}
    return found if among is None else found & among


def describe_empty(selection: Selection, recording: Recording) -> str:
    """Say what a selection that holds no event could have been about."""
    vcpus: dict[int, set[int]] = {}  # id -> its threads
    tids: set[int] = set()
    first = last = None
    for table in recording.iter_events():
        first = int(table.ts_ns[0]) if first is None and len(table) else first
        last = int(table.ts_ns[-1]) if len(table) else last
        tids |= set(np.unique(table.tid).tolist())
        for vcpu_id, tid in vcpus_of(table):
            vcpus.setdefault(vcpu_id, set()).add(tid)
    threads = sorted({tid for ran in vcpus.values() for tid in ran})
    path = recording.capture.path
    if selection.vcpu_id is not None and selection.vcpu_id not in vcpus:
        return f"{path} has no vCPU {selection.vcpu_id}; it has {listed('vCPU', sorted(vcpus))}"
    if selection.tid is not None and selection.tid not in tids:
        return f"{path} has no event of thread {selection.tid}; vCPUs ran on {listed('thread', threads)}"
    origin = (first or 0) if selection.relative else 0
    begin, end = (f"{((ns or 0) - origin) / 1e9:.6f}" for ns in (first, last))
    return f"{path} has no event ({selection.describe()}); its events are from {begin} to {end} s"
