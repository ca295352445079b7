"""TAP 14 (Test Anything Protocol): a line per recording or test, and YAML with what was found.

Source: testanything.org, "TAP 14 specification".
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvmtrace.render.results.finding_text import finding_line, finding_place
from kvmtrace.render.terminal import escape

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmtrace.report.outcome import Outcome


def render_tap(outcomes: Sequence[Outcome]) -> str:
    """Return a whole TAP document."""
    return tap_head(len(outcomes)) + "".join(tap_point(number, one) for number, one in enumerate(outcomes, 1))


def tap_head(count: int) -> str:
    """Return the version and the plan."""
    return f"TAP version 14\n1..{count}\n"


def tap_point(number: int, outcome: Outcome) -> str:
    """Return the test point of one outcome, its diagnostics with it."""
    said = "not ok" if outcome.failed else "ok"
    skip = f" # SKIP {_plain(_why_skipped(outcome))}" if outcome.skipped else ""
    lines = [f"{said} {number} - {_description(outcome.name)}{skip}", "  ---"]
    lines += [f"  {line}" for line in _yaml(_diagnostics(outcome))]
    return "\n".join([*lines, "  ...", ""])


def _why_skipped(outcome: Outcome) -> str:
    return outcome.verdict if outcome.own is None else outcome.own.words


def _plain(text: str) -> str:
    return escape(text)


def _description(text: str) -> str:
    """Return a description in which `#` begins no directive."""
    return escape(text).replace("\\", "\\\\").replace("#", "\\#")


def _diagnostics(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": outcome.verdict}
    model = outcome.model
    if model is not None:
        found |= {"violations": model.n_violations, "suspicions": model.n_suspicions, "checks": model.n_checks}
        found |= {} if model.judged_share is None else {"judged_share": round(model.judged_share, 4)}
    if outcome.own is not None:
        found |= {"test": outcome.own.status, "test_said": outcome.own.words, "seconds": round(outcome.own.seconds, 3)}
        found |= {"log": outcome.own.log} if outcome.own.log else {}
    if outcome.recording:
        found["recording"] = outcome.recording
    if outcome.findings:
        found["findings"] = [
            {
                "message": finding_line(one),
                "severity": one.severity,
                "rule": one.rule,
                "at": finding_place(one),
                "why": one.why,
                "source": one.source,
            }
            for one in outcome.findings
        ]
    return found


def _yaml(values: dict[str, Any]) -> list[str]:
    """Return a mapping as lines of YAML; scalars are JSON's, which YAML 1.2 reads as they are."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines.append(f"{key}:")
            for one in value:
                inner = _yaml(one)
                lines += [f"  - {inner[0]}", *(f"    {line}" for line in inner[1:])]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines
