"""What `kvmtrace fleet report` says: the document "kvmtrace.fleet-report/1", which text, JSON and HTML are views of."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import UsageError
from kvmtrace.fleet.host_metrics import host_metrics, vm_metrics
from kvmtrace.fleet.outliers import Outlier, find_outliers
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.stats.exponential_histogram import quantile_ns

if TYPE_CHECKING:
    from kvmtrace.fleet.host_metrics import HostMetrics
    from kvmtrace.fleet.reduce import Fleet

SCHEMA = "kvmtrace.fleet-report/1"
GROUP_COLUMNS = ("host", "kernel", "cpu_model", "isa", "day")
MAX_FAILURES = 1000  # rows; all are counted
_OF_EXAMPLE = ("severity", "expected", "observed", "source", "event_index", "tid", "vm_exit")


@dataclass(frozen=True)
class GroupRow:
    """An exit reason in one group of recordings; times are from kvm_exit to the next kvm_entry."""

    group: tuple[str | None, ...]
    isa: str | None
    exit_reason: int
    name: str
    hosts: int
    count: int
    samples: int
    total_ns: int
    min_ns: int | None
    max_ns: int | None
    p50_ns: float | None  # within 1.1 %
    p90_ns: float | None
    p99_ns: float | None
    p999_ns: float | None
    histogram: tuple[tuple[int, int], ...]  # (bucket, samples)


@dataclass(frozen=True)
class FindingRow:
    """A rule that was broken: where, and how to see it."""

    rule: str
    severity: str
    kernel: str | None
    cpu_model: str | None
    hosts: int
    recordings: int
    count: int
    example_host: str | None
    example_source: str
    expected: str
    observed: str
    source: str
    event_index: int
    tid: int
    vm_exit: int | None = None  # number that `kvmtrace report --explain` takes; None before the thread's first


@dataclass(frozen=True)
class FleetReport:
    """All that the summaries of a DEST say.

    Parameters
    ----------
    by : columns that `groups` are made by
    matrix : host -> share of its vCPU time that each of `reasons` took, NaN as None; for the heat map
    """

    url: str
    by: tuple[str, ...]
    where: str | None
    recordings: int
    hosts: int
    events: int
    exits: int
    days: tuple[str | None, str | None]
    lossy_recordings: int
    events_lost: int
    groups: tuple[GroupRow, ...]
    outliers: tuple[Outlier, ...]
    findings: tuple[FindingRow, ...]
    failures: tuple[dict[str, Any], ...]
    n_failures: int
    reasons: tuple[str, ...] = ()
    matrix: tuple[tuple[str, str | None, str | None, tuple[float | None, ...]], ...] = ()
    schema: str = SCHEMA

    def to_json(self) -> str:
        """Return the document as JSON, `schema` first."""
        members = dataclasses.asdict(self)
        return json.dumps({"schema": members.pop("schema"), **members}, indent=1, allow_nan=False)


def build_fleet_report(
    fleet: Fleet, by: tuple[str, ...] = ("kernel", "cpu_model"), where: str | None = None
) -> FleetReport:
    """Reduce the summaries to a report.

    Parameters
    ----------
    by : columns of GROUP_COLUMNS
    where : the condition that `fleet` was narrowed by, for the report

    Raises
    ------
    UsageError
        `by` names another column.
    """
    unknown = [name for name in by if name not in GROUP_COLUMNS]
    if unknown:
        raise UsageError(f"--by {','.join(unknown)}: no such column; there are {', '.join(GROUP_COLUMNS)}")
    fleet.load("recordings", "exits", "vcpus", "vms", "failures")
    metrics = host_metrics(fleet)
    totals = fleet.arrow(
        "SELECT count(*) AS recordings, count(DISTINCT host) AS hosts, coalesce(sum(n_events), 0)::BIGINT AS events, "
        "min(nullif(day, 'unknown')) AS first, max(nullif(day, 'unknown')) AS last, "
        "count(*) FILTER (loss.events IS NULL OR loss.events > 0 OR loss.truncated) AS lossy, "
        "coalesce(sum(loss.events), 0)::BIGINT AS lost FROM recordings"
    ).to_pylist()[0]
    failures = fleet.arrow(f"SELECT * FROM failures ORDER BY source LIMIT {MAX_FAILURES}").to_pylist()
    n_failures = int(fleet.arrow("SELECT count(*) AS n FROM failures").column("n")[0].as_py())
    reasons, matrix = _matrix(metrics)
    return FleetReport(
        url=fleet.url,
        by=by,
        where=where,
        recordings=totals["recordings"],
        hosts=totals["hosts"],
        events=totals["events"],
        exits=int(metrics.count.sum()),
        days=(totals["first"], totals["last"]),
        lossy_recordings=totals["lossy"],
        events_lost=totals["lost"],
        groups=_groups(fleet, by),
        outliers=find_outliers(metrics, vm_metrics(fleet, metrics)),
        findings=_findings(fleet.part("violations > 0 OR suspicions > 0")),
        failures=tuple(failures),
        n_failures=n_failures,
        reasons=reasons,
        matrix=matrix,
    )


def _groups(fleet: Fleet, by: tuple[str, ...]) -> tuple[GroupRow, ...]:
    """Add up the exits of each group; histograms are added bucket by bucket."""
    keys = ", ".join(dict.fromkeys((*by, "isa", "exit_reason")))
    histograms: dict[tuple[Any, ...], dict[int, int]] = {}
    bins = fleet.arrow(
        f"SELECT {keys}, bucket, sum(n)::BIGINT AS n FROM "
        f"(SELECT {keys}, unnest(buckets) AS bucket, unnest(counts) AS n FROM exits) GROUP BY ALL ORDER BY ALL"
    ).to_pylist()
    for row in bins:
        histograms.setdefault((*(row[name] for name in by), row["isa"], row["exit_reason"]), {})[row["bucket"]] = row[
            "n"
        ]
    sums = fleet.arrow(
        f"SELECT {keys}, any_value(name) AS name, count(DISTINCT host) AS hosts, sum(count)::BIGINT AS count, "
        "sum(samples)::BIGINT AS samples, sum(total_ns)::BIGINT AS total_ns, "
        "min(min_ns) AS min_ns, max(max_ns) AS max_ns "
        f"FROM exits GROUP BY {keys} ORDER BY total_ns DESC, {keys}"
    ).to_pylist()
    found = []
    for row in sums:
        group = tuple(row[name] for name in by)
        histogram = histograms.get((*group, row["isa"], row["exit_reason"]), {})
        names = ("isa", "exit_reason", "name", "hosts", "count", "samples", "total_ns", "min_ns", "max_ns")
        own: dict[str, Any] = {name: row[name] for name in names}
        own |= {f"p{name}_ns": quantile_ns(histogram, float(f"0.{name}")) for name in ("50", "90", "99", "999")}
        found.append(GroupRow(group=group, histogram=tuple(histogram.items()), **own))
    return tuple(found)


def _findings(fleet: Fleet) -> tuple[FindingRow, ...]:
    """Count broken rules by kernel and CPU model, each with its first example."""
    fleet.load("rules", "findings")
    counted = fleet.arrow(
        "SELECT rule, kernel, cpu_model, count(DISTINCT host) AS hosts, count(*) AS recordings, "
        "sum(violated)::BIGINT AS count FROM rules WHERE violated > 0 GROUP BY rule, kernel, cpu_model"
    ).to_pylist()
    examples: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = fleet.arrow(
        "SELECT rule, severity, kernel, cpu_model, host, source AS recording, expected, observed, "
        "kernel_source AS source, event_index, tid, vm_exit FROM findings ORDER BY host, recording, event_index"
    ).to_pylist()
    for row in rows:
        examples.setdefault((row["rule"], row["kernel"], row["cpu_model"]), row)
    found = []
    for row in counted:
        example = examples.get((row["rule"], row["kernel"], row["cpu_model"]))
        if example is not None:
            found.append(
                FindingRow(
                    **row,
                    **{name: example[name] for name in _OF_EXAMPLE},
                    example_host=example["host"],
                    example_source=example["recording"],
                )
            )
    return tuple(sorted(found, key=lambda row: (row.severity != "violation", -row.hosts, row.rule, str(row.kernel))))


def _matrix(metrics: HostMetrics) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Return the reasons by time, and per host the share of its vCPU time that each took."""
    names = metrics.name.tolist()
    total: dict[str, float] = {}
    for name, share in zip(names, np.nan_to_num(metrics.share).tolist(), strict=True):
        total[name] = total.get(name, 0.0) + share
    reasons = tuple(sorted(total, key=lambda name: -total[name]))
    column = {name: number for number, name in enumerate(reasons)}
    rows: dict[tuple[Any, ...], list[float | None]] = {}
    for row, name in enumerate(names):
        key = (metrics.host[row] or "?", metrics.kernel[row], metrics.cpu_model[row])
        share = float(metrics.share[row])
        rows.setdefault(key, [None] * len(reasons))[column[name]] = round(share, 7) if np.isfinite(share) else None
    return reasons, tuple((*key, tuple(shares)) for key, shares in sorted(rows.items(), key=str))
