"""H4: an interrupt that was accepted before the vCPU halted, and is never injected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.halted_vcpus import NEEDS, halted
from kvmtrace.check.rule import SUSPICION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H4",
    "accepted but never injected",
    SUSPICION,
    NEEDS,
    "An interrupt that the LAPIC accepted is injected: the vCPU does not halt, and stay halted, with it.",
    "kvm_apic_accept_events, kvm_check_and_inject_events (x86.c)",
)


@RULE.part()
def _waiting(excerpt: Excerpt, found: Found) -> None:
    known = halted(excerpt)
    if excerpt.final:
        known.report(excerpt, found, before_halt=True)
