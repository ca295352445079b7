"""The outcomes of many recordings or tests, as CI systems read them: TAP 14, JUnit XML, SARIF 2.1.0."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.outcome import Outcome

FORMATS = ("tap", "junit", "sarif")


def render_outcomes(outcomes: Sequence[Outcome], output_format: str, suite: str) -> str:
    """Return outcomes as text of one of FORMATS.

    Parameters
    ----------
    suite : what they are the outcome of: "kvmtrace check", "kvmtrace suite"
    """
    if output_format == "tap":
        from kvmtrace.render.results.tap import render_tap

        return render_tap(outcomes)
    if output_format == "junit":
        from kvmtrace.render.results.junit import render_junit

        return render_junit(outcomes, suite)
    from kvmtrace.render.results.sarif import render_sarif

    return render_sarif(outcomes)
