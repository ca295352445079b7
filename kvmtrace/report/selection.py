"""Which part of a recording a report is about: threads, vCPUs, a stretch of time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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
    """

    tid: int | None = None
    vcpu_id: int | None = None
    begin: int | None = None
    end: int | None = None
    relative: bool = True

    @property
    def everything(self) -> bool:
        """Say whether nothing is left out."""
        return (self.tid, self.vcpu_id, self.begin, self.end) == (None, None, None, None)

    def describe(self) -> str | None:
        """Return the selection in words, None for everything."""
        since = " after the start" if self.relative else ""
        words = [
            f"thread {self.tid}" if self.tid is not None else "",
            f"vCPU {self.vcpu_id}" if self.vcpu_id is not None else "",
            f"from {self.begin / 1e9:.9g} s{since}" if self.begin is not None else "",
            f"to {self.end / 1e9:.9g} s{since}" if self.end is not None else "",
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
    found: set[int] = set()
    for table in tables:
        for event in ("kvm_entry", "kvm_exit"):
            if table.count(event) and table.has(event, "vcpu_id"):
                own = table.field(event, "vcpu_id") == vcpu_id
                found |= set(np.unique(table.tid[table.rows(event)[own]]).tolist())
    return found if among is None else found & among
