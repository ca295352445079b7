"""A violation in plain text, as logs and CI systems show it: no colours, no width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import escape
from kvmtrace.render.text.event_fields import describe_fields
from kvmtrace.render.text.model_text import explain_command

if TYPE_CHECKING:
    from kvmtrace.check.verdict import ContextEvent, Violation

SHOWN_FIELDS = 6


def finding_line(finding: Violation) -> str:
    """Return a finding as one line: rule, what was expected, what was observed."""
    return escape(f"{finding.rule} {finding.severity}: expected {finding.expected}; observed {finding.observed}")


def finding_place(finding: Violation) -> str:
    """Say where in the recording a finding is."""
    vcpu = "?" if finding.vcpu_id is None else finding.vcpu_id
    return (
        f"event {finding.event_index} ({escape(finding.event)}) at {finding.ts_ns / 1e9:.9f} s, vCPU {vcpu}, "
        f"thread {finding.tid}, CPU {finding.cpu}"
    )


def context_line(event: ContextEvent) -> str:
    """Return an event with its fields as one line."""
    return f"{escape(event.event)} {', '.join(describe_fields(event.event, event.fields, SHOWN_FIELDS))}".rstrip()


def finding_paragraph(finding: Violation, recording: str | None) -> str:
    """Return a finding with its place, its reason, and the events around it.

    Parameters
    ----------
    recording : where the recording is, for the command that explains it; None if nowhere
    """
    lines = [
        finding_line(finding),
        f"at: {finding_place(finding)}",
        f"why: {escape(finding.why)}",
        f"source: {escape(finding.source)}",
    ]
    command = explain_command(finding, recording) if recording else ""
    lines += [f"led to: {escape(command)}"] if command else []
    for event in finding.context:
        mark = ">" if event.event_index == finding.event_index else " "
        lines.append(f"{mark} {(event.ts_ns - finding.ts_ns) / 1000:+.3f} us [{event.cpu:03d}] {context_line(event)}")
    return "\n".join(lines)
