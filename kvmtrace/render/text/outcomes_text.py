"""The outcomes of many recordings as text: a line each, what is wrong in full, totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import Column, count, escape, plural, table
from kvmtrace.render.text.model_text import judged_percent, violation_sections
from kvmtrace.report.outcome import totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.render.terminal import Style
    from kvmtrace.report.outcome import Outcome

LONGEST_NAME = 52


def render_many(outcomes: Sequence[Outcome], style: Style, limit: int, *, quiet: bool = False) -> str:
    """Return what many checks came to.

    Parameters
    ----------
    limit : violations shown per recording
    quiet : only what is wrong or suspicious: "" if nothing is
    """
    lines: list[str] = []
    for outcome in outcomes:
        lines += _wrong(outcome, style, limit)
    if not quiet:
        lines += [*_overview(outcomes, style), "", *totals_line(outcomes, style)]
    elif any(outcome.failed for outcome in outcomes) and len(outcomes) > 1:
        lines += totals_line(outcomes, style)
    return "\n".join(lines).rstrip("\n") + "\n" if lines else ""


def _wrong(outcome: Outcome, style: Style, limit: int) -> list[str]:
    """Return the findings of a recording in full, [] if there are none."""
    if outcome.report is None or not outcome.findings:
        return []
    return [style.title(f"kvmtrace check: {escape(outcome.name)}"), *violation_sections(outcome.report, style, limit)]


def _overview(outcomes: Sequence[Outcome], style: Style) -> list[str]:
    models = [outcome.model for outcome in outcomes]
    judged = [
        "-" if model is None or model.judged_share is None else judged_percent(model.judged_share) for model in models
    ]
    columns = [
        Column("recording", [short_name(one.name) for one in outcomes], left=True),
        Column("verdict", [_verdict(one) for one in outcomes], left=True, flexible=True, shortest=16),
        Column("suspicions", [count(one.n_suspicions) if one.model else "-" for one in outcomes]),
        Column("events", [count(model.n_events) if model else "-" for model in models], rank=2),
        Column("checks", [count(model.n_checks) if model else "-" for model in models], rank=1),
        Column("judged", judged),
    ]
    return [style.title("Recordings"), *table(columns, style)]


def short_name(name: str) -> str:
    """Return a name whose end, which tells it from others, is kept."""
    shown = escape(name)
    return shown if len(shown) <= LONGEST_NAME else f"..{shown[2 - LONGEST_NAME :]}"


def _verdict(outcome: Outcome) -> str:
    if outcome.error:
        return f"ERROR: {escape(outcome.error)}"
    return outcome.verdict.upper() if outcome.n_violations else outcome.verdict


def totals_line(outcomes: Sequence[Outcome], style: Style) -> list[str]:
    """Say what all of it came to."""
    sums = totals(outcomes)
    parts = [
        f"{count(sums.passed)} conform",
        f"{count(sums.violating)} with {plural(sums.violations, 'violation')}" if sums.violating else "0 violate",
        f"{count(sums.skipped)} with nothing to check" if sums.skipped else "",
        f"{count(sums.errors)} without a verdict" if sums.errors else "",
        plural(sums.suspicions, "suspicion") if sums.suspicions else "",
    ]
    text = f"{plural(sums.all, 'recording')}: {', '.join(part for part in parts if part)}"
    paint = style.bad if sums.failed else style.good
    return [paint(line) for line in style.wrapped(text, "", "  ")]
