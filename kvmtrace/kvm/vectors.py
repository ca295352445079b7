"""Exception vectors, and the interruption information that VMX and SVM exchange with KVM.

Sources: arch/x86/include/asm/trapnr.h; arch/x86/kvm/trace.h (kvm_trace_sym_exc);
arch/x86/include/asm/vmx.h (INTR_INFO_*), arch/x86/include/asm/svm.h (SVM_EVTINJ_*);
SDM "Format of the VM-Exit Interruption-Information Field"; APM "Event Injection".
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmtrace.isa.exit_reasons import ISA_VMX

if TYPE_CHECKING:
    from collections.abc import Mapping

DB_VECTOR = 1
NMI_VECTOR = 2
BP_VECTOR = 3
UD_VECTOR = 6
NM_VECTOR = 7
DF_VECTOR = 8
GP_VECTOR = 13
PF_VECTOR = 14
AC_VECTOR = 17
MC_VECTOR = 18

# names as the kernel prints them in kvm_inj_exception; 2, 9, 15 have none
# fmt: off
EXCEPTION_NAMES: Mapping[int, str] = MappingProxyType({
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE",
    21: "#CP", 28: "#HV", 29: "#VC", 30: "#SX",
})

EXCEPTION_MEANINGS: Mapping[int, str] = MappingProxyType({
    0: "divide error", 1: "debug", 2: "non-maskable interrupt", 3: "breakpoint", 4: "overflow",
    5: "bound range exceeded", 6: "invalid opcode", 7: "device not available", 8: "double fault",
    10: "invalid TSS", 11: "segment not present", 12: "stack fault", 13: "general protection",
    14: "page fault", 16: "x87 floating-point error", 17: "alignment check", 18: "machine check",
    19: "SIMD floating-point", 20: "virtualization exception", 21: "control protection",
    28: "hypervisor injection", 29: "VMM communication", 30: "security",
})
# fmt: on

# x86.h x86_exception_has_error_code, extended by SEV's #VC and AMD's #SX
EXCEPTIONS_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})

# event types in bits 10:8; VMX has three more than SVM
INTR_TYPE_EXT_INTR = 0
INTR_TYPE_NMI = 2
INTR_TYPE_HARD_EXCEPTION = 3
INTR_TYPE_SOFT_INTR = 4
INTR_TYPE_PRIV_SW_EXCEPTION = 5
INTR_TYPE_SOFT_EXCEPTION = 6
INTR_TYPE_OTHER_EVENT = 7

# fmt: off
VMX_INTR_TYPES: Mapping[int, str] = MappingProxyType({
    0: "external interrupt", 1: "reserved", 2: "NMI", 3: "hardware exception", 4: "software interrupt",
    5: "privileged software exception", 6: "software exception", 7: "other event",
})
# fmt: on
SVM_EVENT_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "external interrupt",
        2: "NMI",
        3: "exception",
        4: "software interrupt",
    }
)

INTR_INFO_VECTOR_MASK = 0xFF
INTR_INFO_TYPE_SHIFT = 8
INTR_INFO_TYPE_MASK = 0x700
INTR_INFO_ERROR_CODE = 1 << 11
INTR_INFO_NMI_UNBLOCKED = 1 << 12  # VMX: "NMI unblocking due to IRET"
INTR_INFO_VALID = 1 << 31


@dataclass(frozen=True)
class IntrInfo:
    """A decoded interruption-information word (VMX) or EVENTINJ / EXITINTINFO (SVM, low 32 bits)."""

    valid: bool
    vector: int
    type: int
    has_error_code: bool


def decode_intr_info(value: int) -> IntrInfo:
    """Split an interruption-information word; test `valid` first, emulators leave stale bits without it."""
    return IntrInfo(
        bool(value & INTR_INFO_VALID),
        value & INTR_INFO_VECTOR_MASK,
        (value & INTR_INFO_TYPE_MASK) >> INTR_INFO_TYPE_SHIFT,
        bool(value & INTR_INFO_ERROR_CODE),
    )


def describe_exception(vector: int) -> str:
    """Name an exception vector ("#GP"); "UNKNOWN(0x9)" for one without a name."""
    return EXCEPTION_NAMES.get(vector, f"UNKNOWN({vector:#x})")


def describe_vector(vector: int) -> str:
    """Name any vector: exceptions below 32, "IRQ 0x31" from there on."""
    return describe_exception(vector) if vector < 32 else f"IRQ {vector:#x}"


def describe_intr_info(isa: int, value: int) -> str:
    """Say in words what an interruption-information word holds.

    Parameters
    ----------
    isa : ISA_VMX or ISA_SVM
    value : int, kvm_exit's intr_info or info2 (VMX IDT-vectoring), kvm_entry's intr_info

    Returns
    -------
    str, e.g. "#PF hardware exception, error code", "vector 0x31 external interrupt"; "none" if not valid
    """
    info = decode_intr_info(value)
    if not info.valid:
        return "none"
    types = VMX_INTR_TYPES if isa == ISA_VMX else SVM_EVENT_TYPES
    kind = types.get(info.type, f"UNKNOWN({info.type:#x})")
    if info.type == INTR_TYPE_NMI:
        return "NMI"
    exception = info.type in {INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_PRIV_SW_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION}
    name = describe_exception(info.vector) if exception else f"vector {info.vector:#x}"
    return f"{name} {kind}" + (", error code" if info.has_error_code else "")
