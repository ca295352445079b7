"""J3: an interrupted delivery disappears only by what KVM's own code loses; counts these losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.interrupted_delivery import count_interrupted, interrupted_deliveries
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J3",
    "legal loss",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING, "kvm_entry"),
    "A vectoring event disappears only through a new exception, emulation, a reset, nesting, or userspace (any other "
    "loss is a violation of V9).",
    "kvm_multiple_exception, x86_emulate_instruction (x86.c)",
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
)


@RULE.part("interrupts", needs=("kvm_inj_virq",), adds=False)
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    found.check(interrupted_deliveries(excerpt, "kvm_inj_virq").lost)


@RULE.part("exceptions", needs=("kvm_inj_exception",), adds=False)
def _exceptions(excerpt: Excerpt, found: Found) -> None:
    found.check(interrupted_deliveries(excerpt, "kvm_inj_exception").lost)
