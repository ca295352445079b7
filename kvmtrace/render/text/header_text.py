"""What the report says first of a recording: where it comes from, how much it holds, what it lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import count, duration, escape, plural

if TYPE_CHECKING:
    from kvmtrace.report.document import CaptureInfo, Report


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


def counts_line(report: Report) -> str:
    """Say how much there is of what."""
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
    missing = loss.events != 0 or loss.truncated or bool(loss.damage) or loss.ended_by in ENDED_EARLY
    return missing or bool(loss.not_understood)


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
        if loss.repeated:
            note += f"; {plural(loss.repeated, 'event')} recorded twice and counted once"
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
    if loss.not_understood:
        which = ", ".join(f"{count(n)} of {escape(event)}" for event, n in sorted(loss.not_understood.items()))
        words.append(f"lines not understood: {which}")
    if loss.repeated:
        words.append(f"{plural(loss.repeated, 'event')} recorded twice and counted once")
    if loss.discarded_intervals:
        words.append(f"{plural(loss.discarded_intervals, 'interval')} that may span a loss left out")
    return "; ".join(words)
