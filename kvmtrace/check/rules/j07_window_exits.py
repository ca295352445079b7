"""J7: an interrupt-window exit traces nothing but the injection that it made room for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvmtrace.check.forbidden import check_forbidden, is_window
from kvmtrace.check.rule import VIOLATION, RowPart, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "J7",
    "window exits",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa"),
    "An interrupt-window exit traces nothing but the injection that it made room for.",
    "handle_interrupt_window (vmx/vmx.c), interrupt_window_interception (svm/svm.c)",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if is_window(row):
        yield RowPart("", (), partial(check_forbidden, row=row))
