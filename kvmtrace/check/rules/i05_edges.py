"""I5: a line that rises interrupts once through an edge-triggered pin; one that stays up does not interrupt again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.rising_lines import edges
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.side_rows import side_rows

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "I5",
    "edges of lines",
    VIOLATION,
    (
        "kvm_ioapic_set_irq.e",
        "kvm_ioapic_set_irq.pin",
        "kvm_set_irq.gsi",
        "kvm_set_irq.level",
        "kvm_set_irq.irq_source_id",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic.reg",
        "kvm_apic.rw",
        "kvm_msr.ecx",
        "sys_enter_ioctl.cmd",
        "kvm_exit.vcpu_id",
    ),
    "A line that rises interrupts once through an edge-triggered pin that is not masked; while it stays up it does not "
    "interrupt again.",
    "ioapic_set_irq, ioapic_service (ioapic.c)",
    "lines that several sources drive, the pin of the real-time clock, and edges whose destination is not one vCPU",
    places=lambda excerpt: len(side_rows(excerpt, "kvm_ioapic_set_irq")),
    blames_handler=False,
    healthy="""
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xae01, arg: 0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
+2s
(200) kvm_set_irq: gsi 7 level 0 source 0
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge)
(200) kvm_set_irq: gsi 7 level 1 source 0
(200) kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|edge)
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge)
(200) kvm_set_irq: gsi 7 level 1 source 0
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge) (coalesced)
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=128 val=0x0
kvm_msr: write=1 ecx=808 data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xae01, arg: 0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
+2s
(200) kvm_set_irq: gsi 7 level 0 source 0
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge)
(200) kvm_set_irq: gsi 7 level 1 source 0
(200) kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|edge)
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge)
(200) kvm_set_irq: gsi 7 level 1 source 0
(200) kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|edge)
(200) kvm_ioapic_set_irq: pin 7 dst 0 vec 33 (Fixed|physical|edge)
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=128 val=0x0
kvm_msr: write=1 ecx=808 data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.part()
def _edges(excerpt: Excerpt, found: Found) -> None:
    followed = edges(excerpt)
    found.check(followed.n_judged, followed.n_unknown)
    report_when_certain(excerpt, found, "edges", followed.wrong)
