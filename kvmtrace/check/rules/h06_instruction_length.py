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
    "vmx_skip_emulated_instruction, svm_skip_emulated_instruction; ExitRow.longest",
    "instructions with superfluous prefixes, which are longer and legal",
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
