"""Plots for notebooks: each takes a loaded recording and matplotlib Axes (or makes them) and returns the Axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from kvmtrace.render.terminal import duration
from kvmtrace.spans.shares_over_time import shares_over_time
from kvmtrace.spans.slices import PART_NAMES
from kvmtrace.spans.time_parts import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from kvmtrace.api import LoadedRecording
    from kvmtrace.spans.shares_over_time import TimeShares

# Okabe and Ito's palette, which people with colour-vision deficiencies can tell apart
COLOURS = {
    "guest": "#009e73",
    "switch": "#cc79a7",
    "kernel": "#0072b2",
    "VMM": "#e69f00",
    "blocked": "#c3c8ce",
    "poll": "#f0e442",
    "preempted": "#d55e00",
    "unknown": "#6b6b6b",
}
BUDGET = {
    "guest_ns": "guest",
    "entry_exit_ns": "switch",
    "handler_ns": "kernel",
    "userspace_ns": "VMM",
    "blocked_ns": "blocked",
    "halt_poll_ns": "poll",
    "preempted_ns": "preempted",
    "unknown_ns": "unknown",
}
PIECE_EVENTS = 1 << 18  # read at once
TOP = 8  # reasons shown where none are named


def _axes(ax: Axes | None, size: tuple[float, float] = (9, 3.6)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _time_axis(axis: object) -> None:
    axis.set_major_formatter(FuncFormatter(lambda ns, _: duration(ns) if ns else "0"))  # type: ignore[attr-defined]


def _top_reasons(rec: LoadedRecording, reasons: Sequence[str] | None) -> list[str]:
    if reasons is not None:
        return list(reasons)
    exits = rec.vm_exits
    spent = exits.groupby("name", observed=True)["dur_ns"].sum()
    return [str(name) for name in spent.sort_values(ascending=False).index[:TOP]]


def plot_budget(rec: LoadedRecording, ax: Axes | None = None) -> Axes:
    """Draw the time budget of each vCPU as a bar of 100 %."""
    vcpus = rec.vcpus
    ax = _axes(ax, (9, 1.2 + 0.45 * len(vcpus)))
    labels = [f"vCPU {'?' if row.vcpu_id is None else row.vcpu_id}" for row in rec.report().document.vcpus]
    left = np.zeros(len(vcpus))
    for field, part in BUDGET.items():
        share = vcpus[field].fillna(0).to_numpy(float) / vcpus["wall_ns"].to_numpy(float) * 100
        if share.any():
            ax.barh(labels, share, left=left, color=COLOURS[part], label=part)
        left += share
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of wall time")
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return ax


def plot_latency(rec: LoadedRecording, reasons: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the distribution of exit→entry times of some reasons as cumulative shares; the busiest by default."""
    ax = _axes(ax)
    exits = rec.vm_exits
    for name in _top_reasons(rec, reasons):
        values = np.sort(exits.loc[(exits["name"] == name) & exits["dur_ns"].notna(), "dur_ns"].to_numpy(np.int64))
        if len(values):
            ax.step(
                np.maximum(values, 1),
                np.arange(1, len(values) + 1) / len(values) * 100,
                where="post",
                label=f"{name} ({len(values):,})",
            )
    ax.set_xscale("log")
    _time_axis(ax.xaxis)
    ax.set_xlabel("VM-exit to VM-entry")
    ax.set_ylabel("% of VM-exits")
    ax.grid(visible=True, alpha=0.3)
    if ax.lines:
        ax.legend(frameon=False)
    return ax


def plot_exit_rate(
    rec: LoadedRecording, reasons: Sequence[str] | None = None, bins: int = 200, ax: Axes | None = None
) -> Axes:
    """Draw VM-exits per second over time, stacked by reason."""
    ax = _axes(ax)
    exits = rec.vm_exits
    if not len(exits):
        return ax
    start, stop = exits["ts_ns"].min(), exits["ts_ns"].max()
    edges = np.linspace(start, max(stop, start + 1), bins + 1)
    names = _top_reasons(rec, reasons)
    rates = [np.histogram(exits.loc[exits["name"] == name, "ts_ns"], edges)[0] / np.diff(edges) * 1e9 for name in names]
    ax.stackplot(edges[:-1] - start, rates, labels=names, step="post")
    _time_axis(ax.xaxis)
    ax.set_xlabel("time")
    ax.set_ylabel("VM-exits per second")
    ax.legend(frameon=False, fontsize="small", ncols=2)
    return ax


