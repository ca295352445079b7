"""The exit tables: complete, consistent with the vocabulary, and true to spot rows of the kernel."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from kvmtrace.isa.base import EXIT_KINDS, ExitRow, Isa, RipClass
from kvmtrace.isa.registry import ISAS
from kvmtrace.isa.shared import (
    ANY_EXIT_EVENTS,
    ANY_EXIT_USERSPACE,
    EMULATOR_EVENTS,
)
from kvmtrace.isa.svm import SVM
from kvmtrace.isa.svm_words import SVM_EXIT_ERR
from kvmtrace.isa.vmx import VMX
from kvmtrace.kvm.nested_events import LEVEL_EVENTS
from kvmtrace.kvm.userspace_exits import USERSPACE_EXIT_REASONS
from kvmtrace.model.nesting import LEVEL_SETTERS
from kvmtrace.model.predicates import CHECKS, PREDICATES
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS

ROWS = [pytest.param(row, id=f"{isa.name}-{row.code:#x}") for isa in ISAS for row in isa.rows]
# TDCALL belongs to TDX guests, whose registers and handlers are elsewhere
VMX_WITHOUT_ROW = {77}
# numbers of the manual that the kernel has no name for: GETSEC, RSM, RDTSC* ... never enabled; RDPRU
VMX_UNNAMED = {11, 17}
SVM_UNNAMED = {0x8E}


def test_every_named_reason_has_a_row() -> None:
    assert set(VMX.names) - set(VMX.exits) == VMX_WITHOUT_ROW
    assert set(VMX.exits) - set(VMX.names) == VMX_UNNAMED
    ghcb = {code for code in SVM.names if 0x80000000 <= code < SVM_EXIT_ERR}
    assert set(SVM.names) - set(SVM.exits) == ghcb
    assert set(SVM.exits) - set(SVM.names) == SVM_UNNAMED


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_an_isa_is_consistent(isa: Isa) -> None:
    assert len(isa.exits) == len(isa.rows)  # no number twice
    assert len(set(isa.names.values())) == len(isa.names)
    assert not set(isa.other_names) & set(isa.exits)
    assert isa.number < 256
    assert not any(code & ~isa.code_mask for code in isa.exits)
    for kind in ("halt", "external_interrupt", "second_level_fault"):
        assert len(isa.codes(kind)) == 1, kind
    for kind in ("cpuid", "port_io", "triple_fault", "interrupt_window", "task_switch"):
        assert len(isa.codes(kind)) == (1 if isa.decode_io else 0), kind
    assert isa.codes("host") <= isa.codes("asynchronous", "interrupts_delivery")


def test_every_kind_of_exit_has_one() -> None:
    for kind in EXIT_KINDS:
        assert any(isa.codes(kind) for isa in ISAS), kind


@pytest.mark.parametrize("row", ROWS)
def test_rows_use_known_words(row: ExitRow) -> None:
    assert row.userspace <= set(USERSPACE_EXIT_REASONS)
    assert set(row.kinds) <= set(EXIT_KINDS)
    assert set(row.checks) <= set(CHECKS)
    assert {name for must in row.must for name in must.unless} <= set(PREDICATES)
    assert {name for name, _ in row.rip_when} <= set(PREDICATES)
    events = row.may | {event for must in row.must for event in must.events}
    assert events <= set(FOLLOW_UPS) | ANY_EXIT_EVENTS


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_consistent(row: ExitRow) -> None:
    assert row.source
    assert "(" in row.handler
    assert row.handler.endswith(")")
    assert (row.rip is RipClass.NEVER) == (not row.in_kernel)
    assert row.in_kernel or row.userspace
    advances = row.rip in {RipClass.ADVANCE, RipClass.PENDING} or any(
        rip is RipClass.ADVANCE for _, rip in row.rip_when
    )
    assert 1 <= row.length <= 15 if row.rip is RipClass.ADVANCE else row.length == 0 or advances
    assert not row.longest or row.length <= row.longest <= 15
    for must in row.must:
        least, most = must.count
        assert least >= 1
        assert most is None or least <= most


def test_what_may_follow_any_exit() -> None:
    assert {7, 8, 10, 12, 24, 26, 27, 31} == ANY_EXIT_USERSPACE
    assert {33} == VMX.bus_lock_userspace
    assert set(BYSTANDERS) <= ANY_EXIT_EVENTS
    assert not ANY_EXIT_EVENTS & set(FOLLOW_UPS)
    assert set(FOLLOW_UPS) >= EMULATOR_EVENTS


def test_vectoring_exempt_reasons() -> None:
    names = {VMX.names[code] for code in VMX.codes("interrupts_delivery")}
    assert names == {"EXCEPTION_NMI", "TASK_SWITCH", "APIC_ACCESS", "EPT_VIOLATION", "PML_FULL", "NOTIFY"}


def test_kinds() -> None:
    """Sets that were lists of numbers once."""
    assert VMX.codes("forced") == {0, 1, 2, 3, 4, 7, 8, 37, 41, 43, 52}
    assert SVM.codes("forced") == {0x60, 0x61, 0x62, 0x63, 0x64, 0x7F}
    assert VMX.codes("asynchronous") == {1, 7, 8, 43, 52, 62}
    assert SVM.codes("asynchronous") == {0x60, 0x61, 0x62, 0x63, 0x64}
    assert VMX.codes("host") == {1, 7, 8, 52, 75}
    assert SVM.codes("host") == {0x60, 0x61, 0x62, 0x64}
    assert (VMX.codes("memory_fault"), SVM.codes("memory_fault")) == ({0, 48, 49}, {0x4E, 0x400})
    assert (VMX.codes("nested_entry"), SVM.codes("nested_entry")) == ({20, 24}, {0x80})
    assert (VMX.codes("hardware_eoi"), SVM.codes("hardware_eoi")) == ({45}, {0x402})
    assert VMX.codes("fast_path") == {32, 52}
    assert {code: row.longest for code, row in SVM.exits.items() if row.longest} == {
        0x6F: 2, 0x72: 2, 0x76: 2, 0x77: 2, 0x78: 1, 0x7B: 3, 0x7C: 2, 0x80: 3, 0x81: 3, 0x89: 3, 0x8A: 3, 0x8B: 3,
        0x8D: 3,
    }  # fmt: skip
    assert {code: row.longest for code, row in VMX.exits.items() if row.longest} == {
        10: 2, 12: 1, 13: 2, 15: 2, 18: 3, 20: 3, 24: 3, 28: 4, 29: 4, 30: 3, 31: 2, 32: 2, 36: 3, 39: 3, 40: 2, 54: 3,
        55: 3,
    }  # fmt: skip


def test_spot_rows_vmx() -> None:
    assert VMX.exits[10].rip is RipClass.ADVANCE
    assert VMX.exits[10].length == 2
    assert VMX.exits[10].must[0].events == ("kvm_cpuid",)
    assert VMX.exits[1].rip is RipClass.SAME
    assert not VMX.exits[1].may
    assert VMX.exits[2].userspace == {8}
    assert not VMX.exits[2].in_kernel
    assert {33, 34, 41} == {code for code, row in VMX.exits.items() if 9 in row.userspace}
    # section 2: EPT_MISCONFIG never traces kvm_page_fault, EPT_VIOLATION always does, exactly once
    assert "kvm_page_fault" not in VMX.exits[49].may
    assert VMX.exits[48].must[0].count == (1, 1)
    assert VMX.exits[62].must[0].events == ("kvm_pml_full",)
    assert 5 in VMX.exits[12].userspace


def test_spot_rows_svm() -> None:
    assert SVM.exits[0x72].length == 2
    assert "kvm_emulate_insn" in SVM.exits[0x72].may  # skipped by the emulator without NRIPS
    assert "io_next_rip" in SVM.exits[0x7B].checks
    assert SVM.exits[0x400].must[0].events == ("kvm_page_fault",)
    assert SVM.exits[0x7F].userspace == {8}
    assert SVM.exits[SVM_EXIT_ERR].userspace == {9}
    assert 11 in SVM.exits[0x18].userspace
    assert 11 not in SVM.exits[0x10].userspace
    assert SVM.exits[0x6E].userspace == {17}  # rdtsc: no handler


def test_no_exit_row_repeats_what_follows_any_exit() -> None:
    for table in (VMX.exits, SVM.exits):
        own = {reason for row in table.values() for reason in row.userspace}
        assert own & ANY_EXIT_USERSPACE <= {8, 24, 27}  # TRIPLE_FAULT, SEV termination, Hyper-V hypercalls


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.nesting is not None], ids=lambda isa: isa.name)
def test_every_table_of_nested_guests_cites_functions_and_versions(isa: Isa) -> None:
    assert isa.nesting is not None
    tables = {one.name for one in fields(isa.nesting) if not one.name.startswith("source")}
    told = {name for name in tables if getattr(isa.nesting, name)}
    assert isa.nesting.sources.keys() >= told
    assert isa.nesting.sources.keys() <= tables
    for name, source in isa.nesting.sources.items():
        assert re.search(r"\w+.* \(\w+(/\w+)?\.[ch]\)|\.h", source), name
        assert "6.12" in source, name


def test_every_event_that_tells_a_level_cites_its_function() -> None:
    for row in LEVEL_EVENTS:
        assert re.search(r"\w+ \((svm|vmx)/nested\.c\)", row.source), row.event
    assert all(source.endswith(".c)") for source in LEVEL_SETTERS.values())
