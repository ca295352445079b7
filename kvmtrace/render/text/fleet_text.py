"""Many recordings as text: what was summarised, the report over all of them, and two groups compared."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from kvmtrace.fleet.host_metrics import METRICS
from kvmtrace.render.terminal import Column, count, duration, escape, percent, plural, table
from kvmtrace.render.text.model_text import explain_command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.fleet.cohorts import Change, FleetComparison
    from kvmtrace.fleet.fleet_report import FindingRow, FleetReport
    from kvmtrace.fleet.outliers import Outlier
    from kvmtrace.fleet.summarizing import Progress
    from kvmtrace.render.terminal import Style

ROWS = 20  # of a table, unless all are asked for
EVERYTHING = "--all shows them"


def describe_value(metric: str, value: float) -> str:
    """Return a metric's value with its unit."""
    if metric == "rate":
        return f"{value:,.1f}/s" if value < 1000 else f"{value:,.0f}/s"
    if metric == "share":
        return percent(round(value * 1_000_000), 1_000_000)
    return duration(value)


def describe_ratio(ratio: float) -> str:
    """Return how many times as much: "4.1 times", "0.25 times"."""
    return f"{ratio:,.1f} times" if ratio >= 2 else f"{ratio:.2f} times"


def describe_outlier(outlier: Outlier) -> str:
    """Say in one sentence what is unlike the peers, and how much."""
    where = ", ".join(str(part) for part in (outlier.kernel, outlier.cpu_model) if part) or "no kernel told"
    also = f"; also its {' and '.join(METRICS[metric] for metric in outlier.also)}" if outlier.also else ""
    return (
        f"{outlier.name}: {METRICS[outlier.metric]} {describe_value(outlier.metric, outlier.value)}, "
        f"{describe_ratio(outlier.ratio)} the median {describe_value(outlier.metric, outlier.usual)} of "
        f"{plural(outlier.n_peers, 'host' if outlier.vm is None else 'VM')} with {where}{also}"
    )


def describe_unlike(outliers: Iterable[Outlier]) -> str:
    """Say how many hosts and VMs are unlike their peers: "2 hosts and 1 VM unlike their peers"."""
    units = {(one.host, one.vm) for one in outliers}
    hosts = sum(vm is None for _, vm in units)
    counts = [plural(n, word) for n, word in ((hosts, "host"), (len(units) - hosts, "VM")) if n]
    return f"{' and '.join(counts) or '0 hosts'} unlike {'its' if len(units) == 1 else 'their'} peers"


def name_outlier(outlier: Outlier) -> str:
    """Return which host, or which VM of it, is unlike its peers."""
    return outlier.host if outlier.vm is None else f"{outlier.host}, VM {outlier.vm}"


def describe_change(change: Change) -> str:
    """Say in one sentence what changed, and how sure that is."""
    what = "first call" if change.metric == "call" else METRICS[change.metric]
    percent_change = (change.ratio - 1) * 100
    low, high = (change.low - 1) * 100, (change.high - 1) * 100
    model = change.cpu_model or "CPU model not told"
    return (
        f"{change.what} on {model}: {what} {describe_value(change.metric, change.base)} -> "
        f"{describe_value(change.metric, change.new)} "
        f"({percent_change:+.1f} %, 95 % interval {low:+.1f} to {high:+.1f}) "
        f"over {change.n_base} and {change.n_new} hosts"
    )


def render_progress(progress: Progress) -> str:
    """Return what a job did, in one line."""
    counts = progress.counts
    rest = f", {count(counts['failed'])} failed" if counts["failed"] else ""
    present = f", {count(counts['present'])} there already" if counts["present"] else ""
    made = f"{plural(counts['made'], 'summary')[:-1]}y" if counts["made"] == 1 else f"{count(counts['made'])} summaries"
    return f"{made} made of {plural(progress.n_events, 'event')}{present}{rest}\n"


