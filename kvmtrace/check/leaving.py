"""Leaving to userspace: allowed reasons (V7), deliveries that must not go on (J1), errno (V12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, USERSPACE
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.predicates import PREDICATE_COLUMNS, userspace_fields
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.exit_reasons import ISA_VMX
from kvmtrace.isa.shared import ANY_EXIT_USERSPACE, BUS_LOCK_USERSPACE
from kvmtrace.isa.vmx import VMX_VECTORING_EXEMPT
from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_TPR_ACCESS,
    describe_userspace_exit,
)
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.isa.base import ExitExpectation

    Group = NDArray[np.intp]

_U = np.uint64
APIC_TASKPRI = 0x80


def _bits(numbers: frozenset[int]) -> np.uint64:
    return _U(sum(1 << number for number in numbers))


_ANY = _bits(ANY_EXIT_USERSPACE - {KVM_EXIT_INTR})


def check_leaving(batch: Batch) -> None:
    """Check V7 and J1 for every exit."""
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        _check_reason(batch, group, row)
        if row.rip is RipClass.NEVER:
            _check_never_resumes(batch, group, row)
        if int(batch.exits.isa[group[0]]) == ISA_VMX and row.code not in VMX_VECTORING_EXEMPT:
            _check_vectoring(batch, group)
    _check_without_exit(batch)


def _check_reason(batch: Batch, group: Group, row: ExitExpectation) -> None:
    leaves, reason, errno = userspace_fields(batch, group)
    if not batch.has_field("kvm_userspace_exit", "reason") or not batch.has_field("kvm_userspace_exit", "errno"):
        batch.findings.check("V7", 0, np.count_nonzero(leaves))  # with errno < 0 the reason is stale
        return
    group, reason, errno = group[leaves], reason[leaves], errno[leaves]
    allowed = np.full(len(group), _ANY | _bits(row.userspace))
    if any(name.startswith("pio_matches") for name in row.checks):  # only string I/O touches memory
        plain = ~PREDICATE_COLUMNS["string"](batch, group) & batch.has_field("kvm_exit", "info1")
        allowed &= np.where(plain, ~_U(1 << KVM_EXIT_MMIO), ~_U(0))
    allowed |= np.where(batch.exits.bus_lock[group], _bits(BUS_LOCK_USERSPACE), _U(0))
    if not batch.recorded("kvm_entry"):  # the entry that failed was not seen
        allowed |= _U(1 << KVM_EXIT_FAIL_ENTRY)
    allowed |= np.where(batch.exits.vectoring[group] != 0, _U(1 << KVM_EXIT_INTERNAL_ERROR), _U(0))
    fits = (allowed >> np.clip(reason, 0, 63).astype(np.uint64)) & _U(1) == 1
    fits |= reason > 63
    fits &= ~((reason == KVM_EXIT_TPR_ACCESS) & ~_touched_tpr(batch, group))
    fits |= (reason == KVM_EXIT_INTR) & (not batch.capability.exact_errno)
    fits |= errno < 0  # the reason is stale then
    at = np.flatnonzero(~fits)
    batch.findings.check("V7", len(group))
    bad = group[at]

    def describe(i: int) -> tuple[str, str]:
        names = ", ".join(describe_userspace_exit(n, 0) for n in sorted(row.userspace | ANY_EXIT_USERSPACE))
        return (
            f"after {exit_name(batch, int(bad[i]))}: an in-kernel resume, -EINTR, or {names}",
            describe_userspace_exit(int(reason[at[i]]), int(errno[at[i]])),
        )

    batch.findings.violate("V7", batch.segments.start[batch.exits.seg[bad] + 1], describe)


def _touched_tpr(batch: Batch, group: Group) -> NDArray[np.bool_]:
    """Say which segments access the LAPIC's TPR; all, where that event was not recorded."""
    if not batch.recorded("kvm_apic") or not batch.has_field("kvm_apic", "reg"):
        return np.ones(len(group), bool)
    positions = batch.segments.positions("kvm_apic")
    tpr = batch.sequence.values("kvm_apic", "reg", positions) == APIC_TASKPRI
    marked = np.zeros(len(batch.segments), bool)
    marked[batch.segments.of[positions[tpr]]] = True
    return marked[batch.exits.seg[group]]