def plot_latency_over_time(rec: LoadedRecording, reasons: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw every exit→entry time at its time; at most 50,000 points, of which the slowest are all shown."""
    ax = _axes(ax)
    exits = rec.vm_exits
    exits = exits[exits["dur_ns"].notna()]
    start = exits["ts_ns"].min() if len(exits) else 0
    for name in _top_reasons(rec, reasons):
        own = exits[exits["name"] == name]
        if len(own) > 50_000 // TOP:
            slow = own.nlargest(1000, "dur_ns")
            own = own.iloc[:: len(own) // (50_000 // TOP) + 1]
            slow_ns = slow["dur_ns"].astype("int64")
            ax.plot(slow["ts_ns"] - start, slow_ns, ".", markersize=2.5, color="black", alpha=0.3)
        ax.plot(own["ts_ns"] - start, own["dur_ns"].astype("int64"), ".", markersize=3, label=name, alpha=0.6)
    ax.set_yscale("log")
    _time_axis(ax.xaxis)
    _time_axis(ax.yaxis)
    ax.set_xlabel("time")
    ax.set_ylabel("VM-exit to VM-entry")
    if ax.lines:
        ax.legend(frameon=False, fontsize="small", ncols=2, markerscale=3)
    return ax


def plot_timeline(
    rec: LoadedRecording, start_ns: int | None = None, stop_ns: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what each vCPU was doing from `start_ns` to `stop_ns` (trace clock); the whole recording by default.

    Up to 20,000 slices are drawn one by one; of more, the shares of each of 800 bins. The recording is read anew for
    each plot, in bounded memory.
    """
    capture = rec.report().document.capture
    first = capture.start_ns or 0
    start = first if start_ns is None else start_ns
    stop = first + (capture.duration_ns or 0) if stop_ns is None else stop_ns
    made = shares_over_time(rec.recording.iter_events(PIECE_EVENTS), start, stop)
    ax = _axes(ax, (9, 1.2 + 0.5 * max(len(made.tids), 1)))
    if not made.share.any():
        return ax
    (_draw_shares if made.slices is None else _draw_slices)(ax, made)
    labels = {
        row.tid: (f"{row.vm} " if row.vm else "") + f"vCPU {'?' if row.vcpu_id is None else row.vcpu_id}"
        for row in rec.report().document.vcpus
    }
    ax.set_yticks(range(len(made.tids)), [labels.get(tid, str(tid)) for tid in made.tids])
    ax.set_xlim(0, stop - start)
    ax.set_ylim(len(made.tids) - 0.5, -0.5)
    _time_axis(ax.xaxis)
    handles, names = ax.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return ax


def _draw_slices(ax: Axes, made: TimeShares) -> None:
    """Draw every slice."""
    assert made.slices is not None
    start = int(made.edges[0])
    for part in Part:
        for thread in range(len(made.tids)):
            own = made.slices[(made.slices[:, 0] == thread) & (made.slices[:, 1] == part)]
            if len(own):
                spans = [(begin - start, dur) for begin, dur in own[:, 2:].tolist()]
                name = PART_NAMES[part]
                ax.broken_barh(spans, (thread - 0.4, 0.8), facecolor=COLOURS[name], linewidth=0, label=name)


def _draw_shares(ax: Axes, made: TimeShares) -> None:
    """Draw the parts of each bin on top of each other."""
    edges = made.edges - made.edges[0]
    for thread in range(len(made.tids)):
        top = np.full(made.share.shape[2], thread + 0.4)
        for part in Part:
            share = made.share[thread, part]
            if share.any():
                bottom, name = top - 0.8 * share, PART_NAMES[part]
                low, high = np.append(bottom, bottom[-1]), np.append(top, top[-1])
                ax.fill_between(edges, low, high, step="post", color=COLOURS[name], linewidth=0, label=name)
                top = bottom


def plot_around_exit(rec: LoadedRecording, row: int, span_ns: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the timeline around one VM-exit, by its index in `rec.vm_exits`."""
    one = rec.vm_exits.loc[row]
    lasted = 0 if pd.isna(one["dur_ns"]) else int(one["dur_ns"])
    span = span_ns or max(3 * lasted, 20_000)
    centre = int(one["ts_ns"]) + lasted // 2
    ax = plot_timeline(rec, centre - span // 2, centre + span // 2, ax)
    ax.axvline(int(one["ts_ns"]) - (centre - span // 2), color="black", linewidth=0.8)
    return ax
