"""Exit qualifications, checked against values of real traces and the manuals' tables."""

from __future__ import annotations

import pytest

from kvmtrace.isa.qualification import (
    CrAccess,
    DrAccess,
    IoAccess,
    decode_apic_access,
    decode_svm_cr_exit,
    decode_svm_dr_exit,
    decode_svm_io,
    decode_vmx_cr,
    decode_vmx_dr,
    decode_vmx_io,
    describe_bits,
    describe_ept_violation,
    describe_io,
    describe_page_fault_error,
)


@pytest.mark.parametrize(
    ("qualification", "access"),
    [
        (0x03F80000, IoAccess(0x3F8, 1, write=True, string=False, rep=False)),
        (0x03FD0048, IoAccess(0x3FD, 1, write=False, string=False, rep=False)),
        (0x0CFC0003, IoAccess(0xCFC, 4, write=True, string=False, rep=False)),
        (0x01F00039, IoAccess(0x1F0, 2, write=False, string=True, rep=True)),
    ],
)
def test_vmx_io(qualification: int, access: IoAccess) -> None:
    assert decode_vmx_io(qualification) == access


@pytest.mark.parametrize(
    ("exitinfo1", "access"),
    [
        (0x03F80210, IoAccess(0x3F8, 1, write=True, string=False, rep=False)),
        (0x03FD0211, IoAccess(0x3FD, 1, write=False, string=False, rep=False)),
        (0x0CFC0040, IoAccess(0xCFC, 4, write=True, string=False, rep=False)),
        (0x01F0002D, IoAccess(0x1F0, 2, write=False, string=True, rep=True)),
    ],
)
def test_svm_io(exitinfo1: int, access: IoAccess) -> None:
    assert decode_svm_io(exitinfo1) == access


def test_io_in_words() -> None:
    assert describe_io(decode_vmx_io(0x01F00039)) == "REP INS 0x1f0 size 2"
    assert describe_io(decode_svm_io(0x03F80210)) == "OUT 0x3f8 size 1"


def test_control_and_debug_registers() -> None:
    assert decode_vmx_cr(0x300) == CrAccess(0, "write", 3)
    assert decode_vmx_cr(0x014) == CrAccess(4, "read", 0)
    assert decode_vmx_cr(0x00020) == CrAccess(0, "clts", 0)
    assert decode_vmx_cr(0x00090030) == CrAccess(0, "lmsw", 0, lmsw_source=9)
    assert decode_vmx_dr(0x017) == DrAccess(7, write=False, gpr=0)
    assert decode_vmx_dr(0x107) == DrAccess(7, write=True, gpr=1)
    assert decode_svm_cr_exit(0x014) == (4, True)
    assert decode_svm_cr_exit(0x003) == (3, False)
    assert decode_svm_cr_exit(0x072) is None
    assert decode_svm_dr_exit(0x037) == (7, True)
    assert decode_svm_dr_exit(0x026) == (6, False)
    assert decode_svm_dr_exit(0x010) is None


def test_faults_in_words() -> None:
    assert describe_ept_violation(0x182) == "write|gva-valid|translated-gva"
    assert describe_page_fault_error(0x100000006) == "write|user|guest-final"
    assert describe_page_fault_error(0xD) == "present|user|reserved"
    assert describe_page_fault_error(0) == "none"
    assert describe_bits(1 << 50 | 1, {0: "present"}) == f"present|{1 << 50:#x}"


def test_apic_access() -> None:
    assert decode_apic_access(0x10B0) == (0xB0, "linear write")
    assert decode_apic_access(0x0030) == (0x30, "linear read")
    assert decode_apic_access(0x7030) == (0x30, "UNKNOWN(0x7)")
