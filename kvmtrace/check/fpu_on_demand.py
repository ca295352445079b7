"""Kernels before 4.15 load the guest's FPU on demand and put it away after kvm_userspace_exit: kvm_fpu is not judged.

Source: vcpu_put() called kvm_put_guest_fpu() until "KVM: x86: fix guest fpu handling" moved it into
kvm_arch_vcpu_ioctl_run() (4.15). The recording shows it: unload directly behind kvm_userspace_exit, never before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.model.ordering import FPU_BRACKET
from kvmtrace.table.event_table import EventTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

FPU = "kvm_fpu"
HIDDEN = "kvm_fpu of a kernel before 4.15"


def is_on_demand(table: EventTable) -> bool | None:
    """Say whether a recording's kernel loads the FPU on demand, None if this part of it does not tell."""
    if not table.count(FPU) or not table.count("kvm_userspace_exit") or not table.has(FPU, "load"):
        return None
    rows = np.sort(np.concatenate([table.rows(kind) for kind in FPU_BRACKET]))
    rows = rows[np.argsort(table.tid[rows], kind="stable")]
    same = table.tid[rows[1:]] == table.tid[rows[:-1]]
    unload = np.zeros(len(table), bool)
    unload[table.rows(FPU)] = table.field(FPU, "load") == 0
    leaves = _is(table, rows, "kvm_userspace_exit")
    before = (unload[rows[:-1]] & leaves[1:] & same).any()
    after = (leaves[:-1] & unload[rows[1:]] & same).any()
    return bool(after) if bool(before) != bool(after) else (None if not before else False)


def _is(table: EventTable, rows: NDArray[np.intp], kind: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = table.kind[rows] == table.kind_index[kind]
    return found


def without_fpu(table: EventTable) -> EventTable:
    """Return the table with kvm_fpu under a name that no rule knows."""
    kinds = [replace(kind, name=HIDDEN) if kind.name == FPU else kind for kind in table.kinds]
    columns = {name: getattr(table, name) for name in ("ts_ns", "cpu", "tid", "kind", "irq_flags", "preempt_count")}
    return EventTable(columns, kinds, table.payloads)
