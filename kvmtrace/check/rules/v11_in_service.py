"""V11: kvm_eoi ends the highest vector in service, and has an origin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.findings import constant
from kvmtrace.check.in_service import in_service
from kvmtrace.check.pending_interrupts import pending_interrupts
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.apic import APIC_EOI

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=65
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=48
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=65
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x41 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=176 val=0x0
kvm_eoi: apicid=0 vector=48
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


def _neighbours(excerpt: Excerpt, positions: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the events before and behind each position, scheduling left out; -1 where a thread or knowledge ends.

    A preemptible kernel may schedule the thread between any two of them.
    """
    sequence = excerpt.sequence
    found = []
    for step in (-1, 1):
        near = positions + step
        while True:
            inside = (near >= 0) & (near < len(sequence))
            scheduled = np.flatnonzero(inside)[sequence.cls[near[inside]] == CLASS["sched_switch"]]
            if not len(scheduled):
                break
            near[scheduled] += step
        near = np.where(inside, near, -1)
        first, last = np.minimum(near, positions), np.maximum(near, positions)
        parted = np.searchsorted(sequence.begins, last, "right") != np.searchsorted(sequence.begins, first, "right")
        found.append(np.where(parted, -1, near).astype(np.intp))
    return found[0], found[1]


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
    before, behind = _neighbours(excerpt, positions)
    known = (before >= 0) & (behind >= 0)
    positions, before, behind = positions[known], before[known], behind[known]
    by_write = np.zeros(len(positions), bool)
    written = sequence.cls[before] == CLASS["kvm_apic"]
    by_write[written] = sequence.values("kvm_apic", "reg", before[written]) == APIC_EOI
    by_flag = sequence.cls[behind] == CLASS["kvm_pv_eoi"]
    number = np.searchsorted(exits.start, positions) - 1
    by_hardware = np.append(True, excerpt.of_kind("hardware_eoi"))[number + 1]  # True: no exit before
    bad = positions[~(by_write | by_flag | by_hardware)]
    found.check(len(positions))
    found.violate(bad, constant("kvm_apic write of the EOI register before, or kvm_pv_eoi after", "kvm_eoi by itself"))


@RULE.part(
    "the origin of an injection",
    needs=(
        "kvm_inj_virq.vector",
        "kvm_inj_virq.reinjected",
        "kvm_inj_virq.soft",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.dm",
        "kvm_exit.vcpu_id",
        "kvm_apic",
        "kvm_msr",
    ),
    places="inject interrupt",
    adds=False,
)
def _accepted(excerpt: Excerpt, found: Found) -> None:
    """Check that the LAPIC accepted what is injected, since its last injection; or a pin of a PIC was raised."""
    pending = pending_interrupts(excerpt)
    found.check(pending.n_judged, pending.n_unknown)
    report_when_certain(excerpt, found, "repeated", pending.repeated)


@RULE.part("the paravirtual flag", needs=("kvm_pv_eoi.vector",), places="kvm_pv_eoi")
def _pv_eoi(excerpt: Excerpt, found: Found) -> None:
    """Check that kvm_pv_eoi directly follows kvm_eoi of its vector (apic_sync_pv_eoi_from_guest)."""
    sequence = excerpt.sequence
    positions = excerpt.segments.positions("kvm_pv_eoi")
    before, _ = _neighbours(excerpt, positions)
    positions, before = positions[before >= 0], before[before >= 0]
    vector = sequence.values("kvm_pv_eoi", "vector", positions).astype(np.int32)
    ended = np.full(len(positions), -2, np.int32)
    after = sequence.cls[before] == CLASS["kvm_eoi"]
    ended[after] = sequence.values("kvm_eoi", "vector", before[after]).astype(np.int32)
    at = np.flatnonzero(ended != vector)
    found.check(len(positions))
    found.violate(
        positions[at],
        lambda i: (
            f"kvm_eoi of vector {int(vector[at[i]])} directly before kvm_pv_eoi",
            "none" if ended[at[i]] == -2 else f"vector {int(ended[at[i]])}",
        ),
    )
