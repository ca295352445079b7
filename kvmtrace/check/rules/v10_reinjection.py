"""V10: an interrupt that is marked [reinjected] was injected before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.injections import VIRQ_VECTOR, check_causes
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
)


@RULE.part()
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    check_causes(excerpt, found, interrupts=True)
