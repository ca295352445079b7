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
