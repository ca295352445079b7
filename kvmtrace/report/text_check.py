"""`kvmtrace check` as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.report.terminal import escape
from kvmtrace.report.text import is_lossy, loss_line
from kvmtrace.report.text_model import model_sections, verdict_line

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.report.terminal import Style


def render_check(report: Report, style: Style, limit: int) -> str:
    """Return the verdict, the violations with the first divergence on top, rules and coverage."""
    lines = [style.title(f"kvmtrace check: {escape(report.capture.path)}"), *verdict_line(report, style)]
    if is_lossy(report):
        lines.append(style.warn(f"  Loss:    {loss_line(report)}"))
    return "\n".join([*lines, "", *model_sections(report, style, limit)]).rstrip("\n") + "\n"
