"""The exit tables: complete, consistent with the vocabulary, and true to spot rows of the kernel."""

from __future__ import annotations

import pytest

from kvmtrace.isa.base import ExitExpectation, RipClass
from kvmtrace.isa.exit_reasons import SVM_EXIT_ERR, SVM_EXIT_REASONS, VMX_EXIT_REASONS
from kvmtrace.isa.shared import (
    ANY_EXIT_EVENTS,
    ANY_EXIT_USERSPACE,
    BUS_LOCK_USERSPACE,
    EMULATOR_EVENTS,
)
from kvmtrace.isa.svm import SVM_EXITS
from kvmtrace.isa.vmx import VMX_EXITS, VMX_VECTORING_EXEMPT
from kvmtrace.kvm.userspace_exits import USERSPACE_EXIT_REASONS
from kvmtrace.model.rules import CHECKS, PREDICATES
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS

ROWS = [
    pytest.param(row, id=f"{isa}-{row.code:#x}")
    for isa, table in (("vmx", VMX_EXITS), ("svm", SVM_EXITS))
    for row in table.values()
]
# TDCALL belongs to TDX guests, whose registers and handlers are elsewhere
VMX_WITHOUT_ROW = {77}
# numbers of the manual that the kernel has no name for: GETSEC, RSM, RDTSC* ... never enabled; RDPRU
VMX_UNNAMED = {11, 17}
SVM_UNNAMED = {0x8E}


def test_every_named_reason_has_a_row() -> None:
    assert set(VMX_EXIT_REASONS) - set(VMX_EXITS) == VMX_WITHOUT_ROW
    assert set(VMX_EXITS) - set(VMX_EXIT_REASONS) == VMX_UNNAMED
    ghcb = {code for code in SVM_EXIT_REASONS if 0x80000000 <= code < SVM_EXIT_ERR}
    assert set(SVM_EXIT_REASONS) - set(SVM_EXITS) == ghcb
    assert set(SVM_EXITS) - set(SVM_EXIT_REASONS) == SVM_UNNAMED


@pytest.mark.parametrize("row", ROWS)
def test_rows_use_known_words(row: ExitExpectation) -> None:
    assert row.userspace <= set(USERSPACE_EXIT_REASONS)
    assert set(row.checks) <= set(CHECKS)
    assert {name for must in row.must for name in must.unless} <= set(PREDICATES)
    assert {name for name, _ in row.rip_when} <= set(PREDICATES)
    events = row.may | {event for must in row.must for event in must.events}
    assert events <= set(FOLLOW_UPS) | ANY_EXIT_EVENTS


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_consistent(row: ExitExpectation) -> None:
    assert row.source
    assert "(" in row.handler
    assert row.handler.endswith(")")
    assert (row.rip is RipClass.NEVER) == (not row.in_kernel)
    assert row.in_kernel or row.userspace
    advances = row.rip is RipClass.ADVANCE or any(rip is RipClass.ADVANCE for _, rip in row.rip_when)
    assert 1 <= row.length <= 15 if row.rip is RipClass.ADVANCE else row.length == 0 or advances
    for must in row.must:
        least, most = must.count
        assert least >= 1
        assert most is None or least <= most


def test_what_may_follow_any_exit() -> None:
    assert {7, 8, 10, 12, 24, 26, 27, 31} == ANY_EXIT_USERSPACE
    assert {33} == BUS_LOCK_USERSPACE
    assert set(BYSTANDERS) <= ANY_EXIT_EVENTS
    assert not ANY_EXIT_EVENTS & set(FOLLOW_UPS)
    assert set(FOLLOW_UPS) >= EMULATOR_EVENTS


def test_vectoring_exempt_reasons() -> None:
    names = {VMX_EXIT_REASONS[code] for code in VMX_VECTORING_EXEMPT}
    assert names == {"EXCEPTION_NMI", "TASK_SWITCH", "APIC_ACCESS", "EPT_VIOLATION", "PML_FULL", "NOTIFY"}


def test_spot_rows_vmx() -> None:
    assert VMX_EXITS[10].rip is RipClass.ADVANCE
    assert VMX_EXITS[10].length == 2
    assert VMX_EXITS[10].must[0].events == ("kvm_cpuid",)
    assert VMX_EXITS[1].rip is RipClass.SAME
    assert not VMX_EXITS[1].may
    assert VMX_EXITS[2].userspace == {8}
    assert not VMX_EXITS[2].in_kernel
    assert {33, 34, 41} == {code for code, row in VMX_EXITS.items() if 9 in row.userspace}
    # section 2: EPT_MISCONFIG never traces kvm_page_fault, EPT_VIOLATION always does, exactly once
    assert "kvm_page_fault" not in VMX_EXITS[49].may
    assert VMX_EXITS[48].must[0].count == (1, 1)
    assert VMX_EXITS[62].must[0].events == ("kvm_pml_full",)
    assert 5 in VMX_EXITS[12].userspace


def test_spot_rows_svm() -> None:
    assert SVM_EXITS[0x72].length == 2
    assert "kvm_emulate_insn" in SVM_EXITS[0x72].may  # skipped by the emulator without NRIPS
    assert "io_next_rip" in SVM_EXITS[0x7B].checks
    assert SVM_EXITS[0x400].must[0].events == ("kvm_page_fault",)
    assert SVM_EXITS[0x7F].userspace == {8}
    assert SVM_EXITS[SVM_EXIT_ERR].userspace == {9}
    assert 11 in SVM_EXITS[0x18].userspace
    assert 11 not in SVM_EXITS[0x10].userspace
    assert SVM_EXITS[0x6E].userspace == {17}  # rdtsc: no handler


def test_no_exit_row_repeats_what_follows_any_exit() -> None:
    for table in (VMX_EXITS, SVM_EXITS):
        own = {reason for row in table.values() for reason in row.userspace}
        assert own & ANY_EXIT_USERSPACE <= {8, 24, 27}  # TRIPLE_FAULT, SEV termination, Hyper-V hypercalls
