"""The report over many recordings as one self-contained HTML file: heat map, distributions, outliers, findings."""

from __future__ import annotations

import base64
import json
import math
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from kvmtrace import __version__
from kvmtrace.render.html.html_cells import Cell, HtmlTable
from kvmtrace.render.html.page import html_environment, own_text, script_json, uplot_script
from kvmtrace.render.terminal import count, duration, escape, plural
from kvmtrace.render.text.fleet_text import (
    describe_command,
    describe_outlier,
    describe_ratio,
    describe_unlike,
    describe_value,
)
from kvmtrace.stats.exponential_histogram import PER_OCTAVE, ZERO

if TYPE_CHECKING:
    from kvmtrace.fleet.fleet_report import FleetReport, GroupRow
    from kvmtrace.render.html.charts import Chart

CHARTS = 8  # exit reasons whose distribution is drawn
LINES = 6  # groups of one chart
POINT = 4  # buckets that one point of a line stands for
COLOURS = ("--kernel", "--vmm", "--guest", "--preempted", "--switch", "--unknown")
DARKEST = 255
FAINTEST_SHARE = 1e-6  # of vCPU time; what is less is drawn like nothing


def _quantised(report: FleetReport) -> str:
    """Return the shares of all hosts and reasons as bytes on a logarithmic scale, in base64; 0 is nothing."""
    shares = np.array([[value or 0.0 for value in row[3]] for row in report.matrix], np.float64)
    with np.errstate(divide="ignore"):
        scale = 1 + np.log(np.maximum(shares, 1e-30) / FAINTEST_SHARE) / -math.log(FAINTEST_SHARE) * (DARKEST - 1)
    levels = np.where(shares >= FAINTEST_SHARE, np.clip(scale, 1, DARKEST), 0).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def _heat_map(report: FleetReport) -> str:
    """Return the heat map's data as JSON that is safe inside a script element."""
    unlike = {outlier.host for outlier in report.outliers}
    data = {
        "reasons": [escape(name) for name in report.reasons],
        "hosts": [escape(row[0]) for row in report.matrix],
        "groups": [escape(", ".join(str(part) for part in row[1:3] if part)) for row in report.matrix],
        "unlike": [number for number, row in enumerate(report.matrix) if row[0] in unlike],
        "levels": _quantised(report),
        "faintest": FAINTEST_SHARE,
    }
    return json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")


def _charts(report: FleetReport) -> list[Chart]:
    """Return how long the VM-exits of the reasons that take the most time took, a line per group."""
    by_reason: dict[str, list[GroupRow]] = {}
    for row in report.groups:
        if row.histogram:
            by_reason.setdefault(row.name, []).append(row)
    ranked = sorted(by_reason.items(), key=lambda item: -sum(row.total_ns for row in item[1]))
    return [_chart(name, rows) for name, rows in ranked[:CHARTS]]


