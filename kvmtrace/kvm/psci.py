"""The Arm Power State Coordination Interface, which a guest calls by HVC. Source: include/uapi/linux/psci.h.

Functions above 0x95c1ba5d are those of KVM's own version 0.1 (arch/arm64/include/uapi/asm/kvm.h, KVM_PSCI_FN).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_64_BIT = 0x4000_0000  # SMCCC: the same function with 64-bit arguments

# fmt: off
PSCI_FUNCTIONS: Mapping[int, str] = MappingProxyType({
    0x84000000: "PSCI_VERSION",
    0x84000001: "CPU_SUSPEND",
    0x84000002: "CPU_OFF",
    0x84000003: "CPU_ON",
    0x84000004: "AFFINITY_INFO",
    0x84000005: "MIGRATE",
    0x84000006: "MIGRATE_INFO_TYPE",
    0x84000007: "MIGRATE_INFO_UP_CPU",
    0x84000008: "SYSTEM_OFF",
    0x84000009: "SYSTEM_RESET",
    0x8400000A: "PSCI_FEATURES",
    0x8400000E: "SYSTEM_SUSPEND",
    0x8400000F: "SET_SUSPEND_MODE",
    0x84000012: "SYSTEM_RESET2",
    0x95C1BA5E: "CPU_SUSPEND (0.1)",
    0x95C1BA5F: "CPU_OFF (0.1)",
    0x95C1BA60: "CPU_ON (0.1)",
    0x95C1BA61: "MIGRATE (0.1)",
})
# fmt: on
# after these a vCPU goes on wherever another one switches it on
POWERS_OFF: tuple[int, ...] = (0x84000002, 0x95C1BA5F)


def describe_psci(function: int) -> str | None:
    """Name a function by what the guest's W0 held; None if it is not one of PSCI."""
    number = function & 0xFFFFFFFF
    return PSCI_FUNCTIONS.get(number) or PSCI_FUNCTIONS.get(number & ~_64_BIT)
