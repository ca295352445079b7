"""The exit-reason tables: counts, spot values, uniqueness, and this kernel's own list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.isa.exit_reasons import (
    ISA_SVM,
    ISA_VMX,
    SVM_EXIT_REASONS,
    VMX_EXIT_REASONS,
    basic_exit_reason,
    describe_exit_reason,
    failed_vmentry,
)

TABLES = {"vmx": VMX_EXIT_REASONS, "svm": SVM_EXIT_REASONS}
FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_exit/format")


def test_counts() -> None:
    assert len(VMX_EXIT_REASONS) == 65
    assert len(SVM_EXIT_REASONS) == 110


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_names_and_numbers_are_unique_and_sorted(table: dict[int, str]) -> None:
    assert len(set(table.values())) == len(table)
    assert list(table) == sorted(table)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "EXCEPTION_NMI"),
        (1, "EXTERNAL_INTERRUPT"),
        (7, "INTERRUPT_WINDOW"),
        (10, "CPUID"),
        (12, "HLT"),
        (18, "VMCALL"),
        (28, "CR_ACCESS"),
        (30, "IO_INSTRUCTION"),
        (31, "MSR_READ"),
        (32, "MSR_WRITE"),
        (44, "APIC_ACCESS"),
        (48, "EPT_VIOLATION"),
        (49, "EPT_MISCONFIG"),
        (52, "PREEMPTION_TIMER"),
        (62, "PML_FULL"),
        (74, "BUS_LOCK"),
        (75, "NOTIFY"),
        (85, "MSR_WRITE_IMM"),
    ],
)
def test_vmx_spot_values(code: int, name: str) -> None:
    assert describe_exit_reason(ISA_VMX, code) == name


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x000, "read_cr0"),
        (0x018, "write_cr8"),
        (0x046, "UD excp"),
        (0x060, "interrupt"),
        (0x064, "vintr"),
        (0x06D, "write_rt"),
        (0x072, "cpuid"),
        (0x078, "hlt"),
        (0x07B, "io"),
        (0x07C, "msr"),
        (0x07F, "shutdown"),
        (0x081, "hypercall"),
        (0x08D, "xsetbv"),
        (0x0A6, "idle-halt"),
        (0x400, "npf"),
        (0x403, "vmgexit"),
        (-1, "invalid_guest_state"),
        (0xFFFFFFFF, "invalid_guest_state"),
    ],
)
def test_svm_spot_values(code: int, name: str) -> None:
    assert describe_exit_reason(ISA_SVM, code) == name


def test_unknown_codes_keep_their_number() -> None:
    assert describe_exit_reason(ISA_VMX, 0x4C) == "UNKNOWN(0x4c)"
    assert describe_exit_reason(ISA_SVM, 0x8C) == "UNKNOWN(0x8c)"
    assert describe_exit_reason(3, 10) == "UNKNOWN(0xa)"


def test_flags_above_the_basic_exit_reason() -> None:
    assert describe_exit_reason(ISA_VMX, 0x80000021) == "INVALID_STATE FAILED_VMENTRY"
    assert describe_exit_reason(ISA_VMX, 1 << 26 | 30) == "IO_INSTRUCTION 0x4000000"
    assert describe_exit_reason(ISA_VMX, 0x88000021) == "INVALID_STATE FAILED_VMENTRY 0x8000000"
    assert basic_exit_reason(ISA_VMX, 0x80000021) == 33
    assert failed_vmentry(ISA_VMX, 0x80000021)
    assert not failed_vmentry(ISA_VMX, 33)
    # SVM has no flags: the whole word is the exit code
    assert basic_exit_reason(ISA_SVM, 0x80000001) == 0x80000001
    assert not failed_vmentry(ISA_SVM, 0x80000001)


def kernel_tables() -> dict[str, dict[int, str]]:
    """Return the symbolic lists of this kernel's kvm_exit format text."""
    text = FORMAT.read_text()
    vmx, svm = (part.split("),")[0] for part in text.split("__print_symbolic(")[1:3])
    row = re.compile(r'\{ ([-0-9a-fx+ ]+), "([^"]+)" \}')
    return {
        name: {sum(int(term, 0) for term in number.split("+")) & 0xFFFFFFFF: word for number, word in row.findall(text)}
        for name, text in (("vmx", vmx), ("svm", svm))
    }


@pytest.mark.skipif(not FORMAT.exists(), reason="KVM tracepoints are not visible here")
@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_agrees_with_this_kernels_format_text(isa: str) -> None:
    kernel = kernel_tables()[isa]
    assert len(kernel) > 60
    assert {code: TABLES[isa].get(code) for code in kernel} == kernel
