"""J4: an exception that is marked [reinjected] was injected before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.injections import check_causes
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J4",
    "origin of [reinjected]",
    VIOLATION,
    (
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        VECTORING,
        "kvm_inj_exception.exception",
        "kvm_inj_exception.reinjected",
    ),
    "A repeated exception has a cause, as V10 says for interrupts.",
    "kvm_check_and_inject_events (x86.c)",
    places="inject exception",
)


@RULE.part()
def _exceptions(excerpt: Excerpt, found: Found) -> None:
    check_causes(excerpt, found, interrupts=False)
