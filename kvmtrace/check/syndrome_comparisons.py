"""Comparisons with the syndrome that a follow-up carries (model.predicates.CHECKS); kvm_exit tells only its class.

The follow-ups of one VM-exit are held against each other: kvm_guest_fault and kvm_handle_sys_reg carry the syndrome,
and what KVM does about the exit has to be what the syndrome says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.exit_conditions import userspace_fields
from kvmtrace.check.findings import constant
from kvmtrace.check.mmio_chain import MMIO_WRITE
from kvmtrace.check.payload_comparisons import (
    REGISTERED,
    compare_field,
    comparison,
    report_unequal,
    with_follow_up,
)
from kvmtrace.kvm.userspace_exits import KVM_EXIT_ARM_NISV, KVM_EXIT_MMIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.words import AbortAccess

    Group = NDArray[np.intp]
    Positions = NDArray[np.intp]

_U = np.uint64
_PAGE_OFFSET = _U(0xFFF)
FAULT, TRAP = "kvm_guest_fault", "kvm_handle_sys_reg"
COMPARISONS = REGISTERED  # all there are, those of this file included

compare_field("abort_pc", FAULT, "vcpu_pc", "guest_rip")
compare_field("trap_pc", "kvm_sys_access", "vcpu_pc", "guest_rip")
compare_field("wait_pc", "kvm_wfx_arm64", "vcpu_pc", "guest_rip")
compare_field("call_pc", "kvm_hvc_arm64", "vcpu_pc", "guest_rip")


def _syndromes(excerpt: Excerpt, kind: str, positions: Positions) -> NDArray[np.uint64]:
    return excerpt.sequence.values(kind, "hsr", positions).astype(np.uint64)


def _check_class(excerpt: Excerpt, group: Group, found: Found, kind: str) -> None:
    exits, positions = with_follow_up(excerpt, group, kind)
    if not len(exits):
        return
    of_class = excerpt.isa_of(exits).syndrome_code
    assert of_class is not None, "an ISA whose follow-ups carry syndromes"
    told, code = of_class(_syndromes(excerpt, kind, positions)), excerpt.exits.code[exits]
    at = np.flatnonzero(told != code.astype(np.uint64))
    isa = excerpt.isa_of(exits)
    found.check(len(exits))
    found.violate(
        positions[at],
        lambda i: (
            f"{kind} with a syndrome of {excerpt.exit_name(exits[at[i]])}",
            f"one of {isa.describe(int(told[at[i]]))}",
        ),
    )


@comparison("abort_class")
def _abort_class(excerpt: Excerpt, group: Group, found: Found) -> None:
    _check_class(excerpt, group, found, FAULT)


@comparison("trap_class")
def _trap_class(excerpt: Excerpt, group: Group, found: Found) -> None:
    _check_class(excerpt, group, found, TRAP)


def _faults(excerpt: Excerpt, group: Group) -> tuple[Group, Positions, AbortAccess]:
    """Return the exits with a fault, its position, and what its syndrome says."""
    exits, positions = with_follow_up(excerpt, group, FAULT)
    decode = excerpt.isa_of(group).decode_abort
    assert decode is not None, "an ISA whose faults have a syndrome"
    return exits, positions, decode(_syndromes(excerpt, FAULT, positions))


@comparison("abort_mmio")
def _abort_mmio(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Check the first access of each exit; the completion of a read is V8's."""
    exits, positions = with_follow_up(excerpt, group, "kvm_mmio")
    exits, faults, access = _faults(excerpt, exits) if len(exits) else (exits, positions, None)
    positions = excerpt.first_in_exit("kvm_mmio", exits)
    if access is None:
        return
    values = excerpt.sequence.values
    offset = values(FAULT, "hxfar", faults).astype(np.uint64) & _PAGE_OFFSET
    address = (values(FAULT, "ipa", faults).astype(np.uint64) & ~_PAGE_OFFSET) | offset
    report_unequal(excerpt, found, "kvm_mmio.gpa", (exits, positions), address)
    report_unequal(excerpt, found, "kvm_mmio.len", (exits, positions), access.size.astype(np.uint64))
    writes = values("kvm_mmio", "type", positions) == MMIO_WRITE
    early = np.flatnonzero(positions < faults)
    found.violate(positions[early], constant("kvm_guest_fault before what is done about it", "kvm_mmio first"))
    # a device in the kernel that answers a read makes a second event of it
    more = np.flatnonzero(excerpt.segment_counts("kvm_mmio")[excerpt.exits.seg[exits]] > np.where(writes, 1, 2))
    found.violate(positions[more], constant("one access: KVM does not divide it", "several kvm_mmio"))
    at = np.flatnonzero((writes != (access.write != 0)) | (access.valid == 0))
    found.violate(
        positions[at],
        lambda i: (
            f"a {'write' if access.write[at[i]] else 'read'}, as the fault's syndrome says"
            if access.valid[at[i]]
            else "no kvm_mmio: the fault's syndrome does not describe the access",
            "a write" if writes[at[i]] else "a read",
        ),
    )


