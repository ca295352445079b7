"""Conditions on a VM-exit (model.predicates.PREDICATES), each a column over a group of exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, USERSPACE
from kvmtrace.isa.words import (
    INTR_INFO_VALID,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_PRIV_SW_EXCEPTION,
    PFERR_RSVD,
    IoAccess,
)
from kvmtrace.kvm.psci import POWERS_OFF
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO
from kvmtrace.kvm.vectors import DB_VECTOR, PF_VECTOR, UD_VECTOR
from kvmtrace.model.predicates import PREDICATES
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Mask = NDArray[np.bool_]
    Group = NDArray[np.intp]
    Column = Callable[[Excerpt, Group], Mask]

_U = np.uint64
REGISTERED: dict[str, Column] = {}


def _predicate(name: str) -> Callable[[Column], Column]:
    """Register the function that evaluates a predicate of the exit tables."""
    assert name in PREDICATES, name

    def register(column: Column) -> Column:
        REGISTERED[name] = column
        return column

    return register


def needs_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the events and fields that predicates read."""
    return tuple(dict.fromkeys(need for name in names for need in PREDICATES[name].needs))


def holds(name: str, excerpt: Excerpt, group: Group) -> Mask:
    """Say for which exits of the group a predicate holds."""
    return REGISTERED[name](excerpt, group)


def any_holds(names: Iterable[str], excerpt: Excerpt, group: Group) -> Mask:
    """Say for which exits of the group one of the predicates holds."""
    held = np.zeros(len(group), bool)
    for name in names:
        held |= REGISTERED[name](excerpt, group)
    return held


def complete(excerpt: Excerpt, group: Group) -> Mask:
    """Say which exits' segments are known to their end."""
    found: Mask = among(excerpt.exits.next_kind[group], (ENTRY, USERSPACE, EXIT))
    return found


def userspace_fields(excerpt: Excerpt, group: Group) -> tuple[Mask, NDArray[np.int64], NDArray[np.int64]]:
    """Return (segment ends in a userspace exit, its reason, its errno); -1 and 0 where it does not."""
    leaves = excerpt.exits.next_kind[group] == USERSPACE
    reason = np.full(len(group), -1, np.int64)
    errno = np.zeros(len(group), np.int64)
    position = excerpt.segments.start[excerpt.exits.seg[group[leaves]] + 1]
    reason[leaves] = excerpt.values_or("kvm_userspace_exit", "reason", position, -1)
    errno[leaves] = excerpt.values_or("kvm_userspace_exit", "errno", position, 0)
    return leaves, reason, errno


def port_access(excerpt: Excerpt, group: Group) -> IoAccess:
    """Return what port accesses of one ISA the exits of the group are, as columns."""
    if not len(group):
        nothing = np.zeros(0, np.uint64)
        return IoAccess(nothing, nothing, nothing != 0, nothing != 0, nothing != 0)
    decode = excerpt.isa_of(group).decode_io
    assert decode is not None, "an ISA with port accesses decodes them"
    return decode(excerpt.exits.code[group], excerpt.exits.get("info1")[group])


def next_rip(excerpt: Excerpt, group: Group) -> NDArray[np.uint64]:
    """Return the RIP behind a port access that exits of one ISA tell."""
    return excerpt.exits.get(excerpt.isa_of(group).next_rip_field if len(group) else "info2")[group]


@_predicate("exception")
def _exception(excerpt: Excerpt, group: Group) -> Mask:
    if not excerpt.recorded("kvm_inj_exception"):
        return _retry(excerpt, group)
    return excerpt.exits.has("inject exception")[group]


@_predicate("userspace")
def _userspace(excerpt: Excerpt, group: Group) -> Mask:
    leaves, _, errno = userspace_fields(excerpt, group)
    return leaves & (errno >= 0)


@_predicate("interrupted")
def _interrupted(excerpt: Excerpt, group: Group) -> Mask:
    leaves, _, errno = userspace_fields(excerpt, group)
    return leaves & (errno < 0)


@_predicate("first_dr")
@_predicate("retry")
def _retry(excerpt: Excerpt, group: Group) -> Mask:
    """Resumes at the same RIP, userspace exits between included; true as well where it is not seen to resume."""
    known = (excerpt.exits.next_kind[group] == ENTRY) | (excerpt.segments.resume[excerpt.exits.seg[group]] >= 0)
    found: Mask = ~known | (excerpt.exits.later_rip[group] == excerpt.exits.get("guest_rip")[group])
    return found


