"""Nested guests as tables of the page: who had the time, what L2's exits cost, and what L1 did about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.render.html.html_cells import Cell, Column, number, share_cell, table, text, time
from kvmtrace.render.text.nested_text import BUDGET, SPLIT, times

if TYPE_CHECKING:
    from kvmtrace.render.html.html_cells import HtmlTable
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import NestedVcpu


def _share(title: str, field: str) -> Column:
    return Column(title, True, lambda row: share_cell(getattr(row.budget, field), row.wall_ns))


def _part(title: str, field: str) -> Column:
    return Column(title, True, lambda row: share_cell(getattr(row, field), row.total_ns))


def _each(row: Any) -> Cell:
    samples = row.samples if row.reflected else 0
    return Cell(times(row.l1_exits, samples), row.l1_exits / samples if samples and row.l1_exits is not None else -1)


def nested_tables(report: Report) -> list[HtmlTable]:
    """Tabulate nested guests; none without any."""
    rows = report.nested or ()
    if not rows:
        return []
    columns = (
        number("vCPU", "vcpu_id"),
        number("entries"),
        number("failed", "failed_entries"),
        number("L2 exits", "l2_exits"),
        number("to L1", "reflected"),
        number("L1 exits", "l1_exits"),
        time("wall", "wall_ns"),
        *(_share(title, field) for title, field in BUDGET),
    )
    caption = "L1 is KVM's guest, L2 its guest, however deep; L0 is KVM. Shares of the vCPU's wall time."
    budgets = table("nested-budget", "Nested guests", columns, rows, caption)
    return [budgets, *(one for row in rows for one in _of_vcpu(row))]


def _of_vcpu(vcpu: NestedVcpu) -> list[HtmlTable]:
    name = "?" if vcpu.vcpu_id is None else str(vcpu.vcpu_id)
    exits = (
        text("reason", "name"),
        Column("handled by", False, lambda row: Cell("L1" if row.reflected else "L0")),
        number("exits", "count"),
        time("time", "total_ns"),
        time("max", "max_ns"),
        Column("L1 exits each", True, _each),
        *(_part(title, field) for title, field in SPLIT),
    )
    work = (
        text("reason", "name"),
        number("exits", "count"),
        Column("per exit to L1", True, lambda row: Cell(times(row.count, vcpu.reflected), row.count)),
        time("time in L0", "total_ns"),
    )
    made = [
        table(f"nested-exits-{vcpu.tid}", f"L2's exits of vCPU {name}", exits, vcpu.exits, "Time until L2 goes on."),
        table(f"nested-work-{vcpu.tid}", f"What L1 did about them, vCPU {name}", work, vcpu.l1_work, ""),
    ]
    return [one for one in made if one.rows]
