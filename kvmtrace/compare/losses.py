"""Where knowledge breaks off: lost events, ambiguous order, filtered recordings.

A break before an event of a thread means that something of that thread may be missing, or that the order
of the two events around it is not known. Nothing is concluded across a break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.compare.alphabet import CLASS, EXIT
from kvmtrace.events.table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.events.table import EventTable

_FAR = np.iinfo(np.int64).max
_SCHED = CLASS["sched_switch"]


def gaps_by_cpu(table: EventTable) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return, per CPU that lost events, the times between which they happened.

    Returns
    -------
    dict of cpu -> (starts, ends), ascending; a gap without a later event on its CPU never ends
    """
    gaps = {}
    lost = table.rows(LOST_EVENTS)
    for cpu in np.unique(table.cpu[lost]):
        on_cpu = np.flatnonzero(table.cpu == cpu)
        position = np.searchsorted(on_cpu, lost[table.cpu[lost] == cpu])
        before = np.maximum(position - 1, 0)
        starts = np.where(position > 0, table.ts_ns[on_cpu[before]], -_FAR)
        after = np.minimum(position + 1, len(on_cpu) - 1)
        ends = np.where(position + 1 < len(on_cpu), table.ts_ns[on_cpu[after]], _FAR)
        gaps[int(cpu)] = (starts, np.maximum.accumulate(ends))
    return gaps


def _touched(gap: tuple[NDArray[np.int64], NDArray[np.int64]], since: NDArray[np.int64],
             until: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which intervals [since, until] overlap a gap."""
    starts, ends = gap
    began = np.searchsorted(starts, until, "right")
    over = np.searchsorted(ends, since, "left")
    return began > over


def breaks(
    gaps: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
    ts_ns: NDArray[np.int64], cpu: NDArray[np.int16], classes: NDArray[np.uint8],
    *, sched_recorded: bool, filtered: bool,
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
