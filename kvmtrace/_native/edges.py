"""The VM-entries and VM-exits of lanes, each with the one behind it, and what is summed over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True)
class PairedEdges:
    """Edges of lanes, see kvmtrace.spans.pairs; the last four have one less."""

    edges: NDArray[np.intp]
    is_exit: NDArray[np.bool_]
    reasons: NDArray[np.int64]
    handling: NDArray[np.bool_]
    guest: NDArray[np.bool_]
    dur_ns: NDArray[np.int64]
    sound: NDArray[np.bool_]


def pair_edges(lanes: Any, exit_step: int, reason_mask: int) -> PairedEdges:
    """Return the edges of lanes: rows of steps up to `exit_step`, which is a VM-exit, all others VM-entries.

    Parameters
    ----------
    lanes : with columns thread, step, ts_ns, arg and suspect; rows of a thread one behind the other
    reason_mask : of an exit's argument, its reason's number
    """
    kept = [np.ascontiguousarray(c) for c in (lanes.thread, lanes.step, lanes.suspect, lanes.ts_ns, lanes.arg)]
    n = int(np.count_nonzero(kept[1] <= exit_step))
    between = max(n - 1, 0)
    found = PairedEdges(
        edges=np.empty(n, np.int64),
        is_exit=np.empty(n, bool),
        reasons=np.empty(n, np.int64),
        handling=np.empty(between, bool),
        guest=np.empty(between, bool),
        dur_ns=np.empty(between, np.int64),
        sound=np.empty(between, bool),
    )
    source, out = ffi.new("EdgeSource *"), ffi.new("EdgeColumns *")
    source.n_rows = len(kept[1])
    source.thread, source.step, source.suspect, source.ts, source.arg = (given(column) for column in kept)
    out.n_edges, out.edge, out.is_exit, out.reason = (
        n,
        filled(found.edges),
        filled(found.is_exit),
        filled(found.reasons),
    )
    out.handling, out.guest, out.sound = filled(found.handling), filled(found.guest), filled(found.sound)
    out.dur_ns = filled(found.dur_ns)
    if lib.pair_edges(source, exit_step, reason_mask, out) != n:
        raise ValueError("other edges than were counted")
    return found


def _view(edges: Any) -> tuple[Any, list[Any]]:
    """Return edges as C's `EdgeView`, and what must outlive it."""
    out = ffi.new("EdgeView *")
    parts = (edges.edges, edges.reasons, edges.dur_ns, edges.is_exit, edges.handling, edges.guest, edges.sound)
    kept = [np.ascontiguousarray(part) for part in parts]
    out.n_edges = len(kept[0])
    out.edge, out.reason, out.dur_ns, out.is_exit, out.handling, out.guest, out.sound = (given(part) for part in kept)
    return out, kept


def sum_exits(
    edges: Any, count: NDArray[np.int64], guest_ns: NDArray[np.int64], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Add the VM-exits to the counts of their reasons, and the time in guest mode before each.

    Parameters
    ----------
    edges : as PairedEdges
    count, guest_ns : of as many reasons; no sum leaves [-limit, limit]

    Returns
    -------
    (reason, duration in ns) of each sound pair of a VM-exit and a VM-entry, and how many are not sound

    Raises
    ------
    ValueError
        There is a reason that has no count.
    """
    view, _kept = _view(edges)
    group, dur_ns = np.empty((2, len(edges.edges)), np.int64)
    sums, discarded = ffi.new("ExitSums *"), ffi.new("int64_t *")
    sums.n_reasons, sums.limit = min(len(count), len(guest_ns)), limit
    sums.count, sums.guest_ns = filled(count), filled(guest_ns)
    sums.group, sums.dur_ns = filled(group), filled(dur_ns)
    n = lib.sum_exits(view, sums, discarded)
    if n < 0:
        raise ValueError(f"a reason that is none of {sums.n_reasons}")
    return group[:n], dur_ns[:n], int(discarded[0])


def slow_exits(
    edges: Any,
    swept: tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.int64]],
    *,
    waiting: Iterable[int],
    moved_ns: NDArray[np.int64] | None,
    least: int,
    counted: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return those VM-exits in sound pairs that took at least `least` ns without waiting.

    Parameters
    ----------
    edges : as PairedEdges
    swept : thread, part and duration in ns of each row of the lanes
    waiting : parts, below 32, in which a thread waits
    moved_ns : of each edge, time of other parts that was waiting, too
    counted : VM-exits of each thread so far; is updated

    Returns
    -------
    (edge, ns without waiting, number among its thread's VM-exits from 1)

    Raises
    ------
    ValueError
        An edge is none of the rows', or its thread has no count.
    """
    view, _kept = _view(edges)
    edge, work_ns, number = np.empty((3, len(edges.edges)), np.int64)
    rows, out = ffi.new("SweptRows *"), ffi.new("SlowExits *")
    thread, part, dur_ns = (np.ascontiguousarray(column) for column in swept)
    rows.n_rows, rows.thread, rows.part, rows.dur_ns = len(thread), given(thread), given(part), given(dur_ns)
    rows.waiting = sum(1 << one for one in waiting)
    out.edge, out.work_ns, out.number = filled(edge), filled(work_ns), filled(number)
    moved = ffi.NULL if moved_ns is None else given(moved_ns)
    if moved_ns is not None and len(moved_ns) < len(edges.edges):
        raise ValueError("as many edges")
    n = lib.slow_exits(view, rows, moved, least, filled(counted), len(counted), out)
    if n < 0:
        raise ValueError("an edge that is none of the rows'")
    return edge[:n], work_ns[:n], number[:n]