def _check_never_resumes(batch: Batch, group: Group, row: ExitExpectation) -> None:
    """Check that an exit which KVM cannot handle is not followed by a VM-entry."""
    known = batch.exits.next_kind[group] != 0
    bad = group[batch.exits.next_kind[group] == ENTRY]
    batch.findings.check("V7", np.count_nonzero(known) - np.count_nonzero(batch.exits.next_kind[group] == USERSPACE))
    names = ", ".join(describe_userspace_exit(n, 0) for n in sorted(row.userspace))
    batch.findings.violate(
        "V7",
        batch.segments.start[batch.exits.seg[bad] + 1],
        lambda i: (f"{exit_name(batch, int(bad[i]))} leaves to userspace: {names}", "VM-entry"),
    )


def _check_vectoring(batch: Batch, group: Group) -> None:
    """Check J1: valid IDT-vectoring with such a reason ends in KVM_EXIT_INTERNAL_ERROR."""
    group = group[batch.exits.vectoring[group] != 0]
    if not len(group):
        return
    bad = group[batch.exits.next_kind[group] == ENTRY]
    batch.findings.check("J1", len(group))
    batch.findings.violate(
        "J1",
        batch.segments.start[batch.exits.seg[bad] + 1],
        lambda i: (
            f"KVM_EXIT_INTERNAL_ERROR: {exit_name(batch, int(bad[i]))} interrupted the delivery of an event",
            f"VM-entry, after vectoring information {int(batch.exits.vectoring[bad[i]]):#x}",
        ),
    )


def _check_without_exit(batch: Batch) -> None:
    """Check second userspace exits without a VM-exit between: only I/O that goes on gives IO or MMIO."""
    segments = batch.segments
    if not batch.has_field("kvm_userspace_exit", "reason") or not batch.has_field("kvm_userspace_exit", "errno"):
        return
    if not batch.recorded("kvm_exit"):
        return
    pair = np.flatnonzero((segments.kind == USERSPACE) & (segments.next_kind == USERSPACE))
    reasons = batch.sequence.values("kvm_userspace_exit", "reason", segments.start[pair]).astype(np.int64)
    following = segments.start[pair + 1]
    later = batch.sequence.values("kvm_userspace_exit", "reason", following).astype(np.int64)
    errno = batch.sequence.values("kvm_userspace_exit", "errno", following).astype(np.int64)
    io = (KVM_EXIT_IO, KVM_EXIT_MMIO)
    bad = (errno == 0) & among(later, io) & ~among(reasons, io)
    bad &= ~segments.has("kvm_emulate_insn", "kvm_pio", "kvm_mmio")[pair]
    at = np.flatnonzero(bad)
    batch.findings.check("V7", len(pair))
    batch.findings.violate(
        "V7",
        following[at],
        lambda i: ("no further I/O without a VM-exit: none was pending", describe_userspace_exit(int(later[at[i]]), 0)),
    )


def check_errno(batch: Batch) -> None:
    """Check V12: kvm_userspace_exit.errno against the return value of the ioctl and of the system call."""
    if not batch.has_field("kvm_userspace_exit", "errno"):
        return
    for name, kind in (("ioctl ends", "kvm_vcpu_ioctl_return"), ("return to VMM", "sys_exit_ioctl")):
        if batch.has_field(kind, "ret"):
            _check_return(batch, name, kind)


def _check_return(batch: Batch, name: str, kind: str) -> None:
    """Compare with the first such return behind the userspace exit, if nothing else was called between."""
    segments, sequence = batch.segments, batch.sequence
    owners, positions = segments.firsts(name)
    mine = segments.kind[owners] == USERSPACE
    owners, positions = owners[mine], positions[mine]
    if not len(owners):
        return
    between = (
        among(
            sequence.cls,
            [CLASS["call ioctl"], CLASS["call KVM_RUN"], CLASS["KVM_RUN"], CLASS["vCPU ioctl"], CLASS["FPU load"]],
        )
        | sequence.broken
    )
    count = np.append(0, np.cumsum(between))
    start = segments.start[owners]
    direct = count[positions + 1] == count[start + 1]
    start, positions = start[direct], positions[direct]
    errno = sequence.values("kvm_userspace_exit", "errno", start).astype(np.int64)
    ret = sequence.values(kind, "ret", positions).astype(np.int64)
    at = np.flatnonzero(errno != ret)
    batch.findings.check("V12", len(start))
    batch.findings.violate(
        "V12",
        positions[at],
        lambda i: (f"return value {int(errno[at[i]])}, as kvm_userspace_exit said", f"{int(ret[at[i]])}"),
    )
