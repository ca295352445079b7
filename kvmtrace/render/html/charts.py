"""Charts of the HTML report as inline SVG: no library, no script, colours from the style sheet."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from kvmtrace.render.terminal import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.over_time import Lane, Timeline

WIDTH, HEIGHT = 560, 170
WIDE = 1140  # the page's full width
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 10, 24
LABEL_ROOM = 60  # between two labels of an axis
CSS_CLASS = {"unknown": "unknown-part", "VMM": "vmm"}


def part_colour(part: str) -> str:
    """Return the style sheet's variable with a part's colour."""
    return f"--{part.lower()}"


def part_class(part: str) -> str:
    """Return the style class of a part of the budget."""
    return CSS_CLASS.get(part, part)


def _svg(body: str, title: str, height: int = HEIGHT, width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _x_axis(span_ns: float, height: int = HEIGHT, width: int = WIDTH) -> str:
    y = height - BOTTOM
    labels = "".join(
        f'<text x="{LEFT + (width - LEFT - RIGHT) * i / 4:.1f}" y="{height - 8}" '
        f'text-anchor="{("start", "middle", "middle", "middle", "end")[i]}">'
        f"{duration(round(span_ns * i / 4)) if i else 0}</text>"
        for i in range(5)
    )
    return f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>{labels}'


def _y_label(y: float, text: str, width: int = WIDTH) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _polyline(values: Sequence[float | None], colour: str, dash: str = "") -> str:
    """Draw y positions over evenly spaced x; None interrupts the line."""
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    runs: list[list[str]] = [[]]
    for i, y in enumerate(values):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(f"{LEFT + (i + 0.5) * step:.1f},{y:.1f}")
    style = f'stroke="var(--{colour})"' + (f' stroke-dasharray="{dash}"' if dash else "")
    lines = "".join(
        f'<polyline points="{" ".join(run)}" fill="none" {style} stroke-width="1.6"/>' for run in runs if len(run) > 1
    )
    dots = "".join(
        f'<circle cx="{run[0].split(",")[0]}" cy="{run[0].split(",")[1]}" r="1.6" fill="var(--{colour})"/>'
        for run in runs
        if len(run) == 1
    )
    return lines + dots


def rate_chart(counts: Sequence[int], bin_ns: int, title: str) -> str:
    """Draw events per second over time."""
    rates = [count * 1e9 / max(bin_ns, 1) for count in counts]
    high = max([*rates, 1e-9])
    base = HEIGHT - BOTTOM
    ys = [base - (base - TOP) * rate / high for rate in rates]
    labels = "".join(_y_label(base - (base - TOP) * share, _short(high * share)) for share in (0.5, 1.0))
    return _svg(
        labels + _x_axis(bin_ns * len(counts)) + _polyline(ys, "kernel"), f"{title}: at most {_short(high)} per second"
    )


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def latency_chart(timeline: Timeline) -> str:
    """Draw median, 99th percentile and maximum of exit→entry times over time, on a logarithmic scale."""
    latency = timeline.latency
    values = [value for value in (*latency.p50_ns, *latency.max_ns) if value > 0]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)
    base = HEIGHT - BOTTOM

    def y(value: int) -> float | None:
        return None if value <= 0 else base - (base - TOP) * (math.log10(value) - low) / (high - low)

    labels = "".join(
        _y_label(base - (base - TOP) * (power - low) / (high - low), duration(10**power))
        for power in range(low, high + 1)
    )
    lines = (
        _polyline([y(v) for v in latency.max_ns], "preempted", "2 3")
        + _polyline([y(v) for v in latency.p99_ns], "vmm")
        + _polyline([y(v) for v in latency.p50_ns], "kernel")
    )
    title = "VM-exit to VM-entry over time: median, 99th percentile, maximum"
    return _svg(labels + _x_axis(timeline.bin_ns * len(latency.p50_ns)) + lines, title)


def overview_chart(lane: Lane, bin_ns: float) -> str:
    """Draw what a vCPU did over time as stacked columns, each column one time bin."""
    height, n_bins = 96, len(lane.share[0])
    base = height - BOTTOM
    step = (WIDE - LEFT - RIGHT) / n_bins
    rects = []
    for i in range(n_bins):
        y = float(base)
        for part, share in zip(lane.parts, lane.share, strict=True):
            tall = (base - TOP) * share[i] / max(bin_ns, 1)
            if tall >= 0.05:
                y -= tall
                rects.append(
                    f'<rect class="{part_class(part)}" x="{LEFT + i * step:.1f}" y="{y:.1f}" '
                    f'width="{step + 0.2:.1f}" height="{tall:.1f}"/>'
                )
    labels = _y_label(TOP, "100 %", WIDE) + _y_label((base + TOP) / 2, "50 %", WIDE)
    return _svg(
        labels + "".join(rects) + _x_axis(bin_ns * n_bins, height, WIDE),
        f"What {lane.label} did over time",
        height,
        WIDE,
    )


def histogram_chart(histogram: Sequence[tuple[int, int]], title: str) -> str:
    """Draw a histogram on a logarithmic axis: (lower bound ns, samples) of each eighth of an octave."""
    if not histogram:
        return ""
    height, high = 120, max(n for _, n in histogram)
    base = height - BOTTOM
    low, top_ns = max(histogram[0][0], 1), _upper(histogram[-1][0])
    span = max(math.log2(top_ns) - math.log2(low), 0.5)

    def x(ns: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(max(ns, 1)) - math.log2(low)) / span

    bars = "".join(
        f'<rect class="kernel" x="{x(ns) + 0.3:.1f}" y="{base - (base - TOP) * n / high:.1f}" '
        f'width="{max(x(_upper(ns)) - x(ns) - 0.6, 0.8):.1f}" height="{max((base - TOP) * n / high, 0.7):.1f}">'
        f"<title>{n:,} from {duration(ns)} to {duration(_upper(ns))}</title></rect>"
        for ns, n in histogram
    )
    labels, free = "", -1e9
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(top_ns)) + 1):
        at = x(2**power)
        if at - free > LABEL_ROOM and at < WIDTH - RIGHT - LABEL_ROOM / 2:
            labels += f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{duration(2**power)}</text>'
            free = at
    axis = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    return _svg(_y_label(TOP, f"{high:,}") + bars + axis + labels, title, height)


def _upper(ns: int) -> int:
    """Return where the bar that begins at `ns` ends."""
    return ns + 1 if ns < 16 else ns + (1 << (ns.bit_length() - 4))
