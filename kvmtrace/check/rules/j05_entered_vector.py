"""J5: the entry carries the vector that was injected last, on kernels whose kvm_entry tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.injections import VIRQ_VECTOR, injections_of
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
