"""Local APIC registers, delivery modes, and the memory-mapped devices of a PC.

Sources: arch/x86/include/asm/apicdef.h; arch/x86/kvm/trace.h (kvm_trace_symbol_apic, kvm_deliver_mode);
SDM "Local APIC Register Address Map".
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

X2APIC_MSR_BASE = 0x800  # x2APIC register r is MSR 0x800 + (r >> 4)
N_X2APIC_MSRS = 0x100
APIC_DEFAULT_BASE = 0xFEE00000
IOAPIC_DEFAULT_BASE = 0xFEC00000
HPET_BASE = 0xFED00000

APIC_ID = 0x20
APIC_TASKPRI = 0x80
APIC_EOI = 0xB0
APIC_SPIV = 0xF0
APIC_ICR = 0x300
APIC_ICR2 = 0x310
APIC_LVTT, APIC_LVTPC = 0x320, 0x340
APIC_TMICT = 0x380
APIC_SELF_IPI = 0x3F0

# fmt: off
APIC_REGISTERS: Mapping[int, str] = MappingProxyType({
    0x20: "APIC_ID",
    0x30: "APIC_LVR",
    0x80: "APIC_TASKPRI",
    0x90: "APIC_ARBPRI",
    0xA0: "APIC_PROCPRI",
    0xB0: "APIC_EOI",
    0xC0: "APIC_RRR",
    0xD0: "APIC_LDR",
    0xE0: "APIC_DFR",
    0xF0: "APIC_SPIV",
    0x100: "APIC_ISR",
    0x180: "APIC_TMR",
    0x200: "APIC_IRR",
    0x280: "APIC_ESR",
    0x2F0: "APIC_LVTCMCI",
    0x300: "APIC_ICR",
    0x310: "APIC_ICR2",
    0x320: "APIC_LVTT",
    0x330: "APIC_LVTTHMR",
    0x340: "APIC_LVTPC",
    0x350: "APIC_LVT0",
    0x360: "APIC_LVT1",
    0x370: "APIC_LVTERR",
    0x380: "APIC_TMICT",
    0x390: "APIC_TMCCT",
    0x3E0: "APIC_TDCR",
    0x3F0: "APIC_SELF_IPI",
    0x400: "APIC_EFEAT",
    0x410: "APIC_ECTRL",
})
# fmt: on

# eight 32-bit words each, 0x10 apart; word 0 is in the table above
_BIT_ARRAYS = {0x100: "APIC_ISR", 0x180: "APIC_TMR", 0x200: "APIC_IRR"}

FIXED, LOWEST_PRIORITY, EXTERNAL = 0, 1, 7
# bits 10:8 of an ICR, an LVT or MSI data; kvm_apic_accept_irq.dm is this value shifted left by 8
DELIVERY_MODES: Mapping[int, str] = MappingProxyType(
    {
        0: "Fixed",
        1: "LowPrio",
        2: "SMI",
        3: "Res3",
        4: "NMI",
        5: "INIT",
        6: "SIPI",
        7: "ExtINT",
    }
)


def describe_apic_register(offset: int) -> str:
    """Name a local APIC register by its offset in the page ("APIC_EOI", "APIC_ISR3")."""
    if offset in APIC_REGISTERS:
        return APIC_REGISTERS[offset]
    name = _BIT_ARRAYS.get(offset & ~0x7F)
    return f"{name}{(offset & 0x7F) >> 4}" if name else f"APIC_UNKNOWN({offset:#x})"


def describe_delivery_mode(dm: int) -> str:
    """Name the delivery mode of kvm_apic_accept_irq's raw field `dm` (mode << 8)."""
    return DELIVERY_MODES[dm >> 8 & 7]
