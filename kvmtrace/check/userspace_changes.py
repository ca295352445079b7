"""What userspace may have changed between two KVM_RUNs: registers, pending events, the LAPIC."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm.ioctls import IOCTL_NUMBERS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

_SETTERS = (
    "KVM_SET_REGS",
    "KVM_SET_SREGS",
    "KVM_SET_SREGS2",
    "KVM_SET_VCPU_EVENTS",
    "KVM_SET_MP_STATE",
    "KVM_SET_NESTED_STATE",
    "KVM_SET_LAPIC",
    "KVM_INTERRUPT",
    "KVM_SET_GUEST_DEBUG",
    "KVM_SMI",
)
_REGISTER_SETTERS = ("KVM_SET_REGS", "KVM_SET_SREGS", "KVM_SET_SREGS2")
# traced while a VMM writes the whole state back, after a reset for example
_TRACES = ("kvm_hv_stimer_start_one_shot", "kvm_hv_stimer_start_periodic", "kvm_hv_syndbg_get_msr", "kvm_track_tsc")


@lru_cache
def _numbers(names: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([IOCTL_NUMBERS[name] for name in names if name in IOCTL_NUMBERS], np.int64)


def ioctl_kind(batch: Batch) -> str | None:
    """Return the event kind that shows the VMM's ioctls, None if none was recorded."""
    for kind in ("sys_enter_ioctl", "kvm_vcpu_ioctl"):
        if kind in batch.capability.recorded and batch.has_field(kind, "cmd"):
            return kind
    return None


def setter_rows(batch: Batch) -> NDArray[np.intp]:
    """Return the table rows, of any thread, at which an ioctl changes a vCPU's state."""
    kind = ioctl_kind(batch)
    table = batch.sequence.table
    if kind is None:
        return np.empty(0, np.intp)
    cmd = table.field(kind, "cmd").astype(np.int64) & 0xFFFFFFFF
    rows: NDArray[np.intp] = table.rows(kind)[among(cmd, _numbers(_SETTERS))]
    return rows


def sets_registers(batch: Batch) -> bool:
    """Say whether the VMM was seen to set registers by ioctl, hence not by KVM_CAP_SYNC_REGS."""
    kind = ioctl_kind(batch)
    if kind is None:
        return False
    cmd = batch.sequence.table.field(kind, "cmd").astype(np.int64) & 0xFFFFFFFF
    return bool(among(cmd, _numbers(_REGISTER_SETTERS)).any())


def may_have_changed(batch: Batch, first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say whether a vCPU's state may have been set between two sequence positions each.

    Parameters
    ----------
    first, last : intp, sequence positions of one thread, first <= last
    """
    sequence, segments = batch.sequence, batch.segments
    if ioctl_kind(batch) is None:
        marks = np.zeros(len(sequence) + 1, np.int64)
        for name in _TRACES:
            marks[segments.positions(name)] = 1
        count = np.cumsum(marks)
        changed: NDArray[np.bool_] = count[last] != count[first]
        return changed
    rows = setter_rows(batch)
    between = np.searchsorted(rows, sequence.row[last]) - np.searchsorted(rows, sequence.row[first])
    found: NDArray[np.bool_] = between != 0
    return found
