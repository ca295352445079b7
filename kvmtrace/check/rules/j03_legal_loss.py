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
)


@RULE.part("interrupts", needs=("kvm_inj_virq",), adds=False)
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    found.check(interrupted_deliveries(excerpt, "kvm_inj_virq").lost)


@RULE.part("exceptions", needs=("kvm_inj_exception",), adds=False)
def _exceptions(excerpt: Excerpt, found: Found) -> None:
    found.check(interrupted_deliveries(excerpt, "kvm_inj_exception").lost)
