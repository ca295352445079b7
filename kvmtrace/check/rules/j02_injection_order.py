"""J2: one injection pass injects at most one fresh event, before anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import EXIT
from kvmtrace.check.injected_events import VIRQ_VECTOR, injections_of
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J2",
    "injection order",
    VIOLATION,
    ("kvm_exit", "kvm_entry", VIRQ_VECTOR, "kvm_inj_virq.reinjected"),
    "One pass injects at most one interrupt, and a repeated exception goes before it.",
    "kvm_check_and_inject_events (x86.c)",
    places="inject interrupt",
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
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part("interrupts")
def _interrupts(excerpt: Excerpt, found: Found) -> None:
    """Check that between two entries there is at most one fresh interrupt, and none after a repeated one."""
    _check(excerpt, found, injections_of(excerpt).is_interrupt)


@RULE.part("exceptions", needs=("kvm_inj_exception.exception", "kvm_inj_exception.reinjected"), adds=False)
def _exceptions(excerpt: Excerpt, found: Found) -> None:
    """Check the same of exceptions, and of interrupts behind exceptions."""
    _check(excerpt, found, np.ones(len(injections_of(excerpt).position), bool))


def _check(excerpt: Excerpt, found: Found, chosen: NDArray[np.bool_]) -> None:
    """Check that a fresh event is the first of the chosen injections before its entry; new findings only."""
    segments, injections = excerpt.segments, injections_of(excerpt)
    at, repeated, interrupt = (
        column[chosen] for column in (injections.position, injections.repeated, injections.is_interrupt)
    )
    if not len(excerpt.exits) or not len(at):
        return
    fresh = np.flatnonzero(~repeated)
    found.check(len(fresh) if interrupt.all() else np.count_nonzero(~interrupt[fresh]))
    fresh = fresh[fresh > 0]
    own, previous = at[fresh], at[fresh - 1]
    together = (segments.of[previous] == segments.of[own]) & (segments.kind[segments.of[own]] == EXIT)
    number = np.minimum(np.searchsorted(excerpt.exits.seg, segments.of[own]), len(excerpt.exits) - 1)
    together &= ~(excerpt.exits.has("kvm_smm_transition") | excerpt.nested)[number]
    broken = np.append(0, np.cumsum(excerpt.sequence.broken))
    wrong = fresh[together & (broken[own + 1] == broken[previous + 1])]
    if not interrupt.all():  # two interrupts in a row were found already
        wrong = wrong[~(interrupt[wrong] & interrupt[wrong - 1])]
    vector = injections.vector[chosen]
    found.violate(
        at[wrong],
        lambda i: (
            "a fresh event only as the first injection before an entry",
            f"vector {int(vector[wrong[i]]):#x} after another injection",
        ),
    )
