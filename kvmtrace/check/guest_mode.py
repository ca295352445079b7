"""In guest mode: no scheduling or migration (V3), one vCPU (V2), forced exits come at once (J8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

# after a forced exit was asked for. VMX: the preemption timer at zero, and what has a higher priority:
# EXCEPTION_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, INIT, SIPI, windows, TPR_BELOW_THRESHOLD, MTF
ASYNCHRONOUS: dict[int, frozenset[int]] = {
    ISA_VMX: frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, 37, 41, 43, 52}),
    ISA_SVM: frozenset({0x60, 0x61, 0x62, 0x63, 0x64, 0x7F}),
}


def check_guest_mode(batch: Batch) -> None:
    """Check V3, J8, and that entry and exit name the same vCPU (V2)."""
    segments = batch.segments
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    _check_vcpu(batch, inside, inside + 1)
    back = np.flatnonzero((segments.kind == EXIT) & (segments.next_kind == ENTRY))
    _check_vcpu(batch, back, back + 1)
    _check_scheduling(batch, inside)
    _check_immediate_exit(batch, inside)


def vcpu_ids(batch: Batch, numbers: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the vCPU that each segment's kvm_entry or kvm_exit names, -1 for other segments."""
    ids: NDArray[np.int64] = batch.once("vCPU ids", _vcpu_ids)[numbers]
    return ids


def _vcpu_ids(batch: Batch) -> NDArray[np.int64]:
    segments = batch.segments
    ids = np.full(len(segments), -1, np.int64)
    for kind, code in (("kvm_entry", ENTRY), ("kvm_exit", EXIT)):
        if batch.has_field(kind, "vcpu_id"):
            mine = np.flatnonzero(segments.kind == code)
            ids[mine] = batch.sequence.values(kind, "vcpu_id", segments.start[mine])
    return ids


def _check_vcpu(batch: Batch, first: NDArray[np.intp], second: NDArray[np.intp]) -> None:
    if not (batch.has_field("kvm_entry", "vcpu_id") and batch.has_field("kvm_exit", "vcpu_id")):
        return
    one, other = vcpu_ids(batch, first), vcpu_ids(batch, second)
    at = np.flatnonzero(one != other)
    batch.findings.violate(
        "V2",
        batch.segments.start[second[at]],
        lambda i: (f"vCPU {one[at[i]]}, which this thread runs", f"vCPU {other[at[i]]}"),
    )


def _check_scheduling(batch: Batch, inside: NDArray[np.intp]) -> None:
    if batch.capability.exit_irqs_off is not True:
        batch.findings.check("V3", 0, len(inside))
        return
    segments, cpu = batch.segments, batch.sequence.cpu
    switched = segments.has("sched_switch")[inside]
    start, stop = segments.start[inside], segments.start[inside + 1]
    moved = cpu[start] != cpu[stop]
    at = np.flatnonzero(switched | moved)
    batch.findings.check("V3", len(inside))
    first_switch = segments.first_in("sched_switch")[inside[at]]
    where = np.where(switched[at], first_switch, stop[at])
    batch.findings.violate(
        "V3",
        where,
        lambda i: (
            f"kvm_exit on CPU {cpu[start[at[i]]]}, without scheduling since kvm_entry",
            "sched_switch in guest mode" if switched[at[i]] else f"kvm_exit on CPU {cpu[stop[at[i]]]}",
        ),
    )


def _check_immediate_exit(batch: Batch, inside: NDArray[np.intp]) -> None:
    if not batch.has_field("kvm_entry", "immediate_exit"):
        return
    start = batch.segments.start[inside]
    forced = batch.sequence.values("kvm_entry", "immediate_exit", start) != 0
    exits = np.searchsorted(batch.exits.seg, inside[forced] + 1)
    usable = exits[~batch.nested[exits]]
    # SVM forces the exit by an interrupt to itself, which may arrive after some instructions
    vmx = usable[batch.exits.isa[usable] == ISA_VMX]
    expected = among(batch.exits.code[vmx], ASYNCHRONOUS[ISA_VMX]) | (batch.exits.vectoring[vmx] != 0)
    bad = vmx[~expected]
    batch.findings.check("J8", len(vmx), len(usable) - len(vmx))
    batch.findings.violate(
        "J8",
        batch.exits.start[bad],
        lambda i: (
            "PREEMPTION_TIMER, or an exit of higher priority, or one during event delivery",
            exit_name(batch, int(bad[i])),
        ),
    )
