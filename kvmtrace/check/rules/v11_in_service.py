"""V11: kvm_eoi ends the highest vector in service, and has an origin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.findings import constant
from kvmtrace.check.in_service import in_service
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.apic import APIC_EOI

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V11",
    "in-service stack",
    VIOLATION,
    ("kvm_eoi.vector",),
    "kvm_eoi names the highest vector in service: the last one injected from the LAPIC and not yet ended.",
    "apic_set_eoi, apic_find_highest_isr (lapic.c)",
    "vectors that were in service before the recording began, and those that APICv and AVIC deliver without an event",
    places="kvm_eoi",
)


@RULE.part("the stack", needs=("kvm_inj_virq.vector",))
def _stack(excerpt: Excerpt, found: Found) -> None:
    outcome = in_service(excerpt)
    found.check(outcome.n_ended)
    wrong = outcome.wrong_ends
    found.violate([position for position, _, _ in wrong], lambda i: (wrong[i][2], f"kvm_eoi vector {wrong[i][1]}"))


@RULE.part("the origin of an EOI", needs=("kvm_apic.reg", "kvm_pv_eoi", "kvm_exit.exit_reason", "kvm_exit.isa"))
def _origin(excerpt: Excerpt, found: Found) -> None:
    """Check that an EOI is a write of the EOI register, or found in the paravirtual flag, or hardware's."""
    sequence, segments, exits = excerpt.sequence, excerpt.segments, excerpt.exits
    positions = segments.positions("kvm_eoi")
    inside = (positions > 0) & (positions < len(sequence) - 1)
    positions = positions[inside & ~sequence.first[positions] & ~sequence.broken[positions]]
    positions = positions[~sequence.broken[np.minimum(positions + 1, len(sequence) - 1)]]
    positions = positions[sequence.thread[positions + 1] == sequence.thread[positions]]
    by_write = np.zeros(len(positions), bool)
    before = sequence.cls[positions - 1] == CLASS["kvm_apic"]
    by_write[before] = sequence.values("kvm_apic", "reg", positions[before] - 1) == APIC_EOI
    by_flag = sequence.cls[positions + 1] == CLASS["kvm_pv_eoi"]
    number = np.searchsorted(exits.start, positions) - 1
    by_hardware = np.append(True, excerpt.of_kind("hardware_eoi"))[number + 1]  # True: no exit before
    bad = positions[~(by_write | by_flag | by_hardware)]
    found.check(len(positions))
    found.violate(bad, constant("kvm_apic write of the EOI register before, or kvm_pv_eoi after", "kvm_eoi by itself"))


@RULE.part("the paravirtual flag", needs=("kvm_pv_eoi.vector",), places="kvm_pv_eoi")
def _pv_eoi(excerpt: Excerpt, found: Found) -> None:
    """Check that kvm_pv_eoi directly follows kvm_eoi of its vector (apic_sync_pv_eoi_from_guest)."""
    sequence = excerpt.sequence
    positions = excerpt.segments.positions("kvm_pv_eoi")
    positions = positions[(positions > 0) & ~sequence.first[positions] & ~sequence.broken[positions]]
    vector = sequence.values("kvm_pv_eoi", "vector", positions).astype(np.int32)
    ended = np.full(len(positions), -2, np.int32)
    after = sequence.cls[positions - 1] == CLASS["kvm_eoi"]
    ended[after] = sequence.values("kvm_eoi", "vector", positions[after] - 1).astype(np.int32)
    at = np.flatnonzero(ended != vector)
    found.check(len(positions))
    found.violate(
        positions[at],
        lambda i: (
            f"kvm_eoi of vector {int(vector[at[i]])} directly before kvm_pv_eoi",
            "none" if ended[at[i]] == -2 else f"vector {int(ended[at[i]])}",
        ),
    )
