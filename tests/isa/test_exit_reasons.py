"""The exit-reason tables: counts, spot values, uniqueness, and this kernel's own list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.isa.registry import BY_NAME, ISAS, describe_exit_reason, find_exit_reason, isa_name
from kvmtrace.isa.svm import SVM
from kvmtrace.isa.vmx import VMX

if TYPE_CHECKING:
    from kvmtrace.isa.base import Isa

TABLES = {isa.name: isa.names for isa in ISAS}
FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_exit/format")


def test_counts() -> None:
    assert len(VMX.names) == 65
    assert len(SVM.names) == 110


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
    assert VMX.describe(code) == name


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
    assert SVM.describe(code) == name


def test_unknown_codes_keep_their_number() -> None:
    assert VMX.describe(0x4C) == "UNKNOWN(0x4c)"
    assert SVM.describe(0x8C) == "UNKNOWN(0x8c)"
    assert describe_exit_reason(3, 10) == "UNKNOWN(0xa)"


def test_flags_above_the_basic_exit_reason() -> None:
    assert VMX.describe(0x80000021) == "INVALID_STATE FAILED_VMENTRY"
    assert VMX.describe(1 << 26 | 30) == "IO_INSTRUCTION 0x4000000"
    assert VMX.describe(0x88000021) == "INVALID_STATE FAILED_VMENTRY 0x8000000"
    assert VMX.code(0x80000021) == 33
    assert VMX.entry_failed(0x80000021)
    assert not VMX.entry_failed(33)
    assert VMX.bus_locked(1 << 26 | 30)
    # SVM has no flags: the whole word is the exit code
    assert SVM.code(0x80000001) == 0x80000001
    assert not SVM.entry_failed(0x80000001)
    assert SVM.entry_failed(0xFFFFFFFF)
    assert not SVM.bus_locked(1 << 26)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_names_lead_back_to_their_numbers(isa: Isa) -> None:
    for code, name in isa.names.items():
        assert find_exit_reason(name) == (isa, code)
    assert BY_NAME[isa.name] is isa
    assert isa_name(isa.number) == isa.name


def test_flags_and_further_spellings() -> None:
    assert find_exit_reason("INVALID_STATE FAILED_VMENTRY") == (VMX, 0x80000021)
    assert find_exit_reason("EXTERNAL_INTERRUPT 0x4000000") == (VMX, 0x4000001)
    assert find_exit_reason("INVALID_STATE FAILED_VMENTRY 0x8000000") == (VMX, 0x88000021)
    assert find_exit_reason("PENDING_INTERRUPT") == (VMX, 7)
    assert find_exit_reason("EXIT_EXCP_UD") == (SVM, 0x46)
    assert find_exit_reason("EXIT_INTR") == (SVM, 0x60)
    assert find_exit_reason("EXIT_IOIO") == (SVM, 0x7B)
    assert find_exit_reason("EXIT_NPF") == (SVM, 0x400)
    assert find_exit_reason("nonsense") is None
    assert isa_name(9) is None


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
