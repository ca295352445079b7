"""J6: a fresh interrupt of the LAPIC outranks everything in service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.in_service import in_service
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J6",
    "priority of the in-service stack",
    VIOLATION,
    (
        "kvm_inj_virq.vector",
        "kvm_eoi.vector",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.dm",
    ),
    "A fresh LAPIC interrupt has a higher priority class than every vector in service.",
    "kvm_get_apic_interrupt, apic_has_interrupt_for_ppr (lapic.c)",
    places="inject interrupt",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=65
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=48
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=48
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.part()
def _priority(excerpt: Excerpt, found: Found) -> None:
    outcome = in_service(excerpt)
    found.check(outcome.n_injected)
    wrong = outcome.wrong_injections
    found.violate(
        [position for position, _, _ in wrong],
        lambda i: ("a higher priority class than every vector in service", wrong[i][2]),
    )
