"""A file of `kvmtrace record --summary` as a row of `summary_schema.SUMMARY`.

What was only counted in the kernel stays absent: minima, squares, histograms of 1 % (its own are by powers of two),
attribution, the verdict. Counts, times, shares and rates are there.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import kvmtrace
from kvmtrace.fleet.summary_schema import BUDGET_PARTS, SCHEMA
from kvmtrace.formats.common.capture_of_file import capture_of
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.isa.registry import BY_NAME, describe_exit_reason
from kvmtrace.kvm.userspace_exits import describe_errno, describe_userspace_exit_reason
from kvmtrace.spans.time_parts import EXIT_PARTS

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.formats.summary.summary_file import Cell, Summary, VcpuSummary

FORMAT = "kvmtrace-summary"
# what record --summary cannot tell apart is the kernel's: the handler, entry and exit, polling
PARTS = {"guest": "guest_ns", "kernel": "handler_ns", "userspace": "userspace_ns", "blocked": "blocked_ns",
         "preempted": "preempted_ns", "unknown": "unknown_ns"}  # fmt: skip
NOT_COUNTED = ("level", "min_ns", "squares_ns2", "to_userspace", "guest_before_ns", *EXIT_PARTS)


def summary_row(path: Path) -> dict[str, Any]:
    """Return what SUMMARY holds of a summary file, but for its source, checksum and day.

    Raises
    ------
    FormatError
        The file is cut, or not what its schema says.
    """
    summary = read_summary(path.read_bytes(), str(path))
    isas = {row.isa for row in summary.vcpus if row.isa}
    capture = capture_of(str(path), FORMAT, summary.meta)
    told = (summary.meta.get("loss") or {}).get("events")
    return {
        "schema": SCHEMA,
        "kvmtrace": kvmtrace.__version__,
        **{name: getattr(capture, name) for name in ("host", "kernel", "cpu_model", "n_cpus", "format", "backend")},
        "started": summary.meta.get("started"),
        "isa": isas.pop() if len(isas) == 1 else None,
        "duration_ns": summary.meta.get("duration_ns"),
        "n_events": summary.meta.get("n_events"),
        "events": sorted(capture.events),
        "loss": {"events": told, "truncated": False, "discarded_intervals": 0, "damaged_places": 0},
        "vms": _vms(summary),
        "vcpus": [_vcpu(row) for row in summary.vcpus],
        "exits": [_exit(row, reason, cell) for row in summary.vcpus for reason, cell in row.exits.items()],
        "userspace_exits": _userspace_exits(summary),
        **{name: [] for name in ("ports", "msrs", "gpas", "calls", "rules", "findings")},
    }


def _vms(summary: Summary) -> list[dict[str, Any]]:
    names = {vm["pid"]: (vm["name"], vm["uuid"]) for vm in summary.meta.get("vms") or ()}
    comms = {row.pid: row.comm for row in summary.vcpus}
    return [
        {"pid": pid, "comm": comm, "name": name, "uuid": uuid}
        for pid, comm in sorted(comms.items())
        for name, uuid in [names.get(pid, (None, None))]
    ]


def _vcpu(row: VcpuSummary) -> dict[str, Any]:
    return {
        **dict.fromkeys(BUDGET_PARTS),
        **{PARTS[phase]: ns for phase, ns in row.time_ns.items()},
        **{name: getattr(row, name) for name in ("vcpu_id", "tid", "wall_ns")},
        "vm_pid": row.pid,
        "exits": sum(cell.count for cell in row.exits.values()),
        "userspace_exits": sum(cell.count for cell in row.userspace_exits.values()),
        "migrations": None,
    }


def _times(cell: Cell) -> dict[str, int | None]:
    longest = cell.max_ns if cell.samples else None
    return {"count": cell.count, "samples": cell.samples, "total_ns": cell.total_ns, "max_ns": longest}


def _exit(row: VcpuSummary, reason: int, cell: Cell) -> dict[str, Any]:
    isa = BY_NAME.get(row.isa or "")
    return {
        **dict.fromkeys(NOT_COUNTED),
        "vm_pid": row.pid,
        "vcpu_id": row.vcpu_id,
        "tid": row.tid,
        "isa": row.isa,
        "exit_reason": reason,
        "name": describe_exit_reason(isa.number, reason) if isa else f"UNKNOWN({reason:#x})",
        **_times(cell),
        "buckets": [],
        "counts": [],
    }


def _userspace_exits(summary: Summary) -> list[dict[str, Any]]:
    """Return the returns to userspace of all vCPUs; those with an error have no reason."""
    cells: dict[int | str, list[Cell]] = defaultdict(list)
    for row in summary.vcpus:
        for key, cell in row.userspace_exits.items():
            cells[key].append(cell)
    found = []
    for key, parts in sorted(cells.items(), key=str):
        number = getattr(errno, key, None) if isinstance(key, str) else 0
        reason = key if isinstance(key, int) else None
        name = f"-{describe_errno(number)}" if reason is None and number else "other error"
        whole = parts[0]
        for part in parts[1:]:
            whole += part
        found.append(
            {
                "reason": reason,
                "name": name if reason is None else describe_userspace_exit_reason(reason),
                "errno": None if number is None else -number,
                "min_ns": None,
                **_times(whole),
            }
        )
    return found
