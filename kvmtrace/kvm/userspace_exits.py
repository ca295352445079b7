"""KVM_EXIT_* reasons, and the other numbers that struct kvm_run hands to the VMM.

Source: include/uapi/linux/kvm.h (6.1 to 6.18). The kernel's own print table for kvm_userspace_exit ends at
30 (include/trace/events/kvm.h), so it prints later reasons as hexadecimal numbers; we name them all.
"""

from __future__ import annotations

import errno as _errno
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_ARM_NISV = 28
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_NOTIFY = 37
KVM_EXIT_MEMORY_FAULT = 39
KVM_EXIT_TDX = 40

# fmt: off
USERSPACE_EXIT_REASONS: Mapping[int, str] = MappingProxyType({
    0: "KVM_EXIT_UNKNOWN",
    1: "KVM_EXIT_EXCEPTION",
    2: "KVM_EXIT_IO",
    3: "KVM_EXIT_HYPERCALL",
    4: "KVM_EXIT_DEBUG",
    5: "KVM_EXIT_HLT",
    6: "KVM_EXIT_MMIO",
    7: "KVM_EXIT_IRQ_WINDOW_OPEN",
    8: "KVM_EXIT_SHUTDOWN",
    9: "KVM_EXIT_FAIL_ENTRY",
    10: "KVM_EXIT_INTR",
    11: "KVM_EXIT_SET_TPR",
    12: "KVM_EXIT_TPR_ACCESS",
    13: "KVM_EXIT_S390_SIEIC",
    14: "KVM_EXIT_S390_RESET",
    15: "KVM_EXIT_DCR",
    16: "KVM_EXIT_NMI",
    17: "KVM_EXIT_INTERNAL_ERROR",
    18: "KVM_EXIT_OSI",
    19: "KVM_EXIT_PAPR_HCALL",
    20: "KVM_EXIT_S390_UCONTROL",
    21: "KVM_EXIT_WATCHDOG",
    22: "KVM_EXIT_S390_TSCH",
    23: "KVM_EXIT_EPR",
    24: "KVM_EXIT_SYSTEM_EVENT",
    25: "KVM_EXIT_S390_STSI",
    26: "KVM_EXIT_IOAPIC_EOI",
    27: "KVM_EXIT_HYPERV",
    28: "KVM_EXIT_ARM_NISV",
    29: "KVM_EXIT_X86_RDMSR",
    30: "KVM_EXIT_X86_WRMSR",
    31: "KVM_EXIT_DIRTY_RING_FULL",
    32: "KVM_EXIT_AP_RESET_HOLD",
    33: "KVM_EXIT_X86_BUS_LOCK",
    34: "KVM_EXIT_XEN",
    35: "KVM_EXIT_RISCV_SBI",
    36: "KVM_EXIT_RISCV_CSR",
    37: "KVM_EXIT_NOTIFY",
    38: "KVM_EXIT_LOONGARCH_IOCSR",
    39: "KVM_EXIT_MEMORY_FAULT",
    40: "KVM_EXIT_TDX",
})

# kvm_run.internal.suberror
INTERNAL_ERRORS: Mapping[int, str] = MappingProxyType({
    1: "KVM_INTERNAL_ERROR_EMULATION",
    2: "KVM_INTERNAL_ERROR_SIMUL_EX",
    3: "KVM_INTERNAL_ERROR_DELIVERY_EV",
    4: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
})

# kvm_run.system_event.type
SYSTEM_EVENTS: Mapping[int, str] = MappingProxyType({
    1: "KVM_SYSTEM_EVENT_SHUTDOWN",
    2: "KVM_SYSTEM_EVENT_RESET",
    3: "KVM_SYSTEM_EVENT_CRASH",
    4: "KVM_SYSTEM_EVENT_WAKEUP",
    5: "KVM_SYSTEM_EVENT_SUSPEND",
    6: "KVM_SYSTEM_EVENT_SEV_TERM",
    7: "KVM_SYSTEM_EVENT_TDX_FATAL",
})

# KVM_SET_MP_STATE / KVM_GET_MP_STATE; x86 uses 0 to 4 and 9
MP_STATES: Mapping[int, str] = MappingProxyType({
    0: "KVM_MP_STATE_RUNNABLE",
    1: "KVM_MP_STATE_UNINITIALIZED",
    2: "KVM_MP_STATE_INIT_RECEIVED",
    3: "KVM_MP_STATE_HALTED",
    4: "KVM_MP_STATE_SIPI_RECEIVED",
    5: "KVM_MP_STATE_STOPPED",
    6: "KVM_MP_STATE_CHECK_STOP",
    7: "KVM_MP_STATE_OPERATING",
    8: "KVM_MP_STATE_LOAD",
    9: "KVM_MP_STATE_AP_RESET_HOLD",
    10: "KVM_MP_STATE_SUSPENDED",
})
# fmt: on


def describe_userspace_exit_reason(reason: int) -> str:
    """Name a KVM_EXIT_* number, "UNKNOWN(0x63)" if no header has it."""
    return USERSPACE_EXIT_REASONS.get(reason, f"UNKNOWN({reason:#x})")


def describe_errno(value: int) -> str:
    """Name an error number of either sign ("EINTR"); "" for 0, "UNKNOWN(0x..)" for one no errno.h has."""
    number = abs(value)
    return _errno.errorcode.get(number, f"UNKNOWN({number:#x})") if number else ""


def describe_userspace_exit(reason: int, errno: int) -> str:
    """Name a kvm_userspace_exit: the reason, or the error, since KVM leaves a stale reason on error paths."""
    return describe_userspace_exit_reason(reason) if errno >= 0 else f"-{describe_errno(errno)}"
