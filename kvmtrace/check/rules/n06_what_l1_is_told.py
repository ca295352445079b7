"""N6: an exit that is passed on tells L1 what the processor told KVM, an interrupted delivery included."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.guest_levels import nestings
from kvmtrace.check.reflections import reflections
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.base import EVENT_TYPE
from kvmtrace.isa.words import INTR_INFO_VALID
from kvmtrace.model.nesting import REFLECTS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.reflections import Reflections
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import Nesting

RULE = Rule(
    "N6",
    "what L1 is told",
    VIOLATION,
    ("kvm_nested_vmexit", "kvm_nested_vmexit_inject.exit_code", "kvm_exit.exit_reason", "kvm_exit.isa"),
    "An exit that KVM passes on to L1 carries the reason and information of L2's exit, and the delivery that this "
    "interrupted, which then is L1's to repeat.",
    "nested_svm_vmexit, nested_save_pending_event_to_vmcb12 (svm/nested.c); prepare_vmcs12, "
    "vmcs12_save_pending_event (vmx/nested.c)",
    "registers of L2 and what else L1 reads in memory",
    places=REFLECTS,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=28 guest_rip=0x2000 isa=1 info1=0x3 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=28 guest_rip=0x2000 isa=1 info1=0x3 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=28 exit_info1=0x3 exit_info2=0x80000030 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=28 guest_rip=0x2000 isa=1 info1=0x3 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=28 guest_rip=0x2000 isa=1 info1=0x3 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=28 exit_info1=0x3 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
""",
)


def _of(excerpt: Excerpt, nesting: Nesting) -> Reflections:
    """Return the exits of an ISA that were passed on as they are."""
    made = reflections(excerpt)
    mine = next(mine for one, _, mine in nestings(excerpt) if one is nesting)
    return made.take(made.direct & mine[made.exit])


def _check_information(excerpt: Excerpt, found: Found, *, name: str) -> None:
    if not len(reflections(excerpt).position):
        return
    for nesting, _, _ in nestings(excerpt):
        own_name = nesting.reflected_info.get(name)
        if own_name is None or not excerpt.has_field("kvm_exit", own_name):
            continue
        made = _of(excerpt, nesting)
        told = excerpt.sequence.values(REFLECTS, name, made.position).astype(np.uint64)
        own = excerpt.exits.get(own_name)[made.exit]
        bad = np.flatnonzero(told != own)
        found.check(len(made.position))
        found.violate(
            made.position[bad],
            lambda i, bad=bad, own=own, told=told, own_name=own_name: (  # type: ignore[misc]
                f"{name} {int(own[bad[i]]):#x}, {own_name} of L2's exit",
                f"{int(told[bad[i]]):#x}",
            ),
        )


for _name in ("exit_info1", "exit_info2", "exit_int_info"):
    RULE.part(_name, needs=(f"kvm_nested_vmexit_inject.{_name}",), adds=False)(partial(_check_information, name=_name))


@RULE.part("the interrupted delivery", needs=("kvm_nested_vmexit_inject.exit_int_info",))
def _carried(excerpt: Excerpt, found: Found) -> None:
    """Check that L1 learns whose delivery L2's exit interrupted, by its vector; and that none is made up."""
    if not len(reflections(excerpt).position):
        return
    for nesting, isa, _ in nestings(excerpt):
        made = _of(excerpt, nesting)
        if not excerpt.has_field("kvm_exit", isa.vectoring_field) or not excerpt.has_field(
            REFLECTS, nesting.carried_field
        ):
            continue
        made = made.take(~among(made.code, [*nesting.never_carries]))
        bits = np.uint64(INTR_INFO_VALID | 0xFF)
        told = excerpt.sequence.values(REFLECTS, nesting.carried_field, made.position).astype(np.uint64) & bits
        told[(told & np.uint64(INTR_INFO_VALID)) == 0] = 0
        own = excerpt.exits.vectoring[made.exit] & bits
        bad = np.flatnonzero(told != own)
        bad = bad[~_double_fault(excerpt, made, bad)]
        found.check(len(made.position))
        found.violate(
            made.position[bad],
            lambda i, bad=bad, own=own, told=told: (  # type: ignore[misc]
                f"the interrupted delivery of vector {int(own[bad[i]]) & 0xFF:#x}" if own[bad[i]] else "no delivery",
                f"vector {int(told[bad[i]]) & 0xFF:#x}" if told[bad[i]] else "none",
            ),
        )


@RULE.part("the interrupt that L1 takes by its exit", needs=("kvm_nested_vmexit_inject.exit_int_info",), adds=False)
def _taken(excerpt: Excerpt, found: Found) -> None:
    """Check that what an exit for an interrupt of L1's tells is an external interrupt, or nothing."""
    for nesting, isa, mine in nestings(excerpt):
        if not nesting.taken_field or not excerpt.has_field(REFLECTS, nesting.taken_field):
            continue
        made = reflections(excerpt)
        made = made.take(mine[made.exit] & (made.code == isa.code_of("external_interrupt")))
        told = excerpt.sequence.values(REFLECTS, nesting.taken_field, made.position).astype(np.uint64)
        bad = np.flatnonzero((told & np.uint64(INTR_INFO_VALID) != 0) & (told & np.uint64(EVENT_TYPE) != 0))
        found.check(len(made.position))
        found.violate(
            made.position[bad],
            partial(_no_external_interrupt, told=told[bad].tolist()),
        )


def _no_external_interrupt(number: int, told: list[int]) -> tuple[str, str]:
    return "an external interrupt (type 0), which L1's exit acknowledges", f"{told[number]:#x}"


def _double_fault(excerpt: Excerpt, made: Reflections, at: np.ndarray) -> np.ndarray:
    """Say which exits are double faults: by definition they interrupt no delivery."""
    info = excerpt.exits.get("intr_info")[made.exit[at]]
    by_information = excerpt.of_isa(lambda isa: isa.exit_intr_info)[made.exit[at]]
    found: np.ndarray = by_information & (info & np.uint64(INTR_INFO_VALID | 0xFF) == np.uint64(INTR_INFO_VALID | 8))
    return found
