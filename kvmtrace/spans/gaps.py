"""When and where events were lost, and which stretches of a vCPU thread may therefore hide some.

A stretch is the time between two consecutive lane rows of one thread. As long as a thread stays on a CPU its
events lie in that CPU's buffer, so only a loss of that CPU can hide any. Where the thread was off a CPU, or
changed it, or where scheduling was not recorded, it may have been anywhere: a loss of any CPU counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.spans.lanes import Step
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.table.event_table import EventTable


_TAIL = 4096


class LossGaps:
    """The gaps of a recording, fed table by table."""

    def __init__(self) -> None:
        self._by_cpu: dict[int, int] = {}
        self._last_ts: dict[int, int] = {}
        self._begin: NDArray[np.int64] = np.empty(0, np.int64)  # disjoint, ascending
        self._end: NDArray[np.int64] = np.empty(0, np.int64)

    def __bool__(self) -> bool:
        return len(self._begin) > 0

    def feed(self, table: EventTable) -> NDArray[np.int32]:
        """Take in a table; return how often each row's CPU had lost events before the row, shape (n,)."""
        counts = np.zeros(len(table), np.int32)
        lost = table.rows(LOST_EVENTS)
        if not len(lost) and not self._by_cpu:
            self._remember(table)
            return counts
        gaps = []
        for cpu in set(table.cpu[lost].tolist()) | set(self._by_cpu):
            own = np.flatnonzero(table.cpu == cpu)
            is_lost = np.zeros(len(own), bool)
            is_lost[np.searchsorted(own, lost[table.cpu[lost] == cpu])] = True
            counts[own] = self._by_cpu.get(cpu, 0) + np.cumsum(is_lost)
            self._by_cpu[cpu] = self._by_cpu.get(cpu, 0) + int(is_lost.sum())
            gaps += self._gaps_of(table.ts_ns[own], np.flatnonzero(is_lost), cpu)
        self._merge(gaps)
        self._remember(table)
        return counts

    def _gaps_of(self, ts_ns: NDArray[np.int64], lost: NDArray[np.intp], cpu: int) -> list[tuple[int, int]]:
        """Return (begin, end) of one CPU's gaps: from its event before a loss to the one after."""
        first = np.iinfo(np.int64).min
        before = np.where(lost > 0, ts_ns[lost - 1], self._last_ts.get(cpu, first))
        return list(zip(before.tolist(), ts_ns[lost].tolist(), strict=True))

    def _remember(self, table: EventTable) -> None:
        """Keep the time of each CPU's latest event; mostly the last rows hold one of every CPU."""
        if not len(table):
            return
        n_cpus = int(table.cpu.max()) + 1
        for start in (max(len(table) - _TAIL, 0), 0):
            latest = np.full(n_cpus + 1, -1, np.intp)  # one more for CPU -1
            latest[table.cpu[start:]] = np.arange(start, len(table))  # the last assignment stays
            if start == 0 or (latest[:n_cpus] >= 0).all():
                break
        for cpu in np.flatnonzero(latest[:n_cpus] >= 0):
            self._last_ts[int(cpu)] = int(table.ts_ns[latest[cpu]])

    def _merge(self, gaps: list[tuple[int, int]]) -> None:
        """Add gaps and keep all of them disjoint and sorted."""
        known = list(zip(self._begin.tolist(), self._end.tolist(), strict=True))
        merged: list[list[int]] = []
        for begin, end in sorted(known + gaps):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        bounds = np.array(merged, np.int64).reshape(-1, 2)
        self._begin, self._end = bounds[:, 0], bounds[:, 1]

    def suspect(self, lanes: Lanes, *, scheduling: bool) -> NDArray[np.bool_]:
        """Say of each row whether the stretch from it to its thread's next row may hide lost events.

        Parameters
        ----------
        scheduling : bool, sched_switch was recorded
        """
        found = np.zeros(len(lanes), bool)
        if not self or len(lanes) < 2:
            return found
        same_cpu = lanes.cpu[:-1] == lanes.cpu[1:]
        on_cpu = same_cpu & (lanes.step[:-1] != Step.BLOCK) & (lanes.step[:-1] != Step.PREEMPT)
        if not scheduling:
            on_cpu[:] = False
        lost_here = same_cpu & (lanes.loss[:-1] != lanes.loss[1:])
        after = np.searchsorted(self._end, lanes.ts_ns[:-1], side="right")
        begin = np.append(self._begin, np.iinfo(np.int64).max)[after]
        lost_anywhere = ~on_cpu & (begin < lanes.ts_ns[1:])
        found[:-1] = (lost_here | lost_anywhere) & lanes.same_thread()
        return found
