"""H2: interrupt-window exits that no injection follows, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=7 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
71 times:
  kvm_entry: vcpu_id=0 rip=0x1000
  kvm_exit: exit_reason=7 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part()
def _storms(excerpt: Excerpt, found: Found) -> None:
    if len(excerpt.exits):
        injected = excerpt.exits.chain_has("inject interrupt", "inject exception")
        fruitless = excerpt.of_kind("interrupt_window") & ~injected
        report_runs(excerpt, found, fruitless, threshold("window_storm"))


@RULE.part("at one RIP", adds=False)
def _storms_at_one_rip(excerpt: Excerpt, found: Found) -> None:
    if len(excerpt.exits):
        rip = excerpt.exits.get("guest_rip")
        fruitless = excerpt.of_kind("interrupt_window") & ~excerpt.exits.chain_has(
            "inject interrupt", "inject exception"
        )
        same = np.zeros(len(fruitless), bool)
        same[1:] = fruitless[1:] & fruitless[:-1] & (rip[1:] == rip[:-1])
        report_runs(excerpt, found, same, threshold("window_storm_at_one_rip") - 1)
