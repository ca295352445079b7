"""One recording in, its summary out: the row of `summary_schema.SUMMARY`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import kvmtrace
from kvmtrace.fleet.live_summary import summary_row
from kvmtrace.fleet.summary_schema import BUDGET_PARTS, FINDINGS, SCHEMA, TOP
from kvmtrace.fleet.vcpu_exits import VcpuExitStatistic
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary import is_summary_file
from kvmtrace.isa.registry import describe_exit_reason, isa_name
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.spans.time_parts import EXIT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvmtrace.fleet.vcpu_exits import VcpuExits
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import ExitRow

UNKNOWN_DAY = "unknown"
_CHUNK = 1 << 20


def checksum_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal: a recording's identity."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def summarize(path: Path, source: str, checksum: str | None = None) -> dict[str, Any]:
    """Return a recording's summary as one row of SUMMARY.

    Parameters
    ----------
    path : where the recording is now
    source : where the user has it; told in reports
    checksum : its `checksum_of`, computed if not given

    Raises
    ------
    KvmtraceError
        The file is no recording, or is damaged beyond what can be read.
    """
    if is_summary_file(str(path)):
        row = summary_row(path)
        return {**row, **_known(path, source, checksum, row["started"])}
    statistic = VcpuExitStatistic()
    recording = open_recording(path)
    report = build_report(recording, ReportOptions(spans=(statistic.take,)))
    return {
        **_known(path, source, checksum, recording.capture.meta.get("started")),
        **_identity(report),
        **_counted(report, statistic.rows()),
        **_verdict(report),
    }


def _known(path: Path, source: str, checksum: str | None, started: Any) -> dict[str, Any]:
    """Return what tells one recording from others."""
    when = started if isinstance(started, str) else None
    return {"source": source, "checksum": checksum or checksum_of(path), "started": when, "day": _day(when)}


def _day(started: str | None) -> str:
    """Return the date of an ISO 8601 time, UNKNOWN_DAY of none."""
    day = (started or "")[:10]
    return day if len(day) == 10 and day.replace("-", "").isdigit() else UNKNOWN_DAY


def _identity(report: Report) -> dict[str, Any]:
    capture, loss = report.capture, report.loss
    names = ("host", "kernel", "cpu_model", "isa", "n_cpus", "format", "backend", "start_ns", "duration_ns", "n_events")
    comms = {row.pid: row.comm for row in report.vcpus}
    vms = {row.pid: (row.comm or comms.get(row.pid), row.name, row.uuid) for row in report.vms}
    return {
        "schema": SCHEMA,
        "kvmtrace": kvmtrace.__version__,
        **{name: getattr(capture, name) for name in names},
        "events": sorted(capture.events),
        "loss": {
            "events": loss.events,
            "truncated": loss.truncated,
            "discarded_intervals": loss.discarded_intervals,
            "damaged_places": len(loss.damage),
        },
        "vms": [
            {"pid": pid, "comm": comm, "name": name, "uuid": uuid}
            for pid, (comm, name, uuid) in sorted(vms.items(), key=str)
        ],
    }


def _counted(report: Report, exits: Iterable[VcpuExits]) -> dict[str, Any]:
    """Return everything that adds up over recordings."""
    vcpus = {row.tid: row for row in report.vcpus}
    timed = {(row.isa, row.exit_reason): row for row in report.exits}
    return {
        "vcpus": [
            {
                **{name: getattr(row, name) for name in ("vcpu_id", "tid", "wall_ns", "exits", "userspace_exits")},
                **{part: getattr(row.budget, part) for part in BUDGET_PARTS},
                "vm_pid": row.pid,
                "migrations": row.migrations,
            }
            for row in report.vcpus
        ],
        "exits": [_exit_row(row, vcpus.get(row.tid), timed) for row in exits],
        "userspace_exits": [
            {
                name: getattr(row, name)
                for name in ("reason", "name", "errno", "count", "samples", "total_ns", "min_ns", "max_ns")
            }
            for row in report.userspace_exits
        ],
        "ports": _top(report.detail.ports, ("port", "name", "direction"), ("count", "total_ns")),
        "msrs": _top(report.detail.msrs, ("msr", "name", "direction"), ("count", "faults", "total_ns")),
        "gpas": _top(report.detail.gpas, ("gpa", "kind"), ("count", "total_ns")),
        "calls": _first_calls(report),
    }


def _exit_row(row: VcpuExits, vcpu: Any, timed: dict[Any, Any]) -> dict[str, Any]:
    isa = isa_name(row.isa)
    told = timed.get((isa, row.exit_reason))
    durations = dataclasses.asdict(row.durations)
    squares = durations.pop("squares_ns2")
    return {
        "vm_pid": vcpu.pid if vcpu else None,
        "vcpu_id": vcpu.vcpu_id if vcpu else None,
        "tid": row.tid,
        "level": row.level,
        "isa": isa,
        "exit_reason": row.exit_reason,
        "name": describe_exit_reason(row.isa, row.exit_reason),
        **durations,
        "squares_ns2": Decimal(squares),
        **{name: getattr(row, name) for name in ("guest_before_ns", "count")},
        **{name: _part(row, told, name) for name in EXIT_PARTS},
        # null where kvm_userspace_exit was not recorded
        "to_userspace": None if told is None or told.to_userspace is None else row.to_userspace,
        "buckets": list(row.histogram),
        "counts": list(row.histogram.values()),
    }


def _part(row: VcpuExits, told: ExitRow | None, name: str) -> int | None:
    """Return a part of the time; null where the recording does not show it."""
    if told is not None and told.samples and getattr(told, name) is None:
        return None
    ns: int = getattr(row, name)
    return ns


def _top(rows: Sequence[Any], keys: tuple[str, ...], sums: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the most frequent rows, and the sum of the others under a key of null."""
    ranked = sorted(rows, key=lambda row: (-row.count, *(str(getattr(row, key)) for key in keys)))
    found = [{name: getattr(row, name) for name in keys + sums} for row in ranked[:TOP]]
    if len(ranked) > TOP:
        rest: dict[str, Any] = dict.fromkeys(keys)
        for name in sums:
            told = [getattr(row, name) for row in ranked[TOP:] if getattr(row, name) is not None]
            rest[name] = sum(told) if told else None
        found.append(rest)
    return found


def _first_calls(report: Report) -> list[dict[str, Any]]:
    """Return the first call of each kind of the VM's construction: how long KVM took."""
    if report.bring_up is None:
        return []
    seen: dict[str, dict[str, Any]] = {}
    for step in report.bring_up.steps:
        call = {"name": step.name, "dur_ns": step.dur_ns, "ret": step.ret, "verdict": step.verdict}
        seen.setdefault(step.name, call)
    return [call for name, call in seen.items() if name != "KVM_RUN"]


def _verdict(report: Report) -> dict[str, Any]:
    model = report.model
    if model is None:
        return {"rules": [], "findings": []}
    kept: dict[str, int] = defaultdict(int)
    findings = []
    for violation in model.violations:
        kept[violation.rule] += 1
        if kept[violation.rule] <= FINDINGS:
            names = ("rule", "severity", "ts_ns", "tid", "vcpu_id", "event_index", "event", "expected", "observed")
            findings.append({name: getattr(violation, name) for name in (*names, "source", "vm_exit")})
    return {
        "rules": [{"rule": rule, **dataclasses.asdict(result)} for rule, result in model.rules.items()],
        "findings": findings,
        "coverage": dataclasses.asdict(model.coverage),
        "violations": model.n_violations,
        "suspicions": model.n_suspicions,
        "explained_events": model.explained_events,
        "unknown_events": model.unknown_events,
    }
