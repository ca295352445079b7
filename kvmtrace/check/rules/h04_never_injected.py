"""H4: an interrupt that was accepted before the vCPU halted, and is never injected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.halted_vcpus import NEEDS, halted
from kvmtrace.check.rule import SUSPICION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H4",
    "accepted but never injected",
    SUSPICION,
    NEEDS,
    "An interrupt that the LAPIC accepted is injected: the vCPU does not halt, and stay halted, with it.",
    "kvm_apic_accept_events, kvm_check_and_inject_events (x86.c)",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
kvm_vcpu_wakeup: ns=1000 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=7 dm=0 tm=0 vec=1
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
kvm_vcpu_wakeup: ns=1000 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
+2s
[1] (200) kvm_apic_accept_irq: apicid=7 dm=0 tm=0 vec=1
""",
)


@RULE.part()
def _waiting(excerpt: Excerpt, found: Found) -> None:
    known = halted(excerpt)
    if excerpt.final:
        known.report(excerpt, found, before_halt=True)
