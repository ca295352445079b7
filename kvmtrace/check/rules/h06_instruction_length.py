"""H6: instructions that are longer than usual."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.rip_continuity import MAX_INSTRUCTION, advance, overridden
from kvmtrace.check.rule import SUSPICION, RowPart, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "H6",
    "unusual instruction length",
    SUSPICION,
    (
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        "kvm_exit.guest_rip",
        "kvm_entry.rip",
        "kvm_userspace_exit|kvm_fpu.load",
    ),
    "The guest resumes no further on than the longest usual encoding of the instruction.",
    "skip_emulated_instruction (vmx/vmx.c), svm_skip_emulated_instruction (svm/svm.c); ExitRow.longest",
    "instructions with superfluous prefixes, which are longer and legal",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=10 guest_rip=0x1010 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1013
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if row.longest:
        yield RowPart("", (), partial(_check, longest=row.longest))


def _check(excerpt: Excerpt, group: NDArray[np.intp], found: Found, *, longest: int) -> None:
    exits = excerpt.exits
    group = group[(exits.next_kind[group] == ENTRY) & ~exits.has("FPU unload", "kvm_emulate_insn")[group]]
    new = exits.resume_rip[group]
    moved = advance(excerpt, group, new)
    at = np.flatnonzero((moved > longest) & (moved <= MAX_INSTRUCTION))
    if len(at):
        at = at[~overridden(excerpt, group[at], new[at])]
    found.check(len(group))
    bad = group[at]
    found.violate(
        excerpt.segments.start[exits.seg[bad] + 1],
        lambda i: (f"{excerpt.exit_name(bad[i])} is at most {longest} bytes long", f"{int(moved[at[i]])} bytes"),
    )
