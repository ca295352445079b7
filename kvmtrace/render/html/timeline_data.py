"""The timeline as data for the page's script: numbers packed and compressed, words as JSON."""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.render.html.charts import part_colour
from kvmtrace.render.terminal import duration, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.document import Report
    from kvmtrace.report.over_time import Timeline, Window

NOTHING = 0xFFFF  # of a bin
LONGEST = 2**32 - 1  # ns that four bytes hold; longer segments are listed apart


def timeline_json(report: Report, timeline: Timeline) -> str:
    """Return the timeline as JSON that is safe inside a script element."""
    rips = sorted({rip for window in timeline.windows for rip in window.rips})
    index = {rip: i for i, rip in enumerate(rips)}
    parts = [piece for window in timeline.windows for piece in _packed(window, index)]
    parts += [np.array([NOTHING if c < 0 else c for c in b.code], "<u2").tobytes() for b in timeline.bins]
    document = {
        "end": span_ns(timeline),
        "parts": timeline.parts,
        "css": [part_colour(part) for part in timeline.parts],
        "reasons": timeline.reasons,
        "lanes": [escape(lane.label) for lane in timeline.lanes],
        "rips": [f"{rip:#x}" for rip in rips],
        "windows": [_described(window) for window in timeline.windows],
        "bins": [{"lane": b.lane, "ns": b.bin_ns, "n": len(b.code)} for b in timeline.bins],
        "chosen": [[c.lane, c.ts_ns, c.dur_ns] for c in timeline.chosen],
        "marks": _marks(report, timeline),
        "blob": base64.b64encode(zlib.compress(b"".join(parts), 9)).decode(),
    }
    text = json.dumps(document, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def span_ns(timeline: Timeline) -> int:
    """Return how long the recording is."""
    return round(timeline.bin_ns * len(timeline.latency.p50_ns)) or 1


def _packed(window: Window, index: dict[int, int]) -> Sequence[bytes]:
    dur_ns = np.minimum(np.array(window.dur_ns, np.int64), LONGEST)
    return (
        dur_ns.astype("<u4").tobytes(),
        np.array(window.code, np.int64).astype("<u2").tobytes(),
        np.array(window.exits, "<u4").tobytes(),
        np.array([index[rip] for rip in window.rips], "<u4").tobytes(),
    )


def _described(window: Window) -> dict[str, Any]:
    return {
        "lane": window.lane,
        "start": window.start_ns,
        "n": len(window.dur_ns),
        "exits": len(window.exits),
        "first": window.first_exit,
        "long": [[i, ns] for i, ns in enumerate(window.dur_ns) if ns > LONGEST],
    }


def _marks(report: Report, timeline: Timeline) -> list[dict[str, Any]]:
    """Return what stands above the lanes: violations, and the slowest VM-exits."""
    lane_of = {lane.tid: i for i, lane in enumerate(timeline.lanes)}
    violations = report.model.violations if report.model else ()
    marks = [(row.tid, row.ts_ns, "slow") for row in report.slowest]
    marks += [(violation.tid, violation.ts_ns, "violation") for violation in violations]
    return [
        {"lane": lane_of[tid], "at": ts_ns - timeline.start_ns, "kind": kind}
        for tid, ts_ns, kind in marks
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
    begin = max(ts_ns - timeline.start_ns - dur_ns // 3, 0)
    return f"#t={begin}-{begin + max(dur_ns * 5 // 3, 4000)},{lane}"


def chosen_words(timeline: Timeline) -> list[str]:
    """Return each VM-exit worth a look in words, as the list names them."""
    labels = [escape(lane.label) for lane in timeline.lanes]
    return [
        f"{c.reason} {duration(c.dur_ns)}, {c.why}, at {duration(c.ts_ns)}, {labels[c.lane]}"
        f"{f', VM-exit {c.number}' if c.number else ''}, rip {c.guest_rip:#x}"
        for c in timeline.chosen
    ]


def note(timeline: Timeline) -> str:
    """Say what of a long recording is drawn less sharply; "" if nothing is."""
    if timeline.complete:
        return ""
    sharp = duration(timeline.bins[0].bin_ns) if timeline.bins else "a bin"
    return f"A long recording: away from the VM-exits in the list, {sharp} is the finest that this page shows."
