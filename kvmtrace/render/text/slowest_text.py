"""The slowest VM-exits as a table: each with the number that `--explain` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.accesses import describe_access
from kvmtrace.render.terminal import Column, Style, duration, table
from kvmtrace.render.text.text_tables import preempted_column, vm_column

if TYPE_CHECKING:
    from kvmtrace.report.document import Report


def slowest_table(report: Report, style: Style, limit: int) -> list[str]:
    """Return the slowest VM-exits; nothing if none has a time."""
    rows = report.slowest[:limit]
    if not rows:
        return []
    start_ns = report.capture.start_ns or 0
    waits = any(row.waiting_ns for row in rows)
    about = [describe_access(row.access, row.access_key, row.access_write) for row in rows]
    columns = [
        Column("number", [str(row.number) for row in rows]),
        *vm_column(report, rows),
        Column("vCPU", ["?" if row.vcpu_id is None else str(row.vcpu_id) for row in rows]),
        Column("tid", [str(row.tid) for row in rows], rank=3),
        Column("at", [duration(row.ts_ns - start_ns) for row in rows], rank=2),
        Column("reason", [row.name for row in rows], left=True, flexible=True),
        Column("took", [duration(row.dur_ns) for row in rows]),
        *([Column("wait", [duration(row.waiting_ns) for row in rows], rank=1)] if waits else []),
        *preempted_column(rows, [duration(row.preempted_ns) for row in rows]),
        Column("about", about, left=True, flexible=True, shortest=14),
        Column("rip", ["-" if row.guest_rip is None else f"{row.guest_rip:#x}" for row in rows], left=True, rank=4),
    ]
    first = rows[0]
    which = f"--tid {first.tid}" if first.vcpu_id is None else f"--vcpu {first.vcpu_id}"
    hint = f"The first one told step by step: --explain {first.number} {which}"
    more = f"; more of them: --slowest {max(20, 2 * limit)}" if len(report.slowest) > limit else ""
    heading = style.title("Slowest VM-exits") + style.faint("  (waiting and being preempted left out)")
    return [heading, *table(columns, style), *map(style.faint, style.wrapped(hint + more, "  ", "    "))]
