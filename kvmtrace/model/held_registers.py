"""Registers and their bits: those that hold what is written to them (S2), those that a write must not set (S5)."""

from __future__ import annotations

_ALL = (1 << 64) - 1

# MSR -> bits. The memory types: no guest reads or writes them without a VM-exit, and no hardware changes them
# (kvm_mtrr_set_msr, kvm_set_msr_common; SDM "Memory Type Range Registers")
HELD_MSRS: dict[int, int] = {
    **dict.fromkeys((0x250, 0x258, 0x259, *range(0x268, 0x270)), _ALL),  # fixed ranges
    **{0x200 + 2 * number: _ALL for number in range(8)},  # bases of variable ranges
    0x277: _ALL,  # PAT
    0x2FF: _ALL,  # default type
}
# offset of a LAPIC register -> bits: what hardware delivers without KVM (TPR, EOI), and what a LAPIC changes by
# itself, is left out (kvm_lapic_reg_write)
HELD_LAPIC: dict[int, int] = {
    0xF0: 0xFF,  # spurious vector
    0x320: 0xFF,  # vectors of the local vector table
    0x340: 0xFF,
    0x350: 0xFF,
    0x360: 0xFF,
    0x370: 0xFF,
    0x3E0: 0xB,  # divide configuration
}
# requests of the VMM that set MSRs
MSR_SETTERS: tuple[str, ...] = ("KVM_SET_MSRS",)

_UPPER = 0xFFFFFFFF00000000
# offset of an x2APIC register -> bits that no processor lets a guest set: WRMSR raises #GP (S5). A register of 32 bits
# reserves the upper half; what else KVM refuses differs from version to version and is left out (SDM "x2APIC Register
# Address Space"; kvm_lapic_msr_write, kvm_x2apic_icr_write, kvm_lapic_reg_write)
RESERVED_X2APIC: dict[int, int] = {
    **dict.fromkeys((0x80, 0xB0, 0xF0, 0x280, 0x2F0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0), _UPPER),
    0x300: 0xFFF32000,  # interrupt command: the destination is its upper half
    0x3F0: _UPPER | 0xFFFFFF00,  # self-IPI: a vector alone
}
