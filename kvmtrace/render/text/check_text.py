"""`kvmtrace check` as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import escape
from kvmtrace.render.text.header_text import is_lossy, loss_line
from kvmtrace.render.text.model_text import model_sections, unchecked_lines, verdict_line

if TYPE_CHECKING:
    from kvmtrace.render.terminal import Style
    from kvmtrace.report.document import Report


def render_check(report: Report, style: Style, limit: int) -> str:
    """Return the verdict, the violations with the first divergence on top, rules and coverage."""
    lines = [style.title(f"kvmtrace check: {escape(report.capture.path)}"), *verdict_line(report, style)]
    lines += unchecked_lines(report, style)
    if report.capture.vm:
        lines.append(f"  VM:      only {escape(report.capture.vm)}")
    if is_lossy(report):
        lines.append(style.warn(f"  Loss:    {loss_line(report)}"))
    return "\n".join([*lines, "", *model_sections(report, style, limit)]).rstrip("\n") + "\n"
