"""How much of each stretch of time a vCPU thread spent with what: a recording of any length as a few bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.slices import joined_slices
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.time_parts import N_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable


@dataclass(frozen=True)
class TimeShares:
    """Shares of a window of time, and its slices if they are few.

    Attributes
    ----------
    tids : thread number -> tid
    edges : (b+1,) int64, ns
    share : (threads, N_PARTS, b) float, the part of each bin's time
    slices : (n, 4) int64, thread number, Part, ts_ns, dur_ns of the slices that the window touches; None if there are
        more of them than were asked for
    """

    tids: tuple[int, ...]
    edges: NDArray[np.int64]
    share: NDArray[np.float64]
    slices: NDArray[np.int64] | None


def shares_over_time(
    tables: Iterable[EventTable], start_ns: int, stop_ns: int, *, n_bins: int = 800, max_slices: int = 20_000
) -> TimeShares:
    """Return what each vCPU thread did in a window, in bounded memory.

    The time that a part has taken up to an edge is piecewise linear in it: each slice adds a slope of 1 where it
    begins and takes it back where it ends, so sums per bin of how many begin and end there, and where, are enough.

    Parameters
    ----------
    tables : consecutive event tables
    n_bins : bins that the window is cut into
    max_slices : slices that are kept one by one
    """
    stop_ns = max(stop_ns, start_ns + 1)
    edges = start_ns + np.arange(n_bins + 1, dtype=np.int64) * (stop_ns - start_ns) // n_bins
    builder, n_kept = SpanBuilder(), 0
    kept: list[NDArray[np.int64]] = []
    counts = np.zeros((0, 2, n_bins + 1))
    for spans in iter_spans(tables, builder):
        made = joined_slices(spans.lanes, spans.swept.dur_ns, spans.swept.part)
        begin = spans.lanes.ts_ns[made.first]
        row = np.column_stack((spans.lanes.thread[made.first], made.part, begin, made.dur_ns)).astype(np.int64)
        row = row[(begin < stop_ns) & (begin + made.dur_ns > start_ns)]
        n_kept += len(row)
        if n_kept <= max_slices:
            kept.append(row)
        counts = _added(counts, row, edges)
    slices = np.concatenate([np.empty((0, 4), np.int64), *kept]) if n_kept <= max_slices else None
    n_threads = len(builder.tids)
    counts = np.pad(counts, ((0, n_threads * N_PARTS - len(counts)), (0, 0), (0, 0)))
    slope = np.cumsum(counts[:, 0, :], axis=1)
    spent = slope * (edges - start_ns) - np.cumsum(counts[:, 1, :], axis=1)
    share = np.diff(spent, axis=1) / np.diff(edges)
    return TimeShares(tuple(builder.tids), edges, share.reshape(n_threads, N_PARTS, n_bins), slices)


def _added(counts: NDArray[np.float64], row: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Add slices: per (thread and part) and first edge behind, changes of the slope and where they were."""
    n_edges = len(edges)
    group = row[:, 0] * N_PARTS + row[:, 1]
    if len(group):
        counts = np.pad(counts, ((0, max(int(group.max()) + 1 - len(counts), 0)), (0, 0), (0, 0)))
    for sign, at in ((1, row[:, 2]), (-1, row[:, 2] + row[:, 3])):
        since = np.maximum(at, edges[0])
        edge = np.searchsorted(edges, since)
        inside = edge < n_edges
        cells = group[inside] * n_edges + edge[inside]
        size = len(counts) * n_edges
        counts[:, 0, :] += sign * np.bincount(cells, minlength=size).reshape(-1, n_edges)
        where = np.bincount(cells, (since - edges[0])[inside], minlength=size)
        counts[:, 1, :] += sign * where.reshape(-1, n_edges)
    return counts
