"""Conditions on a VM-exit's segment (model.rules.PREDICATES), each a column over a group of exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, USERSPACE
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

    Mask = NDArray[np.bool_]
    Group = NDArray[np.intp]

PFERR_RSVD = 1 << 3
_U = np.uint64
MSR_EXIT_SVM = 0x7C


def userspace_fields(batch: Batch, group: Group) -> tuple[Mask, NDArray[np.int64], NDArray[np.int64]]:
    """Return (segment ends in a userspace exit, its reason, its errno); -1 and 0 where it does not."""
    leaves = batch.exits.next_kind[group] == USERSPACE
    reason = np.full(len(group), -1, np.int64)
    errno = np.zeros(len(group), np.int64)
    position = batch.segments.start[batch.exits.seg[group[leaves]] + 1]
    if batch.has_field("kvm_userspace_exit", "reason"):
        reason[leaves] = batch.sequence.values("kvm_userspace_exit", "reason", position)
    if batch.has_field("kvm_userspace_exit", "errno"):
        errno[leaves] = batch.sequence.values("kvm_userspace_exit", "errno", position)
    return leaves, reason, errno


def _exception(batch: Batch, group: Group) -> Mask:
    if not batch.recorded("kvm_inj_exception"):
        return _retry(batch, group)
    return batch.exits.has("inject exception")[group]


def _userspace(batch: Batch, group: Group) -> Mask:
    leaves, _, errno = userspace_fields(batch, group)
    return leaves & (errno >= 0)


def _interrupted(batch: Batch, group: Group) -> Mask:
    leaves, _, errno = userspace_fields(batch, group)
    return leaves & (errno < 0)


def _retry(batch: Batch, group: Group) -> Mask:
    """Resumes at the same RIP, userspace exits between included; true as well where the RIP is not known."""
    rip = batch.exits.get("guest_rip")[group]
    known = (batch.exits.next_kind[group] == ENTRY) | (batch.segments.resume[batch.exits.seg[group]] >= 0)
    known &= batch.has_field("kvm_entry", "rip")
    found: Mask = ~known | (batch.exits.later_rip[group] == rip)
    return found


def _smm(batch: Batch, group: Group) -> Mask:
    return batch.exits.has("kvm_smm_transition")[group]


def _fastpath(batch: Batch, group: Group) -> Mask:
    """Kernels that trace kvm_exit late trace the fast path's kvm_msr before it, in the guest segment."""
    if batch.capability.traits.isdisjoint({"exit_irqs_on", "exit_irqs_unknown"}):
        return np.zeros(len(group), bool)
    before = batch.exits.seg[group] - 1
    there = (before >= 0) & batch.segments.linked[before]
    found: Mask = there & batch.segments.has("kvm_msr")[before] & (batch.exits.code[group] == MSR_EXIT_SVM)
    return found


def _emulated(batch: Batch, group: Group) -> Mask:
    return batch.exits.has("kvm_emulate_insn")[group] | (not batch.recorded("kvm_emulate_insn"))


def _string(batch: Batch, group: Group) -> Mask:
    info1 = batch.exits.get("info1")[group]
    bit = np.where(batch.exits.isa[group] == ISA_VMX, _U(16), _U(4))
    found: Mask = (info1 & bit) != 0
    return found


def _is_in(batch: Batch, group: Group) -> Mask:
    info1 = batch.exits.get("info1")[group]
    bit = np.where(batch.exits.isa[group] == ISA_VMX, _U(8), _U(1))
    found: Mask = (info1 & bit) != 0
    return found


def _pio_in_userspace(batch: Batch, group: Group) -> Mask:
    leaves, reason, _ = userspace_fields(batch, group)
    found: Mask = _is_in(batch, group) & leaves & among(reason, (KVM_EXIT_IO, -1))
    return found


def _userspace_pio(batch: Batch, group: Group) -> Mask:
    leaves, reason, _ = userspace_fields(batch, group)
    found: Mask = leaves & among(reason, (KVM_EXIT_IO, -1))
    return found


