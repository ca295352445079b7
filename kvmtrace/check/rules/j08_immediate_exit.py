"""J8: an entry that was made to leave at once does leave at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J8",
    "immediate exit",
    VIOLATION,
    ("kvm_entry.immediate_exit", "kvm_exit.exit_reason", "kvm_exit.isa"),
    "After an entry marked [immediate exit] no guest instruction retires: the next exit is the forced one, one taken "
    "during delivery, or asynchronous.",
    "vcpu_enter_guest (x86.c): req_immediate_exit; smp_send_reschedule (svm/svm.c), preemption timer (vmx/vmx.c)",
)


@RULE.part()
def _forced(excerpt: Excerpt, found: Found) -> None:
    segments, exits = excerpt.segments, excerpt.exits
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    start = segments.start[inside]
    forced = excerpt.sequence.values("kvm_entry", "immediate_exit", start) != 0
    number = np.searchsorted(exits.seg, inside[forced] + 1)
    usable = number[~excerpt.nested[number]]
    # where an interrupt to itself forces the exit, it may arrive after some instructions
    exact = usable[excerpt.of_isa(lambda isa: isa.immediate_exit_is_exact)[usable]]
    expected = excerpt.of_kind("forced")[exact] | (exits.vectoring[exact] != 0)
    bad = exact[~expected]
    found.check(len(exact), len(usable) - len(exact))
    found.violate(
        exits.start[bad],
        lambda i: (
            "PREEMPTION_TIMER, or an exit of higher priority, or one during event delivery",
            excerpt.exit_name(bad[i]),
        ),
    )
