"""H1: a halted vCPU for which an interrupt was accepted, and which sleeps on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.halted_vcpus import NEEDS, halted
from kvmtrace.check.rule import SUSPICION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H1",
    "lost wake-up",
    SUSPICION,
    NEEDS,
    "A halted vCPU for which an interrupt was accepted wakes up soon.",
    "kvm_vcpu_halt, kvm_vcpu_block (virt/kvm/kvm_main.c)",
)


@RULE.part()
def _asleep(excerpt: Excerpt, found: Found) -> None:
    known = halted(excerpt)
    if excerpt.final:
        known.report(excerpt, found, before_halt=False)
