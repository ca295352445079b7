"""KVM's own hypercalls. Source: include/uapi/linux/kvm_para.h."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KVM_HC_MAP_GPA_RANGE = 12

# fmt: off
HYPERCALLS: Mapping[int, str] = MappingProxyType({
    1: "KVM_HC_VAPIC_POLL_IRQ",
    2: "KVM_HC_MMU_OP",
    3: "KVM_HC_FEATURES",
    4: "KVM_HC_PPC_MAP_MAGIC_PAGE",
    5: "KVM_HC_KICK_CPU",
    6: "KVM_HC_MIPS_GET_CLOCK_FREQ",
    7: "KVM_HC_MIPS_EXIT_VM",
    8: "KVM_HC_MIPS_CONSOLE_OUTPUT",
    9: "KVM_HC_CLOCK_PAIRING",
    10: "KVM_HC_SEND_IPI",
    11: "KVM_HC_SCHED_YIELD",
    12: "KVM_HC_MAP_GPA_RANGE",
})
# fmt: on


def describe_hypercall(nr: int) -> str:
    """Name a hypercall number (kvm_hypercall's field `nr`), "UNKNOWN(0x99)" if KVM defines none."""
    return HYPERCALLS.get(nr, f"UNKNOWN({nr:#x})")
