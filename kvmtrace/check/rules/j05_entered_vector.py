"""J5: the entry carries the vector that was injected last, on kernels whose kvm_entry tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.injected_events import VIRQ_VECTOR, injections_of
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.words import INTR_INFO_VALID, INTR_TYPE_NMI

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J5",
    "injected vector is entered",
    VIOLATION,
    ("kvm_entry.intr_info", "kvm_exit", VIRQ_VECTOR, "kvm_inj_exception.exception"),
    "The entry carries the vector of the last injection before it.",
    "vmx_inject_irq, svm_inject_irq; kvm_entry fields intr_info and error_code (kernels from 6.14 on)",
    places="inject interrupt",
    blames_handler=False,
    healthy="""
kvm_inj_exception: exception=14 has_error=1 error_code=2 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0 intr_info=0x80000b0e error_code=0x2
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0 intr_info=0x80000030 error_code=0x0
""",
    broken="""
kvm_inj_exception: exception=14 has_error=1 error_code=2 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0 intr_info=0x80000b0e error_code=0x2
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0 intr_info=0x80000031 error_code=0x0
""",
)


@RULE.part()
def _entered(excerpt: Excerpt, found: Found) -> None:
    segments, injections = excerpt.segments, injections_of(excerpt)
    if not len(injections.position):
        return
    entries = np.flatnonzero(segments.kind == ENTRY)
    info = excerpt.sequence.values("kvm_entry", "intr_info", segments.start[entries]).astype(np.int64)
    before = np.searchsorted(injections.position, segments.start[entries]) - 1
    known = (info & INTR_INFO_VALID != 0) & (info >> 8 & 7 != INTR_TYPE_NMI) & (before >= 0)
    before = np.maximum(before, 0)
    owner = segments.of[injections.position[before]]
    known &= (owner == entries - 1) & segments.linked[np.maximum(entries - 1, 0)]
    vector = injections.vector[before]
    wrong = np.flatnonzero(known & (vector != info & 0xFF))
    found.check(np.count_nonzero(known))
    found.violate(
        segments.start[entries[wrong]],
        lambda i: (f"vector {int(vector[wrong[i]]):#x}, injected last", f"vector {int(info[wrong[i]]) & 0xFF:#x}"),
    )
