"""I6: what a pin of a PIC asks for is injected with the pin's vector, and ends as that pin's interrupt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.pics import pics
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.side_rows import side_rows

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "I6",
    "pins of the PICs",
    VIOLATION,
    (
        "kvm_pic_set_irq.chip",
        "kvm_pic_set_irq.pin",
        "kvm_pic_set_irq.elcr",
        "kvm_pic_set_irq.imr",
        "kvm_pic_set_irq.coalesced",
        "kvm_ack_irq.irqchip",
        "kvm_ack_irq.pin",
        "kvm_pio.port",
        "kvm_pio.rw",
        "kvm_pio.size",
        "kvm_pio.count",
        "kvm_pio.val",
        "kvm_inj_virq.vector",
        "kvm_inj_virq.reinjected",
        "kvm_inj_virq.soft",
        "kvm_set_irq.level",
        "kvm_set_irq.irq_source_id",
        # without acceptances nothing of interrupts is followed
        "kvm_apic_accept_irq",
        "kvm_exit.vcpu_id",
        "kvm_entry",
        "kvm_userspace_exit",
        "sys_enter_ioctl.cmd",
    ),
    "A pin of a PIC interrupts with the vector that the guest gave it, not while it is masked, and is told of the end "
    "of its interrupt; each edge that is a request of its own is taken before the next one is.",
    "kvm_pic_read_irq, pic_intack, pic_set_irq1, pic_ioport_write (i8259.c)",
    "PICs that were set up before the recording began, that several vCPUs program, or of several VMs that take turns; "
    "masks of pins whose vector a LAPIC may have, too",
    places=lambda excerpt: len(side_rows(excerpt, "kvm_pic_set_irq")),
    blames_handler=False,
    healthy="""
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
kvm_userspace_exit: reason=10 errno=-4
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x200000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x20 size 1 count 1 val 0x10
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=30 guest_rip=0x1002 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x21 size 1 count 1 val 0x8
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=30 guest_rip=0x1004 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x21 size 1 count 1 val 0x4
kvm_entry: vcpu_id=0 rip=0x1006
2 times:
  (200) kvm_set_irq: gsi 1 level 1 source 0
  (200) kvm_pic_set_irq: chip 0 pin 1 (edge)
  kvm_exit: exit_reason=1 guest_rip=0x1008 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
  kvm_inj_virq: vector=0x9 soft=0 reinjected=0
  kvm_entry: vcpu_id=0 rip=0x1008
  kvm_exit: exit_reason=30 guest_rip=0x2000 isa=1 info1=0x200000 info2=0x0 intr_info=0x0 vcpu_id=0
  kvm_pio: pio_write at 0x20 size 1 count 1 val 0x20
  kvm_ack_irq: irqchip PIC master pin 1
  kvm_entry: vcpu_id=0 rip=0x2002
(200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
""",
    broken="""
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
kvm_userspace_exit: reason=10 errno=-4
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x200000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x20 size 1 count 1 val 0x10
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=30 guest_rip=0x1002 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x21 size 1 count 1 val 0x8
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=30 guest_rip=0x1004 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: pio_write at 0x21 size 1 count 1 val 0x4
kvm_entry: vcpu_id=0 rip=0x1006
2 times:
  (200) kvm_set_irq: gsi 1 level 1 source 0
  (200) kvm_pic_set_irq: chip 0 pin 1 (edge)
  kvm_exit: exit_reason=1 guest_rip=0x1008 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
  kvm_inj_virq: vector=0xa soft=0 reinjected=0
  kvm_entry: vcpu_id=0 rip=0x1008
  kvm_exit: exit_reason=30 guest_rip=0x2000 isa=1 info1=0x200000 info2=0x0 intr_info=0x0 vcpu_id=0
  kvm_pio: pio_write at 0x20 size 1 count 1 val 0x20
  kvm_ack_irq: irqchip PIC master pin 1
  kvm_entry: vcpu_id=0 rip=0x2002
(200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
""",
)


@RULE.part()
def _pins(excerpt: Excerpt, found: Found) -> None:
    followed = pics(excerpt)
    found.check(followed.n_judged, followed.n_unknown)
    report_when_certain(excerpt, found, "PICs", followed.wrong, unless=lambda _: not followed.holds(excerpt))
    report_when_certain(
        excerpt,
        found,
        "edges of PICs",
        followed.lost_edges,
        unless=lambda doubt: not followed.edges_hold(excerpt) or doubt.until_ns in followed.explained,
    )
