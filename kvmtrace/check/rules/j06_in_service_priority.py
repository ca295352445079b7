"""J6: a fresh interrupt of the LAPIC outranks everything in service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.in_service import in_service
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J6",
    "priority of the in-service stack",
    VIOLATION,
    (
        "kvm_inj_virq.vector",
        "kvm_eoi.vector",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.dm",
    ),
    "A fresh LAPIC interrupt has a higher priority class than every vector in service.",
    "kvm_get_apic_interrupt, apic_has_interrupt_for_ppr (lapic.c)",
    places="inject interrupt",
)


@RULE.part()
def _priority(excerpt: Excerpt, found: Found) -> None:
    outcome = in_service(excerpt)
    found.check(outcome.n_injected)
    wrong = outcome.wrong_injections
    found.violate(
        [position for position, _, _ in wrong],
        lambda i: ("a higher priority class than every vector in service", wrong[i][2]),
    )
