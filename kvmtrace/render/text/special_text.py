"""What is special in a recording: where the time went whatever the reason, and what should not happen often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.accesses import call_number, named
from kvmtrace.render.terminal import WIDTH, Column, Style, count, duration, escape, plural, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.report.document import Report

COST_ROWS = 6
# list of Detail -> the --by that shows all of it, "" for none
BY = {
    "ports": "port", "gpas": "gpa", "msrs": "msr", "crs": "cr", "sysregs": "sysreg", "rips": "rip", "hypercalls": "",
    "emulated": "",
}  # fmt: skip


def cost_table(report: Report, style: Style) -> list[str]:
    """Return what took the most time of all attributions, in one table."""
    rows = sorted((row for row in _costs(report) if row[2]), key=lambda row: -row[2])[:COST_ROWS]
    if not rows:
        return []
    columns = [
        Column("access", [words for words, _, _ in rows], left=True, flexible=True),
        Column("count", [count(n) for _, n, _ in rows]),
        Column("time", [duration(ns) for _, _, ns in rows]),
        Column("each", [duration(ns / n) for _, n, ns in rows]),
    ]
    note = "  (of the VM-exits that these accesses caused)" if style.width >= WIDTH else ""
    return [style.title("What took the time") + style.faint(note), *table(columns, style)]


def _costs(report: Report) -> Iterator[tuple[str, int, int]]:
    """Yield (words, count, ns) of every access."""
    detail = report.detail
    for port in detail.ports:
        name = escape(port.name) if port.name else ""
        yield f"{port.direction} {named(port.port, name)}", port.count, port.total_ns or 0
    for msr in detail.msrs:
        verb = "wrmsr" if msr.direction == "write" else "rdmsr"
        yield f"{verb} {named(msr.msr, msr.name)}", msr.count, msr.total_ns or 0
    for gpa in detail.gpas:
        yield f"{gpa.kind} {gpa.gpa:#x}", gpa.count, gpa.total_ns or 0
    for cr in detail.crs:
        yield f"{cr.direction} cr{cr.cr}", cr.count, cr.total_ns or 0
    for register in detail.sysregs:
        yield f"{register.direction} {register.name}", register.count, register.total_ns or 0
    for call in detail.hypercalls:
        yield call.name or f"hypercall {call_number(call)}", call.count, call.total_ns or 0


def special_lines(report: Report, style: Style) -> list[str]:
    """Return what a reader should know and would not look for."""
    lines = [line for words in _special(report) for line in style.wrapped(words, "  - ", "    ")]
    return [style.title("Special"), *lines] if lines else []


def _special(report: Report) -> list[str]:
    detail, found = report.detail, []
    failed = sum(row.failed for row in detail.emulated)
    if failed:
        found.append(f"{plural(failed, 'instruction')} could not be emulated")
    faults = sum(row.faults for row in detail.msrs)
    if faults:
        worst = max(detail.msrs, key=lambda row: row.faults)
        where = named(worst.msr, worst.name)
        found.append(f"{count(faults)} of the accesses to MSRs ended in #GP, most of them to {where}")
    again = sum(row.reinjected or 0 for row in detail.interrupts)
    if again:
        found.append(f"{plural(again, 'injection')} had to be repeated: a VM-exit interrupted the delivery")
    bad = [row for row in report.userspace_exits if row.errno and row.errno not in {-4, -11}]
    found += [f"KVM_RUN failed {count(row.count)} times: {row.name}" for row in bad]
    moved = sum(row.migrations for row in report.vcpus)
    if moved:
        found.append(f"{plural(moved, 'migration')} of vCPU threads between host CPUs")
    starved = [row for row in report.vcpus if (row.budget.preempted_ns or 0) > row.wall_ns // 10]
    found += [f"vCPU {_id(row.vcpu_id)} waited {duration(row.budget.preempted_ns)} for a CPU" for row in starved[:4]]
    return found


def _id(vcpu_id: int | None) -> str:
    return "?" if vcpu_id is None else str(vcpu_id)


def more_line(report: Report) -> str:
    """Name the attributions, and how many rows each has; "" if there is none."""
    detail = report.detail
    rows = {name: detail.distinct.get(name, len(getattr(detail, name))) for name in BY}
    by = [f"{BY[name]} ({count(n)})" for name, n in rows.items() if n and BY[name]]
    return f"All rows with --by: {', '.join(by)}" if by else ""
