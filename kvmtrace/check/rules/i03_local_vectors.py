"""I3: what a LAPIC sends to its own vCPU has the vector that the guest gave it, and is not masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.interrupt_log import interrupt_log
from kvmtrace.check.local_vectors import local_vectors
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found


def _count(excerpt: Excerpt) -> int:
    return len(interrupt_log(excerpt).of_kind("kvm_apic_accept_irq"))


RULE = Rule(
    "I3",
    "local interrupts",
    VIOLATION,
    (
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.dm",
        "kvm_apic_accept_irq.tm",
        "kvm_apic.rw",
        "kvm_apic.reg",
        "kvm_apic.val",
        "kvm_exit.vcpu_id",
        "kvm_msr.ecx",
        "kvm_msr.write",
        "kvm_msr.data",
        # what else sends, so that it is not taken for the LAPIC's
        "kvm_apic_ipi.icr_low",
        "kvm_apic_ipi.dest_id",
        "kvm_set_irq",
        "kvm_hypercall",
        "kvm_userspace_exit",
    ),
    "What a LAPIC sends to its own vCPU has the vector of an unmasked entry of its local vector table; a timer that "
    "fires once does so once for each time that it is started.",
    "kvm_apic_local_deliver, apic_timer_expired (lapic.c)",
    "entries that the guest wrote before the recording began",
    places=_count,
    blames_handler=False,
    healthy="""
(300) kvm_apic_ipi: dst 1 vec 33 (Fixed|physical|assert|edge|dst)
(300) kvm_set_irq: gsi 0 level 0 source 0
(300) kvm_hypercall: nr 0x1 a0 0x0 a1 0x0 a2 0x0 a3 0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_LVTT = 0xec
kvm_msr: write=1 ecx=832 data=0xec exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_LVTPC = 0x10000
kvm_msr: write=1 ecx=834 data=0x10000 exception=0
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=1 guest_rip=0x1004 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
kvm_inj_virq: vector=0xec soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=1 guest_rip=0x1004 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason restart (4)
""",
    broken="""
(300) kvm_apic_ipi: dst 1 vec 33 (Fixed|physical|assert|edge|dst)
(300) kvm_set_irq: gsi 0 level 0 source 0
(300) kvm_hypercall: nr 0x1 a0 0x0 a1 0x0 a2 0x0 a3 0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_LVTT = 0xec
kvm_msr: write=1 ecx=832 data=0xec exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: apic_write APIC_LVTPC = 0x10000
kvm_msr: write=1 ecx=834 data=0x10000 exception=0
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=1 guest_rip=0x1004 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=237
kvm_inj_virq: vector=0xed soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=1 guest_rip=0x1004 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason restart (4)
""",
)


@RULE.part()
def _table(excerpt: Excerpt, found: Found) -> None:
    state = local_vectors(excerpt)
    found.check(state.n_judged, state.n_unknown)
    report_when_certain(excerpt, found, "local vectors", state.wrong)
    report_when_certain(excerpt, found, "timers that fire once", state.shots.wrong)
