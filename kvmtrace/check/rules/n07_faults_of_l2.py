"""N7: before L1 gets a page fault or an interrupt of L2's, KVM has looked at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.exit_conditions import complete, holds
from kvmtrace.check.findings import constant
from kvmtrace.check.nested_entries import followed_by
from kvmtrace.check.reflections import exits_of_l2
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.nesting import REFLECTS, SAYS_WHY, TELLS_L2

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "N7",
    "faults and interrupts in L2",
    VIOLATION,
    ("kvm_nested_vmexit", "kvm_nested_vmexit_inject", "kvm_exit.exit_reason", "kvm_exit.isa"),
    "A second-level page fault of L2 is traced as a kvm_page_fault of L2's, whether KVM mends it or L1 gets it; an "
    "interrupt of L1's that stops L2 is traced right before L1 gets its exit.",
    "npf_interception, handle_ept_violation; svm_check_nested_events (svm/nested.c)",
    places=TELLS_L2,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=48 guest_rip=0x2000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=48 guest_rip=0x2000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x2000 fault_address=0x200000 error_code=0x181
kvm_nested_vmexit_inject: exit_code=48 exit_info1=0x181 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
kvm_exit: exit_reason=24 guest_rip=0x3000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x3000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=1 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_nested_vmexit: exit_reason=1 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_nested_intr_vmexit: rip=0x2000
kvm_nested_vmexit_inject: exit_code=1 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=48 guest_rip=0x2000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=48 guest_rip=0x2000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x2004 fault_address=0x200000 error_code=0x181
kvm_nested_vmexit_inject: exit_code=48 exit_info1=0x181 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
""",
)


def _faults(excerpt: Excerpt) -> np.ndarray:
    """Return the second-level faults of L2 behind which L1 goes on: those that go back to L2 are V4's and V5's."""
    group = exits_of_l2(excerpt)
    group = group[excerpt.of_kind("second_level_fault")[group] & excerpt.nested[group]]
    return group[complete(excerpt, group) & holds("no_mmio", excerpt, group)]


@RULE.part("the fault is traced", needs=("kvm_page_fault", "kvm_exit.info1"))
def _traced(excerpt: Excerpt, found: Found) -> None:
    group = _faults(excerpt)
    count = excerpt.segment_counts("kvm_page_fault")[excerpt.exits.seg[group]]
    bad = group[count != 1]
    found.check(len(group))
    found.violate(
        excerpt.exits.start[bad],
        lambda i: (f"one kvm_page_fault after {excerpt.exit_name(bad[i])} of L2", f"{int(count[count != 1][i])}"),
    )


@RULE.part(
    "what it tells",
    needs=("kvm_page_fault.guest_rip", "kvm_page_fault.error_code", "kvm_exit.guest_rip", "kvm_exit.info1"),
    adds=False,
)
def _same(excerpt: Excerpt, found: Found) -> None:
    group = _faults(excerpt)
    first = excerpt.first_in_exit("kvm_page_fault", group)
    group, first = group[first >= 0], first[first >= 0]
    for name, own in (("guest_rip", "guest_rip"), ("error_code", "info1")):
        told = excerpt.sequence.values("kvm_page_fault", name, first).astype(np.uint64)
        expected = excerpt.exits.get(own)[group]
        bits = np.uint64(0xFFFFFFFF) if name == "error_code" else ~np.uint64(0)  # 32 bits wide before 6.1
        bad = np.flatnonzero((told ^ expected) & bits)
        found.check(len(group))
        found.violate(
            first[bad],
            lambda i, bad=bad, name=name, told=told, expected=expected: (  # type: ignore[misc]
                f"kvm_page_fault.{name} {int(expected[bad[i]]):#x}, of L2's exit",
                f"{int(told[bad[i]]):#x}",
            ),
        )


@RULE.part("interrupts of L1", needs=("kvm_nested_intr_vmexit",), adds=False)
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    """Check that what says that an interrupt of L1's stops L2 is followed by L1's exit, before KVM does anything else.

    KVM may be preempted between.
    """
    for name in SAYS_WHY:
        positions = excerpt.segments.positions(name)
        if not len(positions):
            continue
        follows, known = followed_by(excerpt, positions, REFLECTS)
        found.check(np.count_nonzero(known), np.count_nonzero(~known))
        bad = positions[known & ~follows]
        found.violate(bad, constant(f"kvm_nested_vmexit_inject right behind {name}", "another event of KVM's"))
