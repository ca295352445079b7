"""H5: the RIP behind a userspace exit: a suspicion, as the VMM may set registers without an ioctl (sync_regs)."""

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
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=30 guest_rip=0x1001 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x900
kvm_exit: exit_reason=32 guest_rip=0x900 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=10 data=0x0 exception=1
kvm_inj_exception: exception=13 has_error=1 error_code=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x900
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    yield from parts_behind_userspace(row)
