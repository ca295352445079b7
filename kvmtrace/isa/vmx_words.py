"""VMX: exit qualifications, and the numbers that go with them.

Every decoder takes (exit code, info1) as ints or as columns (ndarray of uint64) and returns the same.
Sources: SDM "Exit Qualification" tables; arch/x86/kvm/vmx/vmx.c (handle_io, handle_cr, handle_dr,
handle_ept_violation); arch/x86/include/asm/vmx.h.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmtrace.isa.words import CrAccess, DrAccess, IoAccess, describe_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

# arch/x86/include/uapi/asm/vmx.h; vmx.c union vmx_exit_reason: what lies above the basic exit reason
VMX_BASIC_EXIT_REASON_MASK = 0xFFFF
VMX_FAILED_VMENTRY = 0x80000000
VMX_BUS_LOCK_DETECTED = 1 << 26

# fmt: off
VMX_EVENT_TYPES: Mapping[int, str] = MappingProxyType({
    0: "external interrupt", 1: "reserved", 2: "NMI", 3: "hardware exception", 4: "software interrupt",
    5: "privileged software exception", 6: "software exception", 7: "other event",
})

EPT_VIOLATION_BITS: Mapping[int, str] = MappingProxyType({
    0: "read", 1: "write", 2: "fetch", 3: "readable", 4: "writable", 5: "executable", 6: "user-executable",
    7: "gva-valid", 8: "translated-gva", 12: "nmi-unblocking",
})
# fmt: on
_ALLOWED_BITS = 0xF << 3  # readable, writable, executable, user-executable
_ACCESS_BITS = {"read": 1, "write": 2, "fetch": 4}

APIC_ACCESS_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "linear read",
        1: "linear write",
        2: "linear fetch",
        3: "linear during event delivery",
        10: "physical during event delivery",
        15: "physical access",
    }
)
TASK_SWITCH_SOURCES = ("CALL", "IRET", "JMP", "task gate in IDT")


def decode_vmx_io(code: Any, qualification: Any) -> IoAccess:  # noqa: ARG001
    """Decode IO_INSTRUCTION's exit qualification."""
    return IoAccess(
        port=(qualification >> 16) & 0xFFFF,
        size=(qualification & 7) + 1,
        write=(qualification & 8) == 0,
        string=(qualification & 16) != 0,
        rep=(qualification & 32) != 0,
    )


def encode_vmx_io(access: IoAccess) -> tuple[int, int]:
    """Return (exit qualification, bits that are known); bit 6 only says how the operand was encoded."""
    flags = access.rep << 5 | access.string << 4 | (not access.write) << 3
    return access.port << 16 | flags | access.size - 1, 0xFFFF003F


def decode_vmx_cr(code: Any, qualification: Any) -> CrAccess:  # noqa: ARG001
    """Decode CR_ACCESS's exit qualification."""
    return CrAccess(
        qualification & 15, (qualification >> 4) & 3, (qualification >> 8) & 15, (qualification >> 16) & 0xFFFF
    )


def decode_vmx_dr(code: Any, qualification: Any) -> DrAccess:  # noqa: ARG001
    """Decode DR_ACCESS's exit qualification; bit 4 set is a read of DRn."""
    return DrAccess(qualification & 7, (qualification & 16) == 0, (qualification >> 8) & 15)


def decode_vmx_msr_write(code: Any, qualification: Any) -> Any:  # noqa: ARG001
    """Say whether an MSR access is a write: each direction has its own exit reason."""
    return (code == 32) | (code == 85)


def encode_vmx_msr(write: bool) -> int:  # noqa: ARG001
    """Return the exit qualification of an MSR access: none is defined."""
    return 0


def encode_vmx_fault(access: str) -> tuple[int, int]:
    """Return (exit qualification, bits that are known) of an EPT violation by "read", "write", "fetch", or "walk".

    A walk of the guest's own page tables is no fetch; with accessed and dirty flags for EPT it counts as a write (SDM),
    and then not all processors call it a read as well (Bochs 2.7).
    """
    if access == "walk":
        return 0, 4
    return _ACCESS_BITS.get(access, 0), 7 if access in _ACCESS_BITS else 4


def describe_ept_violation(qualification: int) -> str:
    """Say what an EPT violation was: the access, and what the paging structures allowed."""
    return describe_bits(qualification, EPT_VIOLATION_BITS)


def classify_ept_violation(qualification: int) -> str:
    """Say whether the page was mapped: the paging structures allowed some access, if not this one."""
    return "refused" if qualification & _ALLOWED_BITS else "unmapped"


def decode_apic_access(qualification: int) -> tuple[int, str]:
    """Return (register offset, kind of access) of APIC_ACCESS's exit qualification."""
    kind = qualification >> 12 & 15
    return qualification & 0xFFF, APIC_ACCESS_TYPES.get(kind, f"UNKNOWN({kind:#x})")
