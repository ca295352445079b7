"""Where knowledge breaks off: lost events, ambiguous order, filtered recordings.

A break before an event of a thread means that something of that thread may be missing, or that the order
of the two events around it is not known. Nothing is concluded across a break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, EXIT
from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import LOST_EVENTS
from kvmtrace.table.kinds import UNKNOWN_EVENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

_FAR = np.iinfo(np.int64).max
DOUBTFUL = 8  # events
_NEVER = _FAR - 1  # unlike a gap at the end of a table, no later event closes it
_SCHED = CLASS["sched_switch"]


class Gaps:
    """When which CPU lost events: from the last event before the loss to the first one behind it.

    Fed with consecutive tables; a gap at the end of one is closed by the next.
    """

    def __init__(self) -> None:
        self.starts: dict[int, list[int]] = {}
        self.ends: dict[int, list[int]] = {}
        self._last_ns: dict[int, int] = {}

    def add(self, table: EventTable) -> None:
        """Take note of a further table, in its recorded order."""
        lost = table.rows(LOST_EVENTS)
        if not len(lost):
            self._go_on(table)
            return
        for cpu in np.flatnonzero(np.bincount(table.cpu.view(np.uint16))).astype(np.uint16).view(np.int16):
            self._add_cpu(int(cpu), table, lost[table.cpu[lost] == cpu])

    def _go_on(self, table: EventTable) -> None:
        """Take note of a table without losses: of each CPU, only its first and its last event matter."""
        for cpu in np.flatnonzero(np.bincount(table.cpu.view(np.uint16))).astype(np.uint16).view(np.int16).tolist():
            here = table.cpu == cpu
            ends = self.ends.setdefault(cpu, [])
            self.starts.setdefault(cpu, [])
            if ends and ends[-1] == _FAR:
                first = int(table.ts_ns[int(here.argmax())])
                ends[:] = [min(end, first) for end in ends]
            self._last_ns[cpu] = int(table.ts_ns[len(table) - 1 - int(here[::-1].argmax())])

    def _add_cpu(self, cpu: int, table: EventTable, lost: NDArray[np.intp]) -> None:
        on_cpu = np.flatnonzero((table.cpu == cpu) & (table.kind != table.kind_index.get(LOST_EVENTS, -1)))
        ts_ns = table.ts_ns[on_cpu]
        starts, ends = self.starts.setdefault(cpu, []), self.ends.setdefault(cpu, [])
        if len(on_cpu) and ends and ends[-1] == _FAR:
            ends[:] = [min(end, int(ts_ns[0])) for end in ends]
        behind = np.searchsorted(on_cpu, lost)
        for position in distinct(behind).tolist():
            before = int(ts_ns[position - 1]) if position else self._last_ns.get(cpu, -_FAR)
            after = int(ts_ns[position]) if position < len(on_cpu) else _FAR
            starts.append(min(before, after))  # time stamps around damage may be garbage
            ends.append(max(before, after))
        if len(on_cpu):
            self._last_ns[cpu] = int(ts_ns[-1])

    def end_at(self, last_ns: dict[int, int]) -> None:
        """Take a CPU's events as lost from its last one on: the recording is damaged or cut off."""
        for cpu, ts_ns in last_ns.items():
            self.starts.setdefault(cpu, []).append(ts_ns)
            self.ends.setdefault(cpu, []).append(_NEVER)

    def by_cpu(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return cpu -> (starts, ends), both ascending; a gap without a later event never ends."""
        return {
            cpu: (np.sort(np.array(starts, np.int64)), np.sort(np.array(self.ends[cpu], np.int64)))
            for cpu, starts in self.starts.items()
            if starts
        }

    def forget_before(self, ts_ns: int) -> None:
        """Drop gaps that ended before a time: no event that is still waiting is as old."""
        for cpu, ends in self.ends.items():
            keep = [i for i, end in enumerate(ends) if end >= ts_ns]
            self.starts[cpu] = [self.starts[cpu][i] for i in keep]
            self.ends[cpu] = [ends[i] for i in keep]


def _touched(
    gap: tuple[NDArray[np.int64], NDArray[np.int64]], since: NDArray[np.int64], until: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Say which intervals [since, until] overlap a gap."""
    starts, ends = gap
    began = np.searchsorted(starts, until, "right")
    over = np.searchsorted(ends, since, "left")
    return began > over


def doubtful_rows(table: EventTable) -> NDArray[np.intp]:
    """Return the last rows before losses of unknown size.

    Damage may begin within an event, and what follows in its page may look like events for a while.
    """
    lost = table.rows(LOST_EVENTS)
    if not len(lost) or not table.has(LOST_EVENTS, "count"):
        return np.empty(0, np.intp)
    unknown = lost[table.field(LOST_EVENTS, "count") < 0]
    nameless = table.kind == table.kind_index.get(UNKNOWN_EVENT, -1)
    doubtful: list[int] = []
    for cpu in distinct(table.cpu[unknown]):
        on_cpu = np.flatnonzero(table.cpu == cpu)
        for behind in np.searchsorted(on_cpu, unknown[table.cpu[unknown] == cpu]).tolist():
            first = behind
            while first and nameless[on_cpu[first - 1]]:
                first -= 1
            doubtful += on_cpu[max(first - DOUBTFUL, 0) : behind].tolist()
    return np.array(sorted(set(doubtful)), np.intp)


def lost_between(table: EventTable, row: NDArray[np.intp], cpu: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Say before which events of a sequence a loss of their own CPU, or of the event before, was recorded.

    By recorded order, so it holds where time stamps do not.
    """
    between = np.zeros(len(row), bool)
    lost = table.rows(LOST_EVENTS)
    for lost_cpu in distinct(table.cpu[lost]):
        count = np.searchsorted(lost[table.cpu[lost] == lost_cpu], row)
        concerned = (cpu[1:] == lost_cpu) | (cpu[:-1] == lost_cpu)
        between[1:] |= (count[1:] != count[:-1]) & concerned
    return between


def breaks(
    gaps: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
    ts_ns: NDArray[np.int64],
    cpu: NDArray[np.int16],
    classes: NDArray[np.uint8],
    *,
    sched_recorded: bool,
    filtered: bool,
) -> NDArray[np.bool_]:
    """Return where knowledge breaks off before an event of a thread sequence.

    A loss on another CPU concerns a thread only if it may have been there: both its events lie on one CPU
    and sched_switch was recorded and does not stand between, so it stayed.

    Parameters
    ----------
    ts_ns, cpu, classes : the sequence's columns, thread by thread
    filtered : the recorder dropped whole exits on purpose, so nothing is known before any VM-exit
    """
    broken = np.zeros(len(ts_ns), bool)
    if len(ts_ns) < 2:
        return broken
    moved = cpu[1:] != cpu[:-1]
    broken[1:] = moved & (ts_ns[1:] == ts_ns[:-1])
    broken[1:] |= ts_ns[1:] < ts_ns[:-1]
    for lost_cpu, gap in gaps.items():
        stayed_away = ~moved & (cpu[1:] != lost_cpu) & (classes[:-1] != _SCHED) & sched_recorded
        broken[1:] |= ~stayed_away & _touched(gap, ts_ns[:-1], ts_ns[1:])
    if filtered:
        broken |= classes == EXIT
    return broken
