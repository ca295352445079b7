"""Nested guests as text: who had the vCPU's time, what L2's exits cost, and what L1 did about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import Column, count, duration, percent, titled

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.render.terminal import Style
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import NestedExitRow, NestedVcpu

EXIT_ROWS, WORK_ROWS = 10, 6
# who had the time -> part of NestedBudget
BUDGET = (
    ("L2", "l2_guest_ns"),
    ("L1", "l1_guest_ns"),
    ("L0", "l0_ns"),
    ("VMM", "userspace_ns"),
    ("wait", "waiting_ns"),
    ("preempted", "preempted_ns"),
    ("unknown", "unknown_ns"),
)
# ... and part of NestedExitRow
SPLIT = (
    ("L0", "l0_ns"),
    ("L1", "l1_guest_ns"),
    ("VMM", "userspace_ns"),
    ("wait", "waiting_ns"),
    ("preempted", "preempted_ns"),
)


def times(n: int | None, per: int | None) -> str:
    """Return how many there are of one thing for one of another: "4.2"."""
    return "-" if n is None or not per else f"{n / per:.1f}"


def nested_sections(report: Report, style: Style) -> list[list[str]]:
    """Return the tables of the section; none without nested guests."""
    vcpus = report.nested or ()
    return [_budgets(vcpus, style)] + [section for row in vcpus for section in _of_vcpu(row, style)] if vcpus else []


def _budgets(rows: tuple[NestedVcpu, ...], style: Style) -> list[str]:
    columns = [
        Column("vCPU", ["?" if row.vcpu_id is None else str(row.vcpu_id) for row in rows]),
        Column("entries", [count(row.entries) for row in rows], rank=3),
        Column("failed", [count(row.failed_entries) for row in rows], rank=5),
        Column("L2 exits", [count(row.l2_exits) for row in rows]),
        Column("to L1", [count(row.reflected) for row in rows], rank=2),
        Column("L1 exits", [count(row.l1_exits) for row in rows], rank=1),
        Column("wall", [duration(row.wall_ns) for row in rows]),
        *(
            Column(title, [percent(getattr(row.budget, part), row.wall_ns) for row in rows], rank=rank)
            for rank, (title, part) in zip((0, 0, 0, 1, 1, 2, 4), BUDGET, strict=True)
        ),
    ]
    return titled("Nested guests", "(L1: KVM's guest; L2: its guest, however deep; L0: KVM)", columns, style)


def _of_vcpu(vcpu: NestedVcpu, style: Style) -> list[list[str]]:
    name = f" of vCPU {'?' if vcpu.vcpu_id is None else vcpu.vcpu_id}"
    sections = []
    if vcpu.exits:
        sections.append(_exits(vcpu, name, style))
    if vcpu.l1_work:
        sections.append(_work(vcpu, name, style))
    return sections


def _exits(vcpu: NestedVcpu, name: str, style: Style) -> list[str]:
    rows = vcpu.exits[:EXIT_ROWS]
    mean: Callable[[NestedExitRow], float | None] = lambda row: (  # noqa: E731
        None if row.total_ns is None else row.total_ns / row.samples
    )
    columns = [
        Column("reason", [row.name for row in rows], left=True, flexible=True, shortest=16),
        Column("handled by", ["L1" if row.reflected else "L0" for row in rows], left=True),
        Column("exits", [count(row.count) for row in rows]),
        Column("time", [duration(row.total_ns) for row in rows]),
        Column("mean", [duration(mean(row)) for row in rows], rank=2),
        Column("max", [duration(row.max_ns) for row in rows], rank=5),
        Column("L1 exits each", [times(row.l1_exits, row.samples if row.reflected else 0) for row in rows], rank=1),
        *(
            Column(title, [percent(getattr(row, part), row.total_ns) for row in rows], rank=rank)
            for rank, (title, part) in zip((0, 0, 3, 3, 4), SPLIT, strict=True)
        ),
    ]
    left_out = len(vcpu.exits) - len(rows)
    more = [style.faint(f"  ... {count(left_out)} more (--format json)")] if left_out else []
    note = "(time: until L2 goes on, with all that L1 does)"
    return [*titled(f"L2's exits{name}", note, columns, style), *more]


def _work(vcpu: NestedVcpu, name: str, style: Style) -> list[str]:
    rows = vcpu.l1_work[:WORK_ROWS]
    columns = [
        Column("reason", [row.name for row in rows], left=True, flexible=True, shortest=16),
        Column("exits", [count(row.count) for row in rows]),
        Column("per exit to L1", [times(row.count, vcpu.reflected) for row in rows]),
        Column("time in L0", [duration(row.total_ns) for row in rows]),
    ]
    left_out = len(vcpu.l1_work) - len(rows)
    more = [style.faint(f"  ... {count(left_out)} more (--format json)")] if left_out else []
    title = f"What L1 did about them{name.replace(' of', ',')}"
    return [*titled(title, "(L1's own exits until it enters L2 again)", columns, style), *more]
