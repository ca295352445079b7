"""I4: the EOI of a vector reaches the pins that have it, and a line that is still raised interrupts again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.line_ends import line_ends
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.side_rows import side_rows

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "I4",
    "ends of lines' interrupts",
    VIOLATION,
    (
        "kvm_ack_irq.irqchip",
        "kvm_ack_irq.pin",
        "kvm_eoi.vector",
        "kvm_eoi.apicid",
        "kvm_ioapic_set_irq.e",
        "kvm_ioapic_set_irq.pin",
        "kvm_set_irq.gsi",
        "kvm_set_irq.level",
        "kvm_set_irq.irq_source_id",
        "kvm_apic_accept_irq",
        "kvm_apic.reg",
        "kvm_apic.val",
        "kvm_msr.ecx",
        "kvm_mmio.gpa",
        "kvm_mmio.type",
        "sys_enter_ioctl.cmd",
        "kvm_exit.vcpu_id",
    ),
    "An EOI is told to the pins whose vector it is, as before; a level-triggered pin waits for it, and interrupts "
    "again if its line is still raised.",
    "kvm_ioapic_update_eoi_one, kvm_ioapic_scan_entry (ioapic.c), kvm_ioapic_send_eoi (lapic.c)",
    "EOIs that no pin is ever told of",
    places=lambda excerpt: len(side_rows(excerpt, "kvm_ack_irq")),
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
(200) kvm_mmio: mmio write len 4 gpa 0xd0000000 val 0x0
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
(200) kvm_set_irq: gsi 9 level 1 source 0
(200) kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|level)
(200) kvm_ioapic_set_irq: pin 9 dst 0 vec 33 (Fixed|physical|level)
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_EOI = 0x0
kvm_eoi: apicid 0 vector 33
kvm_ack_irq: irqchip IOAPIC pin 9
kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|level)
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=1 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
(200) kvm_mmio: mmio write len 4 gpa 0xd0000000 val 0x0
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
(200) kvm_set_irq: gsi 9 level 1 source 0
(200) kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|level)
(200) kvm_ioapic_set_irq: pin 9 dst 0 vec 33 (Fixed|physical|level)
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_EOI = 0x0
kvm_eoi: apicid 0 vector 33
kvm_ack_irq: irqchip IOAPIC pin 9
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=1 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
)


@RULE.part()
def _ends(excerpt: Excerpt, found: Found) -> None:
    ends = line_ends(excerpt)
    found.check(ends.n_judged, ends.n_unknown)
    report_when_certain(excerpt, found, "line ends", ends.wrong)
