"""J11: a fresh interrupt is injected only where the guest has interrupts enabled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import USERSPACE
from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.registry import run_functions
from kvmtrace.isa.words import RFLAGS_FIXED, RFLAGS_IF
from kvmtrace.model.states import RUN_STEPS

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J11",
    "interrupts enabled",
    VIOLATION,
    (
        "kvm_exit",
        "kvm_inj_virq.soft",
        "kvm_inj_virq.reinjected",
        "|".join(f"{name}.rflags" for name in run_functions()),
    ),
    "An interrupt that is injected for the first time finds the guest's RFLAGS.IF set, as the run function is called.",
    "svm_interrupt_blocked (svm/svm.c), vmx_interrupt_blocked (vmx/vmx.c), kvm_check_and_inject_events (x86.c)",
    "interrupts of nested guests, whose hypervisor's flag counts",
    places="inject interrupt",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
svm_vcpu_run: vcpu=0x1 rflags=0x202
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=96 guest_rip=0x1000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
svm_vcpu_run: vcpu=0x1 rflags=0x246
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=96 guest_rip=0x1000 isa=2 info1=0x0 info2=0x0 intr_info=0x80000030 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
svm_vcpu_run: vcpu=0x1 rflags=0x46
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
svm_vcpu_run: vcpu=0x1 rflags=0x2
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=96 guest_rip=0x1000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
svm_vcpu_run: vcpu=0x1 rflags=0x2
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part()
def _enabled(excerpt: Excerpt, found: Found) -> None:
    segments, sequence = excerpt.segments, excerpt.sequence
    positions = segments.positions("inject interrupt")
    fresh = sequence.values("kvm_inj_virq", "reinjected", positions) == 0
    fresh &= sequence.values("kvm_inj_virq", "soft", positions) == 0
    positions = positions[fresh]
    owner = segments.of[positions]
    hidden = np.zeros(len(segments) + 1, bool)
    hidden[excerpt.exits.seg[excerpt.nested | excerpt.of_kind("encrypted")]] = True
    # behind a userspace exit the level of the guest that was left before
    judged = ~hidden[owner] & ~(hidden[owner - 1] & (segments.kind[owner] == USERSPACE))
    # an entry that was cancelled, or a mode that changed, lies between
    judged &= (excerpt.segment_counts("inject interrupt")[owner] == 1) & ~segments.has("kvm_smm_transition")[owner]
    positions, owner = positions[judged], owner[judged]
    for name, step in zip(run_functions(), RUN_STEPS.values(), strict=True):
        if not excerpt.has_field(name, "rflags"):
            continue
        run = segments.first_in(step)[owner]
        mine = np.flatnonzero(run > positions)
        flags = sequence.values(name, "rflags", run[mine]).astype(np.int64)
        told = flags & RFLAGS_FIXED != 0  # what could not be read is 0
        found.check(np.count_nonzero(told), np.count_nonzero(~told))
        found.violate(
            positions[mine[told & (flags & RFLAGS_IF == 0)]],
            constant("RFLAGS.IF set: a fresh interrupt is injected", "RFLAGS.IF clear as the guest is entered"),
        )