@comparison("abort_fetch")
def _abort_fetch(excerpt: Excerpt, group: Group, found: Found) -> None:
    exits, faults, access = _faults(excerpt, group)
    far = excerpt.sequence.values(FAULT, "hxfar", faults).astype(np.uint64)
    into = (far - excerpt.exits.get("guest_rip")[exits]) & _PAGE_OFFSET  # a Thumb instruction has two halves
    at = np.flatnonzero((access.described != 0) | (into > _U(2)))
    found.check(len(exits))
    found.violate(
        faults[at],
        constant("an instruction's fault, at the program counter", "the address or description of a data access"),
    )


@comparison("abort_left")
def _abort_left(excerpt: Excerpt, group: Group, found: Found) -> None:
    exits, faults, access = _faults(excerpt, group)
    _, reason, errno = userspace_fields(excerpt, exits)
    served = (errno >= 0) & ((reason == KVM_EXIT_ARM_NISV) | (reason == KVM_EXIT_MMIO))
    at = np.flatnonzero(served & ((reason == KVM_EXIT_MMIO) != (access.valid != 0)))
    found.check(int(np.count_nonzero(served)))

    def describe(i: int) -> tuple[str, str]:
        told = access.valid[at[i]]
        expected = (
            "KVM_EXIT_MMIO: the syndrome describes" if told else "KVM_EXIT_ARM_NISV: the syndrome does not describe"
        )
        return f"{expected} the access", "KVM_EXIT_ARM_NISV" if told else "KVM_EXIT_MMIO"

    found.violate(faults[at], describe)


@comparison("access_flag_address")
def _access_flag(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Check that access flag faults, and only they, are handled as such."""
    exits, faults, access = _faults(excerpt, group)
    first = excerpt.first_in_exit("kvm_access_fault", exits)
    handled = first >= 0
    values = excerpt.sequence.values
    page = values(FAULT, "ipa", faults[handled]).astype(np.uint64) & ~_PAGE_OFFSET
    of_page = values("kvm_access_fault", "ipa", first[handled]).astype(np.uint64) & ~_PAGE_OFFSET
    wrong = np.zeros(len(exits), bool)
    wrong[handled] = (page != of_page) | ~access.access_flag[handled]
    # without memory there, the access is MMIO, or a table walk that the guest is told of
    elsewhere = excerpt.exits.has("kvm_mmio")[exits] | (access.table_walk != 0)
    wrong |= access.access_flag & ~handled & ~elsewhere & (excerpt.exits.next_kind[exits] == ENTRY)
    at = np.flatnonzero(wrong)
    found.check(len(exits))
    found.violate(
        faults[at],
        lambda i: (
            "kvm_access_fault of the same page if and only if it is an access flag fault",
            "another one" if handled[at[i]] else "none",
        ),
    )


@comparison("trap_register")
def _trap_register(excerpt: Excerpt, group: Group, found: Found) -> None:
    exits, positions = with_follow_up(excerpt, group, "kvm_sys_access")
    trap = excerpt.first_in_exit(TRAP, exits)
    exits, positions, trap = exits[trap >= 0], positions[trap >= 0], trap[trap >= 0]
    if not len(exits):
        return
    decode = excerpt.isa_of(exits).decode_trap
    assert decode is not None, "an ISA whose traps have a syndrome"
    early = np.flatnonzero(
        (positions < trap) | (excerpt.segment_counts("kvm_sys_access")[excerpt.exits.seg[exits]] > 1)
    )
    found.violate(positions[early], constant("one kvm_sys_access, behind kvm_handle_sys_reg", "before it, or several"))
    access = decode(_syndromes(excerpt, TRAP, trap))
    named = (
        ("is_write", access.write),
        ("Op0", access.op0),
        ("Op1", access.op1),
        ("CRn", access.crn),
        ("CRm", access.crm),
        ("Op2", access.op2),
    )
    for field, expected in named:
        report_unequal(excerpt, found, f"kvm_sys_access.{field}", (exits, positions), expected.astype(np.uint64))


@comparison("wait_kind")
def _wait_kind(excerpt: Excerpt, group: Group, found: Found) -> None:
    exits, positions = with_follow_up(excerpt, group, "kvm_wfx_arm64")
    yields = excerpt.sequence.values("kvm_wfx_arm64", "is_wfe", positions) != 0
    at = np.flatnonzero(yields & excerpt.exits.has("wake-up")[exits])
    found.check(len(exits))
    found.violate(positions[at], constant("WFI: the vCPU blocked and was woken up", "WFE, which only yields"))
