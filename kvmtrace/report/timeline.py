"""A bounded picture of a recording over time: budget per time bin, latency per time bin, segments around chosen exits.

However long the recording, the result is a few hundred kilobytes: the overview has a fixed number of bins, and
the segments are those of the whole recording only if it is short; else those around the VM-exits that one would
look at first (the slowest and the first of each reason, and every violation).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.report.over_time import Bins, ChosenExit, Lane, Latency, Timeline, Window
from kvmtrace.spans.slices import PART_NAMES
from kvmtrace.spans.time_parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.check.verdict import Violation
    from kvmtrace.spans.slices import Segments

OVERVIEW_BINS = 160
MAX_SEGMENTS = 400_000  # some 2 MB of HTML
AROUND_SEGMENTS = 60_000  # of a longer recording, around chosen exits
ALL_BINS = 1 << 20  # of all threads together, some 1 MB of HTML
THREAD_BINS = 1 << 18
AROUND = 60  # segments on either side of a chosen exit
SLOWEST = 4  # exits chosen per reason


@dataclass(frozen=True)
class _View:
    """Segments with what is derived of each once."""

    segments: Segments
    start_ns: int
    codes: NDArray[np.int64]
    begins: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    lane_of: dict[int, int]


@dataclass(frozen=True)
class _Exits:
    """VM-exits among segments: first segment, index of the guest segment behind, duration."""

    at: NDArray[np.intp]
    dur_ns: NDArray[np.int64]


def _find_exits(segments: Segments) -> _Exits:
    at = np.flatnonzero(segments.guest_rip != 0)
    guests = np.flatnonzero(segments.part == Part.GUEST)
    if not len(at) or not len(guests):
        return _Exits(np.empty(0, np.intp), np.empty(0, np.int64))
    after = np.searchsorted(guests, at)
    found = after < len(guests)
    at, entry = at[found], guests[after[found]]
    same = segments.thread[at] == segments.thread[entry]
    at, entry = at[same], entry[same]
    return _Exits(at, segments.ts_ns[entry] - segments.ts_ns[at])


def _shares(segments: Segments, thread: int, edges: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Return each part's time per bin: differences of its cumulative time, interpolated at the edges."""
    own = segments.thread == thread
    ts_ns, dur_ns, part = segments.ts_ns[own], segments.dur_ns[own], segments.part[own]
    points = np.append(ts_ns, ts_ns[-1] + dur_ns[-1])
    shares = []
    for which in Part:
        spent = np.concatenate([[0], np.cumsum(np.where(part == which, dur_ns, 0))])
        share = np.rint(np.diff(np.interp(edges, points, spent)))
        # garbage time stamps may span more than int64 holds
        shares.append(np.clip(np.nan_to_num(share), 0, 1 << 61).astype(np.int64))
    return shares


def _latency(segments: Segments, exits: _Exits, edges: NDArray[np.float64]) -> Latency:
    where = np.clip(np.searchsorted(edges, segments.ts_ns[exits.at], "right") - 1, 0, OVERVIEW_BINS - 1)
    order = np.lexsort((exits.dur_ns, where))
    dur_ns, where = exits.dur_ns[order], where[order]
    starts = np.searchsorted(where, np.arange(OVERVIEW_BINS))
    counts = np.searchsorted(where, np.arange(OVERVIEW_BINS), "right") - starts

    def at(quantile: float) -> tuple[int, ...]:
        if not len(dur_ns):
            return (0,) * OVERVIEW_BINS
        pick = np.minimum(starts + np.floor(quantile * np.maximum(counts - 1, 0)).astype(np.intp), len(dur_ns) - 1)
        return tuple(np.where(counts > 0, dur_ns[pick], 0).tolist())

    return Latency(at(0.5), at(0.99), at(1.0))


def _choose(segments: Segments, exits: _Exits) -> list[tuple[int, int, str]]:
    """Return (position in exits, segment, why) of the exits worth a look."""
    chosen: dict[int, str] = {}
    reason = segments.reason[exits.at]
    for number in np.unique(reason):
        own = np.flatnonzero(reason == number)
        chosen.setdefault(int(own[0]), "first of its reason")
        for rank, slow in enumerate(own[np.argsort(-exits.dur_ns[own], kind="stable")[:SLOWEST]]):
            chosen.setdefault(int(slow), "slowest of its reason" if rank == 0 else "slow")
    return [(i, int(exits.at[i]), why) for i, why in chosen.items()]


