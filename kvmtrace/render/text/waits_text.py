"""Who had the CPU while vCPUs waited for one, as a table, and the wake-ups beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import Column, Style, count, duration, escape, percent, plural, titled

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import StolenRow

MATTERS = 0.02  # of the vCPUs' time: below, the table is not shown by itself
LOUD = 0.1  # from here on the first sentence says it
KINDS = {
    "vcpu": "another VM",
    "own vcpu": "its own vCPUs",
    "vmm": "VMM threads",
    "vhost": "vhost",
    "kernel": "kernel thread",
    "process": "process",
    "idle": "",
    "unknown": "",
}


OWN = ("own vcpu", "vmm")  # that a VM has more threads than CPUs is its own affair, and the budget says it


def share_stolen(report: Report) -> float:
    """Return which part of the vCPUs' time others than their own VM's threads had the CPU that they waited for."""
    wall_ns = sum(row.wall_ns for row in report.vcpus)
    others = sum(row.total_ns for row in report.stolen if row.kind not in OWN)
    return others / wall_ns if wall_ns else 0.0


def waits_table(report: Report, style: Style, _sort: str | None, limit: int | None) -> list[str]:
    """Return who ran while vCPUs waited; nothing if others hardly did, but for `--by waits`."""
    if not report.stolen or (limit is not None and share_stolen(report) < MATTERS):
        return []
    rows = report.stolen[:limit]
    all_ns = sum(row.total_ns for row in report.stolen)
    several = len({row.pid for row in report.stolen}) > 1
    columns = [
        *([Column("VM that waited", [_victim(row) for row in rows], left=True, flexible=True, shortest=12)]
          if several else []),
        Column("who ran", [escape(row.who) for row in rows], left=True, flexible=True, shortest=16),
        Column("kind", [KINDS.get(row.kind, row.kind) for row in rows], left=True, rank=1),
        Column("time", [duration(row.total_ns) for row in rows]),
        Column("time%", [percent(row.total_ns, all_ns) for row in rows]),
        Column("times", [count(row.count) for row in rows], rank=2),
        Column("longest", [duration(row.longest_ns) for row in rows]),
    ]  # fmt: skip
    left_out = len(report.stolen) - len(rows)
    note = "(preempted, or woken and not on a CPU yet)"
    lines = titled("Who had the CPU while vCPUs waited for one", note, columns, style)
    lines += [style.faint(f"  ... {count(left_out)} more (--by waits)")] if left_out else []
    return lines + _wake_ups(report, style, limit)


def _victim(row: StolenRow) -> str:
    return escape(row.vm) if row.vm else "?" if row.pid is None else str(row.pid)


def _wake_ups(report: Report, style: Style, limit: int | None) -> list[str]:
    lines = []
    for row in report.wake_ups[:limit]:
        whose = f" of {escape(row.vm)}" if row.vm else f" of process {row.pid}" if len(report.wake_ups) > 1 else ""
        text = (
            f"{plural(row.count, 'wake-up')} of sleeping vCPUs{whose}, from the interrupt's acceptance to guest mode: "
            f"p50 {duration(row.p50_ns)}, p99 {duration(row.p99_ns)}, max {duration(row.max_ns)}; "
            f"{percent(row.to_cpu_ns, row.total_ns)} of it until they had a CPU"
        )
        lines += style.wrapped(text, "  ", "    ")
    return lines


def waits_sentence(report: Report) -> str:
    """Say who had the vCPUs' time, where that is much of it; "" where not."""
    share = share_stolen(report)
    others = [row for row in report.stolen if row.kind not in OWN]
    if share < LOUD or not others:
        return ""
    top = max(others, key=lambda row: row.total_ns)
    all_ns = sum(row.total_ns for row in others)
    who = {"unknown": "nobody recorded who ran", "idle": "the CPU was idle"}
    ran = who.get(top.kind) or f"{escape(top.who)} ran"
    return (
        f" vCPUs waited {duration(all_ns)} for a CPU that others had ({share:.0%} of their time); during "
        f"{percent(top.total_ns, all_ns)} of it {ran}."
    )