@_predicate("fastpath")
def _fastpath(excerpt: Excerpt, group: Group) -> Mask:
    """Kernels that trace kvm_exit late trace the fast path's kvm_msr before it, in the guest segment."""
    if excerpt.capability.traits.isdisjoint({"exit_irqs_on", "exit_irqs_unknown"}):
        return np.zeros(len(group), bool)
    before = excerpt.exits.seg[group] - 1
    there = (before >= 0) & excerpt.segments.linked[before]
    found: Mask = there & excerpt.segments.has("kvm_msr")[before] & excerpt.of_kind("msr")[group]
    return found


@_predicate("emulated")
def _emulated(excerpt: Excerpt, group: Group) -> Mask:
    return excerpt.exits.has("kvm_emulate_insn")[group]


@_predicate("string")
def _string(excerpt: Excerpt, group: Group) -> Mask:
    found: Mask = port_access(excerpt, group).string
    return found


@_predicate("not_string")
def _not_string(excerpt: Excerpt, group: Group) -> Mask:
    return ~_string(excerpt, group)


@_predicate("pio_in_userspace")
def _pio_in_userspace(excerpt: Excerpt, group: Group) -> Mask:
    found: Mask = ~port_access(excerpt, group).write & _userspace_pio(excerpt, group)
    return found


@_predicate("userspace_pio")
def _userspace_pio(excerpt: Excerpt, group: Group) -> Mask:
    leaves, reason, _ = userspace_fields(excerpt, group)
    found: Mask = leaves & (reason == KVM_EXIT_IO)
    return found


def _interrupted_by(excerpt: Excerpt, group: Group, kind: int, vector: int) -> Mask:
    """Say which exits' interruption information is that of an event."""
    info = excerpt.exits.get("intr_info")[group]
    found: Mask = ((info & _U(0x7FF)) == _U(kind << 8 | vector)) & ((info & _U(INTR_INFO_VALID)) != 0)
    return found


@_predicate("not_pf")
def _not_pf(excerpt: Excerpt, group: Group) -> Mask:
    return ~_interrupted_by(excerpt, group, INTR_TYPE_HARD_EXCEPTION, PF_VECTOR)


@_predicate("not_ud")
def _not_ud(excerpt: Excerpt, group: Group) -> Mask:
    return ~_interrupted_by(excerpt, group, INTR_TYPE_HARD_EXCEPTION, UD_VECTOR)


@_predicate("icebp")
def _icebp(excerpt: Excerpt, group: Group) -> Mask:
    return _interrupted_by(excerpt, group, INTR_TYPE_PRIV_SW_EXCEPTION, DB_VECTOR)


@_predicate("no_mmio")
def _no_mmio(excerpt: Excerpt, group: Group) -> Mask:
    found: Mask = (excerpt.exits.get("info1")[group] & _U(PFERR_RSVD)) == 0
    return found


@_predicate("fast_fault")
def _fast_fault(excerpt: Excerpt, group: Group) -> Mask:
    if excerpt.recorded("kvm_fast_mmio"):
        return _fast_mmio(excerpt, group)
    found: Mask = ~excerpt.exits.has("kvm_page_fault")[group] & ~_retry(excerpt, group)
    return found


@_predicate("vectored_mmio")
def _vectored_mmio(excerpt: Excerpt, group: Group) -> Mask:
    found: Mask = ~_no_mmio(excerpt, group) & (excerpt.exits.vectoring[group] != 0)
    return found


@_predicate("fast_mmio")
def _fast_mmio(excerpt: Excerpt, group: Group) -> Mask:
    return excerpt.exits.has("kvm_fast_mmio")[group]


@_predicate("powered_off")
def _powered_off(excerpt: Excerpt, group: Group) -> Mask:
    position = excerpt.first_in_exit("kvm_hvc_arm64", group)
    found: Mask = np.zeros(len(group), bool)
    there = position >= 0
    called = excerpt.sequence.values("kvm_hvc_arm64", "r0", position[there]).astype(np.uint64)
    found[there] = among(called & _U(0xFFFFFFFF), POWERS_OFF)
    return found


@_predicate("sleeps")
def _sleeps(excerpt: Excerpt, group: Group) -> Mask:
    if not excerpt.recorded("sched_switch"):
        return np.ones(len(group), bool)
    return excerpt.exits.has("sched_switch")[group]