def _ranges(segments: Segments, wanted: Iterable[int]) -> list[tuple[int, int]]:
    """Return ranges of segments around the wanted ones, merged, each within one thread."""
    if len(segments) <= MAX_SEGMENTS:
        bounds = np.flatnonzero(np.diff(segments.thread)) + 1
        edges = [0, *bounds.tolist(), len(segments)]
        return [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    ranges: list[tuple[int, int]] = []
    left = AROUND_SEGMENTS
    for i in sorted(wanted):
        first = np.searchsorted(segments.thread, segments.thread[i])
        stop = np.searchsorted(segments.thread, segments.thread[i], "right")
        a, b = max(int(first), i - AROUND), min(int(stop), i + AROUND)
        if ranges and a <= ranges[-1][1] and segments.thread[ranges[-1][0]] == segments.thread[i]:
            a, b = ranges.pop()[0], max(b, a)
        if b - a > left:
            break
        ranges.append((a, b))
        left -= b - a
    return ranges


def _codes(segments: Segments) -> NDArray[np.int64]:
    """Return what each segment is, as Window.code says."""
    codes: NDArray[np.int64] = segments.part.astype(np.int64) + len(Part) * (segments.reason.astype(np.int64) + 1)
    return codes


def _begins(segments: Segments) -> NDArray[np.bool_]:
    """Say which segments a VM-exit begins; one at RIP 0 is told by the guest mode before it."""
    begins = segments.guest_rip != 0
    after_guest = (segments.part[1:] != Part.GUEST) & (segments.part[:-1] == Part.GUEST)
    begins[1:] |= after_guest & (segments.thread[1:] == segments.thread[:-1]) & (segments.reason[1:] >= 0)
    found: NDArray[np.bool_] = begins
    return found


def _numbers(segments: Segments, begins: NDArray[np.bool_], counts: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the number of the VM-exit that begins each segment, 0 where none does or the count does not fit.

    Parameters
    ----------
    counts : tid -> VM-exits that were recorded
    """
    numbers = np.zeros(len(segments), np.int64)
    for thread, tid in enumerate(segments.tids):
        own = np.flatnonzero(begins & (segments.thread == thread))
        if counts.get(tid) == len(own):
            numbers[own] = np.arange(1, len(own) + 1)
    return numbers


def _window(view: _View, first: int, stop: int) -> Window:
    segments = view.segments
    exits = np.flatnonzero(view.begins[first:stop])
    numbers = view.numbers[first:stop][exits]
    return Window(
        lane=view.lane_of[segments.tids[int(segments.thread[first])]],
        start_ns=int(segments.ts_ns[first]) - view.start_ns,
        dur_ns=tuple(segments.dur_ns[first:stop].tolist()),
        code=tuple(view.codes[first:stop].tolist()),
        exits=tuple(exits.tolist()),
        rips=tuple(segments.guest_rip[first:stop][exits].tolist()),
        first_exit=int(numbers[0]) or None if len(numbers) else None,
    )


def _bins(view: _View, stop_ns: int) -> tuple[Bins, ...]:
    """Reduce every thread to what it did longest in each of many stretches."""
    segments, n_bins = view.segments, min(THREAD_BINS, ALL_BINS // max(len(view.lane_of), 1))
    edges = np.linspace(0, max(stop_ns - view.start_ns, 1), n_bins + 1)
    made = []
    for thread, tid in enumerate(segments.tids):
        own = np.flatnonzero(segments.thread == thread)
        if tid in view.lane_of and len(own):
            code = _longest(segments.ts_ns[own] - view.start_ns, segments.dur_ns[own], view.codes[own], edges)
            made.append(Bins(view.lane_of[tid], float(edges[1]), tuple(code.tolist())))
    return tuple(made)


def _longest(
    begin: NDArray[np.int64], dur_ns: NDArray[np.int64], code: NDArray[np.int64], edges: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the code of the segment that covers most of each bin, -1 for none; begin ascends."""
    n_bins = len(edges) - 1
    # the segment that reaches into a bin from before
    into = np.searchsorted(begin, edges[:-1], "right") - 1
    known = into >= 0
    until = np.where(known, begin[into] + dur_ns[into], 0)
    covered = np.where(known, np.minimum(until, edges[1:]) - edges[:-1], -1.0)
    longest = np.where(covered > 0, code[into], -1)
    # the longest of those that begin in it
    where = np.clip(np.searchsorted(edges, begin, "right") - 1, 0, n_bins - 1)
    inside = np.minimum(begin + dur_ns, edges[where + 1]) - begin
    order = np.lexsort((inside, where))
    last = np.flatnonzero(np.append(where[order][1:] != where[order][:-1], True))
    best = order[last]
    better = inside[best] > covered[where[best]]
    longest[where[best[better]]] = code[best[better]]
    return longest


def _of_violations(segments: Segments, violations: Iterable[Violation]) -> list[int]:
    """Return the segment in which each violation of a shown thread lies."""
    wanted = []
    for violation in violations:
        if violation.tid in segments.tids:
            own = np.flatnonzero(segments.thread == segments.tids.index(violation.tid))
            if len(own):
                at = np.searchsorted(segments.ts_ns[own], violation.ts_ns, "right") - 1
                wanted.append(int(own[max(int(at), 0)]))
    return wanted


def _describe(view: _View, at: int, dur_ns: int, why: str) -> ChosenExit:
    segments = view.segments
    tid = segments.tids[int(segments.thread[at])]
    return ChosenExit(
        view.lane_of[tid],
        int(segments.ts_ns[at]) - view.start_ns,
        dur_ns,
        segments.reasons[int(segments.reason[at])],
        int(segments.guest_rip[at]),
        why,
        int(view.numbers[at]) or None,
        tid,
    )


def build_timeline(
    segments: Segments,
    labels: Mapping[int, str],
    violations: Iterable[Violation] = (),
    counts: Mapping[int, int] | None = None,
    span: tuple[int, int] | None = None,
) -> Timeline | None:
    """Reduce a recording's segments to what fits a page.

    Parameters
    ----------
    segments : from collect_segments
    labels : tid -> label
    violations : segments around them are kept
    counts : tid -> VM-exits recorded; their numbers are told where the segments are as many
    span : begin and end of the recording; times count from its begin. Default: of the segments

    Returns
    -------
    Timeline, or None without any segment
    """
    if not len(segments):
        return None
    start = int(segments.ts_ns.min())
    stop = int((segments.ts_ns + segments.dur_ns).max())
    if span is not None:
        start, stop = min(start, span[0]), max(stop, span[1])
    edges = np.linspace(start, max(stop, start + 1), OVERVIEW_BINS + 1)
    parts = tuple(PART_NAMES[part] for part in Part)
    lanes = tuple(
        Lane(tid, labels.get(tid, str(tid)), parts, tuple(tuple(s.tolist()) for s in _shares(segments, i, edges)))
        for i, tid in enumerate(segments.tids)
        if (segments.thread == i).any()
    )
    lane_of = {tid: i for i, tid in enumerate(lane.tid for lane in lanes)}
    exits = _find_exits(segments)
    chosen = _choose(segments, exits)
    wanted = [segment for _, segment, _ in chosen] + _of_violations(segments, violations)
    begins = _begins(segments)
    view = _View(segments, start, _codes(segments), begins, _numbers(segments, begins, counts or {}), lane_of)
    complete = len(segments) <= MAX_SEGMENTS
    described = tuple(
        _describe(view, at, int(exits.dur_ns[i]), why)
        for i, at, why in sorted(chosen, key=lambda item: -int(exits.dur_ns[item[0]]))
    )
    return Timeline(
        start,
        (stop - start) / OVERVIEW_BINS,
        parts,
        segments.reasons,
        lanes,
        _latency(segments, exits, edges),
        tuple(_window(view, a, b) for a, b in _ranges(segments, wanted)),
        described,
        complete,
        () if complete else _bins(view, stop),
    )
