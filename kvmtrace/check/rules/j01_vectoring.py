"""J1: an exit that interrupted a delivery does not simply go on, unless its handler knows how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, RowPart, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "J1",
    "vectoring is captured",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING),
    "An exit with valid vectoring information never re-enters by fast path: an injection pass follows; with a reason "
    "whose handler cannot deal with it, it ends in KVM_EXIT_INTERNAL_ERROR.",
    "__vmx_complete_interrupts raises KVM_REQ_EVENT; __vmx_handle_exit (vmx/vmx.c)",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason=17 errno=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 07] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfe001000 val=0x0
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if "interrupts_delivery" not in row.kinds:
        yield RowPart("", (), _check)


def _check(excerpt: Excerpt, group: NDArray[np.intp], found: Found) -> None:
    exits = excerpt.exits
    if not excerpt.isa_of(group).vectoring_refused:
        return
    group = group[exits.vectoring[group] != 0]
    bad = group[exits.next_kind[group] == ENTRY]
    found.check(len(group))
    found.violate(
        excerpt.segments.start[exits.seg[bad] + 1],
        lambda i: (
            f"KVM_EXIT_INTERNAL_ERROR: {excerpt.exit_name(bad[i])} interrupted the delivery of an event",
            f"VM-entry, after vectoring information {int(exits.vectoring[bad[i]]):#x}",
        ),
    )
