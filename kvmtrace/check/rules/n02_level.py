"""N2: the level of a vCPU changes only where an event says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.guest_levels import guest_levels, nestings, next_exits, uncertain
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.nesting import ENTERS_L2, L1, L2, LEVELS, REFLECTS, REFUSED, TELLS_L2, UNKNOWN_LEVEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "N2",
    "L1 or L2",
    VIOLATION,
    ("kvm_nested_vmexit", "kvm_nested_vmexit_inject", "kvm_nested_vmenter|kvm_nested_vmrun", "kvm_exit", "kvm_entry"),
    "A vCPU that entered L2 leaves with an exit of L2, one that entered L1 with an exit of L1; only a nested entry, a "
    "reflected exit, system-management mode, a reset or the VMM changes the level.",
    "enter_guest_mode, leave_guest_mode (kvm_cache_regs.h) and where they are called (svm/nested.c, vmx/nested.c)",
    "what the VMM sets, where its ioctls were not recorded",
    places=lambda excerpt: len(excerpt.exits) if len(excerpt.segments.positions(TELLS_L2)) else 0,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
kvm_exit: exit_reason=1 guest_rip=0x3000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x3000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
kvm_exit: exit_reason=1 guest_rip=0x2002 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_nested_vmexit: exit_reason=1 guest_rip=0x2002 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x2002
""",
)
_NAMES = {level: f"L{level}" for level in LEVELS if level != UNKNOWN_LEVEL}


@RULE.part("the level of entry and exit")
def _one_level(excerpt: Excerpt, found: Found) -> None:
    if not excerpt.capability.seen.intersection((TELLS_L2, *ENTERS_L2)):
        return
    levels, segments = guest_levels(excerpt), excerpt.segments
    entries = np.flatnonzero(segments.kind == ENTRY)
    number = next_exits(excerpt, entries)
    entries, number = entries[number >= 0], number[number >= 0]
    entered, told = levels.entered[entries], levels.told[number]
    known = (entered != UNKNOWN_LEVEL) & (told != UNKNOWN_LEVEL)
    wrong = known & (entered != told)
    for nesting, isa, mine in nestings(excerpt):  # handled before KVM names them as L2's
        early = np.isin(isa.code(excerpt.exits.raw[number]), list(nesting.unnamed)) & mine[number]
        wrong &= ~(early & (told == L1))
    bad = np.flatnonzero(wrong)
    found.check(np.count_nonzero(known), np.count_nonzero(~known))
    found.violate(
        excerpt.exits.start[number[bad]],
        lambda i: (
            f"an exit of {_NAMES[int(entered[bad[i]])]}, which was entered",
            f"{excerpt.exit_name(number[bad[i]])} of {_NAMES[int(told[bad[i]])]}"
            + ("" if told[bad[i]] == L2 else " (no kvm_nested_vmexit)"),
        ),
    )


@RULE.part("changes of the level", places=REFLECTS, adds=False)
def _alternate(excerpt: Excerpt, found: Found) -> None:
    """Check that L2 is entered from L1, and left from L2."""
    changes = guest_levels(excerpt).changes
    if not len(changes.position):
        return
    known = (changes.exit >= 0) & ~changes.silent & (changes.before != UNKNOWN_LEVEL)
    # L2 may fail to be entered, or be entered again by the VMM: then nothing was left
    telling = excerpt.segments.has(REFLECTS, *ENTERS_L2)[excerpt.segments.of[changes.position]]
    failed = np.isin(changes.position, _failures(excerpt))
    known &= telling & ~failed & ~uncertain(excerpt)[np.maximum(changes.exit, 0)]
    bad = np.flatnonzero(known & (changes.before == changes.level))
    found.check(np.count_nonzero(known))
    found.violate(
        changes.position[bad],
        lambda i: (
            f"{_NAMES[int(L2 + L1 - changes.level[bad[i]])]} before L{int(changes.level[bad[i]])} goes on",
            f"L{int(changes.before[bad[i]])} already",
        ),
    )


def _failures(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return where L2 was not entered: L1 goes on from L1, or L2 had been told already."""
    return excerpt.segments.positions(REFUSED)
