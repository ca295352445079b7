"""Exception vectors of x86.

Sources: arch/x86/include/asm/trapnr.h; arch/x86/kvm/trace.h (kvm_trace_sym_exc).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DB_VECTOR = 1
NMI_VECTOR = 2
BP_VECTOR = 3
OF_VECTOR = 4
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

# x86.h x86_exception_has_error_code, extended by the encrypted guests' #VC and #SX
EXCEPTIONS_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})


def describe_exception(vector: int) -> str:
    """Name an exception vector ("#GP"); "UNKNOWN(0x9)" for one without a name."""
    return EXCEPTION_NAMES.get(vector, f"UNKNOWN({vector:#x})")


def describe_vector(vector: int) -> str:
    """Name any vector: exceptions below 32, "IRQ 0x31" from there on."""
    return describe_exception(vector) if vector < 32 else f"IRQ {vector:#x}"
