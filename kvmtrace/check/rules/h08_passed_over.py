"""H8: a lower interrupt is injected while a higher one, accepted long before, waits on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.passed_over import passed_over
from kvmtrace.check.pending_interrupts import pending_interrupts
from kvmtrace.check.rule import SUSPICION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H8",
    "passed over",
    SUSPICION,
    (
        "kvm_inj_virq.vector",
        "kvm_inj_virq.reinjected",
        "kvm_inj_virq.soft",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.dm",
        "kvm_exit.vcpu_id",
        "kvm_entry",
        "kvm_apic",
        "kvm_msr",
    ),
    "Of the interrupts that a LAPIC has accepted, it injects the highest first.",
    "apic_find_highest_irr, kvm_apic_has_interrupt, kvm_get_apic_interrupt (lapic.c)",
    "interrupts that were accepted in an earlier part of a long recording",
    places="inject interrupt",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x0ffe
kvm_exit: exit_reason=31 guest_rip=0x0ffe isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=0 reg=128 val=0x0
kvm_msr: write=0 ecx=808 data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
[1] (200) kvm_hypercall: nr 0x1 a0 0x0 a1 0x0 a2 0x0 a3 0x0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x0ffe
kvm_exit: exit_reason=31 guest_rip=0x0ffe isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=0 reg=128 val=0x0
kvm_msr: write=0 ecx=808 data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
[1] (200) kvm_hypercall: nr 0x1 a0 0x0 a1 0x0 a2 0x0 a3 0x0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
)


@RULE.part()
def _overtaken(excerpt: Excerpt, found: Found) -> None:
    pending = pending_interrupts(excerpt)
    n = pending.n_judged + pending.n_unknown
    found.check(n if pending.events is not None else 0, 0 if pending.events is not None else n)
    doubts = [] if pending.events is None else passed_over(excerpt, pending.events)
    report_when_certain(excerpt, found, "passed over", doubts)
