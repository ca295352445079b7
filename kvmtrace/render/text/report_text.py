"""The report as text: good enough to paste into a mail, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmtrace.render.terminal import WIDTH, Style, count, duration, escape, percent, plural
from kvmtrace.render.text import text_tables
from kvmtrace.render.text.bring_up_text import bring_up_sections, replay_line, replay_sections
from kvmtrace.render.text.model_text import model_sections, verdict_line
from kvmtrace.render.text.perf_text import render_perf_tables

if TYPE_CHECKING:
    from kvmtrace.report.document import CaptureInfo, Report
    from kvmtrace.stats.rows import ExitRow

SHORT_ROWS = 6  # of each attribution, unless it is asked for with --by
REASON_ROWS = 20


@dataclass(frozen=True)
class TextOptions:
    """How to print.

    Parameters
    ----------
    by : print only this table, all of it: a key of TABLES
    sort : column to sort by; None for the document's order
    perf : print perf's tables, in perf's layout
    limit : violations printed
    """

    by: str | None = None
    sort: str | None = None
    perf: bool = False
    limit: int = 10
    width: int = WIDTH


def render_text(report: Report, options: TextOptions | None = None, style: Style | None = None) -> str:
    """Return the report as text, with a newline at the end."""
    options, style = options or TextOptions(), style or Style()
    if options.perf:
        return render_perf_tables(report.perf_compatible, report.capture.selection or "all VMs, all VCPUs")
    lines = [*header(report, style), ""]
    if options.by:
        lines += text_tables.TABLES[options.by](report, style, options.sort, None)
    else:
        lines += _sections(report, options, style)
    return "\n".join(lines).rstrip("\n") + "\n"


def header(report: Report, style: Style) -> list[str]:
    """Return the first lines: what this is, what was lost, whether the model agrees, what dominates."""
    capture = report.capture
    lines = [style.title(f"kvmtrace report: {escape(capture.path)}"), *_wrapped("Capture", capture_line(capture))]
    lines += _wrapped("Events", _counts_line(report))
    if capture.selection:
        lines += _wrapped("Only", f"{escape(capture.selection)} (the model is compared with the whole recording)")
    loss = _wrapped("Loss", loss_line(report))
    lines += [style.warn(line) for line in loss] if is_lossy(report) else loss
    for note in report.loss.notes if is_lossy(report) else ():
        lines += _wrapped("Note", escape(note))
    kept = filter_line(capture.filters)
    lines += [style.warn(line) for line in _wrapped("Filter", kept)] if kept else []
    lines += verdict_line(report, style) + replay_line(report, style)
    summary = textwrap.wrap(summary_line(report), WIDTH, break_on_hyphens=False)
    return [*lines, "", *map(style.title, summary)]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {label + ':':<9}", subsequent_indent=" " * 11, break_on_hyphens=False
    )


def capture_line(capture: CaptureInfo) -> str:
    """Return where and how it was recorded."""
    recorder = capture.format + (f" by kvmtrace ({escape(capture.backend)})" if capture.backend else "")
    words = [
        f"Linux {escape(capture.kernel)}" if capture.kernel else "",
        f"on {escape(capture.host)}" if capture.host else "",
        f"({escape(capture.cpu_model)})" if capture.cpu_model else "",
    ]
    tail = [
        escape(capture.isa).upper() if capture.isa else "",
        plural(capture.n_cpus, "CPU") if capture.n_cpus else "",
        f"clock {escape(capture.clock)}" if capture.clock else "",
    ]
    cost = capture.tracer_cost_ns_per_event
    tail.append(f"tracing cost {duration(cost)} per event" if cost is not None else "")
    return ", ".join(part for part in [recorder, " ".join(word for word in words if word), *tail] if part)


def _counts_line(report: Report) -> str:
    exits = sum(row.count for row in report.exits)
    userspace = sum(row.count for row in report.userspace_exits)
    parts = [
        f"{plural(report.capture.n_events, 'event')} in {duration(report.capture.duration_ns)}",
        plural(len(report.vcpus), "vCPU"),
        plural(exits, "VM-exit"),
        plural(userspace, "userspace exit"),
    ]
    return ", ".join(parts)


ENDED_EARLY = {
    "killed": "the recorder was killed: what came last may be missing",
    "disk full": "the disk was full: what came last is missing",
}


def is_lossy(report: Report) -> bool:
    """Say whether events are missing, as far as anybody knows."""
    loss = report.loss
    return loss.events != 0 or loss.truncated or bool(loss.damage) or loss.ended_by in ENDED_EARLY


VM_EXIT_FILTERS = ("vcpu", "exit_reason", "sample", "slower_than_ns")


def filter_line(filters: object) -> str:
    """Say which VM-exits the recorder left out on purpose, and what that does to the figures; "" for none."""
    if not isinstance(filters, dict):
        return ""
    kept = [escape(str(filters[name])) for name in ("thread", *VM_EXIT_FILTERS) if name in filters]
    if not kept or not filters.keys() & set(VM_EXIT_FILTERS):
        return "; ".join(kept)
    return "; ".join(kept) + ". Counts, shares and guest time are of what was kept, not of all that the guest did"


def loss_line(report: Report) -> str:
    """Say what was lost and what that means for the statistics."""
    loss = report.loss
    if not is_lossy(report):
        note = f"; {plural(loss.discarded_intervals, 'interval')} ran backwards" if loss.discarded_intervals else ""
        return f"none{note}"
    words = []
    if loss.events != 0:
        where = ", ".join(f"CPU {cpu}: {count(n) if n >= 0 else 'unknown'}" for cpu, n in loss.by_cpu.items())
        lost = "an unknown number of events" if loss.events is None else plural(loss.events, "event")
        words.append(f"{lost} lost" + (f" ({where})" if where else ""))
    if loss.ended_by in ENDED_EARLY:
        words.append(ENDED_EARLY[loss.ended_by])
    if loss.truncated:
        words.append("the file is truncated")
    words += [
        f"damage at offset {d.offset:#x}: expected {escape(d.expected)}, found {escape(d.found)}"
        for d in loss.damage[:3]
    ]
    if len(loss.damage) > 3:
        words.append(f"{len(loss.damage) - 3} more damaged places")
    if loss.discarded_intervals:
        words.append(f"{plural(loss.discarded_intervals, 'interval')} that may span a loss left out")
    return "; ".join(words)


def summary_line(report: Report) -> str:
    """Say in one sentence what dominates."""
    timed = [row for row in report.exits if row.total_ns]
    if timed:
        return _dominating_exit(report, timed)
    if report.userspace_exits:
        top = max(report.userspace_exits, key=lambda row: row.count)
        total = sum(row.count for row in report.userspace_exits)
        missing = "" if report.exits else " No kvm_entry/kvm_exit here, so no VM-exit times."
        return (
            f"{top.name} dominates the userspace exits: {count(top.count)} of {count(total)}, "
            f"{duration(top.mean_ns)} each in the VMM.{missing}"
        )
    return "No VM-exits and no userspace exits were recorded."


def _dominating_exit(report: Report, timed: list[ExitRow]) -> str:
    top = max(timed, key=lambda row: row.total_ns or 0)
    total_ns = sum(row.total_ns or 0 for row in timed)
    total = sum(row.count for row in report.exits)
    wall_ns = sum(row.wall_ns for row in report.vcpus)
    guest_ns = sum(row.budget.guest_ns or 0 for row in report.vcpus)
    where = max(
        (
            ("in the kernel", top.kernel_ns or 0),
            ("in the VMM", top.userspace_ns or 0),
            ("waiting", top.waiting_ns or 0),
        ),
        key=lambda pair: pair[1],
    )
    split = f", {percent(where[1], top.total_ns)} of it {where[0]}" if where[1] else ""
    guest = f" The guest ran {percent(guest_ns, wall_ns)} of the time." if wall_ns else ""
    if where[0] == "waiting":
        guest += _dominating_work(timed)
    return (
        f"{top.name} dominates: {percent(top.total_ns, total_ns)} of the time outside the guest "
        f"({duration(top.total_ns)} of {duration(total_ns)}) in {count(top.count)} of {count(total)} VM-exits, "
        f"p99 {duration(top.p99_ns)}{split}.{guest}"
    )


def _dominating_work(timed: list[ExitRow]) -> str:
    """Say what dominates once waiting is left out."""
    work = {row.name: (row.kernel_ns or 0) + (row.userspace_ns or 0) for row in timed}
    name, ns = max(work.items(), key=lambda pair: pair[1])
    return f" Waiting left out, {name} dominates: {percent(ns, sum(work.values()))} of {duration(sum(work.values()))}."


def _sections(report: Report, options: TextOptions, style: Style) -> list[str]:
    """Return all tables, the attributions cut short."""
    lines: list[str] = []
    for name, make in text_tables.TABLES.items():
        rows = {"reason": REASON_ROWS, "vcpu": REASON_ROWS, "userspace": REASON_ROWS}.get(name, SHORT_ROWS)
        section = make(report, style, options.sort if name == "reason" else None, rows)
        lines += [*section, ""] if section else []
    lines += bring_up_sections(report, style)
    return lines + replay_sections(report, style) + model_sections(report, style, options.limit)
