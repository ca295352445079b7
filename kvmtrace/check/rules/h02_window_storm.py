"""H2: interrupt-window exits that no injection follows, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.rule import SUSPICION, Rule
from kvmtrace.check.runs_of_exits import report_runs
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H2",
    "window storm",
    SUSPICION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", "kvm_exit.guest_rip", "kvm_inj_virq"),
    "Interrupt-window exits lead to an injection; many in a row without one are a storm.",
    "kvm_check_and_inject_events (x86.c)",
)


@RULE.part()
def _storms(excerpt: Excerpt, found: Found) -> None:
    if len(excerpt.exits):
        injected = excerpt.exits.chain_has("inject interrupt", "inject exception")
        report_runs(excerpt, found, excerpt.of_kind("interrupt_window") & ~injected, threshold("window_storm"))