def _vector_is_not(vector: int) -> Callable[[Batch, Group], Mask]:
    def holds(batch: Batch, group: Group) -> Mask:
        info = batch.exits.get("intr_info")[group]
        hardware = (info & _U(0x7FF)) == _U(3 << 8 | vector)
        found: Mask = ~(hardware & ((info & _U(1 << 31)) != 0))
        return found

    return holds


def _icebp(batch: Batch, group: Group) -> Mask:
    info = batch.exits.get("intr_info")[group]
    found: Mask = ((info & _U(1 << 31)) != 0) & ((info & _U(0x7FF)) == _U(5 << 8 | 1))
    return found


def _no_mmio(batch: Batch, group: Group) -> Mask:
    found: Mask = (batch.exits.get("info1")[group] & _U(PFERR_RSVD)) == 0
    return found


def _fast_mmio(batch: Batch, group: Group) -> Mask:
    return batch.exits.has("kvm_fast_mmio")[group]


def _not_eoi(batch: Batch, group: Group) -> Mask:
    info1 = batch.exits.get("info1")[group]
    found: Mask = ~(((info1 & _U(0xFFF)) == 0xB0) & (((info1 >> _U(12)) & _U(15)) == 1))
    return found


def _zero_count(batch: Batch, group: Group) -> Mask:
    return _string(batch, group) & batch.exits.has("kvm_emulate_insn")[group]


def _no_decode_assist(batch: Batch, group: Group) -> Mask:
    found: Mask = ((batch.exits.get("info1")[group] >> _U(63)) == 0) & (batch.exits.isa[group] == ISA_SVM)
    return found


def _nested(batch: Batch, group: Group) -> Mask:
    return batch.nested[group]


def _unlike(predicate: Callable[[Batch, Group], Mask]) -> Callable[[Batch, Group], Mask]:
    return lambda batch, group: ~predicate(batch, group)


PREDICATE_COLUMNS: dict[str, Callable[[Batch, Group], Mask]] = {
    "exception": _exception,
    "userspace": _userspace,
    "interrupted": _interrupted,
    "retry": _retry,
    "nested": _nested,
    "smm": _smm,
    "fastpath": _fastpath,
    "zero_count": _zero_count,
    "emulated": _emulated,
    "string": _string,
    "not_string": _unlike(_string),
    "pio_in_userspace": _pio_in_userspace,
    "userspace_pio": _userspace_pio,
    "no_decode_assist": _no_decode_assist,
    "not_pf": _vector_is_not(14),
    "not_ud": _vector_is_not(6),
    "icebp": _icebp,
    "no_mmio": _no_mmio,
    "fast_mmio": _fast_mmio,
    "not_eoi": _not_eoi,
    "first_dr": _retry,
}


# predicates that look at info1
_ON_INFO1 = frozenset({"string", "not_string", "pio_in_userspace", "no_mmio", "not_eoi", "no_decode_assist"})
_ON_USERSPACE = frozenset({"userspace", "interrupted", "pio_in_userspace", "userspace_pio"})
_ON_INTR_INFO = frozenset({"not_pf", "not_ud"})


def _untold(batch: Batch, group: Group, name: str) -> Mask | None:
    """Return all true if kvm_exit lacks the field that decides: a duty that depends on it is lifted."""
    if name in _ON_USERSPACE and not batch.recorded("kvm_userspace_exit"):
        return np.ones(len(group), bool)
    field = "info1" if name in _ON_INFO1 else "intr_info" if name in _ON_INTR_INFO else "exit_reason"
    return None if batch.has_field("kvm_exit", field) else np.ones(len(group), bool)


def any_holds(names: tuple[str, ...], batch: Batch, group: Group) -> Mask:
    """Say for which exits of the group one of the named predicates holds."""
    held = np.zeros(len(group), bool)
    for name in names:
        untold = _untold(batch, group, name)
        held |= PREDICATE_COLUMNS[name](batch, group) if untold is None else untold
    return held


def complete(batch: Batch, group: Group) -> Mask:
    """Say which exits' segments are known to their end."""
    kind = batch.exits.next_kind[group]
    found: Mask = (kind == ENTRY) | (kind == USERSPACE) | (kind == EXIT)
    return found
