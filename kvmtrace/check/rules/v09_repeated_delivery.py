"""V9: what a VM-exit interrupted is injected again, unless a legal loss replaces it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.findings import constant
from kvmtrace.check.interrupted_delivery import count_interrupted, interrupted_deliveries
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V9",
    "interrupted delivery is repeated",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING, "kvm_entry"),
    "An event whose delivery the VM-exit interrupted (IDT-vectoring, EXITINTINFO) is injected again before the next "
    "entry, unless a legal loss replaces it.",
    "__vmx_complete_interrupts (vmx/vmx.c), svm_complete_interrupts (svm/svm.c), kvm_check_and_inject_events (x86.c)",
    "the repetition of an NMI, whose injection has no tracepoint",
    places=count_interrupted,
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
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x300000 error_code=0x181
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


def _check(excerpt: Excerpt, found: Found, kind: str) -> None:
    outcome = interrupted_deliveries(excerpt, kind)
    found.check(outcome.judged, outcome.unknown)
    for position, expected, observed in outcome.vanished:
        found.violate([position], constant(expected, observed))


@RULE.part("interrupts", needs=("kvm_inj_virq",), adds=False)
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    _check(excerpt, found, "kvm_inj_virq")


@RULE.part("exceptions", needs=("kvm_inj_exception",), adds=False)
def _exceptions(excerpt: Excerpt, found: Found) -> None:
    _check(excerpt, found, "kvm_inj_exception")
