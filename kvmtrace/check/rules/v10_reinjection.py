"""V10: an interrupt that is marked [reinjected] was injected before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.injected_events import VIRQ_VECTOR, check_causes
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V10",
    "[reinjected] is justified",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING, VIRQ_VECTOR, "kvm_inj_virq.reinjected"),
    "An injection marked as repeated has a cause: the last exit interrupted that vector's delivery, an injection was "
    "cancelled before entry, or userspace restored it.",
    "kvm_check_and_inject_events, vmx_cancel_injection, svm_cancel_injection",
    places="inject interrupt",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part()
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    check_causes(excerpt, found, interrupts=True)
