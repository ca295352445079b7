"""Which fields of which events are altered, and how: one row per way a fault could show.

A row is (event, field, name of the alteration, function of the old value). A function may return None: that
event does not lend itself to it. Values stay within what the field could hold in reality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvmtrace.isa.vmx import VMX

Change = Callable[[int], "int | None"]


class Alteration(NamedTuple):
    """One way to alter one field."""

    event: str
    field: str
    name: str
    change: Change


def _plus(step: int) -> Change:
    return lambda value: value + step if value + step >= 0 else None


def _flip(bits: int) -> Change:
    return lambda value: value ^ bits


def _other(first: int, second: int) -> Change:
    """Return `first`, or `second` where the value is that already."""
    return lambda value: second if value == first else first


def _set(value: int) -> Change:
    return lambda old: None if old == value else value


ALTERATIONS: tuple[Alteration, ...] = tuple(
    Alteration(*row)
    for row in (
        ("kvm_exit", "guest_rip", "rip+1", _plus(1)),
        ("kvm_exit", "guest_rip", "rip-1", _plus(-1)),
        ("kvm_exit", "guest_rip", "rip+page", _plus(0x1000)),
        ("kvm_exit", "exit_reason", "reason", _other(10, 12)),  # CPUID or HLT (VMX); replaced on SVM, see plan.py
        ("kvm_exit", "exit_reason", "interrupt", _other(1, 7)),
        ("kvm_exit", "info1", "bit0", _flip(1)),
        ("kvm_exit", "info1", "bit3", _flip(8)),
        ("kvm_exit", "info1", "bit16", _flip(0x10000)),
        ("kvm_exit", "info2", "bit0", _flip(1)),
        ("kvm_exit", "info2", "page", _flip(0x1000)),
        ("kvm_exit", "intr_info", "valid", _flip(0x80000000)),
        ("kvm_exit", "vcpu_id", "vcpu", _plus(1)),
        ("kvm_exit", "isa", "isa", _other(1, 2)),
        ("kvm_entry", "rip", "rip+1", _plus(1)),
        ("kvm_entry", "rip", "rip-1", _plus(-1)),
        ("kvm_entry", "rip", "rip+16", _plus(16)),
        ("kvm_entry", "rip", "rip-16", _plus(-16)),
        ("kvm_entry", "vcpu_id", "vcpu", _plus(1)),
        ("kvm_entry", "immediate_exit", "immediate", _flip(1)),
        ("kvm_pio", "port", "port", _flip(1)),
        ("kvm_pio", "size", "size", _other(2, 1)),
        ("kvm_pio", "rw", "direction", _flip(1)),
        ("kvm_pio", "count", "count", _plus(1)),
        ("kvm_pio", "val", "value", _flip(1)),
        ("kvm_mmio", "gpa", "gpa+8", _plus(8)),
        ("kvm_mmio", "gpa", "gpa+page", _plus(0x1000)),
        ("kvm_mmio", "len", "len", _other(1, 2)),
        ("kvm_mmio", "type", "type", lambda value: (value + 1) % 3),
        ("kvm_mmio", "val", "value", _flip(1)),
        ("kvm_msr", "write", "direction", _flip(1)),
        ("kvm_msr", "exception", "exception", _flip(1)),
        ("kvm_msr", "ecx", "msr", _flip(1)),
        ("kvm_msr", "data", "value", _flip(1)),
        ("kvm_cr", "cr", "cr", _other(4, 0)),
        ("kvm_cr", "rw", "direction", _flip(1)),
        ("kvm_cr", "val", "value", _flip(1)),
        ("kvm_cpuid", "function", "leaf", _flip(1)),
        ("kvm_cpuid", "rax", "value", _flip(1)),
        ("kvm_page_fault", "guest_rip", "rip+1", _plus(1)),
        ("kvm_page_fault", "fault_address", "address+page", _plus(0x1000)),
        ("kvm_page_fault", "error_code", "error", _flip(2)),
        ("kvm_page_fault", "vcpu_id", "vcpu", _plus(1)),
        ("kvm_emulate_insn", "rip", "rip+1", _plus(1)),
        ("kvm_emulate_insn", "len", "len+1", _plus(1)),
        ("kvm_emulate_insn", "len", "len-1", lambda value: value - 1 if value > 1 else None),
        ("kvm_emulate_insn", "failed", "failed", _flip(1)),
        ("kvm_inj_virq", "vector", "vector", _flip(1)),
        ("kvm_inj_virq", "reinjected", "reinjected", _flip(1)),
        ("kvm_inj_virq", "soft", "soft", _flip(1)),
        ("kvm_inj_exception", "exception", "vector", _other(13, 6)),
        ("kvm_inj_exception", "reinjected", "reinjected", _flip(1)),
        ("kvm_inj_exception", "has_error", "has error", _flip(1)),
        ("kvm_inj_exception", "error_code", "error", _flip(2)),
        ("kvm_eoi", "vector", "vector", _flip(1)),
        ("kvm_eoi", "apicid", "vcpu", _plus(1)),
        ("kvm_apic", "reg", "register", _flip(0x10)),
        ("kvm_apic", "rw", "direction", _flip(1)),
        ("kvm_apic", "val", "value", _flip(1)),
        ("kvm_apic_accept_irq", "vec", "vector", _flip(1)),
        ("kvm_apic_accept_irq", "apicid", "vcpu", _plus(1)),
        # interrupts on their way
        ("kvm_apic_accept_irq", "dm", "mode", _other(0x400, 0)),
        ("kvm_apic_accept_irq", "tm", "trigger", _flip(1)),
        ("kvm_apic_ipi", "icr_low", "vector", _flip(1)),
        ("kvm_apic_ipi", "icr_low", "mode", _flip(0x400)),
        ("kvm_apic_ipi", "icr_low", "shorthand", _flip(0x40000)),
        ("kvm_apic_ipi", "dest_id", "destination", _flip(1)),
        ("kvm_msi_set_irq", "data", "vector", _flip(1)),
        ("kvm_msi_set_irq", "address", "destination", _flip(0x1000)),
        ("kvm_ioapic_set_irq", "e", "vector", _flip(1)),
        ("kvm_ioapic_set_irq", "e", "masked", _flip(0x10000)),
        ("kvm_ioapic_set_irq", "e", "destination", _flip(1 << 56)),
        ("kvm_ioapic_set_irq", "pin", "pin", _flip(1)),
        ("kvm_pic_set_irq", "pin", "pin", _flip(1)),
        ("kvm_set_irq", "gsi", "line", _flip(1)),
        ("kvm_userspace_exit", "reason", "reason", _other(6, 2)),
        ("kvm_userspace_exit", "reason", "fail entry", _set(9)),
        ("kvm_userspace_exit", "reason", "intr", _set(10)),
        ("kvm_userspace_exit", "errno", "errno", _other(-4, 0)),
        ("kvm_userspace_exit", "errno", "-EFAULT", _set(-14)),
        ("kvm_fpu", "load", "direction", _flip(1)),
        ("kvm_vcpu_wakeup", "waited", "waited", _flip(1)),
        ("kvm_vcpu_wakeup", "valid", "valid", _flip(1)),
        ("sys_exit_ioctl", "ret", "return", _other(-4, 0)),
        ("sys_enter_ioctl", "cmd", "cmd", _other(0xAE80, 0xAE41)),
        ("kvm_vcpu_ioctl", "cmd", "cmd", _other(0xAE80, 0xAE9A)),
        ("kvm_vcpu_ioctl_return", "ret", "return", _other(-4, 0)),
        # nested guests
        ("kvm_nested_vmexit", "guest_rip", "rip+7", _plus(7)),
        ("kvm_nested_vmexit", "exit_reason", "reason", _other(10, 12)),
        ("kvm_nested_vmexit", "info1", "bit0", _flip(1)),
        ("kvm_nested_vmexit_inject", "exit_code", "other code", _flip(1)),
        ("kvm_nested_vmexit_inject", "exit_info1", "bit0", _flip(1)),
        ("kvm_nested_vmexit_inject", "exit_int_info", "valid", _flip(0x80000000)),
        ("kvm_nested_vmenter", "rip", "rip-3", _plus(-3)),
        ("kvm_nested_vmenter", "nested_rip", "rip+1", _plus(1)),
        ("kvm_nested_intercepts", "intercept1", "CPUID", _flip(1 << 18)),
        ("kvm_nested_intercepts", "intercept2", "VMMCALL", _flip(2)),
        # arm64, whose events call things differently
        ("kvm_exit", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_exit", "vcpu_pc", "pc+page", _plus(0x1000)),
        ("kvm_exit", "esr_ec", "class", _other(0x16, 0x01)),  # HVC64 or WFx
        ("kvm_exit", "esr_ec", "fault class", _other(0x24, 0x20)),
        ("kvm_exit", "ret", "kind", _other(2, 0)),
        ("kvm_entry", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_entry", "vcpu_pc", "pc-4", _plus(-4)),
        ("kvm_entry", "vcpu_pc", "pc+page", _plus(0x1000)),
        ("kvm_guest_fault", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_guest_fault", "hsr", "class", _flip(4 << 26)),
        ("kvm_guest_fault", "hsr", "described", _flip(1 << 24)),
        ("kvm_guest_fault", "hsr", "direction", _flip(1 << 6)),
        ("kvm_guest_fault", "hsr", "size", _flip(1 << 22)),
        ("kvm_guest_fault", "hsr", "access flag", lambda value: value & ~0x3C | 8),
        ("kvm_guest_fault", "hxfar", "offset", _flip(8)),
        ("kvm_guest_fault", "ipa", "page", _flip(0x1000)),
        ("kvm_handle_sys_reg", "hsr", "class", _flip(1 << 26)),
        ("kvm_handle_sys_reg", "hsr", "direction", _flip(1)),
        ("kvm_handle_sys_reg", "hsr", "register", _flip(1 << 17)),
        ("kvm_sys_access", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_sys_access", "is_write", "direction", _flip(1)),
        ("kvm_sys_access", "CRm", "register", _flip(1)),
        ("kvm_wfx_arm64", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_wfx_arm64", "is_wfe", "WFE", _flip(1)),
        ("kvm_hvc_arm64", "vcpu_pc", "pc+4", _plus(4)),
        ("kvm_hvc_arm64", "r0", "function", _flip(1)),
        ("kvm_hvc_arm64", "imm", "immediate", _flip(1)),
        # where and in what context the event was recorded
        ("kvm_entry", "irq_flags", "irqs on", _flip(1)),
        ("kvm_exit", "cpu", "other CPU", _flip(1)),
    )
)

# SVM numbers for the two alterations whose VMX numbers mean something else there
SVM_REASONS: dict[str, Change] = {"reason": _other(0x72, 0x78), "interrupt": _other(0x60, 0x64)}

# follow-up events that are put behind VM-exits which cannot cause them
INSERTED: dict[str, dict[str, int]] = {
    "kvm_pio": {"rw": 1, "port": 0x80, "size": 1, "count": 1},
    "kvm_mmio": {"type": 2, "len": 4, "gpa": 0xFEE00000},
    "kvm_msr": {"write": 1, "ecx": 0x10, "exception": 0},
    "kvm_cr": {"rw": 1, "cr": 0},
    "kvm_cpuid": {"function": 0},
    "kvm_hypercall": {"nr": 1},
    "kvm_page_fault": {"fault_address": 0x1000},
    "kvm_emulate_insn": {"len": 2, "failed": 0},
    "kvm_fast_mmio": {"gpa": 0xFEE00000},
    "kvm_pml_full": {},
    "kvm_inj_virq": {"vector": 0xF0, "soft": 0, "reinjected": 0},
    "kvm_eoi": {"vector": 0xF1},
    "kvm_guest_fault": {"hsr": 0x92000007, "ipa": 0x1000},
    "kvm_access_fault": {"ipa": 0x1000},
    "kvm_handle_sys_reg": {"hsr": 0x62300001},
    "kvm_sys_access": {"is_write": 0},
    "kvm_wfx_arm64": {"is_wfe": 0},
    "kvm_hvc_arm64": {"imm": 0},
    "kvm_userspace_exit": {"reason": 5, "errno": 0},
    "kvm_fpu": {},
    "sched_switch": {},
}


def change_of(alteration: Alteration, isa: int) -> Change:
    """Return the change that an alteration makes on this ISA."""
    if alteration.field == "exit_reason" and isa != VMX.number:
        return SVM_REASONS[alteration.name]
    return alteration.change
