"""The timeline as data for the page's script: words as JSON, numbers as bytes, deflated together.

`timeline_data.js` reads it. Of numbers of several bytes all first bytes come first, then all second ones, and so on:
so they compress better.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.render.accesses import describe_access
from kvmtrace.render.html.charts import part_colour
from kvmtrace.render.terminal import duration, escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvmtrace.report.document import Report
    from kvmtrace.report.over_time import Bins, FollowUp, Place, Timeline, Window

NOTHING = 0xFFFF  # of a bin
LONGEST = 2**32 - 1  # ns that four bytes hold; longer ones are listed apart


def timeline_bytes(report: Report, timeline: Timeline) -> bytes:
    """Return all that the page draws over time."""
    words = {
        "end": timeline.length_ns,
        "parts": timeline.parts,
        "css": [part_colour(part) for part in timeline.parts],
        "reasons": [escape(name) for name in timeline.reasons],
        "lanes": [escape(lane.label) for lane in timeline.lanes],
        "complete": timeline.complete,
        "chosen": [[c.lane, c.ts_ns, c.dur_ns] for c in timeline.chosen],
        "marks": _marks(report, timeline),
        "places": [_place(place, timeline) for place in timeline.places.named],
        "cell": timeline.places.cell_ns,
        "unnamed": timeline.places.left_out,
    }
    cells = [_steps(place.cells, 0) for place in timeline.places.named]
    packed = _planes(np.concatenate([np.empty(0, np.int64), *cells]), 4)
    return pack_stretch(timeline.windows, timeline.bins, timeline.follow_ups, words, behind=packed)


def pack_stretch(
    windows: Iterable[Window],
    bins: Iterable[Bins],
    follow_ups: Sequence[FollowUp],
    words: dict[str, Any],
    *,
    behind: bytes = b"",
    level: int = 7,  # 9 takes six times as long for 1 %
) -> bytes:
    """Return windows and bins for the script, with the RIPs and follow-ups that they refer to, and other words.

    Parameters
    ----------
    behind : numbers that the words tell how to read
    level : of the compression
    """
    windows, bins = list(windows), list(bins)
    rips = np.unique(np.concatenate([np.empty(0, np.uint64), *(np.array(w.rips, np.uint64) for w in windows)]))
    used = np.unique(np.concatenate([np.empty(0, np.int64), *(np.array(w.event_key, np.int64) for w in windows)]))
    document = {
        **words,
        "rips": [f"{rip:#x}" for rip in rips.tolist()],
        "keys": [describe_follow_up(follow_ups[key]) for key in used.tolist()],
        "windows": [_described_window(window) for window in windows],
        "bins": [_described_bins(one) for one in bins],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    parts = [len(text).to_bytes(4, "little"), text]
    for window in windows:
        parts += _packed_window(window, rips, used)
    for one in bins:
        parts += _packed_bins(one)
    parts.append(behind)
    return zlib.compress(b"".join(parts), level)


def describe_follow_up(one: FollowUp) -> str:
    """Return a follow-up event in words."""
    if one.what == "emulated":
        return "emulated instruction"
    if one.what in {"interrupt", "exception"}:
        return f"inject {one.what} {one.number:#x}"
    return describe_access(one.what, one.number, one.write)


def _planes(values: NDArray[Any], width: int) -> bytes:
    """Return the first bytes of all numbers, then their second ones, up to `width`."""
    return values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()


def _steps(times: Sequence[int], start: int) -> NDArray[np.int64]:
    """Return how long after the one before each time is."""
    values = np.array(times, np.int64)
    steps: NDArray[np.int64] = values - np.concatenate([np.array([start], np.int64), values])[:-1]
    return steps


def _packed_window(window: Window, rips: NDArray[np.uint64], used: NDArray[np.int64]) -> list[bytes]:
    return [
        _planes(np.minimum(np.array(window.dur_ns, np.int64), LONGEST), 4),
        _planes(np.minimum(np.array(window.code, np.int64), NOTHING), 2),
        _planes(_steps(window.cpu_at, 0), 4),
        _planes(np.array(window.cpus, np.int64) & 0xFFFF, 2),
        _planes(_steps(window.level_at, 0), 4),
        _planes(np.array(window.levels, np.int64), 1),
        _planes(_steps(window.exits, 0), 4),
        _planes(np.searchsorted(rips, np.array(window.rips, np.uint64)), 4),
        _planes(np.minimum(_steps(window.event_ns, window.start_ns), LONGEST), 4),
        _planes(np.searchsorted(used, np.array(window.event_key, np.int64)), 4),
    ]


def _described_window(window: Window) -> dict[str, Any]:
    steps = _steps(window.event_ns, window.start_ns)
    return {
        "lane": window.lane,
        "start": window.start_ns,
        "n": len(window.dur_ns),
        "cpus": len(window.cpus),
        "levels": len(window.levels),
        "exits": len(window.exits),
        "events": len(window.event_ns),
        "first": window.first_exit,
        "long": [[i, ns] for i, ns in enumerate(window.dur_ns) if ns > LONGEST],
        "far": [[i, int(steps[i])] for i in np.flatnonzero(steps > LONGEST).tolist()],
    }


def _packed_bins(bins: Bins) -> list[bytes]:
    code, cpu = (np.array(column, np.int64) for column in (bins.code, bins.cpu))
    return [
        *(np.array(share, np.uint8).tobytes() for share in bins.shares if share),
        _planes(np.where(code < 0, NOTHING, np.minimum(code, NOTHING)), 2),
        _planes(np.where(cpu < 0, NOTHING, cpu), 2),
        _planes(np.array(bins.level, np.int64), 1),
        _planes(np.array(bins.exits, np.int64), 4),
        _planes(np.array(bins.events, np.int64), 4),
    ]


def _described_bins(bins: Bins) -> dict[str, Any]:
    return {
        "lane": bins.lane,
        "start": bins.start_ns,
        "ns": bins.bin_ns,
        "n": len(bins.code),
        "levels": len(bins.level),
        "parts": [part for part, share in enumerate(bins.shares) if share],
        "before": bins.exits_before,
    }


def _place(place: Place, timeline: Timeline) -> list[Any]:
    """Return [in words, how many there are, lanes, times, how many cells]."""
    if place.what == "rip":
        words = f"{place.number:#x}"
    elif place.what == "reason":
        words = escape(timeline.reasons[place.number])
    else:
        words = describe_follow_up(timeline.follow_ups[place.number])
    return [words, place.total, place.lane, place.ts_ns, len(place.cells)]


def _marks(report: Report, timeline: Timeline) -> list[dict[str, Any]]:
    """Return what stands above the lanes: violations, and the slowest VM-exits."""
    lane_of = {lane.tid: i for i, lane in enumerate(timeline.lanes)}
    marks = [
        (row.tid, row.ts_ns, "slow", f"one of the slowest VM-exits: {row.name}, {duration(row.dur_ns)}")
        for row in report.slowest
    ]
    violations = report.model.violations if report.model else ()
    marks += [(v.tid, v.ts_ns, v.severity, f"{v.severity} of {v.rule}: {escape(v.observed)}") for v in violations]
    return [
        {"lane": lane_of[tid], "at": ts_ns - timeline.start_ns, "kind": kind, "words": words}
        for tid, ts_ns, kind, words in marks
        if tid in lane_of
    ]


def link(report: Report, tid: int, ts_ns: int, dur_ns: int = 20_000) -> str:
    """Return the link to a moment in the timeline, "" if there is none."""
    timeline = report.timeline
    if timeline is None:
        return ""
    lane = next((i for i, lane in enumerate(timeline.lanes) if lane.tid == tid), None)
    if lane is None:
        return ""
    at = max(ts_ns - timeline.start_ns, 0)
    begin = max(at - dur_ns // 3, 0)
    return f"#t={begin}-{begin + max(dur_ns * 5 // 3, 4000)},{lane},{at}"


def chosen_words(timeline: Timeline) -> list[str]:
    """Return each VM-exit worth a look in words, as the list names them."""
    labels = [escape(lane.label) for lane in timeline.lanes]
    return [
        f"{c.reason} {duration(c.dur_ns)}, {c.why}, at {duration(c.ts_ns)}, {labels[c.lane]}"
        f"{f', VM-exit {c.number}' if c.number else ''}, rip {'-' if c.guest_rip is None else f'{c.guest_rip:#x}'}"
        for c in timeline.chosen
    ]


def note(timeline: Timeline, *, live: bool) -> str:
    """Say what of a long recording is drawn less sharply; "" if nothing is."""
    if timeline.complete or live:
        return ""
    sharp = duration(timeline.bins[0].bin_ns) if timeline.bins else "a bin"
    return (
        f"A long recording: away from the VM-exits in the list, {sharp} is the finest that this page shows. "
        "kvmtrace view shows every moment of it, and report --format html --full makes a page of any size that does."
    )
