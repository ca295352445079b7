"""The perf-compatible tables as text, line for line what `perf kvm stat report` prints.

So that `diff` tells whether two tools agree. Source: print_result, tools/perf/builtin-kvm.c
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import PerfRow, PerfTables

EVERYTHING = "all VMs, all VCPUs"
TITLES = {"vmexit": "VM-EXIT", "mmio": "MMIO Access", "ioport": "IO Port Access", "msr": "MSR Access"}


def render_perf_report(report: Report) -> str:
    """Return a report's tables in perf's layout, for what it is about."""
    return render_perf_tables(report.perf_compatible, report.capture.selection or EVERYTHING)


def render_perf_tables(tables: PerfTables, scope: str = EVERYTHING) -> str:
    """Return the tables that have samples, in perf's layout."""
    parts = [
        render_perf_table(title, getattr(tables, name), scope)
        for name, title in TITLES.items()
        if getattr(tables, name) or name == "vmexit"
    ]
    return "".join(parts)


def render_perf_table(title: str, rows: tuple[PerfRow, ...], scope: str) -> str:
    """Return one table; us with two decimals, percentages of all samples and of the summed time."""
    samples = sum(row.samples for row in rows)
    total_ns = sum(row.total_ns for row in rows)
    head = (
        f"{title:>20} {'Samples':>10} {'Samples%':>9} {'Time%':>9} {'Min Time':>11} {'Max Time':>11} {'Avg time':>16} "
    )
    lines = ["", "", f"Analyze events for {scope}:", "", head, ""]
    lines += [_line(row, samples, total_ns) for row in rows]
    lines += ["", f"Total Samples:{samples}, Total events handled time:{total_ns / 1000:.2f}us.", "", ""]
    return "\n".join(lines)


def _line(row: PerfRow, samples: int, total_ns: int) -> str:
    time_percent = row.total_ns / total_ns * 100 if total_ns else 0.0
    return (
        f"{row.key:>20} {row.samples:10d} {row.samples / samples * 100:8.2f}% {time_percent:8.2f}% "
        f"{row.min_ns / 1000:9.2f}us {row.max_ns / 1000:9.2f}us {row.total_ns / row.samples / 1000:9.2f}us "
        f"( +-{row.rel_stderr:7.2f}% ) "
    ).rstrip(" ") + " "
