"""S5: a write of an x2APIC register that sets reserved bits raises #GP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.apic import X2APIC_MSR_BASE, describe_apic_register
from kvmtrace.model.held_registers import RESERVED_X2APIC
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "S5",
    "reserved bits of the x2APIC",
    VIOLATION,
    ("kvm_msr.ecx", "kvm_msr.write", "kvm_msr.data", "kvm_msr.exception"),
    "WRMSR that sets reserved bits of an x2APIC register raises #GP.",
    "kvm_lapic_msr_write, kvm_x2apic_icr_write, kvm_lapic_reg_write (lapic.c)",
    "bits of other MSRs, whose meaning CPUID decides",
    places="kvm_msr",
    blames_handler=False,
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=830 data=0x1000000d1 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=808 data=0x100000000 exception=1
kvm_inj_exception: exception=13 has_error=1 error_code=0x0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=808 data=0x100000000 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)
_REGISTER = 16  # bytes from one register to the next


@RULE.part("writes")
def _writes(excerpt: Excerpt, found: Found) -> None:
    values, positions = excerpt.sequence.values, excerpt.segments.positions("kvm_msr")
    offset = (values("kvm_msr", "ecx", positions).astype(np.int64) - X2APIC_MSR_BASE) * _REGISTER
    mine = among(offset, RESERVED_X2APIC) & (values("kvm_msr", "write", positions) != 0)
    mine &= values("kvm_msr", "exception", positions) == 0
    positions, offset = positions[mine], offset[mine]
    data = values("kvm_msr", "data", positions).astype(np.uint64)
    reserved = np.zeros(len(positions), np.uint64)
    for register, bits in RESERVED_X2APIC.items():
        reserved[offset == register] = bits
    bad = np.flatnonzero(data & reserved)
    found.check(len(positions))
    found.violate(
        positions[bad],
        lambda i: (
            f"#GP: bits {int(data[bad[i]] & reserved[bad[i]]):#x} are reserved",
            f"{int(data[bad[i]]):#x} is taken for {describe_apic_register(int(offset[bad[i]]))}",
        ),
    )
