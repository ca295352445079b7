"""The words in which a VM-exit speaks of its own cause, as the ISAs of x86 share them.

Every function takes ints or columns (ndarray of uint64) and returns the same. Which bits an ISA uses for what stands
in its own file. Sources: SDM "Format of the VM-Exit Interruption-Information Field"; APM "Event Injection", "Nested
Paging"; arch/x86/include/asm/vmx.h (INTR_INFO_*), arch/x86/include/asm/svm.h (SVM_EVTINJ_*),
arch/x86/include/asm/kvm_host.h (PFERR_*).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmtrace.kvm.vectors import describe_exception
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class IoAccess:
    """A port access: `size` in bytes, `write` is OUT, `string` INS/OUTS, `rep` with a REP prefix."""

    port: Any
    size: Any
    write: Any
    string: Any
    rep: Any


@dataclass(frozen=True)
class AbortAccess:
    """An access to memory as a syndrome tells it; without `valid` it tells only `table_walk` and `access_flag`.

    `described`: bits that only a data access sets.
    """

    valid: Any
    size: Any
    register: Any
    write: Any
    table_walk: Any
    access_flag: Any
    described: Any


@dataclass(frozen=True)
class RegisterAccess:
    """A trapped access to a system register, whose name is five numbers."""

    op0: Any
    op1: Any
    crn: Any
    crm: Any
    op2: Any
    write: Any


@dataclass(frozen=True)
class CrAccess:
    """A control-register access: `kind` indexes CR_ACCESS_KINDS; CLTS and LMSW are writes of CR0."""

    cr: Any
    kind: Any
    gpr: Any
    lmsw_source: Any = 0

    @property
    def write(self) -> Any:
        """Whether the register is written."""
        return self.kind != CR_READ

    @property
    def register(self) -> Any:
        """The number of the register that is accessed, as kvm_cr traces it."""
        return self.cr * (self.kind < CR_CLTS)


@dataclass(frozen=True)
class DrAccess:
    """A debug-register access: `write` is MOV to DRn."""

    dr: Any
    write: Any
    gpr: Any


# general registers in the numbering of exit qualifications and ModRM
# fmt: off
GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)
# fmt: on
CR_ACCESS_KINDS = ("write", "read", "clts", "lmsw")
CR_WRITE, CR_READ, CR_CLTS, CR_LMSW = range(4)

# fmt: off
# page-fault error code as KVM traces it: the architectural bits and the upper bits that nested paging adds
PAGE_FAULT_BITS: Mapping[int, str] = MappingProxyType({
    0: "present", 1: "write", 2: "user", 3: "reserved", 4: "fetch", 5: "protection-key", 6: "shadow-stack", 15: "sgx",
    31: "rmp", 32: "guest-final", 33: "guest-page-table", 34: "encrypted", 35: "size-mismatch", 36: "vmpl",
    37: "shadow-stack-page",
})
# fmt: on
PFERR_PRESENT = 1 << 0
PFERR_WRITE = 1 << 1
PFERR_USER = 1 << 2
PFERR_RSVD = 1 << 3  # a known MMIO page: the SPTE has reserved bits set on purpose
PFERR_FETCH = 1 << 4
PFERR_GUEST_FINAL = 1 << 32
PFERR_GUEST_PAGE = 1 << 33  # a page of the guest's own page tables

# interruption information: event types in bits 10:8; VMX has three more than SVM
INTR_TYPE_EXT_INTR = 0
INTR_TYPE_NMI = 2
INTR_TYPE_HARD_EXCEPTION = 3
INTR_TYPE_SOFT_INTR = 4
INTR_TYPE_PRIV_SW_EXCEPTION = 5
INTR_TYPE_SOFT_EXCEPTION = 6
INTR_TYPE_OTHER_EVENT = 7

INTR_INFO_VECTOR_MASK = 0xFF
INTR_INFO_TYPE_SHIFT = 8
INTR_INFO_TYPE_MASK = 0x700
INTR_INFO_ERROR_CODE = 1 << 11
INTR_INFO_NMI_UNBLOCKED = 1 << 12  # VMX: "NMI unblocking due to IRET"
# RFLAGS (SDM "EFLAGS Register", APM "rFLAGS Register")
RFLAGS_FIXED = 1 << 1  # always set
RFLAGS_IF = 1 << 9  # interrupts enabled
INTR_INFO_VALID = 1 << 31


@dataclass(frozen=True)
class IntrInfo:
    """A decoded interruption-information word (VMX) or EVENTINJ / EXITINTINFO (SVM, low 32 bits)."""

    valid: Any
    vector: Any
    type: Any
    has_error_code: Any


def decode_intr_info(value: Any) -> IntrInfo:
    """Split an interruption-information word; test `valid` first, emulators leave stale bits without it."""
    return IntrInfo(
        (value & INTR_INFO_VALID) != 0,
        value & INTR_INFO_VECTOR_MASK,
        (value & INTR_INFO_TYPE_MASK) >> INTR_INFO_TYPE_SHIFT,
        (value & INTR_INFO_ERROR_CODE) != 0,
    )


def describe_intr_info(types: Mapping[int, str], value: int) -> str:
    """Say in words what an interruption-information word holds.

    Parameters
    ----------
    types : the ISA's event types (Isa.event_types)
    value : int, kvm_exit's intr_info or vectoring field, kvm_entry's intr_info

    Returns
    -------
    str, e.g. "#PF hardware exception, error code", "vector 0x31 external interrupt"; "none" if not valid
    """
    info = decode_intr_info(value)
    if not info.valid:
        return "none"
    kind = types.get(info.type, f"UNKNOWN({info.type:#x})")
    if info.type == INTR_TYPE_NMI:
        return "NMI"
    exception = info.type in {INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_PRIV_SW_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION}
    name = describe_exception(info.vector) if exception else f"vector {info.vector:#x}"
    return f"{name} {kind}" + (", error code" if info.has_error_code else "")


def describe_bits(value: int, names: Mapping[int, str]) -> str:
    """Join the names of the set bits with "|"; unnamed bits as one hexadecimal rest; "none" for 0."""
    words = [name for bit, name in names.items() if value >> bit & 1]
    rest = value & ~sum(1 << bit for bit in names)
    return "|".join([*words, f"{rest:#x}"] if rest else words) or "none"


def describe_page_fault_error(error_code: int) -> str:
    """Say what the error code of a page fault, of either level, means."""
    return describe_bits(error_code, PAGE_FAULT_BITS)


def describe_io(access: IoAccess) -> str:
    """Return the instruction in words: "OUT 0x3f8 size 1", "REP INS 0x1f0 size 2"."""
    name = ("OUT" if access.write else "IN") + ("S" if access.string else "")
    return f"{'REP ' if access.rep else ''}{name} {access.port:#x} size {access.size}"
