"""Exit qualifications and EXITINFO words as plain integers: what an exit says about its own cause.

All functions take and return Python integers or dataclasses; the columnar checks use the same shifts on
arrays. Sources: SDM "Exit Qualification" tables; APM "IOIO Intercept", "Nested Paging";
arch/x86/kvm/vmx/vmx.c (handle_io, handle_cr, handle_dr, handle_ept_violation), svm/svm.c (io_interception),
arch/x86/include/asm/kvm_host.h (PFERR_*).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class IoAccess:
    """A port access: `size` in bytes, `write` is OUT, `string` INS/OUTS, `rep` with a REP prefix."""

    port: int
    size: int
    write: bool
    string: bool
    rep: bool


@dataclass(frozen=True)
class CrAccess:
    """A control-register access: `kind` is "write", "read", "clts" or "lmsw"; `gpr` the general register."""

    cr: int
    kind: str
    gpr: int
    lmsw_source: int = 0


@dataclass(frozen=True)
class DrAccess:
    """A debug-register access: `write` is MOV to DRn."""

    dr: int
    write: bool
    gpr: int


# general registers in the numbering of exit qualifications and ModRM
GPR_NAMES = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
)

CR_ACCESS_KINDS = ("write", "read", "clts", "lmsw")


def decode_vmx_io(qualification: int) -> IoAccess:
    """Decode IO_INSTRUCTION's exit qualification (info1)."""
    return IoAccess(
        port=qualification >> 16 & 0xFFFF,
        size=(qualification & 7) + 1,
        write=not qualification & 8,
        string=bool(qualification & 16),
        rep=bool(qualification & 32),
    )


def decode_svm_io(exitinfo1: int) -> IoAccess:
    """Decode EXITINFO1 of `io`; bits 6:4 are the one-hot size, EXITINFO2 is the next RIP."""
    return IoAccess(
        port=exitinfo1 >> 16 & 0xFFFF,
        size=exitinfo1 >> 4 & 7,
        write=not exitinfo1 & 1,
        string=bool(exitinfo1 & 4),
        rep=bool(exitinfo1 & 8),
    )


def decode_vmx_cr(qualification: int) -> CrAccess:
    """Decode CR_ACCESS's exit qualification (info1)."""
    return CrAccess(
        qualification & 15,
        CR_ACCESS_KINDS[qualification >> 4 & 3],
        qualification >> 8 & 15,
        qualification >> 16 & 0xFFFF,
    )


def decode_vmx_dr(qualification: int) -> DrAccess:
    """Decode DR_ACCESS's exit qualification (info1); bit 4 set is a read of DRn."""
    return DrAccess(qualification & 7, not qualification & 16, qualification >> 8 & 15)


def decode_svm_cr_exit(exit_code: int) -> tuple[int, bool] | None:
    """Return (number, write) of a read_crN / write_crN exit code, None for any other."""
    return (exit_code & 15, exit_code >= 0x10) if 0 <= exit_code < 0x20 else None


def decode_svm_dr_exit(exit_code: int) -> tuple[int, bool] | None:
    """Return (number, write) of a read_drN / write_drN exit code, None for any other."""
    return (exit_code & 15, exit_code >= 0x30) if 0x20 <= exit_code < 0x40 else None


EPT_VIOLATION_BITS: Mapping[int, str] = MappingProxyType(
    {
        0: "read",
        1: "write",
        2: "fetch",
        3: "readable",
        4: "writable",
        5: "executable",
        6: "user-executable",
        7: "gva-valid",
        8: "translated-gva",
        12: "nmi-unblocking",
    }
)

# page-fault error code as KVM traces it: the architectural bits and the upper bits that SVM's NPF adds
PAGE_FAULT_BITS: Mapping[int, str] = MappingProxyType(
    {
        0: "present",
        1: "write",
        2: "user",
        3: "reserved",
        4: "fetch",
        5: "protection-key",
        6: "shadow-stack",
        15: "sgx",
        31: "rmp",
        32: "guest-final",
        33: "guest-page-table",
        34: "encrypted",
        35: "size-mismatch",
        36: "vmpl",
        37: "shadow-stack-page",
    }
)

PFERR_RSVD = 1 << 3  # a known MMIO page: the SPTE has reserved bits set on purpose

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


def describe_bits(value: int, names: Mapping[int, str]) -> str:
    """Join the names of the set bits with "|"; unnamed bits as one hexadecimal rest; "none" for 0."""
    words = [name for bit, name in names.items() if value >> bit & 1]
    rest = value & ~sum(1 << bit for bit in names)
    return "|".join([*words, f"{rest:#x}"] if rest else words) or "none"


def describe_ept_violation(qualification: int) -> str:
    """Say what an EPT violation was: the access, and what the paging structures allowed."""
    return describe_bits(qualification, EPT_VIOLATION_BITS)


def describe_page_fault_error(error_code: int) -> str:
    """Say what a page-fault or NPF error code means."""
    return describe_bits(error_code, PAGE_FAULT_BITS)


def decode_apic_access(qualification: int) -> tuple[int, str]:
    """Return (register offset, kind of access) of APIC_ACCESS's exit qualification."""
    kind = qualification >> 12 & 15
    return qualification & 0xFFF, APIC_ACCESS_TYPES.get(kind, f"UNKNOWN({kind:#x})")


def describe_io(access: IoAccess) -> str:
    """Return the instruction in words: "OUT 0x3f8 size 1", "REP INS 0x1f0 size 2"."""
    name = ("OUT" if access.write else "IN") + ("S" if access.string else "")
    return f"{'REP ' if access.rep else ''}{name} {access.port:#x} size {access.size}"
