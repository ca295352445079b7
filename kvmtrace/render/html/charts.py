"""The charts of the HTML pages as data for uPlot (charts.js): zoom, hover, a legend, colours from the style sheet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvmtrace.render.terminal import duration, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.over_time import Timeline
    from kvmtrace.stats.rows import Rate

CSS_CLASS = {"unknown": "unknown-part", "VMM": "vmm"}
PER_OCTAVE = 8  # bars of a histogram
Chart = dict[str, Any]


def part_colour(part: str) -> str:
    """Return the style sheet's variable with a part's colour."""
    return f"--{part.lower()}"


def part_class(part: str) -> str:
    """Return the style class of a part of the budget."""
    return CSS_CLASS.get(part, part)


def _series(
    label: str, colour: str, values: Sequence[float | None], *, dashed: bool = False, of: str = ""
) -> dict[str, Any]:
    """Return a line; `of` names what timeline_sample.js makes of a stretch in its place."""
    return {"label": escape(label), "colour": colour, "values": values, "dashed": dashed, "of": of}


def rate_chart(rate: Rate, start_ns: int, length_ns: int) -> Chart:
    """Return VM-exits and userspace exits per second over time."""
    wanted = (
        ("exits", "VM-exits", "--kernel", rate.exits),
        ("userspace", "userspace exits", "--vmm", rate.userspace_exits),
    )
    return {
        "title": "VM-exits and userspace exits per second",
        "kind": "time",
        "bin": rate.bin_ns,
        "unit": "per second",
        "log": False,
        "end": length_ns,
        "x": [rate.start_ns - start_ns + (i + 0.5) * rate.bin_ns for i in range(len(rate.exits))],
        "series": [
            _series(label, colour, [round(count * 1e9 / rate.bin_ns, 3) for count in counts], of=of)
            for of, label, colour, counts in wanted
            if any(counts)
        ],
    }


def latency_chart(timeline: Timeline) -> Chart | None:
    """Return median, 99th percentile and maximum of exit→entry times over time; None without any."""
    latency = timeline.latency
    if not any(latency.max_ns):
        return None

    def values(ns: Sequence[int]) -> list[int | None]:
        return [value or None for value in ns]

    return {
        "title": "VM-exit to VM-entry over time",
        "kind": "time",
        "bin": latency.bin_ns,
        "unit": "ns",
        "log": True,
        "end": timeline.length_ns,
        "x": [(i + 0.5) * latency.bin_ns for i in range(len(latency.max_ns))],
        "series": [
            _series("median", "--kernel", values(latency.p50_ns), of="p50"),
            _series("99th percentile", "--vmm", values(latency.p99_ns), of="p99"),
            _series("maximum", "--preempted", values(latency.max_ns), dashed=True, of="max"),
        ],
    }


def histogram_chart(histogram: Sequence[tuple[int, int]], title: str) -> Chart | None:
    """Return a histogram's bars, an eighth of an octave each; None without any.

    Parameters
    ----------
    histogram : (lower bound ns, samples) of each bar that is not empty
    """
    if not histogram:
        return None
    counts: dict[int, int] = {}
    for ns, n in histogram:
        at = round(math.log2(max(ns, 1)) * PER_OCTAVE)
        counts[at] = counts.get(at, 0) + n
    low, high = min(counts) - 2, max(counts) + 2
    return {
        "title": escape(title),
        "kind": "durations",
        "unit": "samples",
        "log": False,
        "bars": True,
        "x": [(at + 0.5) / PER_OCTAVE for at in range(low, high + 1)],
        "series": [_series("samples", "--kernel", [counts.get(at, 0) for at in range(low, high + 1)])],
    }


def histogram_title(name: str, samples: str, p50_ns: int | None, p99_ns: int | None) -> str:
    """Return the title of a reason's histogram."""
    return f"{name}: {samples}, p50 {duration(p50_ns)}, p99 {duration(p99_ns)}"
