"""`kvmtrace suite` as text: a line per test with its own result beside the model's verdict, then totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.results.finding_text import finding_line
from kvmtrace.render.terminal import escape, plural
from kvmtrace.render.text.outcomes_text import short_name
from kvmtrace.report.outcome import totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.render.terminal import Style
    from kvmtrace.report.outcome import Outcome

NAME_WIDTH = 36
SHOWN_FINDINGS = 3
INDENT = "           "


def suite_head(style: Style) -> str:
    """Return the columns' headings."""
    return style.title(f"{'':<10} {'test':<{NAME_WIDTH}} {'time':>8}  the test itself / the model") + "\n"


def test_lines(outcome: Outcome, style: Style) -> str:
    """Return a test's line, and what is wrong below it."""
    own = outcome.own
    word = _word(outcome)
    paint = style.bad if outcome.failed else style.warn if outcome.n_suspicions or outcome.skipped else style.good
    seconds = f"{own.seconds:7.1f}s" if own and own.seconds else f"{'-':>8}"
    said = f"{own.status}" + (f", {escape(own.words)}" if own.status != "pass" else "") if own else "not run"
    verdict = "" if outcome.model is None and not outcome.error else f" / {_verdict(outcome)}"
    lines = [f"{paint(f'{word:<10}')} {short_name(outcome.name):<{NAME_WIDTH}} {seconds}  {said}{verdict}"]
    for finding in outcome.findings[:SHOWN_FINDINGS]:
        lines += style.wrapped(finding_line(finding), INDENT, INDENT + "  ")
    if len(outcome.findings) > SHOWN_FINDINGS:
        lines.append(f"{INDENT}... {len(outcome.findings) - SHOWN_FINDINGS:,} more")
    if outcome.recording:
        lines.append(f"{INDENT}recording: {escape(outcome.recording)}")
    if own is not None and own.log and outcome.own_failed:
        lines.append(f"{INDENT}printed:   {escape(own.log)}")
        lines += [f"{INDENT}| {escape(line)}" for line in own.last_words.splitlines()[-3:]]
    return "\n".join(lines) + "\n"


def _word(outcome: Outcome) -> str:
    if outcome.n_violations:
        return "VIOLATION"
    if outcome.error:
        return "ERROR"
    if outcome.own_failed and outcome.own:
        return outcome.own.status.upper()
    return "skipped" if outcome.skipped else "suspicion" if outcome.n_suspicions else "ok"


def _verdict(outcome: Outcome) -> str:
    suspicions = f", {plural(outcome.n_suspicions, 'suspicion')}" if outcome.n_suspicions else ""
    return escape(outcome.verdict) + suspicions


def suite_totals(outcomes: Sequence[Outcome], planned: int, style: Style) -> str:
    """Say what the whole suite came to.

    Parameters
    ----------
    planned : how many tests there are; fewer outcomes if somebody interrupted
    """
    sums = totals(outcomes)
    parts = [
        f"{sums.passed:,} ok",
        f"{sums.own_failed:,} failed by their own word" if sums.own_failed else "",
        f"{sums.violating:,} with {plural(sums.violations, 'violation')}" if sums.violating else "no violation",
        f"{sums.errors:,} without a verdict" if sums.errors else "",
        f"{sums.skipped:,} skipped" if sums.skipped else "",
        plural(sums.suspicions, "suspicion") if sums.suspicions else "",
        f"{planned - sums.all:,} not run" if planned > sums.all else "",
    ]
    text = f"{plural(sums.all, 'test')}: {', '.join(part for part in parts if part)}"
    paint = style.bad if sums.failed or planned > sums.all else style.good
    return "\n".join(paint(line) for line in style.wrapped(text, "", "  ")) + "\n"
