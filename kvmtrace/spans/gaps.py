"""When and where events were lost, and what a loss may hide: the one account of it for report, check and compare.

Two consecutive events of a thread enclose a stretch of time. As long as the thread stays on a CPU, its events lie in
that CPU's buffer in order, so only a loss that was recorded between the two can hide any. Where it was switched out,
changed the CPU, or where scheduling was not recorded, it may have run on any other CPU meanwhile: a loss of that CPU
counts if its time touches the stretch's.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import LOST_EVENTS
from kvmtrace.table.kinds import UNKNOWN_EVENT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

    Times = NDArray[np.int64]

DOUBTFUL = 8  # events
_FAR = np.iinfo(np.int64).max
_NEVER = _FAR - 1  # unlike a gap at the end of a table, no later event closes it
_TAIL = 4096  # rows that mostly hold an event of every CPU


class Gaps:
    """When which CPU lost events: from its last event before the loss to its first one behind it.

    Fed with consecutive tables; a gap at the end of one is closed by the next.
    """

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        self._lost: dict[int, int] = {}  # how often a CPU has lost events so far
        self._last_ns: dict[int, int] = {}

    def __bool__(self) -> bool:
        return any(self._starts.values())

    def feed(self, table: EventTable) -> NDArray[np.int32]:
        """Take in a further table, in its recorded order.

        Returns
        -------
        ndarray[int32], shape (n,): how often each row's CPU had lost events before the row
        """
        counts = np.zeros(len(table), np.int32)
        lost = table.rows(LOST_EVENTS)
        for cpu, own in rows_by_cpu(table, set(table.cpu[lost].tolist()) | self._lost.keys()):
            is_lost = table.kind[own] == table.kind_index.get(LOST_EVENTS, -1)
            counts[own] = self._lost.get(cpu, 0) + np.cumsum(is_lost)
            self._lost[cpu] = self._lost.get(cpu, 0) + int(is_lost.sum())
            self._add(cpu, table.ts_ns[own[~is_lost]], distinct(np.cumsum(~is_lost)[is_lost]))
        self._remember(table)
        return counts

    def _add(self, cpu: int, ts_ns: Times, behind: NDArray[np.intp]) -> None:
        """Add one CPU's gaps.

        Parameters
        ----------
        ts_ns : of the CPU's events
        behind : how many of them stand before each gap
        """
        starts, ends = self._starts.setdefault(cpu, []), self._ends.setdefault(cpu, [])
        if len(ts_ns) and ends and ends[-1] == _FAR:
            ends[:] = [min(end, int(ts_ns[0])) for end in ends]
        for position in behind.tolist():
            before = int(ts_ns[position - 1]) if position else self._last_ns.get(cpu, -_FAR)
            after = int(ts_ns[position]) if position < len(ts_ns) else _FAR
            starts.append(min(before, after))  # time stamps around damage may be garbage
            ends.append(max(before, after))

    def _remember(self, table: EventTable) -> None:
        """Keep the time of each CPU's latest event; mostly the last rows hold one of every CPU."""
        if not len(table):
            return
        n_cpus = int(table.cpu.max()) + 1
        is_lost = table.kind == table.kind_index.get(LOST_EVENTS, -1)
        for start in (max(len(table) - _TAIL, 0), 0):
            rows = start + np.flatnonzero(~is_lost[start:])
            latest = np.full(n_cpus + 1, -1, np.intp)  # one more for CPU -1
            latest[table.cpu[rows]] = rows  # the last assignment stays
            if start == 0 or (latest[:n_cpus] >= 0).all():
                break
        for cpu in np.flatnonzero(latest >= 0).tolist():
            self._last_ns[cpu if cpu < n_cpus else -1] = int(table.ts_ns[latest[cpu]])

    def end_at(self, last_ns: dict[int, int]) -> None:
        """Take a CPU's events as lost from its last one on: the recording is damaged or cut off."""
        for cpu, ts_ns in last_ns.items():
            self._starts.setdefault(cpu, []).append(ts_ns)
            self._ends.setdefault(cpu, []).append(_NEVER)

    def forget_before(self, ts_ns: int) -> None:
        """Drop gaps that ended before a time: no event that is still waiting is as old."""
        for cpu, ends in self._ends.items():
            keep = [i for i, end in enumerate(ends) if end >= ts_ns]
            self._starts[cpu] = [self._starts[cpu][i] for i in keep]
            self._ends[cpu] = [ends[i] for i in keep]

    def hide(
        self, ts_ns: Times, cpu: NDArray[np.int16], loss: NDArray[np.int32], wandered: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Say of each stretch between consecutive rows whether events of the thread may have been lost in it.

        Parameters
        ----------
        ts_ns, cpu, loss : of n rows; `loss` is what feed() returned of them
        wandered : bool, shape (n-1,), the thread may have run on other CPUs between two rows: it was switched out
            there, or scheduling was not recorded

        Returns
        -------
        ndarray[bool], shape (n-1,); what it says of rows of different threads means nothing
        """
        same = cpu[:-1] == cpu[1:]
        hidden: NDArray[np.bool_] = same & (loss[:-1] != loss[1:])
        if not self:
            return hidden
        rows = np.flatnonzero(~same | wandered)
        since, until = np.minimum(ts_ns[:-1], ts_ns[1:])[rows], np.maximum(ts_ns[:-1], ts_ns[1:])[rows]
        touched = _n_touched([*chain(*self._starts.values())], [*chain(*self._ends.values())], since, until)
        rows, since, until, touched = (values[touched > 0] for values in (rows, since, until, touched))
        # what a CPU lost while the thread stayed on it is known by the order of the rows
        stayed = np.flatnonzero(same[rows])
        stayed = stayed[np.argsort(cpu[rows[stayed]], kind="stable")]
        own_cpu = cpu[rows[stayed]]
        for own in np.split(stayed, np.flatnonzero(np.diff(own_cpu)) + 1) if len(stayed) else ():
            one = int(cpu[rows[own[0]]])
            touched[own] -= _n_touched(self._starts.get(one, []), self._ends.get(one, []), since[own], until[own])
        hidden[rows] |= touched > 0
        return hidden


def _n_touched(starts: list[int], ends: list[int], since: Times, until: Times) -> NDArray[np.intp]:
    """Return how many of these gaps each interval [since, until] overlaps."""
    began = np.searchsorted(np.sort(np.array(starts, np.int64)), until, "right")
    return began - np.searchsorted(np.sort(np.array(ends, np.int64)), since, "left")


def rows_by_cpu(table: EventTable, cpus: Collection[int]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each of these CPUs that a table has events of, ascending, with their rows."""
    if not cpus:
        return
    order = np.argsort(table.cpu, kind="stable")
    bounds = np.searchsorted(table.cpu[order], ascending := np.array(sorted(cpus)), "left").tolist()
    ends = np.searchsorted(table.cpu[order], ascending, "right").tolist()
    for cpu, first, stop in zip(ascending.tolist(), bounds, ends, strict=True):
        if stop > first:
            yield cpu, order[first:stop]


def doubtful_rows(table: EventTable) -> NDArray[np.intp]:
    """Return the last rows before losses of unknown size.

    Damage may begin within an event, and what follows in its page may look like events for a while. A count of -2
    says that this is not so: what stands before the loss is whole.
    """
    lost = table.rows(LOST_EVENTS)
    if not len(lost) or not table.has(LOST_EVENTS, "count"):
        return np.empty(0, np.intp)
    unknown = lost[table.field(LOST_EVENTS, "count") == -1]
    nameless = table.kind == table.kind_index.get(UNKNOWN_EVENT, -1)
    doubtful: list[int] = []
    is_unknown = np.zeros(len(table), bool)
    is_unknown[unknown] = True
    for _, on_cpu in rows_by_cpu(table, distinct(table.cpu[unknown]).tolist()):
        for behind in np.flatnonzero(is_unknown[on_cpu]).tolist():
            first = behind
            while first and nameless[on_cpu[first - 1]]:
                first -= 1
            doubtful += on_cpu[max(first - DOUBTFUL, 0) : behind].tolist()
    return np.array(sorted(set(doubtful)), np.intp)
