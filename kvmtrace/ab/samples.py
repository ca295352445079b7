"""What one recording contributes to a comparison of recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.ab.recordings import Key, RunSamples, Samples
from kvmtrace.kvm.ioctls import KVM_RUN
from kvmtrace.spans.vm_exits import group_codes, vm_exit_intervals
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_OFF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable


def _group(
    kind: str, code: NDArray[np.int64], ts_ns: NDArray[np.int64], dur_ns: NDArray[np.int64]
) -> dict[Key, Samples]:
    """Split intervals, given in time order, by their key, coded as isa << 40 | reason << 1 | to userspace."""
    if not len(code):
        return {}
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    groups = np.split(order, starts[1:])
    return {
        Key(
            kind, int(value) >> 40, (int(value) >> 1) & 0xFFFFFFFF, "userspace" if int(value) & 1 else "kernel"
        ): Samples(ts_ns[rows], dur_ns[rows])
        for value, rows in zip(values, groups, strict=True)
    }


def _vm_exit_samples(events: EventTable) -> tuple[dict[Key, Samples], int | None]:
    """Return the samples of VM-exits and the time in guest mode, None if it was not recorded."""
    if not (events.has("kvm_exit", "exit_reason") and events.has("kvm_entry") and events.count("kvm_exit")):
        return {}, None
    exits = vm_exit_intervals(events)
    guest = exits["guest_before_ns"]
    good = exits[(exits["dur_ns"] >= 0) & ~exits["lost"]]
    good = good[np.argsort(good["ts_ns"], kind="stable")]
    code = good["isa"].astype(np.int64) << 40 | good["exit_reason"].astype(np.int64) << 1 | good["to_userspace"]
    return _group("vm_exit", code, good["ts_ns"], good["dur_ns"]), int(guest[guest > 0].sum()) or None


def _late_exit(events: EventTable) -> bool | None:
    """Say whether kvm_exit is traced with interrupts on; None without exits or without irq flags."""
    entries, exits = events.rows("kvm_entry"), events.rows("kvm_exit")
    # kvm_entry is always traced with interrupts off: if its flag does not say so, the capture has no flags
    if not len(exits) or not (events.irq_flags[entries] & TRACE_FLAG_IRQS_OFF).any():
        return None
    return bool((events.irq_flags[exits] & TRACE_FLAG_IRQS_OFF).mean() < 0.5)


def _recorded(events: EventTable) -> frozenset[str]:
    """Return the kinds that happen at least once in fifty VM-exits: what they cost shows in every time."""
    enough = max(events.count("kvm_exit"), events.count("kvm_userspace_exit")) / 50
    return frozenset(kind.name for kind in events.kinds if events.count(kind.name) > enough)


def _run_rows(events: EventTable) -> NDArray[np.intp]:
    """Return the rows where a thread is back in KVM_RUN: the ioctl's entry, or the guest FPU's load."""
    if events.count("sys_enter_ioctl"):
        cmd = events.field("sys_enter_ioctl", "cmd").astype(np.uint32)
        rows: NDArray[np.intp] = events.rows("sys_enter_ioctl")[cmd == KVM_RUN]
    elif events.count("kvm_fpu"):
        rows = events.rows("kvm_fpu")[events.field("kvm_fpu", "load") != 0]
    else:
        rows = np.empty(0, np.intp)
    return rows


USERSPACE_DTYPE = np.dtype([
    ("ts_ns", np.int64), ("dur_ns", np.int64),  # to the thread's next KVM_RUN; -1: none
    ("tid", np.int32), ("cpu", np.int16), ("reason", np.int64), ("errno", np.int64), ("row", np.int64),
])  # fmt: skip


def userspace_intervals(events: EventTable) -> NDArray[Any]:
    """Return the time in the VMM after each kvm_userspace_exit, in recorded order.

    Returns
    -------
    ndarray[USERSPACE_DTYPE], shape (n,)
    """
    exits, runs = events.rows("kvm_userspace_exit"), _run_rows(events)
    found = np.zeros(len(exits), USERSPACE_DTYPE)
    if not len(exits):
        return found
    found["row"], found["ts_ns"], found["dur_ns"] = exits, events.ts_ns[exits], -1
    found["tid"], found["cpu"] = events.tid[exits], events.cpu[exits]
    for field in ("reason", "errno"):
        if events.has("kvm_userspace_exit", field):
            found[field] = events.field("kvm_userspace_exit", field)
    rows = np.concatenate((exits, runs))
    position = np.concatenate((np.arange(len(exits)), np.full(len(runs), -1)))
    order = np.lexsort((rows, group_codes(events.tid[rows])))
    rows, position = rows[order], position[order]
    paired = (position[:-1] >= 0) & (position[1:] < 0) & (events.tid[rows[:-1]] == events.tid[rows[1:]])
    dur_ns = events.ts_ns[rows[1:][paired]] - events.ts_ns[rows[:-1][paired]]
    found["dur_ns"][position[:-1][paired]] = np.maximum(dur_ns, -1)
    return found


def _userspace_samples(events: EventTable) -> dict[Key, Samples]:
    """Return the time the VMM took for each userspace exit, by its reason."""
    found = userspace_intervals(events)
    # with an errno the reason may be a stale one
    found = found[(found["dur_ns"] >= 0) & (found["errno"] == 0)]
    found = found[np.argsort(found["ts_ns"], kind="stable")]
    return _group("userspace", found["reason"] << 1 | 1, found["ts_ns"], found["dur_ns"])


def collect_samples(
    name: str, events: EventTable, *, budget_ns: Mapping[str, int] | None = None,
    transitions: Mapping[tuple[str, str, str], int] | None = None, violations: int = 0,
) -> RunSamples:  # fmt: skip
    """Collect what a recording contributes to a comparison.

    Parameters
    ----------
    name : str, for messages
    events : EventTable of the whole recording
    budget_ns : parts of the time budget summed over vCPUs, from the report
    transitions, violations : from the comparison with the model
    """
    samples, guest_ns = _vm_exit_samples(events)
    samples.update(_userspace_samples(events))
    start = int(events.ts_ns.min()) if len(events) else 0
    wall = int(events.ts_ns.max()) - start if len(events) else 0
    return RunSamples(
        name,
        start,
        wall,
        guest_ns,
        samples,
        dict(budget_ns or {}),
        dict(transitions or {}),
        violations,
        _late_exit(events),
        _recorded(events),
    )
