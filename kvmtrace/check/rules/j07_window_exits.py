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
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=7 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=7 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if is_window(row):
        yield RowPart("", (), partial(check_forbidden, row=row))
