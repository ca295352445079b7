"""The report as text: an answer first, good enough to paste into a mail; what opens each part is said beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.render.headline import headline
from kvmtrace.render.saved_because import saved_because
from kvmtrace.render.terminal import Style, escape
from kvmtrace.render.text import text_tables
from kvmtrace.render.text.bring_up_text import bring_up_line, bring_up_sections, replay_line, replay_sections
from kvmtrace.render.text.header_text import capture_line, counts_line, filter_line, is_lossy, loss_line
from kvmtrace.render.text.model_text import (
    limits_line,
    limits_section,
    rules_line,
    rules_sections,
    verdict_line,
    violation_sections,
)
from kvmtrace.render.text.nested_text import nested_sections
from kvmtrace.render.text.perf_text import render_perf_report
from kvmtrace.render.text.slowest_text import slowest_table
from kvmtrace.render.text.special_text import cost_table, more_line, special_lines

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

DETAIL_ROWS = 6  # of each attribution with --show details
VM_ROWS, REASON_ROWS, VCPU_ROWS, WAIT_ROWS, USERSPACE_ROWS, SLOW_ROWS = 8, 10, 8, 5, 4, 5
SHOW = ("details", "bring-up", "rules", "limits")


@dataclass(frozen=True)
class TextOptions:
    """How to print.

    Parameters
    ----------
    by : print only this table, all of it: a key of TABLES
    sort : column to sort by; None for the document's order
    perf : print perf's tables, in perf's layout
    limit : violations printed
    show : the parts told in full, of SHOW; the others have one line
    slowest : print only the slowest VM-exits, so many
    """

    by: str | None = None
    sort: str | None = None
    perf: bool = False
    limit: int = 10
    show: frozenset[str] = frozenset()
    slowest: int | None = None


def render_text(report: Report, options: TextOptions | None = None, style: Style | None = None) -> str:
    """Return the report as text, with a newline at the end."""
    options, style = options or TextOptions(), style or Style()
    if options.perf:
        return render_perf_report(report)
    lines = [style.title(f"kvmtrace report: {escape(report.capture.path)}"), ""]
    if options.slowest is not None:
        table = slowest_table(report, style, options.slowest)
        lines = [*header(report, style), "", *(table or ["  No VM-exit with a time in this recording."])]
    elif options.by:
        table = text_tables.TABLES[options.by](report, style, options.sort, None)
        lines = [*header(report, style), "", *(table or style.wrapped(nothing_of(options.by, report), "  "))]
    else:
        if report.triggers:
            lines += [*map(style.warn, style.wrapped(saved_because(report))), ""]
        lines += [*map(style.title, style.wrapped(headline(report))), ""]
        lines += violation_sections(report, style, options.limit)
        lines += [*facts(report, style), "", *_sections(report, options, style)]
    return "\n".join(lines).rstrip("\n") + "\n"


def nothing_of(by: str, report: Report) -> str:
    """Say why a table is empty: nothing of the kind happened, or nobody recorded it."""
    recorded = {name.rpartition(":")[2] for name in report.capture.events}
    words, events = text_tables.EVENTS_OF[by]
    missing = [event for event in events if event not in recorded]
    if recorded and len(missing) == len(events):
        return f"No {words}: {' and '.join(events)} {'was' if len(events) == 1 else 'were'} not recorded."
    return f"No {words} in this recording."


def header(report: Report, style: Style) -> list[str]:
    """Return a report's first lines where only a part of it is printed."""
    return [style.title(f"kvmtrace report: {escape(report.capture.path)}"), *facts(report, style)]


def facts(report: Report, style: Style) -> list[str]:
    """Return whether the model agrees, what was lost, and where the recording comes from."""
    capture = report.capture
    lines = verdict_line(report, style) + replay_line(report, style)
    loss = _labelled("Loss", loss_line(report), style)
    lines += [style.warn(line) for line in loss] if is_lossy(report) else loss
    for note in report.loss.notes if is_lossy(report) else ():
        lines += _labelled("Note", escape(note), style)
    kept = filter_line(capture.filters)
    lines += [style.warn(line) for line in _labelled("Filter", kept, style)] if kept else []
    if capture.vm:
        lines += _labelled("VM", f"only {escape(capture.vm)}", style)
    if capture.selection:
        lines += _labelled("Only", f"{escape(capture.selection)} (the model judges the whole recording)", style)
    lines += _labelled("Events", counts_line(report), style)
    return lines + _labelled("Capture", capture_line(capture), style)


def _labelled(label: str, text: str, style: Style) -> list[str]:
    return style.wrapped(text, f"  {label + ':':<9}", " " * 11)


def _sections(report: Report, options: TextOptions, style: Style) -> list[str]:
    """Return the tables that answer most questions, then a line for each part that is not shown."""
    rows = {"vm": VM_ROWS, "reason": REASON_ROWS, "vcpu": VCPU_ROWS, "waits": WAIT_ROWS, "userspace": USERSPACE_ROWS}
    sections = [
        text_tables.TABLES[name](report, style, options.sort if name == "reason" else None, limit)
        for name, limit in rows.items()
    ]
    sections += nested_sections(report, style)
    sections += [cost_table(report, style), slowest_table(report, style, SLOW_ROWS), special_lines(report, style)]
    if "details" in options.show:
        sections += [
            make(report, style, None, DETAIL_ROWS) for name, make in text_tables.TABLES.items() if name not in rows
        ]
    lines = [line for section in sections if section for line in [*section, ""]]
    lines += replay_sections(report, style)
    if "bring-up" in options.show:
        lines += bring_up_sections(report, style)
    if "rules" in options.show:
        lines += rules_sections(report, style)
    if "limits" in options.show:
        lines += limits_section(report, style)
    return lines + _closed(report, options, style)


def _closed(report: Report, options: TextOptions, style: Style) -> list[str]:
    """Return one line for each part that is not shown, with the option that opens it."""
    made = {
        "details": more_line(report),
        "bring-up": bring_up_line(report),
        "rules": rules_line(report),
        "limits": limits_line(report),
    }
    lines = []
    for name in SHOW:
        if made[name] and name not in options.show:
            lines += style.wrapped(f"{made[name]}  (--show {name})", "  ", "    ")
    return lines
