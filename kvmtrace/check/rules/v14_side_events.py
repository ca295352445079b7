"""V14: events beside the life of a vCPU stand where the model knows them, and carry what caused them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.side_rows import last_steps, neighbours, side_rows
from kvmtrace.kvm.apic import APIC_ICR
from kvmtrace.model.side_events import ICR_BUSY, SIDE_EVENTS
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

_IN_THE_RUN_LOOP = tuple(row.kind for row in SIDE_EVENTS.values() if row.place == "run loop")
_CAUSED = tuple(row for row in SIDE_EVENTS.values() if row.after)
TIMER, LINE, USERSPACE = "kvm_timer_update_irq", "vgic_update_irq_pending", "kvm_userspace_exit"
_PAGE = np.uint64(4096)
_ICR_BITS = np.uint64(0xFFFFFFFF & ~ICR_BUSY)


def _count(*kinds: str) -> Callable[[Excerpt], int]:
    """Return a function that counts the side events of these kinds."""
    return lambda excerpt: sum(len(side_rows(excerpt, kind)) for kind in kinds)


RULE = Rule(
    "V14",
    "side events in place",
    VIOLATION,
    ("kvm_entry|kvm_exit",),
    "Interrupt lines, IPIs, clocks and the emulator's page look-ups are traced where KVM does them, behind what "
    "caused them; an IPI is what the guest wrote, MMIO is where the look-up found it, a timer's line is the GIC's.",
    "kvm_set_irq (virt/kvm/irqchip.c), kvm_apic_send_ipi (lapic.c), vcpu_enter_guest, vcpu_is_mmio_gpa (x86.c)",
    "what is traced by threads that run no vCPU",
    places=_count(*SIDE_EVENTS),
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_pvclock_update: vcpu_id=0 version=2
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_pvclock_update: vcpu_id=0 version=2
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
)


@RULE.part("the run loop", places=_count(*_IN_THE_RUN_LOOP), adds=False)
def _places(excerpt: Excerpt, found: Found) -> None:
    """Check that what only the run loop does stands in it."""
    for kind in _IN_THE_RUN_LOOP:
        rows = side_rows(excerpt, kind)
        steps = last_steps(excerpt, rows)
        known = steps >= 0
        state = excerpt.automaton.next_state[excerpt.whole.cls[steps[known]]]
        bad = rows[known][~excerpt.automaton.follow_ups[state]]
        found.check(np.count_nonzero(known), np.count_nonzero(~known))
        found.violate_rows(bad, constant(f"{kind} in the run loop, outside guest mode", "elsewhere"))


@RULE.part("causes", places=_count(*(row.kind for row in _CAUSED)), adds=False)
def _causes(excerpt: Excerpt, found: Found) -> None:
    """Check that an event that has a cause stands behind it, nothing of KVM_RUN between."""
    for row in _CAUSED:
        if not excerpt.recorded(*row.after):
            continue
        rows = side_rows(excerpt, row.kind)
        steps = last_steps(excerpt, rows)
        # what an earlier table held of a thread's side events is not known any more
        known = (steps >= 0) & (excerpt.whole.row[np.maximum(steps, 0)] >= excerpt.whole.n_parked)
        rows, steps = rows[known], steps[known]
        caused = np.zeros(len(rows), bool)
        for cause in row.after:
            causes = side_rows(excerpt, cause)
            before, _ = neighbours(excerpt, rows, causes)
            caused |= (before >= 0) & (last_steps(excerpt, causes[before]) == steps) if len(causes) else False
        found.check(len(rows), np.count_nonzero(~known))
        found.violate_rows(rows[~caused], constant(f"{' or '.join(row.after)} before {row.kind}", "none"))


@RULE.part(
    "IPIs",
    needs=("kvm_apic.reg", "kvm_apic.val", "kvm_apic.rw", "kvm_apic_ipi.icr_low"),
    places=_count("kvm_apic_ipi"),
    adds=False,
)
def _ipis(excerpt: Excerpt, found: Found) -> None:
    """Check that an IPI is what the guest wrote to its ICR, just before (xAPIC) or just behind (x2APIC)."""
    rows, writes = side_rows(excerpt, "kvm_apic_ipi"), side_rows(excerpt, "kvm_apic", parked=True)
    writes = writes[(_field(excerpt, "kvm_apic", "reg", writes) == APIC_ICR)]
    writes = writes[_field(excerpt, "kvm_apic", "rw", writes) == 1]
    if not len(rows) or not len(writes):
        return
    sent = _field(excerpt, "kvm_apic_ipi", "icr_low", rows) & _ICR_BITS
    written = _field(excerpt, "kvm_apic", "val", writes) & _ICR_BITS
    steps, steps_of_writes = last_steps(excerpt, rows), last_steps(excerpt, writes)
    judged, right = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for nearest in neighbours(excerpt, rows, writes):
        near = (nearest >= 0) & (steps >= 0) & (steps_of_writes[nearest] == steps)
        judged |= near
        right |= near & (written[nearest] == sent)
    before, behind = neighbours(excerpt, rows, writes)
    nearest = np.where(before >= 0, before, behind)
    at = np.flatnonzero(judged & ~right)
    found.check(np.count_nonzero(judged), np.count_nonzero(~judged))
    found.violate_rows(
        rows[at],
        lambda i: (f"an IPI with ICR {int(written[nearest[at[i]]]):#x}, as written", f"{int(sent[at[i]]):#x}"),
    )


@RULE.part(
    "known MMIO",
    needs=("vcpu_match_mmio.gpa", "kvm_mmio.gpa"),
    places=_count("vcpu_match_mmio"),
    adds=False,
    source="emulator_read_write_onepage, vcpu_mmio_gva_to_gpa, vcpu_is_mmio_gpa (x86.c)",
)
def _known_mmio(excerpt: Excerpt, found: Found) -> None:
    """Check that the emulator reads or writes MMIO where its look-up, the last one before, found it."""
    rows, accesses = side_rows(excerpt, "vcpu_match_mmio"), side_rows(excerpt, "kvm_mmio")
    if not len(rows) or not len(accesses):
        return
    (_, access), (_, again) = neighbours(excerpt, rows, accesses), neighbours(excerpt, rows, rows)
    judged = (access >= 0) & ((again < 0) | (rows[again] > accesses[access]))
    steps, steps_of_accesses = last_steps(excerpt, rows), last_steps(excerpt, accesses)
    judged &= (steps >= 0) & (steps == steps_of_accesses[access])
    rows, access = rows[judged], accesses[access[judged]]
    gpa, told = _field(excerpt, "vcpu_match_mmio", "gpa", rows), _field(excerpt, "kvm_mmio", "gpa", access)
    # what begins a page may be the rest of an access, which is traced with the address of its beginning
    at = np.flatnonzero((gpa != told) & (gpa % _PAGE != 0))
    found.check(len(rows))
    found.violate_rows(
        access[at], lambda i: (f"kvm_mmio at {int(gpa[at[i]]):#x}, as looked up", f"gpa {int(told[at[i]]):#x}")
    )


@RULE.part(
    "timer lines",
    needs=tuple(f"{kind}.{field}" for kind in (TIMER, LINE) for field in ("irq", "level")),
    places=_count(TIMER),
    adds=False,
    source="kvm_timer_update_irq (arch_timer.c)",
)
def _timer_lines(excerpt: Excerpt, found: Found) -> None:
    """Check that the vGIC is told of a timer's line at once, and as it is.

    A VM whose interrupt controller is in userspace has no vGIC: of a KVM_RUN that never told it, nothing is asked.
    """
    rows, lines = side_rows(excerpt, TIMER), side_rows(excerpt, LINE, parked=True)
    if not len(rows) or not len(lines):
        return
    steps, steps_of_lines = last_steps(excerpt, rows), last_steps(excerpt, lines)
    _, line = neighbours(excerpt, rows, lines)
    _, again = neighbours(excerpt, rows, rows)
    told = (line >= 0) & (steps_of_lines[line] == steps) & ((again < 0) | (lines[line] < rows[again]))
    wrong = np.zeros(len(rows), bool)
    for field in ("irq", "level"):
        wrong |= told & (_field(excerpt, TIMER, field, rows) != _field(excerpt, LINE, field, lines[line]))
    table = excerpt.whole.table
    run, _ = neighbours(excerpt, rows, table.rows(USERSPACE) if USERSPACE in table.kind_index else rows[:0])
    which = table.tid[rows].astype(np.int64) << 32 | (run + 1)
    known = steps >= 0
    missed = ~told & among(which, distinct(which[told & known]))
    found.check(np.count_nonzero(known & (told | missed)), np.count_nonzero(~known))
    found.violate_rows(
        rows[known & (wrong | missed)],
        constant(f"{LINE} behind {TIMER}, with its interrupt and level", "none, or of another"),
    )


def _field(excerpt: Excerpt, kind: str, field: str, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Return a field of rows of a kind."""
    table = excerpt.whole.table
    return table.field(kind, field).take(table.position_in_kind[rows]).astype(np.uint64)
