"""The VMs of a recording: who they are, and what their vCPUs did together."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from typing import TYPE_CHECKING

from kvmtrace.stats.rows import Budget, VmRow
from kvmtrace.table.vm_threads import recorded_vms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.stats.rows import VcpuRow
    from kvmtrace.table.recording import Recording


def vm_rows(recording: Recording, vcpus: Sequence[VcpuRow]) -> tuple[VmRow, ...]:
    """Return a row for each process that ran vCPUs or is known to have a VM, the busiest first.

    Parameters
    ----------
    vcpus : the vCPU threads, with their processes
    """
    known = {vm["pid"]: vm for vm in recorded_vms(recording)}
    pids = dict.fromkeys([*(row.pid for row in vcpus), *known])
    rows = []
    for pid in pids:
        told = known.get(pid, {}) if pid is not None else {}
        own = [row for row in vcpus if row.pid == pid]
        rows.append(
            VmRow(
                pid=pid,
                **{name: told.get(name) for name in ("name", "uuid", "kind", "name_from", "unit", "namespace")},
                pod=told.get("pod"),
                container=told.get("container"),
                comm=told.get("comm") or (recording.comms.get(pid) if pid is not None else None),
                debugfs=tuple(told.get("debugfs") or ()),
                tids=tuple(row.tid for row in own),
                exits=sum(row.exits for row in own),
                userspace_exits=sum(row.userspace_exits for row in own),
                wall_ns=sum(row.wall_ns for row in own),
                budget=_sum([row.budget for row in own]),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.exits - row.userspace_exits, row.pid or 0)))


def with_names(vcpus: tuple[VcpuRow, ...], vms: Sequence[VmRow]) -> tuple[VcpuRow, ...]:
    """Return the vCPU threads with their VMs' names."""
    names = {row.pid: row.name for row in vms if row.name and row.pid is not None}
    return tuple(replace(row, vm=names.get(row.pid) if row.pid is not None else None) for row in vcpus)


def _sum(budgets: list[Budget]) -> Budget | None:
    """Add budgets up; a part that none of them can tell stays untold."""
    if not budgets:
        return None
    parts = zip(*(astuple(one) for one in budgets), strict=True)
    sums = [sum(told) if (told := [ns for ns in values if ns is not None]) else None for values in parts]
    return Budget(**{part.name: ns for part, ns in zip(fields(Budget), sums, strict=True)})  # type: ignore[arg-type]
