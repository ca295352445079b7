"""Fields that must agree beyond the exit tables' checks: vCPU ids, #GP flags, EOI origins, wake-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT
from kvmtrace.check.decoding import failed_segments
from kvmtrace.check.findings import constant
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.guest_mode import vcpu_ids
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.kvm.vectors import GP_VECTOR
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.check.findings import Describe

_U = np.uint64
APIC_EOI = 0xB0
EOI_INDUCED, AVIC_UNACCELERATED = 45, 0x402  # exits whose EOI the hardware began
TASK_INTERRUPTIBLE = 1
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17, 21, 29, 30)  # x86_exception_has_error_code (x86.c)
HLT = {ISA_VMX: 12, ISA_SVM: 0x78}


def check_consistency(batch: Batch) -> None:
    """Check these fields under V5, V11, V4 and V12."""
    _check_vcpu_ids(batch)
    _check_isa(batch)
    _check_gp(batch)
    _check_intr_info(batch)
    _check_error_codes(batch)
    _check_single_pio(batch)
    _check_eoi_origin(batch)
    _check_pv_eoi(batch)
    _check_wake_up(batch)
    _check_errno_range(batch)


def _check_vcpu_ids(batch: Batch) -> None:
    """Check that follow-ups name the vCPU that left the guest last."""
    sequence, segments = batch.sequence, batch.segments
    if not (batch.has_field("kvm_exit", "vcpu_id") and batch.has_field("kvm_entry", "vcpu_id")):
        return
    told = (segments.kind == ENTRY) | (segments.kind == EXIT)
    last = np.maximum.accumulate(np.where(told, np.arange(len(segments)), -1))
    ids = vcpu_ids(batch, np.arange(len(segments)))
    for kind, name in (
        ("kvm_page_fault", "vcpu_id"),
        ("kvm_eoi", "apicid"),
        ("kvm_pv_eoi", "apicid"),
        ("kvm_smm_transition", "vcpu_id"),
    ):
        if not batch.has_field(kind, name):
            continue
        positions = batch.segments.positions(kind)
        owner = last[segments.of[positions]]
        known = (owner >= 0) & (sequence.thread[segments.start[owner]] == sequence.thread[positions])
        positions, owner = positions[known], owner[known]
        found = sequence.values(kind, name, positions).astype(np.int64)
        expected = ids[owner]
        at = np.flatnonzero(found != expected)
        batch.findings.check("V5", len(positions))
        batch.findings.violate("V5", positions[at], _numbers(f"{kind}.{name}", expected[at], found[at]))


def _numbers(what: str, expected: NDArray[np.int64], found: NDArray[np.int64]) -> Describe:
    """Return a description of unequal numbers."""
    return lambda i: (f"{what} {int(expected[i])}, the vCPU that this thread runs", f"{int(found[i])}")


def _check_isa(batch: Batch) -> None:
    """Check that all exits are of one ISA."""
    isa = batch.exits.isa
    if not len(isa) or not batch.capability.exact_errno:  # tools may drop what they cannot name
        return
    common = int(np.bincount(isa).argmax())
    bad = np.flatnonzero(isa != common)
    batch.findings.violate("V5", batch.exits.start[bad], lambda i: (f"isa {common}", f"isa {int(isa[bad[i]])}"))


def _check_gp(batch: Batch) -> None:
    """Check that where kvm_msr says (#GP), #GP is injected and nothing skipped; else neither."""
    exits = batch.exits
    if not batch.has_field("kvm_msr", "exception") or not batch.recorded("kvm_inj_exception", "kvm_msr"):
        return
    if not (batch.has_field("kvm_exit", "guest_rip") and batch.has_field("kvm_entry", "rip")):
        return
    group = np.flatnonzero((exits.next_kind == ENTRY) & ~batch.nested & ~exits.has("kvm_smm_transition"))
    first = batch.first_in_exit("kvm_msr", group)
    injected = batch.first_in_exit("inject exception", group)
    group, first, injected = group[first >= 0], first[first >= 0], injected[first >= 0]
    refused = batch.sequence.values("kvm_msr", "exception", first) != 0
    vector = np.full(len(group), -1, np.int64)
    there = injected >= 0
    vector[there] = batch.sequence.values("kvm_inj_exception", "exception", injected[there])
    stayed = exits.resume_rip[group] == exits.get("guest_rip")[group]
    wrong = np.where(refused, (vector != GP_VECTOR) | ~stayed, (vector == GP_VECTOR) & stayed)
    at = np.flatnonzero(wrong)
    batch.findings.check("V5", len(group))
    batch.findings.violate(
        "V5",
        first[at],
        lambda i: (
            "kvm_msr (#GP) if and only if #GP is injected at the same rip",
            f"exception {int(refused[at[i]])}, injected {int(vector[at[i]])}",
        ),
    )


def _check_intr_info(batch: Batch) -> None:
    """Check that EXCEPTION_NMI and EXTERNAL_INTERRUPT carry information of their own type."""
    exits = batch.exits
    if not batch.has_field("kvm_exit", "intr_info"):
        return
    group = np.flatnonzero((exits.isa == ISA_VMX) & (exits.code <= 1) & ~exits.failed_entry & ~batch.nested)
    info = exits.get("intr_info")[group]
    external = (info >> _U(8)) & _U(7) == 0
    bad = group[((info & _U(1 << 31)) == 0) | (external != (exits.code[group] == 1))]
    batch.findings.check("V5", len(group))
    batch.findings.violate(
        "V5",
        exits.start[bad],
        lambda i: (
            f"intr_info valid, of the type of {exit_name(batch, int(bad[i]))}",
            f"{int(exits.get('intr_info')[bad[i]]):#x}",
        ),
    )


def _check_error_codes(batch: Batch) -> None:
    """Check that only exceptions that have an error code are injected with one."""
    if not (batch.has_field("kvm_inj_exception", "has_error") and batch.has_field("kvm_inj_exception", "exception")):
        return
    positions = batch.segments.positions("inject exception")
    vector = batch.sequence.values("kvm_inj_exception", "exception", positions).astype(np.int64)
    has_error = batch.sequence.values("kvm_inj_exception", "has_error", positions) != 0
    at = np.flatnonzero(has_error & ~among(vector, WITH_ERROR_CODE))
    batch.findings.check("V5", len(positions))
    batch.findings.violate(
        "V5", positions[at], lambda i: (f"no error code: exception {int(vector[at[i]])} has none", "has_error 1")
    )


def _check_single_pio(batch: Batch) -> None:
    """Check that a port access has count 1 where no string instruction was decoded."""
    exits, segments = batch.exits, batch.segments
    if not batch.has_field("kvm_pio", "count"):
        return
    positions = segments.positions("kvm_pio")
    owner = segments.of[positions]
    string = segments.chain_mask[owner] & _U(1 << CLASS["kvm_emulate_insn"]) != 0
    number = np.searchsorted(exits.start, positions) - 1
    plain = ~string & (number >= 0) & batch.recorded("kvm_emulate_insn")
    count = batch.sequence.values("kvm_pio", "count", positions)
    at = np.flatnonzero(plain & (count != 1) & segments.chain_known[owner])
    batch.findings.violate(
        "V5", positions[at], lambda i: ("kvm_pio.count 1: no string instruction was decoded", f"{int(count[at[i]])}")
    )


def _check_eoi_origin(batch: Batch) -> None:
    """Check that an EOI is a write of the EOI register, or found in the paravirtual flag, or hardware's."""
    sequence, segments, exits = batch.sequence, batch.segments, batch.exits
    if not batch.recorded("kvm_apic", "kvm_pv_eoi") or not batch.has_field("kvm_apic", "reg"):
        return
    positions = segments.positions("kvm_eoi")
    inside = (positions > 0) & (positions < len(sequence) - 1)
    positions = positions[inside & ~sequence.first[positions] & ~sequence.broken[positions]]
    positions = positions[~sequence.broken[np.minimum(positions + 1, len(sequence) - 1)]]
    positions = positions[sequence.thread[positions + 1] == sequence.thread[positions]]
    by_write = np.zeros(len(positions), bool)
    before = sequence.cls[positions - 1] == CLASS["kvm_apic"]
    by_write[before] = sequence.values("kvm_apic", "reg", positions[before] - 1) == APIC_EOI
    by_flag = sequence.cls[positions + 1] == CLASS["kvm_pv_eoi"]
    number = np.searchsorted(exits.start, positions) - 1
    code = exits.code[np.maximum(number, 0)] if len(exits) else np.zeros(len(positions), np.int64)
    by_hardware = among(code, (EOI_INDUCED, AVIC_UNACCELERATED)) | (number < 0)
    bad = positions[~(by_write | by_flag | by_hardware)]
    batch.findings.check("V11", len(positions))
    batch.findings.violate(
        "V11", bad, lambda _: ("kvm_apic write of the EOI register before, or kvm_pv_eoi after", "kvm_eoi by itself")
    )


def _check_pv_eoi(batch: Batch) -> None:
    """Check that kvm_pv_eoi directly follows kvm_eoi of its vector (apic_sync_pv_eoi_from_guest)."""
    sequence, segments = batch.sequence, batch.segments
    if not batch.recorded("kvm_eoi") or not batch.has_field("kvm_pv_eoi", "vector"):
        return
    positions = segments.positions("kvm_pv_eoi")
    positions = positions[(positions > 0) & ~sequence.first[positions] & ~sequence.broken[positions]]
    vector = sequence.values("kvm_pv_eoi", "vector", positions).astype(np.int64)
    ended = np.full(len(positions), -2, np.int64)
    after = sequence.cls[positions - 1] == CLASS["kvm_eoi"]
    ended[after] = sequence.values("kvm_eoi", "vector", positions[after] - 1).astype(np.int32)
    at = np.flatnonzero(ended != vector.astype(np.int32))
    batch.findings.check("V11", len(positions))
    batch.findings.violate(
        "V11",
        positions[at],
        lambda i: (
            f"kvm_eoi of vector {int(vector[at[i]])} directly before kvm_pv_eoi",
            "none" if ended[at[i]] == -2 else f"vector {int(ended[at[i]])}",
        ),
    )


def _check_wake_up(batch: Batch) -> None:
    """Check that a halted vCPU that slept traces kvm_vcpu_wakeup when it goes on (kvm_vcpu_halt)."""
    exits, segments, sequence = batch.exits, batch.segments, batch.sequence
    if not batch.recorded("kvm_vcpu_wakeup", "sched_switch") or not batch.has_field("sched_switch", "prev_state"):
        return
    halted = np.zeros(len(exits), bool)
    for isa, code in HLT.items():
        halted |= (exits.isa == isa) & (exits.code == code)
    halted &= ~batch.nested & ~failed_segments(batch)[exits.seg]
    group = np.flatnonzero(halted & (exits.next_kind != 0) & exits.has("sched_switch"))
    switches = segments.positions("sched_switch")
    sleeps = sequence.values("sched_switch", "prev_state", switches).astype(np.int64) & 0xFF
    asleep = np.zeros(len(segments), bool)
    asleep[segments.of[switches[sleeps == TASK_INTERRUPTIBLE]]] = True
    group = group[asleep[exits.seg[group]]]
    bad = group[~exits.has("wake-up")[group]]
    batch.findings.check("V4", len(group))
    batch.findings.violate(
        "V4",
        segments.start[exits.seg[bad] + 1],
        lambda i: (f"kvm_vcpu_wakeup: {exit_name(batch, int(bad[i]))} put the thread to sleep", "none"),
    )
    if batch.has_field("kvm_vcpu_wakeup", "waited"):
        wakes = segments.positions("wake-up")
        waited = np.zeros(len(segments), bool)
        waited[segments.of[wakes[sequence.values("kvm_vcpu_wakeup", "waited", wakes) != 0]]] = True
        polled = batch.first_in_exit("wake-up", group)
        polled = polled[(polled >= 0) & ~waited[exits.seg[group]]]
        batch.findings.violate(
            "V4", polled, constant("kvm_vcpu_wakeup with waited 1: the thread slept", "waited 0 (polled)")
        )


def _check_errno_range(batch: Batch) -> None:
    """Check that KVM_RUN returns 0 or a negative errno."""
    if not batch.has_field("kvm_userspace_exit", "errno"):
        return
    positions = batch.segments.positions("userspace exit")
    errno = batch.sequence.values("kvm_userspace_exit", "errno", positions).astype(np.int64)
    at = np.flatnonzero((errno > 0) | (errno < -4095))
    batch.findings.violate("V12", positions[at], lambda i: ("errno 0 or negative", f"{int(errno[at[i]])}"))
