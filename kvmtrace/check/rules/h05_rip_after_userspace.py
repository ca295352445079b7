"""H5: the RIP behind a userspace exit, where the VMM may have set registers without an ioctl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.rip_after_userspace import NEEDS, parts_behind_userspace
from kvmtrace.check.rule import SUSPICION, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.check.rule import RowPart
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "H5",
    "RIP after userspace",
    SUSPICION,
    NEEDS,
    "The guest continues behind the access that userspace completed, unless userspace set registers.",
    "complete_emulated_io, kvm_skip_emulated_instruction (x86.c)",
    "a change by KVM_CAP_SYNC_REGS, which takes no ioctl",
    "userspace exit",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    yield from parts_behind_userspace(row, by_ioctl=False)
