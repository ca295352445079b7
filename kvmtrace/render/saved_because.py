"""Why the flight recorder saved a recording, as a sentence: what a report says first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import count, duration, escape, plural

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import TriggerRow


def saved_because(report: Report) -> str:
    """Return the sentence; "" for recordings that nothing triggered."""
    if not report.triggers:
        return ""
    first, *others = report.triggers
    start = report.capture.start_ns
    before = (
        "" if start is None or not first.ts_ns > start else f", {duration(first.ts_ns - start)} after its beginning"
    )
    more = f"; {plural(len(others), 'more trigger')} followed" if others else ""
    if first.kind == "model" and report.model is not None and not report.model.n_violations:
        return "Saved because what was recorded right after it was kept (model)."
    return f"Saved because {_words(first)}{before}{more} ({escape(first.trigger)})."


def _words(row: TriggerRow) -> str:
    reason = escape(row.reason) if row.reason else ""
    whose = _whose(row)
    if row.kind == "slower-than":
        which = f"exit {count(row.number)}" if row.number is not None else "an exit"
        return f"{which}{f' ({reason})' if reason else ''}{whose} took {duration(row.dur_ns)}"
    if row.kind == "run-delay":
        return f"{whose.removeprefix(' of ') or 'a vCPU'} waited {duration(row.dur_ns)} for a CPU"
    if row.kind == "rate" and row.value is not None:
        return f"{reason or 'all'} exits{whose} were {count(round(row.value))} a second"
    if row.kind == "slo":
        return f"the quantile of {reason or 'all'} exits{whose} was {duration(row.value)}"
    if row.kind == "monitor":
        return (
            f"{whose.removeprefix(' of ') or 'a vCPU'} took a step that the model does not allow: {escape(row.detail)}"
        )
    return {
        "signal": "it was asked for by a signal",
        "command": f"a command ended, {escape(row.detail)}",
        "model": "it contradicts the reference model",
    }.get(row.kind, "a trigger fired")


def _whose(row: TriggerRow) -> str:
    vcpu = f"vCPU {row.vcpu_id}" if row.vcpu_id is not None else f"thread {row.tid}" if row.tid is not None else ""
    vm = escape(row.vm) if row.vm else ""
    return "".join(f" of {part}" for part in (vcpu, vm) if part)
