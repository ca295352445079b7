"""MSRs, ports, APIC registers, hypercalls: spot values, uniqueness, unknowns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.kvm.apic import APIC_REGISTERS, DELIVERY_MODES, describe_apic_register, describe_delivery_mode
from kvmtrace.kvm.hypercalls import describe_hypercall
from kvmtrace.kvm.msrs import (
    AMD64_MSRS,
    ARCHITECTURAL_MSRS,
    HYPERV_MSRS,
    KVM_MSRS,
    MSR_RANGES,
    MSRS,
    describe_msr,
)
from kvmtrace.kvm.ports import PORT_RANGES, describe_port

APIC_FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_apic/format")


@pytest.mark.parametrize(
    ("msr", "name"),
    [
        (0x10, "IA32_TSC"),
        (0x1B, "IA32_APIC_BASE"),
        (0x8B, "IA32_UCODE_REV"),
        (0xC1, "IA32_PMC0"),
        (0x187, "IA32_PERFEVTSEL1"),
        (0x200, "IA32_MTRR_PHYSBASE0"),
        (0x201, "IA32_MTRR_PHYSMASK0"),
        (0x277, "IA32_PAT"),
        (0x403, "IA32_MC0_MISC"),
        (0x405, "IA32_MC1_STATUS"),
        (0x6E0, "IA32_TSC_DEADLINE"),
        (0x808, "X2APIC_TASKPRI"),
        (0x80B, "X2APIC_EOI"),
        (0x811, "X2APIC_ISR1"),
        (0x830, "X2APIC_ICR"),
        (0x838, "X2APIC_TMICT"),
        (0x83F, "X2APIC_SELF_IPI"),
        (0xC0000080, "EFER"),
        (0xC0000102, "KERNEL_GS_BASE"),
        (0xC0010117, "VM_HSAVE_PA"),
        (0xC0010201, "AMD_F15H_PERF_CTR0"),
        (0x4B564D00, "KVM_WALL_CLOCK_NEW"),
        (0x4B564D06, "KVM_ASYNC_PF_INT"),
        (0x40000070, "HV_X64_MSR_EOI"),
        (0x12345, "UNKNOWN(0x12345)"),
    ],
)
def test_msr_spot_values(msr: int, name: str) -> None:
    assert describe_msr(msr) == name


def test_msr_tables_do_not_overlap() -> None:
    tables = (ARCHITECTURAL_MSRS, AMD64_MSRS, KVM_MSRS, HYPERV_MSRS)
    assert sum(map(len, tables)) == len(MSRS)
    assert len(set(MSRS.values())) == len(MSRS)
    in_ranges = {msr for first, last, _, _ in MSR_RANGES for msr in range(first, last + 1)}
    assert not in_ranges & set(MSRS)
    assert len(in_ranges) == sum(last - first + 1 for first, last, _, _ in MSR_RANGES)


@pytest.mark.parametrize(
    ("port", "name"),
    [
        (0x20, "PIC master"),
        (0x40, "PIT"),
        (0x64, "keyboard command"),
        (0x71, "RTC, CMOS"),
        (0x80, "POST code, I/O delay"),
        (0x3F8, "COM1"),
        (0x3FD, "COM1"),
        (0x402, "firmware debug console"),
        (0x3F6, "IDE primary control"),
        (0x511, "fw_cfg"),
        (0xCF8, "PCI configuration address"),
        (0xCFC, "PCI configuration data"),
        (0xCF9, "reset control"),
        (0x1234, ""),
    ],
)
def test_port_spot_values(port: int, name: str) -> None:
    assert describe_port(port) == name


def test_every_port_range_is_reachable() -> None:
    for first, last, name in PORT_RANGES:
        assert 0 <= first <= last <= 0xFFFF
        assert name in {describe_port(port) for port in range(first, last + 1)}, name


def test_apic_registers() -> None:
    assert describe_apic_register(0xB0) == "APIC_EOI"
    assert describe_apic_register(0x130) == "APIC_ISR3"
    assert describe_apic_register(0x270) == "APIC_IRR7"
    assert describe_apic_register(0x40) == "APIC_UNKNOWN(0x40)"
    # kvm_apic_accept_irq.dm as recorded is the mode << 8
    assert describe_delivery_mode(0x100) == "LowPrio"
    assert describe_delivery_mode(0x500) == "INIT"
    assert len(DELIVERY_MODES) == 8


def test_hypercalls() -> None:
    assert describe_hypercall(10) == "KVM_HC_SEND_IPI"
    assert describe_hypercall(0x99) == "UNKNOWN(0x99)"


@pytest.mark.skipif(not APIC_FORMAT.exists(), reason="KVM's tracepoints are not visible here")
def test_apic_registers_agree_with_this_kernels_format_text() -> None:
    rows = re.findall(r'\{ (0x[0-9A-F]+), "APIC_" "(\w+)" \}', APIC_FORMAT.read_text())
    assert len(rows) > 25
    assert all(APIC_REGISTERS[int(number, 0)] == f"APIC_{name}" for number, name in rows)
