"""J8: an entry that was made to leave at once does leave at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J8",
    "immediate exit",
    VIOLATION,
    ("kvm_entry.immediate_exit", "kvm_exit.exit_reason", "kvm_exit.isa"),
    "After an entry marked [immediate exit] no guest instruction retires: the next exit is the forced one, one taken "
    "during delivery, or asynchronous.",
    "vcpu_enter_guest (x86.c): req_immediate_exit; smp_send_reschedule (svm/svm.c), preemption timer (vmx/vmx.c)",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
kvm_exit: exit_reason=7 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=1
kvm_exit: exit_reason=52 guest_rip=0x3000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x3000 immediate_exit=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
kvm_exit: exit_reason=7 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=1
kvm_exit: exit_reason=10 guest_rip=0x3000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x3002 immediate_exit=0
""",
)


@RULE.part(local=True)
def _forced(excerpt: Excerpt, found: Found) -> None:
    segments, exits = excerpt.segments, excerpt.exits
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    start = segments.start[inside]
    forced = excerpt.sequence.values("kvm_entry", "immediate_exit", start) != 0
    number = np.searchsorted(exits.seg, inside[forced] + 1)
    usable = number[~exits.failed_entry[number]]
    expected = excerpt.of_kind("forced")[usable] | (exits.vectoring[usable] != 0)
    bad = usable[~expected]
    found.check(len(usable))
    found.violate(
        exits.start[bad],
        lambda i: (
            "the exit that was forced, or one of higher priority, or one during event delivery",
            excerpt.exit_name(bad[i]),
        ),
    )