def render_fleet_report(report: FleetReport, style: Style, *, everything: bool = False) -> str:
    """Return the report as text: outliers and findings first."""
    days = [day for day in report.days if day]
    counted = f"{plural(report.exits, 'VM-exit')} in {plural(report.events, 'event')}"
    when = f", {days[0]} to {days[-1]}" if days and days[0] != days[-1] else f", {days[0]}" if days else ""
    lines = [
        style.title(f"kvmtrace fleet report: {escape(report.url)}"),
        f"  {plural(report.recordings, 'recording')} of {plural(report.hosts, 'host')}{when}; {counted}",
        f"  Loss:     {_loss(report)}",
        f"  Failures: {_failures(report)}",
        "",
        *_outliers(report, style, everything=everything),
        *_findings(report, style, everything=everything),
        *_groups(report, style, everything=everything),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _loss(report: FleetReport) -> str:
    if not report.lossy_recordings:
        return "none"
    return f"{plural(report.events_lost, 'event')} or more, in {plural(report.lossy_recordings, 'recording')}"


def _failures(report: FleetReport) -> str:
    if not report.n_failures:
        return "none"
    first = report.failures[0]
    return f"{count(report.n_failures)}, the first: {escape(first['source'])}: {escape(first['error'])}"


def _outliers(report: FleetReport, style: Style, *, everything: bool) -> list[str]:
    if not report.outliers:
        return ["No host or VM is unlike its peers (same kernel, CPU model and instruction set).", ""]
    shown = report.outliers if everything else report.outliers[:ROWS]
    lines = [style.title(describe_unlike(report.outliers))]
    for outlier in shown:
        lines += style.wrapped(f"{escape(name_outlier(outlier))}  {escape(describe_outlier(outlier))}", "  ", "      ")
    return [*lines, *_left_out(len(report.outliers) - len(shown), style), ""]


def _findings(report: FleetReport, style: Style, *, everything: bool) -> list[str]:
    if not report.findings:
        return ["No recording contradicts the model.", ""]
    shown = report.findings if everything else report.findings[:ROWS]
    lines = [style.title("Rules that were broken")]
    for row in shown:
        lines += _finding(row, style)
    return [*lines, *_left_out(len(report.findings) - len(shown), style), ""]


def describe_command(row: FindingRow) -> str:
    """Return the command that tells the first example step by step."""
    return explain_command(row, row.example_source) or f"kvmtrace check {shlex.quote(row.example_source)}"


def _finding(row: FindingRow, style: Style) -> list[str]:
    where = escape(", ".join(str(part) for part in (row.kernel, row.cpu_model) if part))
    paint = style.bad if row.severity == "violation" else style.warn
    counts = f"{plural(row.hosts, 'host')}, {plural(row.count, 'time')}"
    first, *others = style.wrapped(f"{row.severity} of {escape(row.rule)}: {counts}; {where}", "  ", "      ")
    return [
        first.replace(row.severity, paint(row.severity), 1),
        *others,
        *style.wrapped(f"expected {escape(row.expected)}", "    ", "      "),
        *style.wrapped(f"observed {escape(row.observed)}", "    ", "      "),
        style.faint(f"    {escape(describe_command(row))}   ({escape(row.source)})"),
    ]


def _groups(report: FleetReport, style: Style, *, everything: bool) -> list[str]:
    rows = report.groups if everything else report.groups[:ROWS]
    if not rows:
        return []
    total = sum(row.total_ns for row in report.groups)
    columns = [
        *(
            Column(name, [escape(row.group[i]) for row in rows], left=True, flexible=True)
            for i, name in enumerate(report.by)
        ),
        Column("reason", [escape(row.name) for row in rows], left=True),
        Column("hosts", [count(row.hosts) for row in rows]),
        Column("exits", [count(row.count) for row in rows]),
        Column("time%", [percent(row.total_ns, total) for row in rows]),
        Column("p50", [duration(row.p50_ns) for row in rows]),
        Column("p99", [duration(row.p99_ns) for row in rows]),
        Column("max", [duration(row.max_ns) for row in rows]),
    ]
    title = f"VM-exits by {', '.join(report.by) or 'reason'}  (time: from kvm_exit to the next kvm_entry)"
    return [style.title(title), *table(columns, style), *_left_out(len(report.groups) - len(rows), style)]


def _left_out(n: int, style: Style) -> list[str]:
    return [style.faint(f"  ... {count(n)} more ({EVERYTHING})")] if n else []


def render_fleet_comparison(result: FleetComparison, style: Style, *, everything: bool = False) -> str:
    """Return a comparison of two groups as text: what could not be compared first, then what changed."""
    lines = [
        style.title("kvmtrace fleet compare"),
        f"  base: {escape(result.base)}  ({plural(result.hosts_base, 'host')})",
        f"  new:  {escape(result.new)}  ({plural(result.hosts_new, 'host')})",
        "",
    ]
    if result.not_compared:
        lines += [style.warn("Not compared:"), *(f"  {escape(line)}" for line in result.not_compared), ""]
    significant = [change for change in result.changes if change.significant]
    shown = significant if everything else significant[:ROWS]
    if not significant:
        lines.append(f"No significant change in {plural(len(result.changes), 'comparison')}.")
    else:
        lines.append(
            style.title(f"{plural(len(significant), 'significant change')} in {len(result.changes)} comparisons")
        )
        for change in shown:
            word = style.bad("slower") if change.is_regression else "changed"
            lines.append(f"  {word}: {escape(describe_change(change))}")
        lines += _left_out(len(significant) - len(shown), style)
    return "\n".join([*lines, "", *_before_after(result, style, everything=everything)]).rstrip("\n") + "\n"


def _before_after(result: FleetComparison, style: Style, *, everything: bool) -> list[str]:
    rows = result.changes if everything else result.changes[:ROWS]
    if not rows:
        return []
    columns = [
        Column("CPU model", [escape(row.cpu_model) for row in rows], left=True, flexible=True),
        Column("what", [escape(row.what) for row in rows], left=True, flexible=True),
        Column("metric", [row.metric for row in rows], left=True),
        Column("hosts", [f"{row.n_base}/{row.n_new}" for row in rows]),
        Column("base", [describe_value(row.metric, row.base) for row in rows]),
        Column("new", [describe_value(row.metric, row.new) for row in rows]),
        Column("change", [f"{(row.ratio - 1) * 100:+.1f}%" for row in rows]),
        Column("q", [f"{row.q:.1g}" for row in rows]),
    ]
    title = style.title("Before and after")
    return [title, *table(columns, style), *_left_out(len(result.changes) - len(rows), style)]