def _chart(name: str, rows: list[GroupRow]) -> Chart:
    buckets = [bucket for row in rows for bucket, _ in row.histogram if bucket != ZERO]
    low, high = min(buckets, default=0) // POINT - 1, max(buckets, default=1) // POINT + 1
    series = []
    for number, row in enumerate(sorted(rows, key=lambda row: -row.samples)[:LINES]):
        total = np.zeros(high - low + 1)
        for bucket, samples in row.histogram:
            total[max(bucket // POINT - low, 0)] += samples
        percents = np.round(100 * total / max(total.sum(), 1), 4)
        label = ", ".join(escape(str(part)) for part in row.group if part) or "all"
        label = f"{label} (p50 {duration(row.p50_ns)}, p99 {duration(row.p99_ns)})"
        series.append({"label": label, "colour": COLOURS[number], "values": percents.tolist(), "dashed": False})
    return {
        "title": escape(name),
        "kind": "durations",
        "unit": "%",
        "log": False,
        "x": [(at + 0.5) * POINT / PER_OCTAVE for at in range(low, high + 1)],
        "series": series,
    }


def _host_cell(host: str | None) -> Cell:
    """Return a host's name, which leads to its row of the heat map (fleet.js)."""
    return Cell("-") if host is None else Cell(escape(host), link=f"#host={quote(host, errors='replace')}")


def _outlier_table(report: FleetReport) -> HtmlTable:
    rows = tuple(
        (
            _host_cell(one.host),
            Cell(escape(one.vm)),
            Cell(escape(one.name)),
            Cell(one.metric),
            Cell(describe_value(one.metric, one.value), one.value),
            Cell(describe_value(one.metric, one.usual), one.usual),
            Cell(describe_ratio(one.ratio), one.ratio),
            Cell(escape(describe_outlier(one))),
        )
        for one in report.outliers
    )
    columns = (
        ("host", False), ("VM", False), ("exit", False), ("metric", False), ("here", True), ("usual", True),
        ("ratio", True), ("in words", False),
    )  # fmt: skip
    caption = "Peers: same kernel, CPU model, ISA."
    return HtmlTable("outliers", "Hosts and VMs unlike their peers", caption, columns, rows)


def _finding_table(report: FleetReport) -> HtmlTable:
    rows = tuple(
        (
            Cell(escape(one.rule)),
            Cell(one.severity),
            Cell(escape(one.kernel)),
            Cell(escape(one.cpu_model)),
            Cell(count(one.hosts), one.hosts),
            Cell(count(one.count), one.count),
            _host_cell(one.example_host),
            Cell(f"expected {escape(one.expected)}; observed {escape(one.observed)}"),
            Cell(escape(describe_command(one))),
        )
        for one in report.findings
    )
    columns = (
        ("rule", False), ("severity", False), ("kernel", False), ("CPU model", False), ("hosts", True), ("count", True),
        ("first host", False), ("there", False), ("see it", False),
    )  # fmt: skip
    return HtmlTable("findings", "Rules that were broken", "By kernel and CPU model.", columns, rows)


def _group_table(report: FleetReport) -> HtmlTable:
    rows = tuple(
        (
            *(Cell(escape(part)) for part in row.group),
            Cell(escape(row.name)),
            Cell(count(row.hosts), row.hosts),
            Cell(count(row.count), row.count),
            Cell(duration(row.total_ns), row.total_ns),
            *(Cell(duration(value), -1 if value is None else value) for value in (row.p50_ns, row.p99_ns, row.max_ns)),
        )
        for row in report.groups
    )
    columns = (
        *((name, False) for name in report.by), ("exit", False), ("hosts", True), ("exits", True), ("time", True),
        ("p50", True), ("p99", True), ("max", True),
    )  # fmt: skip
    caption = "Time: from kvm_exit to the next kvm_entry. Percentiles are within 1.1 %."
    return HtmlTable("groups", "VM-exits by group", caption, columns, rows)


def _failure_table(report: FleetReport) -> HtmlTable:
    rows = tuple((Cell(escape(one["source"])), Cell(escape(one["error"]))) for one in report.failures)
    caption = f"{plural(report.n_failures, 'source')} could not be summarised."
    return HtmlTable("failures", "Failures", caption, (("source", False), ("error", False)), rows)


def build_fleet_page(report: FleetReport) -> dict[str, Any]:
    """Return all that the template shows."""
    drawn = _charts(report)
    tables = (_outlier_table(report), _finding_table(report), _group_table(report), _failure_table(report))
    return {
        "url": escape(report.url),
        "version": __version__,
        "lead": f"{plural(report.recordings, 'recording')} of {plural(report.hosts, 'host')}, "
        f"{plural(report.exits, 'VM-exit')}.",
        "good": not report.outliers and not report.findings,
        "verdict": f"{describe_unlike(report.outliers)}; "
        f"{plural(len(report.findings), 'kind')} of broken rules; {plural(report.n_failures, 'failure')}.",
        "tables": [table for table in tables if table.rows],
        "charts": [(number, chart["title"]) for number, chart in enumerate(drawn)],
        "chart_data": script_json(drawn),
        "heat_map": _heat_map(report) if report.matrix else "",
    }


def render_fleet_html(report: FleetReport) -> str:
    """Return the report as one HTML file without references to others."""
    template = html_environment().get_template("fleet.html.j2")
    return template.render(
        page=build_fleet_page(report),
        style=own_text("uplot/uPlot.min.css", "style.css", "fleet.css"),
        uplot=uplot_script(),
        script=own_text("script.js", "charts.js", "fleet.js"),
    )
